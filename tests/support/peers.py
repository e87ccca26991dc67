"""Models of PEFT and shadow-peft on tiny bases, with randomised weights."""

import warnings

import peft
import shadow_peft
import torch
from shadow_peft.task_models import ShadowForCausalLM, ShadowForSequenceClassification
from torch import nn


def peft_model(base: nn.Module, classifier: bool = False, **fields) -> nn.Module:
    """Wrap a base in PEFT's Shadow tuner."""
    fields = {"task_type": "SEQ_CLS" if classifier else "CAUSAL_LM", **fields}
    return peft.get_peft_model(base, peft.ShadowConfig(**fields))


def load_peft(base: nn.Module, folder, classifier: bool = False) -> nn.Module:
    """Load an adapter folder with PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # missing and unexpected keys are only warned of
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        return peft.PeftModel.from_pretrained(base, str(folder)).eval()


def shadow_peft_model(base: nn.Module, classifier: bool = False, shadow=None, loss_weight=0.05, **fields) -> nn.Module:
    """Wrap a base in shadow-peft; ``shadow`` is an explicit shadow model."""
    kind = ShadowForSequenceClassification if classifier else ShadowForCausalLM
    adapter = shadow_peft.get_shadow_model(base, shadow_peft.ShadowConfig(**fields), shadow_model=shadow)
    return kind(adapter, shadow_loss_weight=loss_weight)


def load_shadow_peft(base: nn.Module, folder, classifier: bool = False, shadow=None) -> nn.Module:
    """Load an adapter folder with shadow-peft."""
    kind = ShadowForSequenceClassification if classifier else ShadowForCausalLM
    return kind.from_pretrained(base, str(folder), shadow_model=shadow).eval()


def scramble_trained(model: nn.Module, seed: int = 2) -> nn.Module:
    """Randomise the package's trainable weights and switch to eval mode; the base is unchanged."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                noise = torch.randn(p.shape, generator=generator) * 0.3
                p.copy_(1 + 0.1 * noise if "norm" in name and name.endswith("weight") else noise)
    return model.eval()


def shadow_logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return head(s⁰) as computed by the package."""
    if isinstance(model, peft.PeftModel):
        return model.base_model.unload_shadow()(ids).logits
    return model(input_ids=ids).shadow_logits
