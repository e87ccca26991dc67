"""Functions that run on each rank of a `Pair`, and in one process as the reference."""

import itertools
import os
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import umbra
from support.tiny import gradients, label_count, make, make_base, partly_labelled, tokens
from umbra.base.architectures import locate

ROWS, LENGTH = 6, 11


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share(rows: int = ROWS) -> dict[str, Any]:
    """Return this rank's part of one global batch: rank 0 has 1 row and the fewest labels."""
    ids = tokens(rows, LENGTH)
    labels = partly_labelled(ids)
    items = torch.tensor(label_count(labels))
    cut = slice(None) if world() == 1 else slice(0, 1) if dist.get_rank() == 0 else slice(1, None)
    return {"input_ids": ids[cut], "labels": labels[cut], "num_items_in_batch": items}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def summed(value: Tensor) -> Tensor:
    value = value.detach().clone().float()
    if world() > 1:
        dist.all_reduce(value)
    return value


# -- one step under an engine ------------------------------------------------------------------------------------------


def step(
    engine: str = "none", *, wrapped_by: str | None = None, before_attach: bool = False, inside: bool | None = None,
    resting: bool = False, **options: Any,
) -> Any:  # fmt: skip
    """Return the loss of the global batch and every gradient of a tiny model by name.

    Args:
        engine: none, ddp, blocks (fully_shard on every block, then on the model), root, bf16 (as blocks, in bfloat16).
        wrapped_by: checkpoint wrappers around the base's blocks, "reentrant" or "not_reentrant".
        before_attach: whether the wrappers are applied before the shadow is attached.
        inside: enable transformers' activation checkpointing, reentrant or not.
        resting: add a second, inactive adapter.
    """
    model = make(**options).train()
    if resting:
        model.add_adapter(model.shadow_config, "resting")
    if inside is not None:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": inside})
    if wrapped_by is not None and not before_attach:
        wrap_blocks(model.base, wrapped_by)
    if wrapped_by is not None and before_attach:
        trained, config = model.shadow.state_dict(), model.shadow_config
        base = model.unload()
        wrap_blocks(base, wrapped_by)
        model = umbra.attach(base, config).train()
        model.shadow.load_state_dict(trained)
    wrapped: Any = model
    if engine == "ddp" and world() > 1:
        wrapped = DistributedDataParallel(model)
    elif engine in ("blocks", "bf16"):
        policy = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
        kept = policy if engine == "bf16" else {}
        for block in locate(model.base).blocks:
            fully_shard(block, **kept)
        fully_shard(model, **kept)
    elif engine == "root":
        fully_shard(model)
    return backward(wrapped, model)


def backward(wrapped: Any, model: umbra.ShadowModel) -> tuple[Tensor, dict[str, Tensor]]:
    loss = wrapped(**share()).loss
    (loss * world()).backward()  # engines average over ranks
    found = {name.replace("_checkpoint_wrapped_module.", ""): whole(g) for name, g in gradients(model).items()}
    return summed(loss), found


def wrap_blocks(base: Any, kind: str) -> None:
    """Wrap every decoder block in torch's checkpoint wrapper."""
    impl = CheckpointImpl.REENTRANT if kind == "reentrant" else CheckpointImpl.NO_REENTRANT
    blocks = set(locate(base).blocks)
    apply_activation_checkpointing(
        base, checkpoint_wrapper_fn=lambda m: checkpoint_wrapper(m, impl), check_fn=lambda m: m in blocks
    )
    assert all(isinstance(block, CheckpointWrapper) for block in locate(base).blocks)


@contextmanager
def accelerators():
    """Let accelerate run FSDP and DeepSpeed on CPUs, which it allows on accelerators only."""
    from accelerate.state import DistributedType, PartialState

    os.environ.pop("ACCELERATE_USE_CPU", None)
    kept = PartialState._prepare_backend, PartialState.set_device
    PartialState._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    try:
        yield
    finally:
        PartialState._prepare_backend, PartialState.set_device = kept


