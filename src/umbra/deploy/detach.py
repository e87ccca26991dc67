"""The shadow as a stock transformers model: nothing of Umbra is needed to load it.

What it answers to requests beyond it stands in its generation config, as ``escalation``.

    embeddings  E' = E · P_in / scale       head  W' = W_head · P_out · factor

Both products are exact, since each projection is one bias-free linear map next to the table or the head.
"""

import copy
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
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
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

from umbra.adapters.integrity import PROMPTING
from umbra.adapters.prompting import TOKENIZER_FILES, Prompting, override, save_tokenizer
from umbra.base import architectures, quantized
from umbra.data import ChatFormatter, end_tokens
from umbra.errors import CheckpointError, ConfigError, DetachError
from umbra.files import folder
from umbra.model.shadow_model import ShadowModel
from umbra.options import check_dtype
from umbra.shadow.network import ROUNDED, Shadow

PIECES = "tokenizer.model"
OF_STOCK = ("generation_config.json", *TOKENIZER_FILES)


@torch.no_grad()
def detach(model: ShadowModel) -> PreTrainedModel:
    """A stock model, with weights of its own, whose logits are those of the shadow path: head(s⁰).

    Raises:
        DetachError: the base caps its logits, or transforms its states before the head, which the shadow's own class
            cannot do.
    """
    base, shadow = architectures.locate(model.base), model.shadow
    if shadow.added_tokens is not None:
        shadow.added_tokens.write()
    config = _stock_config(model)
    mirrored = type(shadow.backbone) is type(base.decoder) and type(config) is type(base.model.config)
    cap = None if base.is_classifier else architectures.soft_cap(model.base.config)
    architectures.set_soft_cap(config, cap)
    if not base.is_classifier and architectures.soft_cap(config) != cap:
        raise DetachError(
            f"The base ({base.config.model_type}) caps its logits, which a detached "
            f"{shadow.backbone.config.model_type} cannot do. Use shadow='mirror' or shadow='dense'."
        )
    stock: Any
    dtype = shadow.dtype
    if mirrored:
        stock = type(model.base)._from_config(config, dtype=dtype)
    else:
        kind = AutoModelForSequenceClassification if base.is_classifier else AutoModelForCausalLM
        stock = kind.from_config(config, dtype=dtype)
    parts = architectures.locate(stock)

    table = _embedding_table(model, parts.embeddings)
    head: Any = shadow.heads["shadow"] if shadow.heads else model.base_head
    factor = 1.0
    if not base.is_classifier:
        factor = architectures.logit_factor(model.base.config) / architectures.logit_factor(stock.config)
    if table.is_meta or quantized.linear_weight(head, model.base.dtype).is_meta:
        raise DetachError(
            "The base's embeddings or its head are offloaded: load the base without offloading to detach."
        )
    weight = _folded_head(quantized.linear_weight(head, model.base.dtype), _maps_before_head(model, stock), factor)
    tied = (
        _stays_tied(base, shadow) and weight.shape == table.shape and torch.allclose(weight.to(table), table, *ROUNDED)
    )
    table = weight if tied else table
    _settle_tying(stock, parts, tied)
    own: Any = shadow.backbone.get_input_embeddings() if shadow.owns_embeddings else None
    copied_below = {k for k, p in shadow.backbone.named_parameters() if own is not None and p is own.weight}
    state = {k: v for k, v in shadow.backbone.state_dict().items() if k not in copied_below}
    whole: Any = stock.base_model
    decoder = whole if type(whole) is type(shadow.backbone) else parts.decoder
    missing = decoder.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys, missing
    parts.embeddings.weight.copy_(table)
    parts.head.weight.copy_(weight)
    if getattr(head, "bias", None) is not None and (parts.head.bias is not None or head.bias.any()):
        parts.head.bias = nn.Parameter(head.bias.detach().to(dtype, copy=True) * factor)
    stock.tie_weights()
    if stock.can_generate():
        generation: Any = copy.deepcopy(model.base.generation_config)
        if shadow.config.escalation is not None:
            generation.escalation = shadow.config.escalation
            generation._from_model_config = False  # otherwise it is not read back
            accept(generation)
        if shadow.prompting is not None and (settings := shadow.prompting.settings()) != Prompting().settings():
            generation.prompting = settings
            generation._from_model_config = False
            accept(generation)
        stock.generation_config = generation
    return stock.to(device=table.device).eval()


