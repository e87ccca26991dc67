"""Describe an adapter folder without loading its base: ``umbra inspect``."""

import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from umbra.adapters.files import (
    CONFIG_FILE,
    DRAFT_TOKENS,
    PREFIX,
    PROMPTING,
    WEIGHTS_FILE,
    Values,
    check_config,
    local_folder,
    read_json,
    read_optional_json,
)
from umbra.adapters.interop import recognise
from umbra.adapters.prompting import Prompting, describe
from umbra.config import CONSTANTS, DIALECTS, ShadowConfig
from umbra.errors import CheckpointError, ConfigError, plain
from umbra.files import folder
from umbra.options import EMBEDDED, EMBEDDED_ORIGIN
from umbra.shadow.pretrained import saved_config


def inspect(path: str) -> dict[str, Any]:
    """Return an adapter's dialect, sizes, parameters by part, and base.

    Only the configuration and the header of the weights are read.

    Args:
        path: an adapter folder, or a hub id.

    Raises:
        CheckpointError: the folder holds no adapter of Umbra, or is damaged.
    """
    source = local_folder(path)
    description = folder.read_whole(source, lambda: _read(path, source), (CONFIG_FILE, WEIGHTS_FILE))
    return {"path": str(path), **description}


def _read(path: str, source: Path) -> dict[str, Any]:
    values = read_optional_json(source, CONFIG_FILE)
    if package := recognise(source, values):
        raise CheckpointError(
            f"{path} is an adapter of {package}: convert it first, umbra convert {path} --to umbra --out …"
        )
    file = folder.find(source, CONFIG_FILE)
    values = check_config(read_json(source, CONFIG_FILE) if values is None else values, file)
    if PROMPTING in values:
        Prompting.read(source, values[PROMPTING])
    parameters = _count_parameters(folder.find(source, WEIGHTS_FILE))
    try:
        return _describe(values, parameters)
    except (ConfigError, LookupError, TypeError) as error:
        raise CheckpointError(f"{folder.find(source, CONFIG_FILE)} is damaged: {error!r}") from error


def _count_parameters(file: Path) -> dict[str, int]:
    """Parameter counts by part of the shadow, from the header of the weights."""
    counts: dict[str, int] = {}
    try:
        folder.check_regular(file)
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                part = key.removeprefix(PREFIX).partition(".")[0]
                counts[part] = counts.get(part, 0) + math.prod(tensors.get_slice(key).get_shape())
    except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{file} is missing or damaged: {error}") from error
    return counts


def _describe(values: Values, parameters: dict[str, int]) -> dict[str, Any]:
    """The description, from the content of ``adapter_config.json``."""
    config = ShadowConfig.from_dict(values["shadow"]).resolve()
    fixed = {k: v for k, v in DIALECTS[config.dialect].items() if k not in ("rank", "gate_rank", "alpha", "init")}
    changed = {k: v for k, v in config.to_dict().items() if k in fixed and v != fixed[k]}
    constants = CONSTANTS[config.dialect]
    changed |= {k: v for k, v in config.to_dict()["constants"].items() if k in constants and v != constants[k]}
    shadow, base = saved_config(values["shadow_model_config"]), values["base"]
    return {
        "task": values["task_type"],
        "dialect": config.dialect,
        "changed_from_dialect": changed,
        "rank": config.rank,
        "gate_rank": config.gate_rank,
        "alpha": config.alpha,
        "auxiliary_loss_weight": config.auxiliary_loss_weight,
        "coupled_blocks": list(config.coupled(base["num_hidden_layers"])),
        "shadow": {k: getattr(shadow, k) for k in ("model_type", "num_hidden_layers", "hidden_size")},
        "draft_vocabulary": None if values.get(DRAFT_TOKENS) is None else len(values[DRAFT_TOKENS]),
        "parameters": {**parameters, "total": sum(parameters.values())},
        "base": {
            "name": values.get("base_model_name_or_path"),
            **{k: base[k] for k in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")},
        },
        "prompting": describe(values.get(PROMPTING)),
        "umbra_version": values.get("umbra_version"),
    }


def explain(description: dict[str, Any]) -> str:
    """Return the description that `inspect` returned as lines of text."""
    shadow, base, blocks = description["shadow"], description["base"], description["coupled_blocks"]
    contiguous = blocks == list(range(blocks[0], blocks[-1] + 1))
    before = f"{blocks[0]} to {blocks[-1]}" if contiguous else ", ".join(map(str, blocks))
    changed = ", ".join(f"{k}={v}" for k, v in description["changed_from_dialect"].items())
    lines = [
        f"{description['path']}: a shadow for {base['name'] or 'an unnamed base'} ({description['task']})",
        f"  dialect     {description['dialect']}" + (f", but {changed}" if changed else ""),
        f"  injection   rank {description['rank']}, α {description['alpha']}, before blocks {before}",
        f"  update      gate rank {description['gate_rank']}",
        f"  λ           {description['auxiliary_loss_weight']}",
        f"  shadow      {shadow['model_type']}, {shadow['num_hidden_layers']} layers of width {shadow['hidden_size']}",
        f"  base        {base['model_type']}, {base['num_hidden_layers']} layers of width {base['hidden_size']}, "
        f"{base['vocab_size']} tokens",
        *([f"              {EMBEDDED_ORIGIN}"] if base["name"] == EMBEDDED else []),
        *([f"  drafts      from {description['draft_vocabulary']} tokens"] if description["draft_vocabulary"] else []),
        f"  prompts     {description['prompting']}",
        "  parameters",
    ]
    lines += [f"    {part:<18}{count:>14,}" for part, count in description["parameters"].items()]
    return "\n".join(plain(line).replace("\n", " ") for line in lines)
