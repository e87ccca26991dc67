"""The rows: each method as its users run it, without dropout, with about as many trainable parameters as PEFT's LoRA.

A row is a line of `METHODS`. Shadows are fitted by the width of their feed-forward.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from umbra.base import architectures
from umbra.config import ShadowConfig
from umbra.errors import ConfigError
from umbra.lab.bench.base import Base
from umbra.method import kernels
from umbra.method.kernels import Head, linear_loss
from umbra.method.losses import IGNORED, labelled_positions
from umbra.model.attach import attach

Batch = dict[str, Tensor]
BASE, LORA = "bare base", "PEFT LoRA"
REFERENCES = (LORA, BASE)  # what every other row is measured beside
NARROWEST = 16  # width of a fitted feed-forward
FIT = 0.05  # by which trainable parameters may differ from LoRA's


# -- losses --------------------------------------------------------------------------------------------------------


def naive_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean next-token cross-entropy of all logits (B, T, V) in fp32: what every method's task loss must be."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)


def total_loss(model: Any, batch: Batch) -> Tensor:
    """The loss that the model itself computes from labels; without a cache, as trainers of transformers run it."""
    return model(**batch, use_cache=False).loss


def label_only_loss(model: Any, batch: Batch) -> Tensor:
    """A PEFT model's loss from the hidden states where there is a label alone, as Umbra computes its own."""
    parts = architectures.locate(model.get_base_model())
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    positions, targets = labelled_positions(batch["labels"])
    states = parts.decoder(**inputs, use_cache=False).last_hidden_state
    return linear_loss(states.flatten(0, 1)[positions], Head(parts.head.weight, parts.head.bias), targets)[0] / len(
        targets
    )


def _task_of_umbra(model: Any, batch: Batch) -> Tensor:
    out, weight = model(**batch), model.shadow_config.auxiliary_loss_weight
    return out.loss - weight * out.shadow_loss if weight else out.loss


def _task_of_peft_shadow(model: Any, batch: Batch) -> Tensor:
    out = model(**batch)
    return out.loss - model.active_peft_config.auxiliary_loss_weight * out.shadow_loss


def _task_of_shadow_peft(model: Any, batch: Batch) -> Tensor:
    out = model(**batch)
    return out.loss - model.shadow_loss_weight * naive_loss(out.shadow_logits, batch["labels"])


# -- models --------------------------------------------------------------------------------------------------------


def _bare(base: Any, rank: int, width: int) -> Any:
    return base


def _lora(base: Any, rank: int, width: int, dora: bool = False) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", use_dora=dora, task_type="CAUSAL_LM")
    return get_peft_model(base, config)


def _quick(build: Callable[[Any, int, int], Any]) -> Callable[[Any, int, int], Any]:
    """A peer with Umbra's products of matrices, to tell what they bring from what the method brings."""

    def with_products(base: Any, rank: int, width: int) -> Any:
        model = build(base, rank, width)
        kernels.patch_linears(model.modules())
        return model

    return with_products


def _recomputing(model: Any) -> Any:
    """With activation checkpointing of every block."""
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return model


def _lean_lora(base: Any, rank: int, width: int) -> Any:
    return _recomputing(_quick(_lora)(base, rank, width))


def _dora(base: Any, rank: int, width: int) -> Any:
    return _lora(base, rank, width, dora=True)


def _peft_shadow(base: Any, rank: int, width: int) -> Any:
    import peft

    config = peft.ShadowConfig(shadow_intermediate_size=width, shadow_dropout=0.0, task_type="CAUSAL_LM")
    return peft.get_peft_model(base, config)


def _shadow_peft(base: Any, rank: int, width: int) -> Any:
    from shadow_peft import ShadowConfig as TheirConfig
    from shadow_peft import get_shadow_model
    from shadow_peft.task_models import ShadowForCausalLM

    inner = get_shadow_model(base, TheirConfig(shadow_intermediate_size=width, dropout=0.0))
    return ShadowForCausalLM(inner.to(base.dtype))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Method:
    """One row.

    Args:
        build: from (a copy of the base, LoRA's rank, the shadow's feed-forward width) to a model.
        package: what must be installed; None for none.
        loss: what a training step goes backward from.
        is_bare: whether nothing of it is trained.
        only: "training" or "inference", where it differs from another row in that alone; None where in both.
        task: the task's part of it, which at initialisation is the base's own loss; None where it is all of it.
        about: what it is, in one line.
    """

    name: str
    about: str
    build: Callable[[Any, int, int], Any]
    package: str | None = None
    is_fitted: bool = False
    is_umbra: bool = False
    is_bare: bool = False
    only: str | None = None
    loss: Callable[[Any, Batch], Tensor] = total_loss
    task: Callable[[Any, Batch], Tensor] | None = None

    def on(self, base: Any, rank: int, width: int) -> Any:
        """The model, on a copy of the base."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # a peer's use of transformers is not the user's to mend
            return self.build(base, rank, width)

    @property
    def is_installed(self) -> bool:
        return self.package is None or find_spec(self.package) is not None


def _config(width: int, **fields: Any) -> ShadowConfig:
    return ShadowConfig(**{"dialect": "paper", "shadow_intermediate_size": width, "dropout": 0.0, **fields})


def umbra(name: str, about: str, only: str | None = None, recomputes: bool = False, **fields: Any) -> Method:
    """A row of Umbra: fields of `ShadowConfig`, over the paper's with no dropout."""

    def build(base: Any, rank: int, width: int) -> Any:
        model = attach(base, _config(width, **fields))
        return _recomputing(model) if recomputes else model

    return Method(name, about, build, None, True, True, only=only, task=_task_of_umbra)