def _stock_config(model: ShadowModel) -> PretrainedConfig:
    config, base = copy.deepcopy(architectures.text_twin(model.shadow.backbone.config)), model.base.config
    config.architectures = None
    if architectures.locate(model.base).is_classifier:
        for key in ("num_labels", "id2label", "label2id", "problem_type"):
            setattr(config, key, model.shadow.classifier.get(key) or getattr(base, key))
    config.vocab_size = architectures.vocabulary_size(model.get_input_embeddings())
    text = base.get_text_config()
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, key, getattr(text, key))
    return config


def _embedding_table(model: ShadowModel, target: nn.Module) -> Tensor:
    """(V, Ds): what the stock model's table must hold so that looking a token up gives what the shadow reads."""
    shadow = model.shadow
    if shadow.owns_embeddings:
        own: Any = shadow.backbone.get_input_embeddings()
        return own.weight.detach()[: architectures.vocabulary_size(model.get_input_embeddings())]
    source: Any = model.base.get_input_embeddings()
    table = architectures.embedding_rows(source).to(shadow.dtype)
    if shadow.embed_projection is not None:
        table = table @ shadow.embed_projection.weight.T
    ratio = architectures.embedding_scale(source) / architectures.embedding_scale(target)
    return table if ratio == 1 else table * ratio


def _maps_before_head(model: ShadowModel, stock: PreTrainedModel) -> list[nn.Linear]:
    """The linear maps from the backbone's states to the head, last first; what is not linear moves into ``stock``."""
    between, twin = architectures.before_head(model.base), architectures.before_head(stock)
    maps = [m for m in (between, model.shadow.projection) if isinstance(m, nn.Linear)]
    moved = None if isinstance(between, nn.Linear) else between
    if any(twin is module for module in stock.base_model.modules()):
        twin = None
    if (moved is None) != (twin is None) or (moved is not None and maps):
        raise DetachError(
            f"The base ({model.base.config.model_type}) and a detached {stock.config.model_type} of these sizes transform "
            "their states differently before the head. Use shadow='mirror' with the base's hidden size."
        )
    if moved is not None and twin is not None:
        twin.load_state_dict(moved.state_dict())
    return maps


def _folded_head(weight: Tensor, maps: list[nn.Linear], factor: float) -> Tensor:
    for linear in maps:
        weight = weight.to(linear.weight.dtype) @ linear.weight.detach()
    return weight if factor == 1 else weight.float() * factor


def _stays_tied(base: architectures.Architecture, shadow: Shadow) -> bool:
    """Whether the shadow reads and writes tokens by one weight, the base's.

    Of a base in half precision whose embeddings are multiplied (Gemma's √D), the rows fall short of the head's by the rounding
    of that factor. They are tied all the same: the stock model has the factor unrounded, as beside a base in float32.
    """
    return base.is_tied and not shadow.heads and not shadow.owns_embeddings


def _settle_tying(stock: PreTrainedModel, parts: architectures.Architecture, tied: bool) -> None:
    """Tie the head to the embeddings, or untie them."""
    for config in {id(c): c for c in (stock.config, stock.config.get_text_config())}.values():
        config.tie_word_embeddings = tied
    stock.all_tied_weights_keys = stock.get_expanded_tied_weights_keys(all_submodels=True)
    if not tied and parts.head.weight is parts.embeddings.weight:
        parts.head.weight = nn.Parameter(parts.embeddings.weight.detach().clone())


