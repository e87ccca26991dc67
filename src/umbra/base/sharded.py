"""Tensors that an engine has spread over ranks: putting them together, and spreading them again.

FSDP2 keeps each parameter as a `DTensor`, DeepSpeed's ZeRO-3 as an empty tensor with a ``ds_id``. What is gathered is
the adapter; of the frozen base a few blocks to copy, or one part after another.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only


def whole_state(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """A module's state dict with every tensor whole; where any is sharded, all ranks must call it together."""
    with gathered(module.parameters()) as partitioned:
        state = gather(module.state_dict(prefix=prefix))
        return {name: value.clone() for name, value in state.items()} if partitioned else state


@contextmanager
def gathered(parameters: Iterable[Tensor], to_change: bool = False) -> Iterator[bool]:
    """A context in which what ZeRO-3 has partitioned of these parameters is whole; whether there is any.

    Changes are lost, unless they are to be made: then all ranks get those of rank 0.
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
    """A context in which a model that ZeRO-3 has partitioned can run, outside its engine: each part is whole while it runs."""
    running: dict[nn.Module, ExitStack] = {}

    def enter(module: nn.Module, args: tuple) -> None:
        running[module] = ExitStack()
        running[module].enter_context(gathered(module.parameters(recurse=False)))

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        running.pop(module).close()

    parts = [m for m in model.modules() if any(is_partitioned(p) for p in m.parameters(recurse=False))]
    handles = [m.register_forward_pre_hook(enter) for m in parts] + [m.register_forward_hook(leave) for m in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in list(running):  # in which it failed
            running.pop(module).close()


def is_whole(tensor: Tensor) -> bool:
    """Whether this process holds all of a tensor and may compute with it at any time."""
    return not is_partitioned(tensor) and not isinstance(tensor, DTensor)


def is_partitioned(tensor: Tensor) -> bool:
    """Whether ZeRO-3 has taken this tensor's content away, so that only `gathered` can read it."""
    return hasattr(tensor, "ds_id")


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather(tree: Any) -> Any:
    """The same structure with every sharded tensor whole; where there are any, all ranks must call it together."""
    return tree_map_only(DTensor, DTensor.full_tensor, tree)


def spread(whole: Tensor, like: Tensor) -> Tensor:
    """``whole``, which every rank holds, sharded as ``like`` is; itself where that is a plain tensor."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def spread_optimizer_state(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's whole ``state_dict`` with each tensor that has its parameter's shape sharded as the parameter is."""
    groups = zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
    parameters = {i: p for own, saved in groups for i, p in zip(saved["params"], own["params"], strict=True)}

    def of(p: Tensor, values: dict[str, Any]) -> dict[str, Any]:
        return {k: spread(v, p) if isinstance(v, Tensor) and v.shape == p.shape else v for k, v in values.items()}

    return {**state_dict, "state": {i: of(parameters[i], values) for i, values in state_dict["state"].items()}}


def is_first_rank() -> bool:
    """Whether this process is rank 0, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0
