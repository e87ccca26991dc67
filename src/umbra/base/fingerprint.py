"""Fingerprints identify a base: sizes, configuration and a sample of the weights.

The sample is stored in bf16. It tolerates a change of precision and quantization, but not another training run. Where either
side is quantized, only the similarity is compared: 2 to 8 bits separate a base from unrelated models, not from its fine-tunes.
"""

import base64
import json
import math
import re
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from umbra.base import architectures, quantized, sharded
from umbra.base.architectures import Architecture
from umbra.errors import BaseModelError, CheckpointError, shown

SAMPLES = 16  # values of each tensor
AGREEMENT = 0.9  # share of all samples that must be equal in bf16, and of one tensor's that must be nearly equal
NEARLY = (
    2.0**-7,
    1e-7,
)  # relative, absolute: one step of bf16; a conversion to fp16 and back moves 1 value in 16 by that
LAST, LAST_ROWS = ", last rows", 16  # of a table: each row must agree by itself
ROUNDING = 1e-5  # relative: GGUF stores a configuration's numbers in single precision
# Fields of a configuration that do not affect logits: names, storage, training, generation, classes, and those that follow
# from the weights or from other fields.
INDIFFERENT = {
    "add_cross_attention", "architectures", "auto_map", "chunk_size_feed_forward", "dtype", "experts_implementation",
    "finetuning_task", "gradient_checkpointing", "head_dim", "id2label", "is_decoder", "is_encoder_decoder", "label2id",
    "max_length", "max_window_layers", "model_type", "n_ctx", "n_positions", "num_labels", "output_attentions",
    "output_hidden_states", "output_router_logits", "prefix", "pretraining_tp", "problem_type", "quantization_config",
    "reorder_and_upcast_attn", "return_dict", "router_aux_loss_coef", "router_z_loss_coef", "task_specific_params",
    "tie_word_embeddings", "tokenizer_class", "torch_dtype", "torchscript", "transformers_version", "use_cache",
    "use_sliding_window", "vocab_size",
}  # fmt: skip
IRRELEVANT = re.compile(r"^_|^summary_|^initializer_|_token_id$|_token_index$|dropout|pdrop|_drop$|name_or_path|_plan$")
LENGTH_DEPENDENT = ("dynamic", "longrope", "yarn")  # rotary frequencies that depend on the number of positions
SIMILARITY = 0.7  # least mean cosine of quantized samples with the same base's; 0.9 at 2 bits, 0 ± 0.1 for another base


def fingerprint(base: Architecture, rows: int | None = None) -> dict[str, Any]:
    """Return a base's fingerprint.

    All tensors of the model are sampled: embeddings, blocks, norms, position tables, head.

    Args:
        base: its parts.
        rows: V, the original vocabulary size, where the embeddings have been resized; by default their number of rows.

    Returns:
        Sizes, ``config``, and ``weights`` and ``quantised``: name → base64 of evenly spaced values in bf16.
    """
    rows = architectures.vocabulary_size(base.embeddings) if rows is None else rows
    plain, quantised = _table_samples("embeddings", base.embeddings, rows)
    if base.is_tied:
        plain["head weight"] = plain.get("embeddings", "")
    plain, matrices = {name: sample for name, sample in plain.items() if sample}, set(plain)
    for name, module in _parts(base):
        if quantized.is_packed_linear(module):
            places = _places(cast(nn.Linear, module).in_features)
            quantised[f"{name}.weight".lstrip(".")] = _sample(quantized.columns(module, places, base.model.dtype))
            continue
        for key, tensor in _direct_tensors(module):
            if tensor is base.embeddings.weight or not _is_readable(tensor):
                continue
            full = f"{name}{'' if name.endswith(' ') or not name else '.'}{key}"
            matrices |= {full, full + LAST} if tensor.ndim > 1 else set()
            of_tokens = module is base.head and not base.is_classifier
            plain |= _rows_samples(full, tensor, rows) if of_tokens else {full: _sample(tensor)}
    if architectures.is_unpacked(base.model.config):
        quantised |= {name: sample for name, sample in plain.items() if name in matrices}
        plain = {name: sample for name, sample in plain.items() if name not in matrices}
    return {
        "model_type": base.config.model_type,
        "hidden_size": base.config.hidden_size,
        "num_hidden_layers": len(base.blocks),
        "vocab_size": rows,
        "config": deciding_fields(base.config),
        "weights": plain,
        "quantised": quantised,
    }


def _parts(base: Architecture) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module except the embeddings, with its name: ``block 3 mlp.up_proj``, ``head ``, or as in the model."""
    blocks = {id(m): f"block {l} {n}" for l, block in enumerate(base.blocks) for n, m in block.named_modules()}
    head = {id(m): f"head {n}" for n, m in base.head.named_modules()}
    for name, module in base.model.named_modules():
        if module is not base.embeddings:
            yield (blocks | head).get(id(module), name), module


def _direct_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a module's direct parameters and buffers, except rotary frequencies, which some models change in use."""
    yield from module.named_parameters(recurse=False)
    for name, buffer in module.named_buffers(recurse=False):
        if not name.endswith("inv_freq"):
            yield name, buffer


def _table_samples(name: str, table: nn.Embedding, rows: int) -> tuple[dict[str, str], dict[str, str]]:
    if _is_readable(table.weight):
        return _rows_samples(name, table.weight, rows), {}
    if quantized.is_packed(table):
        return {}, {name: _sample(architectures.embedding_rows(table, _places(rows)))}
    return {}, {}


