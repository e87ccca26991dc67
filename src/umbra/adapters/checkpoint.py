"""The adapter folder: ``adapter_config.json``, ``adapter_model.safetensors``, the tokenizer, ``README.md`` (model card).

Written atomically, read strictly: a tensor that is missing, left over, misshapen or not finite is an error, never a
random weight, and so is whatever does not match the folder's own digest (integrity.py). Nothing is ever unpickled, and
no code named in a file is imported.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PretrainedConfig, PreTrainedModel

from umbra import __version__
from umbra.adapters.card import may_replace, model_card
from umbra.adapters.integrity import (
    DIGEST,
    DRAFT_TOKENS,
    PROMPTING,
    check_counts,
    check_digest,
    check_numbers,
    check_sizes,
    check_tensors,
    digest,
    draft_tokens,
)
from umbra.adapters.prompting import BEFORE, TOKENIZER_PATTERNS, Prompting, check_before_saving
from umbra.base import architectures, sharded
from umbra.base.added_tokens import AddedTokens, added_count
from umbra.base.architectures import Anatomy
from umbra.base.fingerprint import check_same_base
from umbra.base.loading import load_base
from umbra.config import ShadowConfig
from umbra.errors import BaseModelError, CheckpointError, ConfigError, UmbraError
from umbra.files import folder, hub
from umbra.model.attach import attach
from umbra.model.shadow_model import ShadowModel
from umbra.options import EMBEDDED
from umbra.shadow.network import Shadow
from umbra.shadow.pretrained import saved_config

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "adapter_config.json", "adapter_model.safetensors", "README.md"
SHADOW_PEFT_FILES = ["shadow_config.json", "shadow_adapter.safetensors", "shadow_modules.safetensors"]  # see interop
# 1, of 2026-11, had neither a digest nor samples that quantised bases could be held to; 2 carried no tokenizer, and of its base
# the blocks and the embeddings alone.
FORMAT_VERSION = 3
READABLE = (2, FORMAT_VERSION)
PREFIX = "shadow."  # of the tensors in WEIGHTS_FILE: their names in the model's own state dict
NAMES_OF_LABELS = ("id2label", "label2id", "problem_type")
TRAINER_FILE = "model.safetensors"  # the name by which transformers' Trainer finds what it resumes from
# What transformers' and accelerate's callers pass to any model, and the only values that mean nothing here.
WITHOUT_MEANING = ("max_shard_size", "save_function", "save_peft_format", "save_original_format")
ONLY = {"safe_serialization": (True, None), "variant": (None,)}
TASKS = {False: "CAUSAL_LM", True: "SEQ_CLS"}


def save(
    model: ShadowModel,
    path: str | Path,
    *,
    adapter_name: str | None = None,
    overwrite: bool = False,
    state_dict: dict[str, torch.Tensor] | None = None,
    is_main_process: bool | None = None,
    tokenizer: Any = None,
    chat_template: bool | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    **passed: Any,
) -> None:
    """Write the adapter folder; the base is not in it.

    A sharded adapter is gathered: all ranks call this together, and rank 0 writes.

    Args:
        adapter_name: which of several adapters; by default the active one.
        overwrite: replace another adapter that lies there; the model's own earlier save is always replaced.
        state_dict: gathered weights under this model's names; whoever passes them writes.
        is_main_process: passed by transformers' Trainer, which owns its folders and finds the weights there by a
            second name; False writes nothing.
        tokenizer: the tokenizer, or the processor, that the adapter is asked with; by default the one that it was loaded
            with, and of an adapter without one the base's.
        chat_template, chat_template_kwargs: whether the tokenizer's chat template is used, and its arguments; by default as
            when the adapter was loaded.
        passed: what callers of transformers' models pass, and means nothing here.

    Raises:
        ConfigError: another argument, or a tokenizer that does not fit the base.
        CheckpointError: another adapter lies there, or the disk refused; the folder is as it was.
    """
    for name, value in passed.items():
        if name not in WITHOUT_MEANING and value not in ONLY.get(name, ()):
            raise ConfigError(f"save_pretrained has no {name}={value!r:.80}: an adapter is one file of safetensors.")
    target, shadow = Path(path), model.adapter(adapter_name)
    is_called_by_user = is_main_process is None and state_dict is None
    if tokenizer is not None and is_called_by_user:
        check_before_saving(
            tokenizer, architectures.vocabulary_size(model.get_input_embeddings()), model.base.name_or_path
        )
    given = (tokenizer, chat_template, chat_template_kwargs)
    prompting = (shadow.prompting or Prompting()).replaced(*given)
    resting = next((f"inactive_adapters.{n}." for n, s in model.inactive_adapters.items() if s is shadow), None)
    if state_dict is not None and resting is not None:
        state_dict = {PREFIX + k.removeprefix(resting): v for k, v in state_dict.items() if k.startswith(resting)}
    source = sharded.whole_state(shadow, PREFIX) if state_dict is None else state_dict
    if is_main_process is False or (is_called_by_user and not sharded.is_first_rank()):
        return
    if is_main_process is None and not overwrite:
        refuse_other_adapter(target, shadow.adapter_id)
    source = {k: v for k, v in source.items() if k.startswith(PREFIX) and not v.is_meta}
    lost = own_weights(shadow).keys() - source.keys()
    if lost:
        raise CheckpointError(
            f"The state dict to save lacks {len(lost)} tensors of the shadow, {sorted(lost)[0]} first."
        )
    weights = {k: v.detach().cpu().contiguous() for k, v in source.items()}
    # transformers' Trainer writes its tokenizer over these files afterwards: there, no file is listed.
    values = {**describe(model, shadow), PROMPTING: prompting.to_dict(is_listed=is_main_process is None)}
    values[DIGEST] = digest(values, weights)

    def write(staging: Path) -> None:
        save_file(weights, staging / WEIGHTS_FILE, metadata={"format": "pt"})
        folder.write_text(staging / CONFIG_FILE, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        if may_replace(folder.find(target, CARD_FILE)):
            folder.write_text(staging / CARD_FILE, model_card(values, model, shadow))
        if prompting.tokenizer is not None:
            prompting.tokenizer.write(staging)
        if is_main_process:
            folder.link_or_copy(staging / WEIGHTS_FILE, staging / TRAINER_FILE)

    replaced = _listed_files(target)
    folder.write_together(target, write)
    for file in replaced if prompting.tokenizer is None else replaced - prompting.tokenizer.contents.keys():
        (target / file).unlink(missing_ok=True)


def _listed_files(target: Path) -> set[str]:
    """The unchanged tokenizer files of the adapter that lies in a folder, as its configuration lists them."""
    try:
        values = json.loads(folder.read_text(folder.find(target, CONFIG_FILE)))[PROMPTING]
        return set() if values["tokenizer"] is None else set(Prompting.read(target, values).tokenizer.contents)  # type: ignore[union-attr]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return set()


def refuse_other_adapter(target: Path, adapter_id: str | None) -> None:
    """Raise a CheckpointError where ``target`` holds an adapter other than ``adapter_id``."""
    if not folder.find(target, CONFIG_FILE).exists():
        return
    try:
        found = json.loads(folder.read_text(folder.find(target, CONFIG_FILE))).get("adapter_id")
    except (OSError, ValueError, AttributeError, RecursionError):
        found = None
    if found is None or found != adapter_id:
        raise CheckpointError(f"{target} already holds another adapter: choose another folder, or pass overwrite=True.")


def describe(model: ShadowModel, shadow: Shadow) -> dict[str, Any]:
    """What ``adapter_config.json`` holds."""
    base = architectures.locate(model.base)
    config = model.base.config
    labels = {
        name: shadow.classifier.get(name) or getattr(config, name)
        for name in ("num_labels", "id2label", "problem_type")
    }
    return {
        "peft_type": "UMBRA",
        "task_type": TASKS[base.is_classifier],
        "base_model_name_or_path": _from_anywhere(model.base.name_or_path),
        "format_version": FORMAT_VERSION,
        "umbra_version": __version__,
        "adapter_id": shadow.adapter_id,
        "shadow": shadow.config.to_dict(),
        "shadow_model_config": _plain_config(shadow.backbone.config),
        "base": model.base_fingerprint,
        **(
            {"classifier": {**labels, "pad_token_id": architectures.pad_token_id(config)}} if base.is_classifier else {}
        ),
        **({} if shadow.draft_tokens is None else {DRAFT_TOKENS: shadow.draft_tokens}),
    }


def _from_anywhere(name: str | None) -> str | None:
    """The base's name as it is found from any folder: local paths are absolute."""
    return os.path.abspath(name) if name and name != EMBEDDED and os.path.isdir(name) else name


