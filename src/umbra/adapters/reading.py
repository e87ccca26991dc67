"""Read an adapter folder, of Umbra or of another package, and put its weights into a shadow.

Reading is strict: a tensor that is missing, unknown, misshapen or not finite is an error, never a random weight, and so is
content that does not match the folder's own SHA-256 checksum (integrity.py).
"""

from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from umbra.adapters import interop
from umbra.adapters.files import (
    CONFIG_FILE,
    PREFIX,
    PROMPTING,
    TASKS,
    WEIGHTS_FILE,
    Tensors,
    Values,
    check_config,
    local_folder,
    read_config,
    read_json,
    read_optional_json,
    read_weights,
)
from umbra.adapters.integrity import (
    check_counts,
    check_digest,
    check_numbers,
    check_sizes,
    check_tensors,
    draft_tokens,
)
from umbra.adapters.interop.foreign import Foreign
from umbra.adapters.prompting import FORMAT_2_PROMPTING, Prompting
from umbra.base import architectures, sharded
from umbra.base.added_tokens import AddedTokens, added_count
from umbra.base.architectures import Architecture
from umbra.base.fingerprint import check_same_base
from umbra.base.loading import load_base
from umbra.config import ShadowConfig
from umbra.errors import BaseModelError, CheckpointError, ConfigError, UmbraError
from umbra.files import folder
from umbra.options import EMBEDDED, EMBEDDED_ORIGIN
from umbra.shadow.network import Shadow
from umbra.shadow.pretrained import saved_config


class SavedAdapter:
    """An adapter folder of Umbra, read and checked as far as possible without its base.

    Args:
        path: the folder.
        values: the content of its ``adapter_config.json``.

    Raises:
        CheckpointError: the folder is damaged, or was not written by a version that this one can read.
    """

    def __init__(self, path: Path, values: Values):
        self.path = path
        self.file, self.source = folder.find(path, CONFIG_FILE), folder.find(path, WEIGHTS_FILE)
        self.values, self.weights = check_config(values, self.file), read_weights(path)
        check_counts(values["shadow_model_config"], self.weights, self.file)
        try:
            self.config = ShadowConfig.from_dict(values["shadow"])
            self.backbone_config = saved_config(values["shadow_model_config"])
        except (ConfigError, TypeError) as error:
            raise CheckpointError(f"{self.file} is damaged: {error}") from error
        self.base_name: str | None = values.get("base_model_name_or_path")
        self.base_options: dict[str, str] = {}
        self.added_count = added_count(self.weights)
        self.base_rows = 0
        self.draft_tokens: list[int] | None = None

    @cached_property
    def classifier(self) -> Values | None:
        """The label entries of the base's configuration, for a classifier; None for a language model."""
        if self.values["task_type"] != TASKS[True]:
            return None
        try:
            classifier = self.values["classifier"]
            id2label = {int(k): v for k, v in classifier["id2label"].items()}
            return {**classifier, "id2label": id2label, "label2id": {v: k for k, v in id2label.items()}}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{self.file} is damaged: classifier: {error!r}") from error

    def prompting(self) -> Prompting:
        """Read the tokenizer and the chat template settings."""
        values = self.values.get(PROMPTING)
        return FORMAT_2_PROMPTING if values is None else Prompting.read(self.path, values)

    def check(self, base: Architecture, allow_other_base: bool) -> None:
        """Check the adapter against a base; nothing is allocated that the file does not hold.

        Args:
            base: the base's parts.
            allow_other_base: skip the comparison of fingerprints.

        Raises:
            BaseModelError: it is not the base that the adapter was trained on.
            CheckpointError: the folder is damaged, was changed, or is for another task.
        """
        task = TASKS[base.is_classifier]
        if task != self.values["task_type"]:
            raise CheckpointError(
                f"{self.path} is an adapter for {self.values['task_type']}, the base given is a model for {task}."
            )
        rows = architectures.vocabulary_size(base.embeddings)
        expected = self.values["base"].get("vocab_size")
        # V, of a base that has its tokens alone, or also those that this adapter adds.
        self.base_rows = rows - self.added_count if self.added_count and rows - self.added_count == expected else rows
        if not allow_other_base:
            try:
                has_heads = base.is_classifier if self.config.train_heads is None else self.config.train_heads
                check_same_base(self.values["base"], base, self.base_rows, has_heads)
            except UmbraError as error:
                raise type(error)(f"{self.path}: {error}") from error
        rows = self.base_rows + self.added_count
        check_sizes(base, self.config, self.backbone_config, self.weights, self.file, self.source, rows)
        self.draft_tokens = draft_tokens(self.values, rows, self.file)
        check_digest(self.values, self.weights, self.file)

    def add_rows(self, shadow: Shadow, base: Architecture) -> None:
        """Add the rows of added tokens to a shadow that joins other adapters; the base must have these rows already.

        Raises:
            BaseModelError: the base does not have them.
        """
        if not self.added_count:
            return
        if architectures.vocabulary_size(base.embeddings) != self.base_rows + self.added_count:
            raise BaseModelError(
                f"{self.path} adds {self.added_count} tokens, which the other adapters of this base do not know: load it "
                "beside a base of its own, by umbra.load."
            )
        shadow.added_tokens = AddedTokens(base, self.base_rows, shadow.dtype)

    def fill(self, shadow: Shadow) -> None:
        """Load the tensors into ``shadow``, and set its id and its draft vocabulary.

        Raises:
            CheckpointError: see `load_weights`.
        """
        load_weights(shadow, self.weights, self.source)
        shadow.adapter_id = self.values.get("adapter_id") or shadow.adapter_id
        shadow.draft_tokens = self.draft_tokens