def _rows_samples(name: str, p: Tensor, rows: int) -> dict[str, str]:
    """Return samples of a tensor with a row per token, and of each of the last rows, which may belong to added tokens."""
    with sharded.gathered([p]):
        whole = sharded.gather(p.detach())[:rows]
        last = whole[-LAST_ROWS:].reshape(min(rows, LAST_ROWS), -1)
        return {name: _sample(whole), f"{name}{LAST}": _encode(last[:, _places(last.shape[1], last.device)])}


def _is_readable(p: Tensor) -> bool:
    return quantized.is_plain(p) or (sharded.is_partitioned(p) and p.is_floating_point())


def _places(size: int, device: torch.device | None = None) -> Tensor:
    return torch.linspace(0, size - 1, SAMPLES, dtype=torch.float64).long().to(device)


def _sample(p: Tensor) -> str:
    """Sample along the diagonal: a weight, its transpose and its sampled columns alone give the same values."""
    with sharded.gathered([p]):
        whole = sharded.gather(p.detach())
        return _encode(whole[tuple(_places(size, whole.device) for size in whole.shape)])


def _encode(values: Tensor) -> str:
    return base64.b64encode(values.float().bfloat16().view(torch.int16).cpu().numpy().tobytes()).decode()


def _decode(sample: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(sample)), dtype=torch.bfloat16).float()


def _agreement(name: str, a: Tensor, b: Tensor) -> float:
    """Return the share of nearly equal values; of the last rows, that of the row which differs most."""
    close = torch.isclose(a, b, *NEARLY).float()
    return float(close.view(-1, SAMPLES).mean(1).min() if name.endswith(LAST) else close.mean())


def deciding_fields(config: PretrainedConfig) -> dict[str, Any]:
    """Return the fields of a decoder's configuration that affect its logits, as plain values."""
    values = json.loads(config.to_json_string(use_diff=False))
    if not any(kind in json.dumps(values.get("rope_parameters")) for kind in LENGTH_DEPENDENT):
        values.pop("max_position_embeddings", None)
    return _deciding(values)


def _deciding(values: object) -> Any:
    if not isinstance(values, dict):
        return values
    return {k: _deciding(v) for k, v in values.items() if k not in INDIFFERENT and not IRRELEVANT.search(k)}


def _difference(expected: object, actual: object, name: str = "") -> str | None:
    """Describe the first field that two configurations share with different values; None if there is none."""
    if isinstance(expected, dict) and isinstance(actual, dict):
        common = sorted(expected.keys() & actual.keys())
        inner = (_difference(expected[k], actual[k], f"{name}.{k}".lstrip(".")) for k in common)
        return next((other for other in inner if other is not None), None)
    if isinstance(expected, float) and isinstance(actual, int | float):
        same = math.isclose(expected, actual, rel_tol=ROUNDING)
    else:
        same = expected == actual
    return None if same else f"{name} is {shown(actual)}, the adapter's has {shown(expected)}"


def check_same_base(
    expected: dict[str, Any], base: Architecture, rows: int | None = None, has_own_heads: bool = False
) -> None:
    """Check that a base has the fingerprint of an adapter's base.

    Only entries of both fingerprints are compared: those of format 2 have no configuration, head or norms, and each version
    of transformers has different fields.

    Args:
        expected: the adapter's record of its base.
        base: its parts.
        rows: V, the original vocabulary size, where the embeddings have been resized.
        has_own_heads: whether the adapter has trained heads in place of the base's, which is then not compared.

    Raises:
        BaseModelError: another architecture, other sizes, or other weights.
        CheckpointError: a damaged fingerprint.
    """
    actual = fingerprint(base, rows)
    for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        if expected.get(key) != actual[key]:
            raise _wrong_base(f"{key} is {actual[key]}, the adapter's has {expected.get(key)}")
    try:
        plain, quantised = (
            {name: _decode(sample) for name, sample in expected[kind].items()} for kind in ("weights", "quantised")
        )
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"The adapter's record of its base's weights is damaged: {error!r}") from error
    if (difference := _difference(expected.get("config") or {}, actual["config"])) is not None:
        raise _wrong_base(difference)
    if has_own_heads:
        plain, quantised = ({k: v for k, v in of.items() if not k.startswith("head ")} for of in (plain, quantised))
    _check_samples(plain, quantised, actual)


def _check_samples(plain: dict[str, Tensor], quantised: dict[str, Tensor], actual: dict[str, Any]) -> None:
    """Check an adapter's plain and quantized samples against a base's fingerprint.

    Raises:
        BaseModelError: other weights.
    """
    expected, samples = plain | quantised, actual["weights"] | actual["quantised"]
    exact = plain.keys() & actual["weights"].keys()
    equal, count, similarities = 0, 0, []
    for name in sorted(expected.keys() & samples.keys()):
        a, b = expected[name], _decode(samples[name])
        if len(a) != len(b) or (name in exact and _agreement(name, a, b) < AGREEMENT):
            raise _wrong_base(f"same sizes, but other weights in {name}")
        if name in exact:
            equal, count = equal + int((a == b).sum()), count + len(a)
        else:
            similarities.append(float(torch.cosine_similarity(a, b, dim=0)))
    if equal < AGREEMENT * count:
        raise _wrong_base("same sizes, but slightly other weights throughout")
    if sum(similarities) < SIMILARITY * len(similarities):
        raise _wrong_base("same sizes, but other quantised weights")


def _wrong_base(difference: str) -> BaseModelError:
    return BaseModelError(
        f"Wrong base: {difference}. Load the adapter with the base that it was trained on; allow_other_base=True overrides."
    )
