"""Read and edit adapter folders."""

import json
from pathlib import Path

import torch

import umbra
from support.tiny import tokens

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
FILES = {CONFIG, WEIGHTS, CARD}
FIXTURES = Path(__file__).parents[1] / "fixtures"  # adapters saved by earlier releases
TENSOR = "shadow.couplings.injections.1.down.weight"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def hook_count(base) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in base.modules())


def assert_same_weights(found: umbra.ShadowModel, expected: umbra.ShadowModel) -> None:
    weights, wanted = found.shadow.state_dict(), expected.shadow.state_dict()
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[k], v) and weights[k].dtype == v.dtype for k, v in wanted.items())


def assert_same_model(found: umbra.ShadowModel, expected: umbra.ShadowModel) -> None:
    """Assert that shadow weights, logits and configuration are equal bit for bit."""
    assert_same_weights(found, expected)
    assert found.shadow_config == expected.shadow_config
    assert found.shadow.adapter_id == expected.shadow.adapter_id
    with torch.no_grad():
        assert torch.equal(found(tokens()).logits, expected(tokens()).logits)


def edit_config(folder: Path, **changes) -> None:
    """Set keys of adapter_config.json; a value of ``...`` removes the key."""
    values = {**json.loads((folder / CONFIG).read_text()), **changes}
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))