def _cast(base: Any, rank: int, width: int) -> Any:
    """As it would be served: nothing of it is trained any more."""
    model: Any = attach(base, _config(width))
    model.shadow.to(base.dtype)
    return model


def _plain(base: Any, rank: int, width: int) -> Any:
    """Umbra with core.py's own forms in place of the kernels."""
    model: Any = attach(base, _config(width))
    model.forward, model.generate = kernels.reference()(model.forward), kernels.reference()(model.generate)
    return model


METHODS = (
    Method(BASE, "frozen; in training its forward alone, all logits", _bare, is_bare=True),
    Method("bare base +", "the same with Umbra's products of matrices", _quick(_bare), is_bare=True),
    Method(LORA, "peft's LoRA on all linear layers, alpha twice the rank, unmerged", _lora, "peft"),
    Method(
        "PEFT LoRA +", "the same with Umbra's products, and its loss: logits only at labels", _quick(_lora), "peft",
        loss=label_only_loss,
    ),
    Method(
        "PEFT LoRA lean", "this with activation checkpointing", _lean_lora, "peft", only="training",
        loss=label_only_loss,
    ),
    Method("PEFT DoRA", "peft's LoRA with use_dora", _dora, "peft"),
    Method("PEFT Shadow", "peft's ShadowConfig at its defaults", _peft_shadow, "peft", True, task=_task_of_peft_shadow),
    Method(
        "shadow-peft", "the authors' package at its defaults", _shadow_peft, "shadow_peft", True, task=_task_of_shadow_peft
    ),
    Method("Umbra plain", "core.py as it reads, without the kernels", _plain, None, True, True, task=_task_of_umbra),
    umbra("Umbra", "as in the paper: every block but the first is coupled, α = 0.1"),
    umbra("Umbra default", "at its defaults, but rank 16: 64 alone is larger than LoRA's 8", dialect="umbra", rank=16),
    Method("Umbra cast", "its weights in the base's precision", _cast, None, True, True, only="inference", task=_task_of_umbra),
    umbra("Umbra λ=0", "no loss of the shadow's own", only="training", auxiliary_loss_weight=0.0),
    umbra("Umbra 4th", "the shadow's own loss on every 4th label", only="training", auxiliary_loss_every=4),
    umbra("Umbra upper half", "only the upper half of the blocks is coupled", first_layer=0.5),
    umbra("Umbra upper third", "only the upper third of them", first_layer=0.67),
    umbra(
        "Umbra lean", "upper half, every 4th label, activation checkpointing; α = 1", only="training", recomputes=True,
        first_layer=0.5, auxiliary_loss_every=4, alpha=1.0,
    ),
)  # fmt: skip


# -- choosing ------------------------------------------------------------------------------------------------------


def chosen(patterns: str, known: Sequence[str], what: str) -> list[str]:
    """The names that match one of the comma-separated shell patterns, in their own order, whatever their case.

    Raises:
        ConfigError: a pattern that matches none.
    """
    wanted = [p.strip().casefold() for p in patterns.split(",") if p.strip()]
    for pattern in wanted:
        if not any(fnmatchcase(name.casefold(), pattern) for name in known):
            raise ConfigError(f"{what}={pattern!r} matches none of: {', '.join(known)}.")
    if not wanted:
        raise ConfigError(f"{what} is empty: choose from {', '.join(known)}, or * for all.")
    return [name for name in known if any(fnmatchcase(name.casefold(), pattern) for pattern in wanted)]


# -- equal sizes ---------------------------------------------------------------------------------------------------


def trainable(model: torch.nn.Module) -> int:
    """Parameters that an optimizer would be given."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def lora_size(base: Base, rank: int) -> int:
    """Trainable parameters of LoRA on all linear layers but the head: rank · Σ (in + out)."""
    return rank * sum(m.in_features + m.out_features for m in base.linears)


def fit(base: Base, methods: Sequence[Method], rank: int) -> tuple[int, dict[str, int]]:
    """LoRA's rank, and the feed-forward width of each shadow at which it has as many trainable parameters as LoRA.

    Parameters grow linearly with the width, so two builds without weights tell all. Where a shadow's attention and
    couplings alone are larger than LoRA, its rank is doubled until they fit.
    """
    lines = {}
    with torch.device("meta"):
        for method in methods:
            if method.is_fitted:
                small, large = (trainable(method.on(base.skeleton(), rank, w)) for w in (NARROWEST, 2 * NARROWEST))
                lines[method.name] = small, (large - small) / NARROWEST
    while any(small > lora_size(base, rank) for small, _ in lines.values()):
        rank *= 2
    target = lora_size(base, rank)
    return rank, {name: NARROWEST + round((target - small) / slope) for name, (small, slope) in lines.items()}


def build(base: Base, methods: Sequence[Method], rank: int, widths: dict[str, int], seed: int) -> dict[str, Any]:
    """Every method's model, by name, on its own copy of the base.

    Raises:
        ConfigError: a shadow could not be fitted to LoRA's size within `FIT`.
    """
    models, target = {}, lora_size(base, rank)
    for method in methods:
        torch.manual_seed(seed)
        model = models[method.name] = method.on(base.copy(), rank, widths.get(method.name, 0)).to(base.device)
        count = trainable(model)
        if method.is_fitted and abs(count - target) > FIT * target:
            sizes = f"{method.name} has {count:,} trainable parameters, LoRA {target:,}"
            raise ConfigError(f"{sizes}: choose another lora_rank.")
    return models
