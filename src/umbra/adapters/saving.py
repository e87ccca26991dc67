"""Write an adapter folder, atomically: configuration, weights, tokenizer and model card."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PretrainedConfig, PreTrainedModel

from umbra import __version__
from umbra.adapters.card import may_replace, model_card
from umbra.adapters.files import (
    CARD_FILE,
    CONFIG_FILE,
    DIGEST,
    DRAFT_TOKENS,
    FORMAT_VERSION,
    PEFT_TYPE,
    PREFIX,
    PROMPTING,
    TASKS,
    TRAINER_FILE,
    WEIGHTS_FILE,
    Tensors,
    Values,
)
from umbra.adapters.integrity import digest
from umbra.adapters.prompting import Prompting, check_before_saving
from umbra.base import architectures, sharded
from umbra.errors import CheckpointError, ConfigError
from umbra.files import folder
from umbra.options import EMBEDDED
from umbra.shadow.network import Shadow

# Arguments that callers in transformers and accelerate pass to any model. These have no effect here …
IGNORED_ARGUMENTS = ("max_shard_size", "save_function", "save_peft_format", "save_original_format")
# … and these are accepted with these values alone.
ACCEPTED_ARGUMENTS = {"safe_serialization": (True, None), "variant": (None,)}


@dataclass(frozen=True)
class AttachedShadow:
    """A shadow and the base to which it is attached: everything that an adapter folder is written from.

    Args:
        shadow: the shadow.
        base: its base.
        base_fingerprint: see `umbra.base.fingerprint.fingerprint`.
        state_prefix: of the shadow's tensors in the state dict of the model that holds both.
    """

    shadow: Shadow
    base: PreTrainedModel
    base_fingerprint: Values
    state_prefix: str = PREFIX


def save(
    attached: AttachedShadow,
    path: str | Path,
    *,
    overwrite: bool = False,
    state_dict: Tensors | None = None,
    is_main_process: bool | None = None,
    tokenizer: Any = None,
    chat_template: bool | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    **arguments: Any,
) -> None:
    """Write the adapter folder; the base is not in it.

    A sharded adapter is gathered: all ranks call this together, and rank 0 writes.

    Args:
        attached: the shadow and its base.
        path: the folder.
        overwrite: replace another adapter in the folder; an earlier save of the same adapter is always replaced.
        state_dict: gathered weights under the names of the model that holds shadow and base; the caller then decides which
            rank writes.
        is_main_process: passed by transformers' Trainer, which owns its folders and finds the weights there by a
            second name; False writes nothing.
        tokenizer: the tokenizer or processor to save with the adapter; by default the one that it was loaded with, or
            none.
        chat_template: whether the tokenizer's chat template is used; by default as when the adapter was loaded.
        chat_template_kwargs: arguments of the template; by default as when the adapter was loaded.
        arguments: passed by callers of transformers' models, without an effect here.

    Raises:
        ConfigError: an unknown argument, or a tokenizer that does not fit the base.
        CheckpointError: the folder holds another adapter, or the disk refused; the folder is unchanged.
    """
    _check_arguments(arguments)
    target, shadow = Path(path), attached.shadow
    is_called_by_user = is_main_process is None and state_dict is None
    if tokenizer is not None and is_called_by_user:
        rows = architectures.vocabulary_size(attached.base.get_input_embeddings())
        check_before_saving(tokenizer, rows, attached.base.name_or_path)
    prompting = (shadow.prompting or Prompting()).replaced(tokenizer, chat_template, chat_template_kwargs)
    state = sharded.whole_state(shadow, PREFIX) if state_dict is None else _renamed(state_dict, attached.state_prefix)
    if is_main_process is False or (is_called_by_user and not sharded.is_first_rank()):
        return
    if is_main_process is None and not overwrite:
        _refuse_other_adapter(target, shadow.adapter_id)
    weights = _weights(shadow, state)
    # transformers' Trainer writes its tokenizer over these files afterwards: there, no file is listed.
    values = {**describe(attached), PROMPTING: prompting.to_dict(is_listed=is_main_process is None)}
    values[DIGEST] = digest(values, weights)
    _write(target, attached, values, weights, prompting, is_of_trainer=bool(is_main_process))


def _write(
    target: Path, attached: AttachedShadow, values: Values, weights: Tensors, prompting: Prompting, is_of_trainer: bool
) -> None:
    """Write the files as one, then remove the unchanged tokenizer files of the adapter that they replace."""

    def write(staging: Path) -> None:
        save_file(weights, staging / WEIGHTS_FILE, metadata={"format": "pt"})
        folder.write_text(staging / CONFIG_FILE, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        if may_replace(folder.find(target, CARD_FILE)):
            card = model_card(values, type(attached.base).__name__, attached.shadow.parts())
            folder.write_text(staging / CARD_FILE, card)
        if prompting.tokenizer is not None:
            prompting.tokenizer.write(staging)
        if is_of_trainer:
            folder.link_or_copy(staging / WEIGHTS_FILE, staging / TRAINER_FILE)

    obsolete = _listed_files(target)
    folder.write_together(target, write)
    for file in obsolete if prompting.tokenizer is None else obsolete - prompting.tokenizer.contents.keys():
        (target / file).unlink(missing_ok=True)


def _check_arguments(arguments: dict[str, Any]) -> None:
    """Refuse an argument that is neither ignored nor accepted."""
    for name, value in arguments.items():
        if name not in IGNORED_ARGUMENTS and value not in ACCEPTED_ARGUMENTS.get(name, ()):
            raise ConfigError(f"save_pretrained has no {name}={value!r:.80}: an adapter is one file of safetensors.")


def _renamed(state_dict: Tensors, prefix: str) -> Tensors:
    """Tensors of a model's state dict below ``prefix``, by their names in an adapter's file."""
    return {PREFIX + k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}


def _weights(shadow: Shadow, state: Tensors) -> Tensors:
    """The tensors to write, on the CPU.

    Raises:
        CheckpointError: ``state`` lacks tensors of the shadow.
    """
    state = {k: v for k, v in state.items() if not v.is_meta}
    missing = shadow.state_dict(prefix=PREFIX).keys() - state.keys()
    if missing:
        raise CheckpointError(
            f"The state dict to save lacks {len(missing)} tensors of the shadow, {sorted(missing)[0]} first."
        )
    return {k: v.detach().cpu().contiguous() for k, v in state.items()}


def _listed_files(target: Path) -> set[str]:
    """Names of the unchanged tokenizer files of the adapter in a folder, as its configuration lists them."""
    try:
        values = json.loads(folder.read_text(folder.find(target, CONFIG_FILE)))[PROMPTING]
        tokenizer = None if values["tokenizer"] is None else Prompting.read(target, values).tokenizer
        return set() if tokenizer is None else set(tokenizer.contents)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return set()


def _refuse_other_adapter(target: Path, adapter_id: str | None) -> None:
    """Raise a CheckpointError if ``target`` holds an adapter other than ``adapter_id``."""
    if not folder.find(target, CONFIG_FILE).exists():
        return
    try:
        present = json.loads(folder.read_text(folder.find(target, CONFIG_FILE))).get("adapter_id")
    except (OSError, ValueError, AttributeError, RecursionError):
        present = None
    if present is None or present != adapter_id:
        raise CheckpointError(f"{target} already holds another adapter: choose another folder, or pass overwrite=True.")


def describe(attached: AttachedShadow) -> Values:
    """Return the content of ``adapter_config.json``, without the entries `PROMPTING` and `DIGEST`."""
    shadow, config = attached.shadow, attached.base.config
    is_classifier = architectures.locate(attached.base).is_classifier
    labels = {
        name: shadow.classifier.get(name) or getattr(config, name)
        for name in ("num_labels", "id2label", "problem_type")
    }
    return {
        "peft_type": PEFT_TYPE,
        "task_type": TASKS[is_classifier],
        "base_model_name_or_path": _absolute(attached.base.name_or_path),
        "format_version": FORMAT_VERSION,
        "umbra_version": __version__,
        "adapter_id": shadow.adapter_id,
        "shadow": shadow.config.to_dict(),
        "shadow_model_config": _plain_config(shadow.backbone.config),
        "base": attached.base_fingerprint,
        **({"classifier": {**labels, "pad_token_id": architectures.pad_token_id(config)}} if is_classifier else {}),
        **({} if shadow.draft_tokens is None else {DRAFT_TOKENS: shadow.draft_tokens}),
    }


def _absolute(name: str | None) -> str | None:
    """The base's name, valid from any working directory: local paths become absolute."""
    return os.path.abspath(name) if name and name != EMBEDDED and os.path.isdir(name) else name


def _plain_config(config: PretrainedConfig) -> Values:
    """A backbone's configuration without entries on where it came from and how it was stored."""
    values = json.loads(config.to_json_string(use_diff=False))
    omitted = ("_name_or_path", "architectures", "quantization_config", "transformers_version", "dtype")
    values = {k: v for k, v in values.items() if k not in omitted}
    return {"model_type": config.model_type, **values}