def open_adapter(path: str | Path, shadow: str | None = None) -> SavedAdapter | Foreign:
    """Read an adapter folder; a writer that replaces its files meanwhile is waited for.

    Args:
        path: a folder, or a hub id.
        shadow: the path or hub id of an explicit shadow, which adapters of shadow-peft do not name.

    Returns:
        The adapter, not yet checked against a base.

    Raises:
        CheckpointError: the folder is missing, damaged, or of a kind that cannot be read.
        ConfigError: ``shadow`` was given for an adapter that names its shadow.
    """
    source = local_folder(path)

    def read() -> SavedAdapter | Foreign:
        values = read_optional_json(source, CONFIG_FILE)
        if interop.recognise(source, values):
            return interop.read(source, values, shadow)
        if shadow is not None:
            raise ConfigError(f"{path} names its shadow itself: shadow=… is for adapters of shadow-peft.")
        return SavedAdapter(source, read_json(source, CONFIG_FILE) if values is None else values)

    return folder.read_whole(source, read, (CONFIG_FILE, WEIGHTS_FILE))


def open_with_base(
    path: str | Path, base: PreTrainedModel | str | None, *, allow_other_base: bool, shadow: str | None,
    base_options: dict[str, Any],
) -> tuple[SavedAdapter | Foreign, PreTrainedModel]:  # fmt: skip
    """Read an adapter, load its base unless a model is given, and check that they belong together.

    Args:
        path: a folder, or a hub id.
        base: the base model, or where to load it from; None for the name that the adapter stores.
        allow_other_base: skip the comparison of fingerprints.
        shadow: see `open_adapter`.
        base_options: keyword arguments for loading the base.

    Returns:
        The checked adapter, and the base.

    Raises:
        CheckpointError: the folder is missing, damaged, does not name its base, or does not fit it.
        BaseModelError: the base cannot be loaded, or is not the adapter's.
        ConfigError: ``base_options`` beside a base that is a model.
    """
    if "is_trainable" in base_options:
        raise ConfigError("is_trainable is an argument of PEFT: write trainable=….")
    saved = open_adapter(path, shadow)
    if base_options and isinstance(base, PreTrainedModel):
        raise ConfigError(f"{', '.join(base_options)}: for loading a base by its name, but a model was given.")
    if base is None or isinstance(base, str):
        name = base or saved.base_name
        if not isinstance(name, str) or not name:
            raise CheckpointError(f"{saved.file} does not name its base: pass base=…")
        options = base_options if base else {**saved.base_options, **base_options}
        try:
            base = load_base(name, classifier=saved.classifier, **options)
        except BaseModelError as error:
            hint = "" if base else f" {saved.file} names this base: say where it is by base=… or --base."
            raise BaseModelError(f"{error}{hint}") from error
    architectures.check_bare(base)
    _check(saved, path, base, allow_other_base)
    return saved, base


