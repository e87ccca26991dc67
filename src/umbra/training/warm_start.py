"""Training that starts from an adapter: the configuration of its shadow, its base, its classes and its weights."""

import json
import uuid
from dataclasses import asdict, replace
from typing import Any

from transformers import PreTrainedModel

from umbra.adapters import interop
from umbra.adapters.files import CONFIG_FILE, PROMPTING, local_folder, read_config, read_optional_json
from umbra.adapters.prompting import FORMAT_2_PROMPTING, Prompting
from umbra.config import ShadowConfig, migrate
from umbra.data import Labels
from umbra.errors import ConfigError, DataError
from umbra.model import loading
from umbra.model.shadow_model import ShadowModel
from umbra.options import TrainOptions, names


def adopt(options: TrainOptions, given: dict[str, Any]) -> tuple[TrainOptions, ShadowConfig]:
    """Return the options with the adapter's base, unless another one is set, and the adapter's shadow configuration.

    Args:
        options: the run's options.
        given: all settings of the run; those of the shadow must agree with the adapter.

    Raises:
        ConfigError: settings that differ, all named; or an adapter that does not name its base.
        CheckpointError: the folder holds no adapter of Umbra.
    """
    path = local_folder(options.adapter or "")
    values = read_optional_json(path, CONFIG_FILE)
    if interop.recognise(path, values) is not None:
        raise ConfigError(
            f"adapter={options.adapter} is an adapter of another package: convert it first (umbra convert … --to umbra)."
        )
    values = read_config(path)
    config = ShadowConfig.from_dict(values["shadow"])
    saved = json.loads(json.dumps(config.to_dict()))
    shadow = migrate(given)
    if "constants" in shadow:
        shadow["constants"] = asdict(ShadowConfig(constants=shadow["constants"]).constants)
        shadow["constants"] = {k: saved["constants"][k] if v is None else v for k, v in shadow["constants"].items()}
    shadow = json.loads(json.dumps(shadow))
    changed = sorted(k for k in names(ShadowConfig) if k in shadow and shadow[k] != saved[k])
    if changed:
        differences = ", ".join(f"{k}: {saved[k]!r} → {shadow[k]!r}" for k in changed)
        raise ConfigError(
            f"adapter={options.adapter} has other settings of the shadow ({differences}): leave them out: the adapter's apply."
        )
    base = options.base if "base" in given else values["base_model_name_or_path"]
    if not base:
        raise ConfigError(f"adapter={options.adapter} does not name its base: set base (--base).")
    return replace(options, base=base), config


def prompting_of(adapter: str, given: dict[str, Any]) -> Prompting:
    """Return the adapter's prompting, overridden by the settings of the run."""
    path = local_folder(adapter)
    entry = read_config(path).get(PROMPTING)
    prompting = FORMAT_2_PROMPTING if entry is None else Prompting.read(path, entry)
    return prompting.replaced(None, given.get("chat_template"), given.get("chat_template_kwargs"))


def classes(adapter: str, labels: Labels | None) -> Labels | None:
    """Return the adapter's classes, in its order; None for a language model.

    Args:
        adapter: the adapter.
        labels: the labels of the training data.

    Raises:
        DataError: data of another task, or with a class that the adapter does not have.
    """
    values = read_config(local_folder(adapter))
    known = values.get("classifier")
    if (known is None) != (labels is None):
        kinds = ("text and its labels", "prompts and completions")
        raise DataError(
            f"adapter={adapter} learned from {kinds[known is None]}, the training data holds {kinds[labels is None]}."
        )
    if known is None or labels is None:
        return None
    known_names = tuple(str(v) for _, v in sorted(known["id2label"].items(), key=lambda item: int(item[0])))
    problem = known.get("problem_type") or labels.problem_type
    if problem != labels.problem_type or (problem == "regression" and known["num_labels"] != labels.width):
        raise DataError(
            f"adapter={adapter} is trained for {problem} with {known['num_labels']} outputs; the training data's labels are of "
            f"{labels.problem_type} with {labels.width}."
        )
    if unknown := sorted(set(labels.names) - set(known_names)):
        raise DataError(
            f"The training data has classes that adapter={adapter} does not know: {', '.join(unknown[:5])}. It knows "
            f"{', '.join(known_names[:20])}; train a new adapter for other classes."
        )
    return Labels(problem, labels.names if problem == "regression" else known_names, known["num_labels"])


def load(adapter: str, base: PreTrainedModel, shadow: ShadowConfig) -> ShadowModel:
    """Return the base with the adapter's shadow, trainable, under a new adapter id."""
    model = loading.load(adapter, base, trainable=True)
    model.shadow.config, model.shadow.adapter_id = shadow, uuid.uuid4().hex
    return model
