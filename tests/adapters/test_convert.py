"""What a foreign format cannot express is refused by name, and nothing is written then."""

import re

import pytest

from support.tiny import make, make_base
from umbra import CheckpointError, ConfigError
from umbra.adapters.interop import FORMATS
from umbra.cli import main
from umbra.deploy.convert import convert

PAPER, PEFT = {"dialect": "paper"}, {"dialect": "peft"}
INEXPRESSIBLE = [
    ("peft", "llama", PAPER, "norm=True"),
    ("peft", "llama", {**PEFT, "constants": {"activation": "silu"}}, "activation=silu"),
    ("peft", "llama", {**PEFT, "constants": {"bias": False}}, "bias=False"),
    ("peft", "llama", {**PEFT, "dropout": 0.1, "constants": {"dropout_position": "rank"}}, "dropout_position=rank"),
    ("peft", "llama", {**PEFT, "layers": (0, 2)}, "[0, 2]"),
    ("peft", "llama", {**PEFT, "shadow_hidden_size": 16}, "projected shared embeddings"),
    ("peft", "llama", {**PEFT, "train_heads": True}, "heads.shadow.weight"),
    ("peft", "llama", {**PEFT, "shadow_num_key_value_heads": 4}, "num_key_value_heads=4"),
    ("peft", "llama", {**PEFT, "shadow_head_dim": 4}, "head_dim=4"),
    ("peft", "mistral", {**PEFT, "shadow": "dense"}, "shadow with"),
    ("peft", "qwen3_moe", PEFT, "shadow with"),
    ("shadow-peft", "llama", PEFT, "norm=False"),
    ("shadow-peft", "llama", {**PAPER, "first_layer": 0}, "[0, 1, 2, 3]"),
    ("shadow-peft", "llama", {**PAPER, "layers": (1, 2)}, "[1, 2]"),
    ("shadow-peft", "llama", {**PAPER, "gate_rank": 1}, "gate_rank=1"),
    ("shadow-peft", "llama", {**PAPER, "constants": {"norm": False}}, "norm=False"),
    ("shadow-peft", "llama", {**PAPER, "embeddings": "own"}, "embeddings='own'"),
    ("shadow-peft", "llama", {**PAPER, "shadow_hidden_size": 16}, "projected shared embeddings"),
    ("shadow-peft", "tied", {**PAPER, "train_heads": True}, "trained heads"),
]


@pytest.mark.parametrize(("to", "base", "fields", "named"), INEXPRESSIBLE)
def test_inexpressible_fields_are_named(to, base, fields, named, tmp_path):
    model = (
        make("llama", base_options={"tie_word_embeddings": True}, **fields) if base == "tied" else make(base, **fields)
    )
    with pytest.raises(CheckpointError, match=re.escape(named)):
        convert(model, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", FORMATS)
def test_pretrained_shadow_sharing_base_embeddings_is_refused(to, tmp_path):
    make_base(num_hidden_layers=1).save_pretrained(tmp_path / "shadow")
    model = make(dialect="peft" if to == "peft" else "paper", shadow=str(tmp_path / "shadow"), embeddings="base")
    with pytest.raises(CheckpointError, match="embeddings"):
        convert(model, tmp_path / "out", to)


@pytest.mark.parametrize("to", [*FORMATS, "umbra"])
def test_convert_overwrites_nothing(to, tmp_path):
    (tmp_path / "kept").write_text("x")
    with pytest.raises(CheckpointError, match="not empty"):
        convert(make(), tmp_path, to)
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_unknown_format_is_named(tmp_path, capsys):
    with pytest.raises(ConfigError, match="onnx"):
        convert(make(), tmp_path / "out", "onnx")
    assert main(["convert", str(tmp_path), "--to", "onnx", "--out", str(tmp_path / "out")]) == 2
    assert main(["convert", str(tmp_path)]) == 2
    assert "--to" in capsys.readouterr().err


@pytest.mark.parametrize("to", FORMATS)
def test_full_disk_leaves_no_partial_output(to, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("umbra.adapters.interop.save_file", full)
    with pytest.raises(CheckpointError, match="No space"):
        convert(make(dialect="peft" if to == "peft" else "paper"), tmp_path / "out", to)
    assert list((tmp_path / "out").iterdir()) == []