def load_shadow(
    path: str | Path, base: PreTrainedModel, *, trainable: bool = False, allow_other_base: bool = False,
    shadow: str | None = None,
) -> Shadow:  # fmt: skip
    """Read an adapter for a base that carries a shadow already; the base does not change.

    Args:
        path: a folder, or a hub id.
        base: the base.
        trainable: keep the shadow's weights trainable; otherwise all are frozen.
        allow_other_base: skip the check that the base is the adapter's.
        shadow: see `open_adapter`.

    Returns:
        The shadow.

    Raises:
        CheckpointError, BaseModelError: as `open_with_base`.
    """
    saved = open_adapter(path, shadow)
    _check(saved, path, base, allow_other_base)
    located = architectures.locate(base)
    loaded = Shadow(located, saved.config, saved.backbone_config)
    saved.add_rows(loaded, located)
    restore(loaded, saved)
    if not trainable:
        loaded.requires_grad_(False)
    return loaded


def restore(shadow: Shadow, saved: SavedAdapter | Foreign) -> None:
    """Put the weights, label names and prompting of a checked adapter into ``shadow``.

    Raises:
        CheckpointError: tensors that do not fit the shadow, or a damaged tokenizer.
    """
    saved.fill(shadow)
    shadow.classifier, shadow.prompting = saved.classifier or {}, saved.prompting()


def restore_checkpoint(shadow: Shadow, base: PreTrainedModel, path: Path) -> None:
    """Put the weights and the draft vocabulary of a trainer's checkpoint into the shadow that was being trained.

    Args:
        shadow: the shadow.
        base: the base to which it is attached.
        path: the checkpoint's folder, which holds an adapter.

    Raises:
        CheckpointError: a missing or damaged folder, or tensors that do not fit.
    """
    load_weights(shadow, read_weights(path), path / WEIGHTS_FILE)
    rows = architectures.vocabulary_size(base.get_input_embeddings())
    tokens = draft_tokens(read_config(path), rows, folder.find(path, CONFIG_FILE))
    shadow.draft_tokens = tokens or shadow.draft_tokens


def load_weights(shadow: Shadow, weights: Tensors, file: Path) -> None:
    """Put the tensors of a file into the shadow, all of them or none.

    Args:
        shadow: the shadow.
        weights: tensors by their names in the file.
        file: the file, for the message.

    Raises:
        CheckpointError: a tensor is missing, unknown, misshapen, not floating point or not finite.
    """
    state = shadow.state_dict(prefix=PREFIX)
    check_tensors(state, weights, file)
    check_numbers(state, weights, file)
    if any(value.is_meta for value in state.values()):
        return  # the model was made on the meta device: its shadow has no weights
    shadow.load_state_dict({key.removeprefix(PREFIX): sharded.spread(v, state[key]) for key, v in weights.items()})


def _check(saved: SavedAdapter | Foreign, path: str | Path, base: PreTrainedModel, allow_other_base: bool) -> None:
    """Check the number of labels, and whatever else the adapter knows of its base."""
    located, classifier, num_labels = architectures.locate(base), saved.classifier, base.config.num_labels
    if located.is_classifier and classifier is not None and classifier.get("num_labels") != num_labels:
        raise CheckpointError(f"{path} knows {classifier.get('num_labels')} labels, the base's head {num_labels}.")
    try:
        saved.check(located, allow_other_base)
    except BaseModelError as error:
        if saved.base_name != EMBEDDED:
            raise
        raise BaseModelError(f"{error} {EMBEDDED_ORIGIN}.") from error
