"""What an adapter folder must fulfil before a shadow is built of it: its sizes, its numbers, its digest.

Sizes are compared with the header of the tensors, so that nothing is allocated that the file does not hold.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from umbra.adapters.files import DIGEST, DRAFT_TOKENS, PROMPTING, Tensors
from umbra.base.added_tokens import added_count, expected_rows
from umbra.base.architectures import Anatomy
from umbra.config import ShadowConfig
from umbra.errors import CheckpointError, ConfigError
from umbra.shadow.draft_vocabulary import check_draft_tokens
from umbra.shadow.network import Shadow, fresh_config

VOUCHED = ("task_type", "shadow", "shadow_model_config", "base", "classifier")
OPTIONAL = (DRAFT_TOKENS, PROMPTING)
LENGTHS = ("n_positions", "n_ctx")  # tokens, which nobody counts one by one
MOST_BUFFERED = 2**27  # values in a shadow's buffers, which no tensor of the file bounds


def digest(values: dict[str, Any], weights: Tensors) -> str:
    """SHA-256 of what decides an adapter's answers: the `VOUCHED` entries, in any order and spacing, and all tensors."""
    optional = {k: v for k, v in values.items() if k in OPTIONAL and v is not None}
    plain = json.loads(json.dumps({**{k: values.get(k) for k in VOUCHED}, **optional}))
    sha = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for key in sorted(weights):
        tensor = weights[key]
        sha.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def check_digest(values: dict[str, Any], weights: Tensors, file: Path) -> None:
    """Raise a CheckpointError where values or tensors are not those that were saved; null switches the check off."""
    if values.get(DIGEST, "") not in (None, digest(values, weights)):
        raise CheckpointError(
            f"{file} or the tensors beside it were changed after they were saved: they do not match {DIGEST!r}. Restore "
            f'the folder from its source; if the change was intended, set "{DIGEST}": null.'
        )


def draft_tokens(values: dict[str, Any], rows: int, file: Path) -> list[int] | None:
    """The draft vocabulary, if there is one.

    Args:
        rows: tokens of the base.

    Raises:
        CheckpointError: it holds what is no token of the base, or a token twice, or nothing.
    """
    tokens = values.get(DRAFT_TOKENS)
    try:
        if tokens is not None:
            check_draft_tokens(tokens, rows)
    except ConfigError as error:
        raise CheckpointError(f"{file} is damaged: {DRAFT_TOKENS}: {error}") from error
    return tokens


def check_counts(values: dict[str, Any], weights: Tensors, file: Path) -> None:
    """Refuse counts that no model of these tensors can have, before a constructor counts that far.

    Raises:
        CheckpointError: the first such entry.
    """
    depth = max(256, len(weights))
    width = max(2**15, *(size for tensor in weights.values() for size in tensor.shape), 0)
    for key, value in values.items():
        if isinstance(value, dict):
            check_counts(value, weights, file)
        elif isinstance(value, int) and (key.startswith(("num_", "n_")) or "layers" in key) and key not in LENGTHS:
            most = depth if "layer" in key else width
            if value > most:
                raise CheckpointError(f"{file} is damaged: {key} is {value!s:.20}, its tensors allow at most {most}.")


def check_sizes(
    base: Anatomy, config: ShadowConfig, backbone_config: PretrainedConfig, weights: Tensors, file: Path, source: Path,
    rows: int | None = None,
) -> None:  # fmt: skip
    """Refuse a configuration that asks for other tensors than there are, without allocating any.

    Args:
        file: the configuration, for the message.
        source: the tensors' file, for the message.
        rows: tokens that a language model will have, if not the base's; those beyond are added by the adapter.

    Raises:
        CheckpointError: the tensors differ, or no model can be built.
    """
    try:
        kinds = {fresh_config(base, config).model_type, base.config.model_type}
        if not config.is_pretrained and backbone_config.model_type not in kinds:
            raise ConfigError(
                f"a {backbone_config.model_type} is no {config.shadow} shadow of a {base.config.model_type}."
            )
        with torch.device("meta"):
            shadow = Shadow(base, config.resolve(), backbone_config, device="meta")
    except ConfigError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    except Exception as error:  # a model of another kind may fail in any way
        raise CheckpointError(f"{file} is damaged: {error!r:.500}") from error
    own = shadow.state_dict(prefix="shadow.")
    if rows is not None:
        heads = {k: v for k, v in own.items() if k.startswith("shadow.heads.") and not base.is_classifier}
        own |= {k: torch.empty(rows, *v.shape[1:], device="meta") for k, v in heads.items()}
        own |= expected_rows(base, added_count(weights))
    check_tensors(own, weights, source)
    if sum(buffer.numel() for buffer in shadow.buffers()) > MOST_BUFFERED:
        raise CheckpointError(f"{file} is damaged: its shadow needs absurdly large buffers.")


def check_tensors(own: Tensors, weights: Tensors, file: Path) -> None:
    """Hold the tensors of a file to those that a shadow has.

    Raises:
        CheckpointError: one is missing, left over, misshapen, or not floating point.
    """
    for problem, keys in (("lacks", own.keys() - weights.keys()), ("has unknown", weights.keys() - own.keys())):
        if keys:
            raise CheckpointError(f"{file} {problem} {len(keys)} tensors, {sorted(keys)[0]!r:.200} first.")
    for key, value in weights.items():
        if value.shape != own[key].shape or not value.is_floating_point() or value.element_size() < 2:
            raise CheckpointError(
                f"{file}: {key!r} is {value.dtype} of shape {tuple(value.shape)}, "
                f"needed is floating point of shape {tuple(own[key].shape)}."
            )


def check_numbers(own: Tensors, weights: Tensors, file: Path) -> None:
    """Raise a CheckpointError for a tensor that is not finite once it has the shadow's dtype."""
    for key, value in weights.items():
        if not own[key].is_meta and not value.to(own[key].dtype).isfinite().all():
            raise CheckpointError(f"{file}: {key!r} holds values that are no finite numbers in {own[key].dtype}.")