def _plain_config(config: PretrainedConfig) -> dict[str, Any]:
    values = json.loads(config.to_json_string(use_diff=False))
    hidden = ("_name_or_path", "architectures", "quantization_config", "transformers_version", "dtype")
    values = {k: v for k, v in values.items() if k not in hidden}
    return {"model_type": config.model_type, **values}


def read_json(path: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of an adapter folder.

    Raises:
        CheckpointError: no such folder or file, or no JSON object in it.
    """
    file = folder.find(path, name)
    if not path.is_dir():
        raise CheckpointError(f"{path} is no adapter folder: it does not exist, or is a file.")
    try:
        values = json.loads(folder.read_text(file), object_pairs_hook=_unique)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is no adapter folder: {name} is missing.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: {error}. Restore the folder from its source.") from error
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{file} is damaged: it holds a {type(values).__name__}. Restore the folder from its source."
        )
    return values


def read_config(path: str | Path) -> dict[str, Any]:
    """The checked content of an adapter folder's ``adapter_config.json``.

    Raises:
        CheckpointError: missing, not JSON, not Umbra's, or of a later format.
    """
    file = folder.find(Path(path), CONFIG_FILE)
    values = read_json(Path(path), CONFIG_FILE)
    if values.get("peft_type") != "UMBRA":
        raise CheckpointError(f"{file} was not written by Umbra (peft_type is {values.get('peft_type')!r:.80}).")
    version = values.get("format_version")
    if isinstance(version, bool) or version not in READABLE:
        raise CheckpointError(
            f"{file} has format {version!r:.80}, this is Umbra {__version__} with format {FORMAT_VERSION}: "
            f"load it with the version that wrote it ({values.get('umbra_version')!r:.40})."
        )
    kinds = {
        "shadow": dict, "shadow_model_config": dict, "base": dict, "task_type": str,
        "base_model_name_or_path": str | None, "adapter_id": str | None, "classifier": dict | None,
        DRAFT_TOKENS: list | None, PROMPTING: dict if version == FORMAT_VERSION else dict | None,
    }  # fmt: skip
    wrong = [k for k, kind in kinds.items() if not isinstance(values.get(k), kind)]
    if wrong:
        raise CheckpointError(
            f"{file} is damaged: {', '.join(wrong)} missing or of another kind. Restore the folder from its source."
        )
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key stands there twice")
    return values


def read_weights(path: str | Path, name: str = WEIGHTS_FILE) -> dict[str, torch.Tensor]:
    """All tensors of a file in an adapter folder.

    Raises:
        CheckpointError: missing, truncated or corrupted.
    """
    file = folder.find(Path(path), name)
    try:
        folder.check_regular(file)
        with safe_open(file, framework="pt") as tensors:
            return {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"{path} is incomplete: {name} is missing.") from None
    except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{file} is damaged: {error}. Restore the folder from its source.") from error


def load(
    path: str | Path,
    base: PreTrainedModel | str | None = None,
    *,
    trainable: bool = False,
    allow_other_base: bool = False,
    shadow: str | None = None,
    **base_options: Any,
) -> ShadowModel:
    """Read an adapter and put it beside its base. Adapters of PEFT and of shadow-peft are read too: see `umbra.adapters.interop`.

    Args:
        path: an adapter folder, or a hub id (``owner/name``, ``owner/name@revision``).
        base: the base model, or where to load it from; by default what the adapter names.
        trainable: keep the shadow's weights trainable; otherwise all are frozen.
        allow_other_base: skip the check that the base is the adapter's own.
        shadow: for an adapter of shadow-peft with an explicit shadow: the path or hub id of that model.
        base_options: for loading the base, such as dtype.

    Raises:
        CheckpointError: a missing or damaged folder, one of a kind that cannot be read, or tensors that do not fit.
        BaseModelError: another base than the adapter's. In the folders of others there is nothing to tell but the sizes.
    """
    saved = _open(path, shadow)
    if base_options and isinstance(base, PreTrainedModel):
        raise ConfigError(f"{', '.join(base_options)}: for loading a base by its name, but a model was given.")
    if base is None or isinstance(base, str):
        name = base or saved.base_name
        if not isinstance(name, str) or not name:
            raise CheckpointError(f"{saved.file} does not name its base: pass base=…")
        base_options = base_options if base else {**saved.base_options, **base_options}
        try:
            base = load_base(name, classifier=saved.classifier(), **base_options)
        except BaseModelError as error:
            where = "" if base else f" {saved.file} names this base: say where it is by base=… or --base."
            raise BaseModelError(f"{error}{where}") from error
    architectures.check_bare(base)
    _check_labels(saved, path, base)
    saved.check(architectures.locate(base), allow_other_base)
    model = attach(base, saved.config, backbone_config=saved.backbone_config)
    try:
        saved.add_tokens(model)
        saved.fill(model.shadow)
        model.shadow.classifier, model.shadow.prompting = saved.classifier() or {}, saved.prompting()
        for name, value in model.shadow.classifier.items():
            if name in NAMES_OF_LABELS:
                setattr(model.config, name, value)
    except BaseException:
        model.unload()
        raise
    if not trainable:
        model.requires_grad_(False)
    return model


def _check_labels(saved: Any, path: str | Path, base: PreTrainedModel) -> None:
    classifier, labels = saved.classifier(), base.config.num_labels
    if architectures.locate(base).is_classifier and classifier is not None and classifier.get("num_labels") != labels:
        raise CheckpointError(f"{path} knows {classifier.get('num_labels')} labels, the base's head {labels}.")


def load_shadow(
    path: str | Path, base: PreTrainedModel, *, trainable: bool = False, allow_other_base: bool = False,
    shadow: str | None = None,
) -> Shadow:  # fmt: skip
    """Read an adapter for a base that carries a shadow already; the base is left alone. See `ShadowModel.load_adapter`.

    Raises:
        CheckpointError, BaseModelError: as `load`; or a classifier of another number of labels.
    """
    saved = _open(path, shadow)
    located = architectures.locate(base)
    _check_labels(saved, path, base)
    saved.check(located, allow_other_base)
    found = Shadow(located, saved.config, saved.backbone_config)
    saved.add_rows(found, located)
    saved.fill(found)
    found.classifier, found.prompting = saved.classifier() or {}, saved.prompting()
    if not trainable:
        found.requires_grad_(False)
    return found


def _open(path: str | Path, shadow: str | None = None) -> Any:
    from umbra.adapters import interop

    source = local_folder(path)

    def read() -> Any:
        if interop.recognise(source):
            return interop.read(source, shadow)
        if shadow is not None:
            raise ConfigError(f"{path} names its shadow itself: shadow=… is for adapters of shadow-peft.")
        return _Saved(source)

    return folder.read_whole(source, read, (CONFIG_FILE, WEIGHTS_FILE))


class _Saved:
    """An adapter folder, read and checked as far as it can be without its base."""

    def __init__(self, path: Path):
        self.path = path
        self.values, self.weights = read_config(self.path), read_weights(self.path)
        self.file, self.source = folder.find(self.path, CONFIG_FILE), folder.find(self.path, WEIGHTS_FILE)
        check_counts(self.values["shadow_model_config"], self.weights, self.file)
        try:
            self.config = ShadowConfig.from_dict(self.values["shadow"])
            self.backbone_config = saved_config(self.values["shadow_model_config"])
        except (ConfigError, TypeError) as error:
            raise CheckpointError(f"{self.file} is damaged: {error}") from error
        self.base_name, self.base_options = self.values.get("base_model_name_or_path"), {}

    def classifier(self) -> dict[str, Any] | None:
        return _classifier(self.values, self.file)

    def prompting(self) -> Prompting:
        values = self.values.get(PROMPTING)
        return BEFORE if values is None else Prompting.read(self.path, values)

    def check(self, base: Anatomy, allow_other_base: bool) -> None:
        task = TASKS[base.is_classifier]
        if task != self.values["task_type"]:
            raise CheckpointError(
                f"{self.path} is an adapter for {self.values['task_type']}, the base given is a model for {task}."
            )
        rows, count = architectures.vocabulary_size(base.embeddings), added_count(self.weights)
        own = self.values["base"].get("vocab_size")
        # V, of a base that has its own tokens alone, or those that this adapter adds as well.
        self.own_rows = rows - count if count and rows - count == own else rows
        if not allow_other_base:
            try:
                heads = base.is_classifier if self.config.train_heads is None else self.config.train_heads
                check_same_base(self.values["base"], base, self.own_rows, heads)
            except UmbraError as error:
                raise type(error)(f"{self.path}: {error}") from error
        rows = self.own_rows + count
        check_sizes(base, self.config, self.backbone_config, self.weights, self.file, self.source, rows)
        self.draft_tokens = draft_tokens(self.values, rows, self.file)
        check_digest(self.values, self.weights, self.file)

    def add_tokens(self, model: ShadowModel) -> None:
        """Make room for the tokens that the adapter adds."""
        if added_count(self.weights):
            model.carry_added_tokens(self.own_rows, added_count(self.weights))

    def add_rows(self, shadow: Shadow, base: Anatomy) -> None:
        """Let a shadow beside others carry the rows of tokens that it adds; the base must have them.

        Raises:
            BaseModelError: it does not.
        """
        if not (count := added_count(self.weights)):
            return
        if architectures.vocabulary_size(base.embeddings) != self.own_rows + count:
            raise BaseModelError(
                f"{self.path} adds {count} tokens, which the other adapters of this base do not know: load it beside a base of "
                "its own, by umbra.load."
            )
        shadow.added_tokens = AddedTokens(base, self.own_rows, shadow.dtype)

    def fill(self, shadow: Shadow) -> None:
        load_weights(shadow, self.weights, self.source)
        shadow.adapter_id = self.values.get("adapter_id") or shadow.adapter_id
        shadow.draft_tokens = self.draft_tokens


def load_draft_tokens(model: ShadowModel, path: Path) -> None:
    """Take the draft vocabulary of an adapter folder, if it has one; a CheckpointError where it is none of this base."""
    rows, file = architectures.vocabulary_size(model.get_input_embeddings()), folder.find(path, CONFIG_FILE)
    model.shadow.draft_tokens = draft_tokens(read_config(path), rows, file) or model.shadow.draft_tokens


def load_weights(shadow: Shadow, weights: dict[str, torch.Tensor], file: Path) -> None:
    """Put the tensors of a file into the shadow, all of them or none.

    Raises:
        CheckpointError: a tensor is missing, left over, misshapen, not floating point or not finite.
    """
    own = own_weights(shadow)
    check_tensors(own, weights, file)
    check_numbers(own, weights, file)
    if any(value.is_meta for value in own.values()):
        return  # where its model was made on the meta device, the shadow has no weights
    shadow.load_state_dict({key.removeprefix(PREFIX): sharded.spread(v, own[key]) for key, v in weights.items()})


def own_weights(shadow: Shadow) -> dict[str, torch.Tensor]:
    """All that an adapter file holds, by its names there."""
    return shadow.state_dict(prefix=PREFIX)


def _classifier(values: dict[str, Any], file: Path) -> dict[str, Any] | None:
    if values["task_type"] != "SEQ_CLS":
        return None
    try:
        id2label = {int(k): v for k, v in values["classifier"]["id2label"].items()}
        return {**values["classifier"], "id2label": id2label, "label2id": {v: k for k, v in id2label.items()}}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged: classifier: {error!r}") from error


def local_folder(path: str | Path) -> Path:
    """The folder itself, or the cached copy of a hub repository (``owner/name``, ``owner/name@revision``)."""
    try:
        if hub.is_path(str(path)) or "/" not in str(path):
            return Path(path).expanduser()
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is no adapter folder: {error}") from error
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = str(path).partition("@")
    wanted = [CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, *TOKENIZER_PATTERNS, *SHADOW_PEFT_FILES]
    try:
        with hub.lookup(repository):
            return Path(snapshot_download(repository, revision=revision or None, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = hub.way_out(repository, error) or error
        raise CheckpointError(f"The adapter {path} cannot be loaded: {reason}") from error
