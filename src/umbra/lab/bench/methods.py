"""The methods to measure, each as its users run it, without dropout, with about as many trainable parameters as PEFT's LoRA.

A method is a row of the tables and an entry of `METHODS`. Shadows are fitted by their feed-forward width.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.util import find_spec
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from umbra.base import architectures
from umbra.config import ShadowConfig
from umbra.errors import ConfigError
from umbra.lab.bench.base import Base
from umbra.method import kernels
from umbra.method.kernels import Head, linear_loss
from umbra.method.losses import IGNORED, labelled_positions
from umbra.model.attach import attach
from umbra.model.shadow_model import ShadowModel

Batch = dict[str, Tensor]
Build = Callable[
    [PreTrainedModel, int, int], nn.Module
]  # from a copy of the base, LoRA's rank and the shadow's feed-forward width
BASE, LORA = "bare base", "PEFT LoRA"
REFERENCES = (LORA, BASE)  # the methods that all others are compared with
NARROWEST = 16  # smallest fitted feed-forward width
FIT = 0.05  # tolerated relative difference to LoRA's trainable parameters


# -- losses --------------------------------------------------------------------------------------------------------


def naive_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean next-token cross-entropy of logits (B, T, V) in fp32, the expected task loss of every method."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)


def total_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss that a model computes from labels, without a cache, as in transformers' Trainer."""
    return model(**batch, use_cache=False).loss


def label_only_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of a PEFT model computed from the hidden states at labels only, as Umbra does."""
    parts = architectures.locate(cast(Any, model).get_base_model())
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    positions, targets = labelled_positions(batch["labels"])
    states = parts.decoder(**inputs, use_cache=False).last_hidden_state
    return linear_loss(states.flatten(0, 1)[positions], Head(parts.head.weight, parts.head.bias), targets)[0] / len(
        targets
    )


def _umbra_task_loss(model: nn.Module, batch: Batch) -> Tensor:
    out, weight = model(**batch), cast(ShadowModel, model).shadow_config.auxiliary_loss_weight
    return out.loss - weight * out.shadow_loss if weight else out.loss


def _peft_shadow_task_loss(model: nn.Module, batch: Batch) -> Tensor:
    out = model(**batch)
    return out.loss - cast(Any, model).active_peft_config.auxiliary_loss_weight * out.shadow_loss


def _shadow_peft_task_loss(model: nn.Module, batch: Batch) -> Tensor:
    out = model(**batch)
    return out.loss - cast(Any, model).shadow_loss_weight * naive_loss(out.shadow_logits, batch["labels"])


# -- models --------------------------------------------------------------------------------------------------------


def _bare(base: PreTrainedModel, rank: int, width: int) -> nn.Module:
    return base


def _lora(base: PreTrainedModel, rank: int, width: int, dora: bool = False) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", use_dora=dora, task_type="CAUSAL_LM")
    return get_peft_model(base, config)


def _with_fast_linears(build: Build) -> Build:
    """Return a peer's build with Umbra's matrix products, to separate their contribution from the method's."""

    def build_fast(base: PreTrainedModel, rank: int, width: int) -> nn.Module:
        model = build(base, rank, width)
        kernels.patch_linears(model.modules())
        return model

    return build_fast


def _checkpointed(model: nn.Module) -> nn.Module:
    """Enable activation checkpointing of every block."""
    cast(PreTrainedModel, model).activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": False}
    )
    return model


def _lean_lora(base: PreTrainedModel, rank: int, width: int) -> nn.Module:
    return _checkpointed(_with_fast_linears(_lora)(base, rank, width))


def _dora(base: PreTrainedModel, rank: int, width: int) -> nn.Module:
    return _lora(base, rank, width, dora=True)


def _peft_shadow(base: PreTrainedModel, rank: int, width: int) -> nn.Module:
    import peft

    config = peft.ShadowConfig(shadow_intermediate_size=width, shadow_dropout=0.0, task_type="CAUSAL_LM")
    return peft.get_peft_model(base, config)


def _shadow_peft(base: PreTrainedModel, rank: int, width: int) -> nn.Module:
    from shadow_peft import ShadowConfig as TheirConfig
    from shadow_peft import get_shadow_model
    from shadow_peft.task_models import ShadowForCausalLM

    inner = get_shadow_model(base, TheirConfig(shadow_intermediate_size=width, dropout=0.0))
    return ShadowForCausalLM(cast(Any, inner.to(base.dtype)))


@dataclass(frozen=True)
class Method:
    """One method, a row of the tables.

    Args:
        name: Its name in tables and options.
        about: A description in one line.
        build: Builds the model.
        package: The package that it needs; None for none.
        is_fitted: Whether its feed-forward width is fitted to LoRA's trainable parameters.
        is_umbra: Whether it is a variant of Umbra.
        is_bare: Whether nothing is trained.
        only: "training" or "inference" if it differs from another method in that alone; None for both.
        loss: The loss of a training step.
        task: The task's share of it, which equals the loss of the base at initialization; None for all of it.
    """

    name: str
    about: str
    build: Build
    package: str | None = None
    is_fitted: bool = False
    is_umbra: bool = False
    is_bare: bool = False
    only: str | None = None
    loss: Callable[[nn.Module, Batch], Tensor] = total_loss
    task: Callable[[nn.Module, Batch], Tensor] | None = None

    def on(self, base: PreTrainedModel, rank: int, width: int) -> nn.Module:
        """Return the model on a copy of the base, for LoRA's rank and the feed-forward width of a shadow."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # caused by the peers' use of transformers
            return self.build(base, rank, width)

    @property
    def is_installed(self) -> bool:
        """Whether its package is installed."""
        return self.package is None or find_spec(self.package) is not None


def _config(width: int, **fields: object) -> ShadowConfig:
    return ShadowConfig.from_dict({"dialect": "paper", "shadow_intermediate_size": width, "dropout": 0.0, **fields})


def umbra(name: str, about: str, only: str | None = None, checkpoints: bool = False, **fields: object) -> Method:
    """Return a variant of Umbra: the paper's dialect without dropout, with ``fields`` of `ShadowConfig` changed."""

    def build(base: PreTrainedModel, rank: int, width: int) -> nn.Module:
        model = attach(base, _config(width, **fields))
        return _checkpointed(model) if checkpoints else model

    return Method(name, about, build, None, True, True, only=only, task=_umbra_task_loss)


