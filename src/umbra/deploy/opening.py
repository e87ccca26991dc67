"""Open any folder that Umbra writes and that can be run: an adapter, a detached shadow, a pretrained one.

Every verb that runs a model (eval, generate, predict, export) opens it here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from umbra.adapters.files import CONFIG_FILE, is_umbra, local_folder, read_json, read_optional_json
from umbra.adapters.interop import recognise
from umbra.adapters.prompting import open_formatter
from umbra.base.loading import load_base, load_tokenizer
from umbra.data import ChatFormatter
from umbra.deploy.detach import formatter_of
from umbra.errors import CheckpointError, ConfigError
from umbra.files import folder, manifest
from umbra.model.loading import load
from umbra.model.shadow_model import ShadowModel
from umbra.shadow.pretrained import LANGUAGE_MODELS, PROJECTED

ADAPTER, DETACHED, PRETRAINED, STOCK = "adapter", "detached", "pretrained", "stock"  # kinds of folder
MODES = ("base", "attached", "detached")
CLASSIFIERS = frozenset(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values())
EXPECTED = "adapter folder (umbra train), detached shadow (umbra detach) or pretrained shadow (umbra pretrain)"


@dataclass(frozen=True)
class Opened:
    """A folder that was opened.

    Args:
        kind: one of `ADAPTER`, `DETACHED`, `PRETRAINED` and `STOCK`, any other model of transformers.
        model: a `ShadowModel` for an adapter, otherwise a stock model.
        formatter: formats its prompts and has its tokenizer.
    """

    kind: str
    model: PreTrainedModel
    formatter: ChatFormatter

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes in which the model can answer: a folder without a base has only the shadow."""
        return MODES if isinstance(self.model, ShadowModel) else ("detached",)

    def mode(self, name: str | None) -> str:
        """Return the mode that is asked for, by default attached, or detached where there is no base.

        Raises:
            ConfigError: the folder cannot run in it.
        """
        if name is None:
            return "attached" if "attached" in self.modes else "detached"
        if name not in MODES:
            raise ConfigError(f"Unknown mode {name!r}: choose from {', '.join(MODES)}.")
        if name not in self.modes:
            raise ConfigError(f"A {self.kind} folder has no base, so it cannot run {name}: use --mode detached.")
        return name

    @property
    def has_untrained_head(self) -> bool:
        """Whether the base was a language model on disk, to which a new classification head was added."""
        if self.model.can_generate() or not isinstance(self.model, ShadowModel):
            return False
        return CLASSIFIERS.isdisjoint(self.model.base.config.architectures or ())

    @property
    def escalation(self) -> str | None:
        """The text of an answer that escalates, if the shadow has one."""
        if not self.model.can_generate():
            return None
        if isinstance(self.model, ShadowModel):
            return self.model.shadow_config.escalation
        return getattr(self.model.generation_config, "escalation", None)


def kind_of(path: str) -> str:
    """Return the kind of a folder.

    Args:
        path: a folder, or a hub id.

    Raises:
        CheckpointError: the folder holds no model that can be run; the message says what it seems to be.
    """
    source = local_folder(path)
    values = read_optional_json(source, CONFIG_FILE) if source.is_dir() else None
    if recognise(source, values) or (values is not None and is_umbra(values)):
        return ADAPTER
    if values is None and source.is_dir() and folder.find(source, "config.json").is_file():
        return _stock_kind(path, source)
    raise CheckpointError(f"{path} is no {EXPECTED}: {_appearance(source, values)}.")


def _stock_kind(path: str, source: Path) -> str:
    """The kind of a folder with a ``config.json``."""
    config = read_json(source, "config.json")
    if config.get("model_type") == PROJECTED:
        raise CheckpointError(
            f"{path} is a pretrained shadow with a projection to its base's width, which cannot run alone: "
            f"train with it (umbra train --shadow {path})."
        )
    classes = config.get("architectures") or ()
    if LANGUAGE_MODELS.isdisjoint(classes) and CLASSIFIERS.isdisjoint(classes):
        raise CheckpointError(
            f"{path} holds a {', '.join(map(str, classes)) or 'model of an unnamed class'}, which has neither a language-model "
            f"head nor a classification head; expected is an {EXPECTED}."
        )
    written = manifest.read(source)
    command = written.asked.get("command") if written is not None and isinstance(written.asked, dict) else None
    if command in ("detach", "export"):
        return DETACHED
    return PRETRAINED if folder.find(source, "run.json").is_file() else STOCK


def _appearance(source: Path, values: dict[str, Any] | None) -> str:
    """What a folder that cannot be run seems to be, and how to go on."""
    if not source.exists():
        return "there is no such folder; check the path"
    if source.is_file():
        return "it is a file; give the folder that holds it"
    if values is not None:
        return f"it holds an adapter of the type {values.get('peft_type')!r:.80} of PEFT; load it with PeftModel"
    if (source / "prompt.json").is_file() and (source / "run.py").is_file():
        return f'it is an exported model; run it with python {source}/run.py "a text", or give the folder it was exported from'
    if checkpoints := sorted(source.glob("checkpoint-*"), key=lambda p: (len(p.name), p.name)):
        return f"it holds an unfinished run; finish it, or give one of its checkpoints, such as {checkpoints[-1]}"
    if (source / "study.yaml").is_file() or (source / "records").is_dir():
        return "it seems to be a study; give the folder of one of its adapters"
    if (source / "adapter_model.safetensors").is_file():
        return f"it has the weights of an adapter, but {CONFIG_FILE} is missing; restore it from its source"
    if any(source.glob("*.safetensors")):
        return "it has weights, but config.json is missing; restore it from its source"
    return "it is empty" if folder.is_empty(source) else "it holds neither adapter_config.json nor config.json"


def open_model(
    path: str, base: str | None = None, *, chat_template: bool | None = None,
    chat_template_kwargs: dict[str, Any] | None = None, **options: Any,
) -> Opened:  # fmt: skip
    """Open a folder of any kind.

    Args:
        path: an adapter folder, a detached or pretrained shadow, another model of transformers, or a hub id.
        base: path or hub id of an adapter's base; None for the one that it names.
        chat_template: overrides the setting that the folder stores.
        chat_template_kwargs: likewise.
        options: for loading the base or the stock model, such as dtype.

    Raises:
        CheckpointError: see `kind_of` and `umbra.load`.
        BaseModelError: the model, its base or its tokenizer cannot be loaded.
        ConfigError: a base for a folder that needs none.
    """
    kind = kind_of(path)
    if kind == ADAPTER:
        attached = load(path, base, **options).eval()
        return Opened(kind, attached, open_formatter(attached, chat_template, chat_template_kwargs))
    if base is not None:
        raise ConfigError(f"{path} is a complete model without a base ({kind}): leave out --base.")
    classes = read_json(local_folder(path), "config.json").get("architectures") or ()
    classifier: dict[str, Any] | None = None if CLASSIFIERS.isdisjoint(classes) else {}
    stock = load_base(path, classifier=classifier, **options).eval()
    return Opened(kind, stock, formatter_of(stock, load_tokenizer(path), chat_template, chat_template_kwargs))
