"""Gather tensors that an engine has sharded over ranks, and shard them again.

FSDP2 stores each parameter as a `DTensor`, DeepSpeed's ZeRO-3 as an empty tensor with a ``ds_id``. The adapter is gathered;
of the frozen base a few blocks to copy, or one module after another.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from umbra.base.private_torch import map_tree


def whole_state(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Return a module's state dict with every tensor whole; where any is sharded, all ranks must call this together.

    Args:
        module: of any engine.
        prefix: of the names.
    """
    with gathered(module.parameters()) as partitioned:
        state = gather(module.state_dict(prefix=prefix))
        return {name: value.clone() for name, value in state.items()} if partitioned else state


@contextmanager
def gathered(parameters: Iterable[Tensor], to_change: bool = False) -> Iterator[bool]:
    """A context in which parameters that ZeRO-3 has partitioned are whole; it yields whether there are any.

    Args:
        parameters: of any engine.
        to_change: whether changes are saved: all ranks then receive those of rank 0.
    """
    partitioned = [p for p in parameters if is_partitioned(p)]
    if partitioned:
        import deepspeed

        with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if to_change else None):
            yield True
    else:
        yield False


@contextmanager
def gathered_while_computing(model: nn.Module) -> Iterator[None]:
    """A context in which a model that ZeRO-3 has partitioned can run outside its engine: each module is whole while it runs."""
    running: dict[nn.Module, ExitStack] = {}

    def enter(module: nn.Module, args: tuple) -> None:
        running[module] = ExitStack()
        running[module].enter_context(gathered(module.parameters(recurse=False)))

    def leave(module: nn.Module, args: tuple, output: object) -> None:
        running.pop(module).close()

    parts = [m for m in model.modules() if any(is_partitioned(p) for p in m.parameters(recurse=False))]
    handles = [m.register_forward_pre_hook(enter) for m in parts] + [m.register_forward_hook(leave) for m in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in list(running):  # those that raised
            running.pop(module).close()


def is_whole(tensor: Tensor) -> bool:
    """Return whether this process holds all of a tensor and can compute with it at any time."""
    return not is_partitioned(tensor) and not isinstance(tensor, DTensor)


def is_partitioned(tensor: Tensor) -> bool:
    """Return whether ZeRO-3 has freed this tensor's storage, so that it must be `gathered` to be read."""
    return hasattr(tensor, "ds_id")


def local(tensor: Tensor) -> Tensor:
    """Return the shard of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather(tree: Any) -> Any:
    """Return the same structure with every sharded tensor whole; where there are any, all ranks must call this together."""
    return map_tree(DTensor, DTensor.full_tensor, tree)


def spread(whole: Tensor, like: Tensor) -> Tensor:
    """Return ``whole``, which every rank holds, sharded as ``like`` is; unchanged where ``like`` is a plain tensor."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def spread_optimizer_state(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's whole ``state_dict`` with each tensor of its parameter's shape sharded as the parameter is."""
    groups = zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
    parameters = {i: p for group, saved in groups for i, p in zip(saved["params"], group["params"], strict=True)}

    def of(p: Tensor, values: dict[str, Any]) -> dict[str, Any]:
        return {k: spread(v, p) if isinstance(v, Tensor) and v.shape == p.shape else v for k, v in values.items()}

    return {**state_dict, "state": {i: of(parameters[i], values) for i, values in state_dict["state"].items()}}


def is_first_rank() -> bool:
    """Return whether this process is rank 0, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0