def _cast(base: PreTrainedModel, rank: int, width: int) -> nn.Module:
    """Cast the shadow to the dtype of the base, as for serving."""
    model = attach(base, _config(width))
    model.shadow.to(base.dtype)
    return model


def _plain(base: PreTrainedModel, rank: int, width: int) -> nn.Module:
    """Use the equations of core.py instead of the kernels."""
    model = cast(Any, attach(base, _config(width)))
    model.forward, model.generate = kernels.reference()(model.forward), kernels.reference()(model.generate)
    return model


METHODS = (
    Method(BASE, "frozen; for training, the forward alone with all logits", _bare, is_bare=True),
    Method("bare base +", "the bare base with Umbra's matrix products", _with_fast_linears(_bare), is_bare=True),
    Method(LORA, "peft's LoRA on all linear layers, alpha twice the rank, unmerged", _lora, "peft"),
    Method(
        "PEFT LoRA +", "LoRA with Umbra's matrix products and loss (logits only at labels)", _with_fast_linears(_lora), "peft",
        loss=label_only_loss,
    ),
    Method(
        "PEFT LoRA lean", "PEFT LoRA + with activation checkpointing", _lean_lora, "peft", only="training",
        loss=label_only_loss,
    ),
    Method("PEFT DoRA", "peft's LoRA with use_dora", _dora, "peft"),
    Method("PEFT Shadow", "peft's ShadowConfig at its defaults", _peft_shadow, "peft", True, task=_peft_shadow_task_loss),
    Method(
        "shadow-peft", "the authors' package at its defaults", _shadow_peft, "shadow_peft", True, task=_shadow_peft_task_loss
    ),
    Method("Umbra plain", "the equations of core.py without the kernels", _plain, None, True, True, task=_umbra_task_loss),
    umbra("Umbra", "as in the paper: injections before every block but the first, α = 0.1"),
    umbra("Umbra default", "default configuration with rank 16: rank 64 exceeds LoRA at rank 8", dialect="umbra", rank=16),
    Method(
        "Umbra cast", "the shadow in the precision of the base", _cast, None, True, True, only="inference",
        task=_umbra_task_loss,
    ),
    umbra("Umbra λ=0", "without the auxiliary shadow loss", only="training", auxiliary_loss_weight=0.0),
    umbra("Umbra 4th", "the auxiliary shadow loss on every 4th label", only="training", auxiliary_loss_every=4),
    umbra("Umbra upper half", "injections in the upper half of the blocks only", first_layer=0.5),
    umbra("Umbra upper third", "injections in the upper third of the blocks only", first_layer=0.67),
    umbra(
        "Umbra lean", "upper half, every 4th label, activation checkpointing; α = 1", only="training", checkpoints=True,
        first_layer=0.5, auxiliary_loss_every=4, alpha=1.0,
    ),
)  # fmt: skip


# -- choosing ------------------------------------------------------------------------------------------------------


def chosen(patterns: str, known: Sequence[str], what: str) -> list[str]:
    """Return the names that match comma-separated shell patterns, in the order of ``known``; case is ignored.

    Args:
        patterns: The patterns.
        known: All names.
        what: The name of the option, for error messages.

    Raises:
        ConfigError: no pattern, or one without a match.
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
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def lora_size(base: Base, rank: int) -> int:
    """Return the trainable parameters of LoRA on all linear layers but the head: rank · Σ (in + out)."""
    return rank * sum(m.in_features + m.out_features for m in base.linears)


def fit(base: Base, methods: Sequence[Method], rank: int) -> tuple[int, dict[str, int]]:
    """Return LoRA's rank, and the feed-forward width at which each shadow has as many trainable parameters as LoRA.

    The number of parameters is linear in the width, so two builds without weights determine it. The rank is doubled while the
    attention and the injections of a shadow alone exceed LoRA.
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


def build(base: Base, methods: Sequence[Method], rank: int, widths: dict[str, int], seed: int) -> dict[str, nn.Module]:
    """Return the model of every method by name, each on a separate copy of the base.

    Raises:
        ConfigError: a shadow's size differs from LoRA's by more than `FIT`.
    """
    models: dict[str, nn.Module] = {}
    target = lora_size(base, rank)
    for method in methods:
        torch.manual_seed(seed)
        model = models[method.name] = method.on(base.copy(), rank, widths.get(method.name, 0)).to(base.device)
        count = trainable(model)
        if method.is_fitted and abs(count - target) > FIT * target:
            sizes = f"{method.name} has {count:,} trainable parameters, LoRA {target:,}"
            raise ConfigError(f"{sizes}: choose another lora_rank.")
    return models
