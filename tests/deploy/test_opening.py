"""Folders of every kind are opened by every verb that runs a model; any other folder gets an error that says what it is."""

import json
from pathlib import Path

import pytest

import umbra
from support.runs import pretrain_settings, train_settings, write
from umbra.cli import main
from umbra.deploy.opening import kind_of

CLASSES = [{"text": c * 3, "label": "vowel" if c in "ae" else "consonant"} for c in "abcdef"]
KINDS = {"adapter": "adapter", "detached": "detached", "pretrained": "pretrained", "stock": "stock"}
VERBS = ("eval", "generate", "predict", "export")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, base_folder) -> Path:
    """An adapter, its detached shadow and a pretrained shadow; a classifier's adapter and its detached shadow."""
    root = tmp_path_factory.mktemp("folders")
    settings = train_settings(root, base_folder) | {"output_dir": str(root / "adapter")}
    pretraining = pretrain_settings(root, base_folder) | {"output_dir": str(root / "pretrained"), "max_steps": 2}
    classes = {
        "base": base_folder, "train_data": write(root / "classes.jsonl", CLASSES), "output_dir": str(root / "classifier"),
        "use_cpu": True, "disable_tqdm": True, "max_steps": 2, "report_to": "none",
    }  # fmt: skip
    for verb, values in (("train", settings), ("pretrain", pretraining), ("train", classes)):
        (root / "settings.yaml").write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in values.items()))
        assert main([verb, str(root / "settings.yaml")]) == 0
    assert main(["detach", str(root / "adapter"), str(root / "detached")]) == 0
    assert main(["detach", str(root / "classifier"), str(root / "detached-classifier")]) == 0
    (root / "stock").symlink_to(base_folder)
    return root


def command(verb: str, root: Path, name: str, out: Path) -> list[str]:
    """The arguments of a verb for the folder ``name``."""
    data = root / ("classes.jsonl" if "classifier" in name else "train.jsonl")
    return {
        "eval": ["eval", str(root / name), str(data), "--limit", "4", "--json"],
        "generate": ["generate", str(root / name), "1+1=", "--max-new-tokens", "3", "--json"],
        "predict": ["predict", str(root / name), str(data), "--max-new-tokens", "3"],
        "export": ["export", str(root / name), "--to", "hf", "--out", str(out), "--max-new-tokens", "3", "--json"],
    }[verb]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_verb_opens_every_kind(folders, tmp_path, capsys, verb, kind):
    assert kind_of(str(folders / kind)) == KINDS[kind]
    assert main(command(verb, folders, kind, tmp_path / "out")) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    if verb == "eval":
        modes = [score["mode"] for score in json.loads(printed)]
        assert modes == (["base", "attached", "detached"] if kind == "adapter" else ["detached"])
    if verb == "predict":
        assert len(printed.splitlines()) == 24


@pytest.mark.parametrize("verb", ["eval", "predict", "export"])
@pytest.mark.parametrize("name", ["classifier", "detached-classifier"])
def test_every_verb_opens_a_classifier(folders, tmp_path, capsys, verb, name):
    assert main(command(verb, folders, name, tmp_path / "out")) == 0, capsys.readouterr().err


def test_detached_folder_scores_as_its_adapter(folders, capsys):
    scores = []
    for name in ("adapter", "detached"):
        assert main([*command("eval", folders, name, folders), "--modes", "detached"]) == 0
        [score] = json.loads(capsys.readouterr().out)
        scores.append({k: v for k, v in score.items() if k not in ("seconds", "tokens_per_second")})
    assert scores[0] == scores[1]


@pytest.mark.parametrize("verb", ["generate", "predict"])
def test_mode_that_needs_a_base_is_refused(folders, tmp_path, capsys, verb):
    assert main([*command(verb, folders, "detached", tmp_path), "--mode", "attached"]) == 2
    assert "use --mode detached" in capsys.readouterr().err


def test_base_for_a_folder_without_one_is_refused(folders, base_folder, tmp_path, capsys):
    assert main([*command("predict", folders, "detached", tmp_path), "--base", base_folder]) == 2
    assert "leave out --base" in capsys.readouterr().err


OTHERS = {
    "nothing": ({}, "it is empty"),
    "an export": ({"run.py": "", "prompt.json": "{}"}, "it is an exported model"),
    "LoRA": ({"adapter_config.json": '{"peft_type": "LORA"}'}, "the type 'LORA' of PEFT"),
    "weights": ({"model.safetensors": ""}, "config.json is missing"),
    "an adapter's weights": ({"adapter_model.safetensors": ""}, "adapter_config.json is missing"),
    "a run": ({"checkpoint-10/x": "", "checkpoint-9/x": ""}, "checkpoint-10"),
    "a headless model": ({"config.json": '{"architectures": ["LlamaModel"]}'}, "neither a language-model head"),
    "a projection": ({"config.json": '{"model_type": "causal_lm_with_hidden_projection"}'}, "umbra train --shadow"),
    "notes": ({"notes.txt": ""}, "neither adapter_config.json nor config.json"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_folder_is_described(tmp_path, what):
    files, message = OTHERS[what]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(umbra.CheckpointError, match=message) as caught:
        kind_of(str(tmp_path))
    assert "adapter folder" in str(caught.value) or what == "a projection"


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(umbra.CheckpointError, match="there is no such folder"):
        kind_of(str(tmp_path / "nowhere"))