def accelerated(plugin: dict[str, Any], mixed_precision: str = "no", bare: bool = False, **options: Any) -> Any:
    """Like `step`, sharded by accelerate's FSDP2; also return the number of sharded units."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    with accelerators():
        accelerator = Accelerator(
            fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2, **plugin), mixed_precision=mixed_precision
        )
        model: Any = make(**options).train()
        model = model.unload().requires_grad_() if bare else model
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model, optimizer = accelerator.prepare(model, optimizer)
        return *backward(model, model), sum(isinstance(m, FSDPModule) for m in model.modules())


def ram_efficient(adapter: str, empty: bool, **base_options: Any) -> Any:
    """Like `accelerated`, with an adapter loaded from disk; if ``empty``, rank 1 has a base without weights."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, init_empty_weights

    plugin = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "cpu_ram_efficient_loading": True}
    with accelerators():
        accelerator = Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2, **plugin))
        base = make_base(**base_options)
        if empty and dist.get_rank() == 1:
            with init_empty_weights():
                base = type(base)(base.config).eval()
        model: Any = umbra.load(adapter, base, trainable=True).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model, optimizer = accelerator.prepare(model, optimizer)
        return backward(model, model)


def saved_and_generated(folder: Path, engine: str, **options: Any) -> Tensor:
    """Save a model on every rank, sharded or not, and then continue a prompt."""
    model: Any = make(**options)
    if engine == "blocks":
        for block in locate(model.base).blocks:
            fully_shard(block)
        fully_shard(model)
        register_fsdp_forward_method(model, "generate")
    model.save_pretrained(folder)
    return model.generate(tokens(2, LENGTH), max_new_tokens=6, do_sample=False)


def zero_config(stage: int) -> dict[str, Any]:
    """Return DeepSpeed's settings; without persistent parameters, ZeRO-3 partitions even the smallest ones."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo instead of a kernel that it would compile
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }


# -- runs of a trainer -------------------------------------------------------------------------------------------------


def examples(count: int = 16) -> list[dict[str, Tensor]]:
    """Return rows with 1 to 9 labels, distributed unevenly over neighbours."""
    ids = tokens(count, LENGTH, seed=11)
    labels = torch.full_like(ids, -100)
    for row, labelled in zip(range(count), itertools.cycle([1, 9, 2, 8, 9]), strict=False):
        labels[row, -labelled:] = ids[row, -labelled:]
    return [{"input_ids": i, "labels": l} for i, l in zip(ids, labels, strict=True)]


def fit(
    folder: Path, *, kind: str = "umbra", rows: int = 8, accumulate: int = 1, resume: str | None = None,
    fsdp: dict | None = None, zero: int | None = None, arguments: dict | None = None, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Train a tiny model; ``rows`` is the global batch of a step, whatever the number of ranks.

    Returns:
        log (the trainer's history), weights (unsharded, after training), logits (of a forward).
    """
    with ExitStack() as stack:
        engine: dict[str, Any] = {"use_cpu": True}
        if fsdp is not None or zero is not None:
            stack.enter_context(accelerators())
        if fsdp is not None:
            engine |= {"fsdp": True, "fsdp_config": fsdp}
        if zero is not None:
            engine = {"deepspeed": zero_config(zero)}
        trainer = {"umbra": umbra.ShadowTrainer, "plain": Trainer}[kind](
            make(**options),
            TrainingArguments(
                str(folder),
                **{
                    "per_device_train_batch_size": rows // accumulate // world(), "gradient_accumulation_steps": accumulate,
                    "per_device_eval_batch_size": 4 // world(), "logging_steps": 1, "report_to": "none",
                    "disable_tqdm": True, "learning_rate": 1e-2, "save_steps": 2, **engine, **(arguments or {}),
                },
            ),
            train_dataset=examples(),  # type: ignore[arg-type]
            eval_dataset=examples(8),  # type: ignore[arg-type]
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        trainer.evaluate()
        trainer.save_model()
        model: Any = trainer.model
        stack.callback(unset_hf_deepspeed_config)
        with torch.no_grad():
            logits = model.eval()(tokens(2, LENGTH)).logits
        weights = {k: whole(v).clone() for k, v in model.shadow.state_dict().items()}
    return {"log": trainer.state.log_history, "weights": weights, "logits": whole(logits)}


def train_with_zero3(settings: dict[str, Any]) -> dict[str, Any]:
    """Run `umbra.training.train.train` with a base that transformers loads partitioned."""
    from umbra.training.train import train

    with accelerators():
        try:
            return train({**settings, "deepspeed": zero_config(3)})
        finally:
            unset_hf_deepspeed_config()
