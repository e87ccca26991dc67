"""The shadow as a stock transformers model: nothing of Umbra is needed to load it.

    embeddings  E' = E · P_in / scale       head  W' = W_head · P_out

Both products are exact, since each projection is one bias-free linear map next to the table or the head.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from . import anatomy, dense, folder
from .errors import CheckpointError, DetachError
from .model import ShadowModel
from .options import check_dtype


@torch.no_grad()
def detach(model: ShadowModel) -> PreTrainedModel:
    """A stock model, with weights of its own, whose logits are those of the shadow path: head(s⁰).

    Raises:
        DetachError: the base caps or scales its logits in a way that the shadow's own class does not.
    """
    base, shadow = anatomy.locate(model.base), model.shadow
    mirrored = type(shadow.backbone) is type(base.decoder)
    if not mirrored and not base.is_classifier and anatomy.caps_logits(model.base.config):
        raise DetachError(
            f"The base ({base.config.model_type}) caps or scales its logits, which a detached "
            f"{shadow.backbone.config.model_type} cannot do. Use shadow='mirror'."
        )
    config = _stock_config(model)
    stock: Any
    dtype = shadow.dtype
    if mirrored:
        stock = type(model.base)._from_config(config, dtype=dtype)
    else:
        kind = AutoModelForSequenceClassification if base.is_classifier else AutoModelForCausalLM
        stock = kind.from_config(config, dtype=dtype)
    parts = anatomy.locate(stock)

    table = _embedding_table(model, parts.embeddings)
    head: Any = shadow.heads["shadow"] if shadow.heads else model.base_head
    weight = _folded_head(dense.linear_weight(head, model.base.dtype), shadow.projection)
    tied = weight.shape == table.shape and torch.equal(weight, table)
    _settle_tying(stock, parts, tied)
    own: Any = shadow.backbone.get_input_embeddings() if shadow.owns_embeddings else None
    copied_below = {k for k, p in shadow.backbone.named_parameters() if own is not None and p is own.weight}
    state = {k: v for k, v in shadow.backbone.state_dict().items() if k not in copied_below}
    missing = parts.decoder.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys, missing
    parts.embeddings.weight.copy_(table)
    parts.head.weight.copy_(weight)
    if getattr(head, "bias", None) is not None:
        parts.head.bias = nn.Parameter(head.bias.detach().to(dtype).clone())
    stock.tie_weights()
    if stock.can_generate():
        stock.generation_config = copy.deepcopy(model.base.generation_config)
    return stock.to(device=table.device).eval()


def _stock_config(model: ShadowModel) -> PretrainedConfig:
    config, base = copy.deepcopy(model.shadow.backbone.config), model.base.config
    config.architectures = None
    if anatomy.locate(model.base).is_classifier:
        for key in ("num_labels", "id2label", "label2id", "problem_type"):
            setattr(config, key, model.shadow.classifier.get(key, getattr(base, key)))
    config.vocab_size = anatomy.vocabulary_size(model.get_input_embeddings())
    text = base.get_text_config()
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, key, getattr(text, key))
    return config


def _embedding_table(model: ShadowModel, target: nn.Module) -> Tensor:
    """(V, Ds): what the stock model's table must hold so that looking a token up gives what the shadow reads."""
    shadow = model.shadow
    if shadow.owns_embeddings:
        own: Any = shadow.backbone.get_input_embeddings()
        return own.weight.detach()[: anatomy.vocabulary_size(model.get_input_embeddings())]
    source: Any = model.base.get_input_embeddings()
    table = anatomy.embedding_rows(source).to(shadow.dtype)
    if shadow.embed_projection is not None:
        table = table @ shadow.embed_projection.weight.T
    ratio = anatomy.embedding_scale(source) / anatomy.embedding_scale(target)
    return table if ratio == 1 else table * ratio


def _folded_head(weight: Tensor, projection: nn.Linear | None) -> Tensor:
    return weight if projection is None else weight.to(projection.weight.dtype) @ projection.weight


def _settle_tying(stock: PreTrainedModel, parts: anatomy.Anatomy, tied: bool) -> None:
    """Tie the head to the embeddings exactly where they are equal."""
    for config in {id(c): c for c in (stock.config, stock.config.get_text_config())}.values():
        config.tie_word_embeddings = tied
    stock.all_tied_weights_keys = stock.get_expanded_tied_weights_keys(all_submodels=True)
    if not tied and parts.head.weight is parts.embeddings.weight:
        parts.head.weight = nn.Parameter(parts.embeddings.weight.detach().clone())


def check_target(out: str | Path, overwrite: bool) -> Path:
    """``out``, if it may be written to.

    Raises:
        CheckpointError: it is a file, or a folder that is not empty and ``overwrite`` is False.
    """
    out = Path(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not overwrite):
        raise CheckpointError(f"{out} is not empty: choose another folder, or overwrite (--overwrite).")
    return out


def write_detached(
    model: ShadowModel, out: str | Path, tokenizer: PreTrainedTokenizerBase | None = None, *, overwrite: bool = False,
    dtype: torch.dtype | None = None,
) -> Path:  # fmt: skip
    """Write the detached shadow, its generation config and its tokenizer as a stock checkpoint.

    Raises:
        CheckpointError: ``out`` is not empty and ``overwrite`` is False, or the disk refused.
        DetachError: see `detach`.
    """
    out = check_target(out, overwrite)
    stock: Any = detach(model)
    if dtype is not None:
        stock = stock.to(dtype)

    def write(staging: Path) -> None:
        stock.save_pretrained(staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)

    folder.write_together(out, write)
    return out


def parse_dtype(name: str) -> torch.dtype | None:
    """A floating-point type by its name; None for auto.

    Raises:
        ConfigError: another name.
    """
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return types.get(check_dtype(name))