def check_target(out: str | Path, overwrite: bool) -> Path:
    """``out``, if it may be written to: new, empty, to be overwritten, or left by a kill in the middle of being written.

    Raises:
        CheckpointError: it is a file, or a folder that is not empty and ``overwrite`` is False.
    """
    out = Path(out)
    if out.is_file() or not (overwrite or folder.is_empty(out) or folder.is_interrupted(out)):
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
    stock = detach(model)
    if tokenizer is not None:
        end_as_learned(stock, formatter_of(stock, tokenizer))
    write_stock(out, lambda staging: save_stock(stock, staging, tokenizer, dtype))
    return out


def formatter_of(
    stock: Any, tokenizer: PreTrainedTokenizerBase, chat_template: bool | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> ChatFormatter:  # fmt: skip
    """The chat formatting by which a stock model is asked: as the adapter that it is detached from, unless overridden.

    Raises:
        ConfigError: a damaged entry of its generation config, or unusable arguments.
    """
    noted = stock.generation_config.to_dict().get(PROMPTING) if stock.can_generate() else None
    try:
        prompting = Prompting(None, **(noted or {}))
    except TypeError as error:
        raise ConfigError(f"The generation config is damaged: {PROMPTING}: {error}") from error
    return override(prompting, tokenizer, chat_template, chat_template_kwargs)


def end_as_learned(stock: Any, formatter: ChatFormatter) -> None:
    """Let a stock model's answers end where the chat template ends them, which the base's generation config may not know."""
    if not stock.can_generate():
        return
    generation, ends = stock.generation_config, end_tokens(stock, formatter)
    told = generation.eos_token_id
    if ends and ends != (told if isinstance(told, list) else [told]):
        generation.eos_token_id = ends[0] if len(ends) == 1 else ends
        generation._from_model_config = False
        accept(generation)


def write_stock(out: Path, write: Callable[[Path], None]) -> None:
    """What ``write`` puts into a folder, in ``out``, in place of the model there: the files of another's tokenizer go.

    Whoever loads the folder meanwhile, or after a kill, finds the old model or the new one.
    """
    folder.settle(out)
    is_model = (out / "config.json").is_file()
    folder.switch_together(out, write, (*OF_STOCK, *_weights(out)) if is_model else ())


def _weights(out: Path) -> list[str]:
    """Names of the weights that transformers would read from a folder."""
    names = ["model.safetensors"]
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        index = json.loads(folder.read_text(out / SAFE_WEIGHTS_INDEX_NAME))
        names += [SAFE_WEIGHTS_INDEX_NAME, *{Path(n).name for n in index["weight_map"].values()}]
    return names


def save_stock(stock: Any, staging: Path, tokenizer: PreTrainedTokenizerBase | None, dtype: torch.dtype | None) -> None:
    """The files of a stock model, cast to ``dtype`` if one is given, and of its tokenizer.

    Raises:
        DetachError: a head with a bias, which the stock class would not read back.
    """
    with torch.device("meta"):
        known = type(stock)(stock.config).state_dict().keys()
    if more := sorted(stock.state_dict().keys() - known):
        raise DetachError(
            f"A {type(stock).__name__} on disk has no {', '.join(more)}, as the base's head does. Use shadow='mirror', or "
            "`umbra export --to onnx`."
        )
    (stock if dtype is None else stock.to(dtype)).save_pretrained(staging)
    if tokenizer is not None:
        save_tokenizer(tokenizer, staging)
        if (pieces := _pieces(tokenizer.name_or_path)) is not None:
            shutil.copyfile(pieces, staging / PIECES)


def _pieces(name: str) -> str | None:
    """SentencePiece's file of the tokenizer that was loaded from ``name``, where it has one: GGML's converter reads no other.

    transformers saves tokenizer.json alone.
    """
    try:
        found: Any = cached_file(name, PIECES, _raise_exceptions_for_missing_entries=False) if name else None
    except OSError:  # no such place any more, or the hub cannot be reached
        return None
    return found


def accept(generation: Any) -> None:
    """Let a generation config be saved after a change of ours, even if what the base brought is not all consistent."""
    generation._original_object_hash = hash(generation)


def parse_dtype(name: str) -> torch.dtype | None:
    """A floating-point type by its name; None for auto.

    Raises:
        ConfigError: another name.
    """
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return types.get(check_dtype(name))
