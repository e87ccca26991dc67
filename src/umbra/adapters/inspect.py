"""What an adapter folder holds, told without loading its base."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from umbra.adapters.files import (
    CONFIG_FILE,
    DRAFT_TOKENS,
    PREFIX,
    PROMPTING,
    WEIGHTS_FILE,
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
from umbra.shadow.pretrained import saved_config


def inspect(path: str) -> dict[str, Any]:
    """Dialect, sizes, parameters per part, base: from the configuration and the header of the weights.

    Raises:
        CheckpointError: no adapter folder, or a damaged one.
    """
    source = local_folder(path)
    facts = folder.read_whole(source, lambda: _read(path, source), (CONFIG_FILE, WEIGHTS_FILE))
    return {"path": str(path), **facts}


def _read(path: str, source: Path) -> dict[str, Any]:
    values = read_optional_json(source, CONFIG_FILE)
    if form := recognise(source, values):
        raise CheckpointError(
            f"{path} is an adapter of {form}: make it Umbra's first, umbra convert {path} --to umbra --out …"
        )
    values = check_config(
        read_json(source, CONFIG_FILE) if values is None else values, folder.find(source, CONFIG_FILE)
    )
    if PROMPTING in values:
        Prompting.read(source, values[PROMPTING])
    file = folder.find(source, WEIGHTS_FILE)
    parts: dict[str, int] = {}
    try:
        folder.check_regular(file)
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                count = 1
                for size in tensors.get_slice(key).get_shape():
                    count *= size
                part = key.removeprefix(PREFIX).partition(".")[0]
                parts[part] = parts.get(part, 0) + count
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise CheckpointError(f"{file} is missing or damaged: {error}") from error
    try:
        return _facts(values, parts)
    except (ConfigError, LookupError, TypeError) as error:
        raise CheckpointError(f"{folder.find(source, CONFIG_FILE)} is damaged: {error!r}") from error


def _facts(values: dict[str, Any], parts: dict[str, int]) -> dict[str, Any]:
    config = ShadowConfig.from_dict(values["shadow"]).resolve()
    own = {k: v for k, v in DIALECTS[config.dialect].items() if k not in ("rank", "gate_rank", "alpha", "init")}
    changed = {k: getattr(config, k) for k, v in own.items() if getattr(config, k) != v}
    constants = CONSTANTS[config.dialect].items()
    changed |= {k: getattr(config.constants, k) for k, v in constants if getattr(config.constants, k) != v}
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
        "parameters": {**parts, "total": sum(parts.values())},
        "base": {
            "name": values.get("base_model_name_or_path"),
            **{k: base[k] for k in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")},
        },
        "prompting": describe(values.get(PROMPTING)),
        "umbra_version": values.get("umbra_version"),
    }


def explain(found: dict[str, Any]) -> str:
    """The same as lines to read."""
    shadow, base, blocks = found["shadow"], found["base"], found["coupled_blocks"]
    whole = blocks == list(range(blocks[0], blocks[-1] + 1))
    where = f"{blocks[0]} to {blocks[-1]}" if whole else ", ".join(map(str, blocks))
    changed = ", ".join(f"{k}={v}" for k, v in found["changed_from_dialect"].items())
    lines = [
        f"{found['path']}: a shadow for {base['name'] or 'an unnamed base'} ({found['task']})",
        f"  dialect     {found['dialect']}" + (f", but {changed}" if changed else ""),
        f"  injection   rank {found['rank']}, α {found['alpha']}, before blocks {where}",
        f"  update      gate rank {found['gate_rank']}",
        f"  λ           {found['auxiliary_loss_weight']}",
        f"  shadow      {shadow['model_type']}, {shadow['num_hidden_layers']} layers of width {shadow['hidden_size']}",
        f"  base        {base['model_type']}, {base['num_hidden_layers']} layers of width {base['hidden_size']}, "
        f"{base['vocab_size']} tokens",
        *([f"  drafts      from {found['draft_vocabulary']} of them"] if found["draft_vocabulary"] else []),
        f"  asked       with {found['prompting']}",
        "  parameters",
    ]
    lines += [f"    {part:<18}{count:>14,}" for part, count in found["parameters"].items()]
    return "\n".join(plain(line).replace("\n", " ") for line in lines)
