"""Checks of an adapter folder before a shadow is built from it: its SHA-256 checksum, sizes and values.

Sizes are compared with the shapes of the tensors, so that nothing larger than the file is allocated.
"""

import hashlib
import json
from pathlib import Path

import torch
from transformers import PretrainedConfig

from umbra.adapters.files import DIGEST, DRAFT_TOKENS, PREFIX, PROMPTING, Tensors, Values
from umbra.base.added_tokens import added_count, expected_rows
from umbra.base.architectures import Architecture
from umbra.config import ShadowConfig
from umbra.errors import CheckpointError, ConfigError, raising
from umbra.shadow.backbone import fresh_config
from umbra.shadow.draft_vocabulary import check_draft_tokens
from umbra.shadow.network import Shadow

# Entries of the configuration that the checksum covers, besides all tensors; the optional ones where they are present.
COVERED = ("task_type", "shadow", "shadow_model_config", "base", "classifier")
OPTIONAL = (DRAFT_TOKENS, PROMPTING)
LENGTHS = ("n_positions", "n_ctx")  # in tokens: no constructor makes a module for each
LARGEST_BUFFERS = 2**27  # values in a shadow's buffers, which no tensor of the file bounds


def digest(values: Values, weights: Tensors) -> str:
    """Return the SHA-256 of everything that decides an adapter's output: configuration entries and tensors.

    Args:
        values: the content of ``adapter_config.json``; order and spacing do not matter.
        weights: all tensors by name.
    """
    optional = {k: v for k, v in values.items() if k in OPTIONAL and v is not None}
    plain = json.loads(json.dumps({**{k: values.get(k) for k in COVERED}, **optional}))
    sha = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for key in sorted(weights):
        tensor = weights[key]
        sha.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def check_digest(values: Values, weights: Tensors, file: Path) -> None:
    """Check the SHA-256 that an adapter folder stores; null switches the check off.

    Args:
        values: the content of ``adapter_config.json``.
        weights: all tensors by name.
        file: the configuration, for the message.

    Raises:
        CheckpointError: the configuration or the tensors were changed after they were saved.
    """
    if values.get(DIGEST, "") not in (None, digest(values, weights)):
        raise CheckpointError(
            f"{file} or the tensors beside it were changed after they were saved: they do not match {DIGEST!r}. Restore "
            f'the folder from its source; if you meant to change it, set "{DIGEST}": null.'
        )


def draft_tokens(values: Values, rows: int, file: Path) -> list[int] | None:
    """Return the draft vocabulary of an adapter, or None if it has none.

    Args:
        values: the content of ``adapter_config.json``.
        rows: V, the number of the base's tokens.
        file: the configuration, for the message.

    Raises:
        CheckpointError: the vocabulary is empty, or holds an id twice or one that is no token of the base.
    """
    tokens = values.get(DRAFT_TOKENS)
    try:
        if tokens is not None:
            check_draft_tokens(tokens, rows)
    except ConfigError as error:
        raise CheckpointError(f"{file} is damaged: {DRAFT_TOKENS}: {error}") from error
    return tokens


def check_counts(values: Values, weights: Tensors, file: Path) -> None:
    """Refuse counts that no model with these tensors can have, before a constructor counts that far.

    Args:
        values: the saved configuration of the shadow's backbone.
        weights: all tensors by name.
        file: the configuration, for the message.

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
    base: Architecture, config: ShadowConfig, backbone_config: PretrainedConfig, weights: Tensors, file: Path, source: Path,
    rows: int | None = None,
) -> None:  # fmt: skip
    """Check that a shadow with this configuration has exactly the given tensors, without allocating any.

    Args:
        base: the base's parts.
        config: the shadow's configuration.
        backbone_config: its backbone's.
        weights: all tensors by name.
        file: the configuration, for the message.
        source: the tensors' file, for the message.
        rows: the number of tokens that a language model will have, if not the base's; those beyond are added by the adapter.

    Raises:
        CheckpointError: the tensors differ, or no model can be built.
    """
    expected, buffered = _expected_tensors(base, config, backbone_config, file)
    if rows is not None:
        heads = {k: v for k, v in expected.items() if k.startswith(f"{PREFIX}heads.") and not base.is_classifier}
        expected |= {k: torch.empty(rows, *v.shape[1:], device="meta") for k, v in heads.items()}
        expected |= expected_rows(base, added_count(weights))
    check_tensors(expected, weights, source)
    if buffered > LARGEST_BUFFERS:
        raise CheckpointError(f"{file} is damaged: its shadow needs absurdly large buffers.")


def _expected_tensors(
    base: Architecture, config: ShadowConfig, backbone_config: PretrainedConfig, file: Path
) -> tuple[Tensors, int]:
    """The tensors of a shadow with this configuration, on the meta device, and the number of values in its buffers."""
    with raising(CheckpointError, lambda error: f"{file} is damaged: {error!r:.500}"):  # any type, from a foreign model
        try:
            types = {fresh_config(base, config).model_type, base.config.model_type}
            if not config.is_pretrained and backbone_config.model_type not in types:
                raise ConfigError(
                    f"a {backbone_config.model_type} is no {config.shadow} shadow of a {base.config.model_type}."
                )
            with torch.device("meta"):
                shadow = Shadow(base, config.resolve(), backbone_config, device="meta")
        except ConfigError as error:
            raise CheckpointError(f"{file} is damaged: {error}") from error
    return shadow.state_dict(prefix=PREFIX), sum(buffer.numel() for buffer in shadow.buffers())


def check_tensors(expected: Tensors, weights: Tensors, file: Path) -> None:
    """Check the names, shapes and types of a file's tensors.

    Args:
        expected: the tensors of the shadow.
        weights: the tensors of the file.
        file: the file, for the message.

    Raises:
        CheckpointError: a tensor is missing, unknown, misshapen, or not floating point.
    """
    for problem, keys in (
        ("lacks", expected.keys() - weights.keys()),
        ("has unknown", weights.keys() - expected.keys()),
    ):
        if keys:
            raise CheckpointError(f"{file} {problem} {len(keys)} tensors, {sorted(keys)[0]!r:.200} first.")
    for key, value in weights.items():
        shape = expected[key].shape
        if value.shape != shape or not value.is_floating_point() or value.element_size() < 2:
            raise CheckpointError(
                f"{file}: {key!r} is {value.dtype} of shape {tuple(value.shape)}, "
                f"needed is floating point of shape {tuple(shape)}."
            )


def check_numbers(expected: Tensors, weights: Tensors, file: Path) -> None:
    """Check that every tensor is finite in the shadow's dtype.

    Args:
        expected: the tensors of the shadow; those on the meta device are not checked.
        weights: the tensors of the file.
        file: the file, for the message.

    Raises:
        CheckpointError: a tensor is not.
    """
    for key, value in weights.items():
        dtype = expected[key].dtype
        if not expected[key].is_meta and not value.to(dtype).isfinite().all():
            raise CheckpointError(f"{file}: {key!r} holds values that are no finite numbers in {dtype}.")
