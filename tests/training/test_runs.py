"""Output folders of runs: who writes there, what overwrite removes, how a run becomes longer, and what it may start from."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import umbra
from support.tiny import make, make_base, scramble
from umbra.adapters.card import may_replace
from umbra.base.loading import load_base
from umbra.cli import main
from umbra.data import local_files
from umbra.files.locks import LOCK, locked
from umbra.training.train import train

RECORDS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(5) for b in range(5)]


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


@pytest.fixture
def settings(tmp_path, base_folder):
    return {
        "base": base_folder, "train_data": write(tmp_path / "train.jsonl", RECORDS[:20]), "output_dir": str(tmp_path / "out"),
        "rank": 4, "gate_rank": 4, "dropout": 0.1, "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 3,
        "max_steps": 3, "disable_tqdm": True, "use_cpu": True, "seed": 7, "lr_scheduler_type": "constant",
    }  # fmt: skip


def weights(folder):
    return load_file(f"{folder}/adapter_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def history(folder):
    return json.loads(Path(folder, "run.json").read_text())["history"]


def flags(command, values):
    return [command, *(x for k, v in values.items() for x in (f"--{k}", str(v)))]


# -- locks -------------------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from umbra.files.locks import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path/out."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_second_writer_is_told_first_process(settings, saved, tmp_path, holder, capsys, base_folder):
    """At once, in one line, whatever command it is; a killed holder has given the lock back."""
    out = settings["output_dir"]
    study = tmp_path / "study.yaml"
    task = {"train": settings["train_data"], "test": settings["train_data"], "validation": 4, "max_new_tokens": 2}
    study.write_text(json.dumps({
        "title": "x", "base": base_folder, "seeds": [0], "tasks": {"sum": task}, "methods": {"LoRA": {"kind": "lora", "r": 2}},
    }))  # fmt: skip
    commands = [
        flags("train", settings), [*flags("train", settings), "--overwrite"],
        flags("pretrain", {"base": base_folder, "data": settings["train_data"], "output_dir": out, "max_length": 8}),
        ["detach", str(saved), out, "--overwrite"], ["convert", str(saved), "--to", "umbra", "--out", out],
        ["export", str(saved), "--to", "hf", "--out", out], ["bench", "--base", "random:tiny", "--out", out],
        ["report", out],
    ]  # fmt: skip
    for command in commands:
        start = time.monotonic()
        assert main(command) == 2, command
        assert time.monotonic() - start < 5, command
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"{out} is being written by process {holder.pid} on " in error, command
    holder.kill()
    holder.wait()
    assert train(settings)["global_step"] == 3
    assert not Path(out, LOCK).exists()


def test_lock_leaves_no_file(tmp_path):
    with locked(tmp_path / "a" / "b"):
        assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == [LOCK]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    with locked(tmp_path / "a"):
        (tmp_path / "a" / "x").touch()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x"]


def test_only_one_writer_holds_lock(tmp_path):
    """Also while the file of the lock comes and goes."""
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from umbra.files.locks import locked\nfrom umbra.errors import CheckpointError\n"
        "out, got = Path(sys.argv[1]), 0\n"
        "end = time.monotonic() + 3\n"
        "while time.monotonic() < end:\n"
        "    try:\n"
        "        with locked(out):\n"
        "            (out / 'inside').touch(exist_ok=False); got += 1; (out / 'inside').unlink()\n"
        "    except CheckpointError as error:\n"
        "        assert 'being written' in str(error), error\n"
        "print(got)\n"
    )
    (tmp_path / "kept").touch()
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert all(int(w.communicate()[0]) > 0 and w.returncode == 0 for w in writers)


def test_ranks_of_one_run_share_lock(tmp_path, monkeypatch):
    with locked(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with locked(tmp_path):
            pass


@pytest.mark.parametrize("form", ["dangling", "loop", "file", "below a file", "no locks", "read-only"])
def test_unusable_output_folder_prints_one_line(settings, tmp_path, form, monkeypatch, capsys):
    out = tmp_path / "out"
    if form == "dangling":
        out.symlink_to(tmp_path / "nowhere" / "at all")
    elif form == "loop":
        out.symlink_to(out)
    elif form in ("file", "below a file"):
        out.write_text("mine")
    elif form == "no locks":
        monkeypatch.setattr(
            "filelock._unix.lock_fd_nonblocking", lambda fd: (_ for _ in ()).throw(OSError(37, "No locks"))
        )
    else:
        monkeypatch.setattr("os.open", lambda *a, **k: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    place = str(out / "x") if form == "below a file" else str(out)
    assert main(flags("train", {**settings, "output_dir": place})) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("umbra: error: ") and "\n" not in error and str(out) in error
    monkeypatch.undo()
    assert form in ("dangling", "loop", "file", "below a file") or not out.exists()


@pytest.mark.parametrize("seed", [10**30, -1, 2**32])
def test_invalid_seed_prints_one_line(settings, seed, capsys):
    assert main(flags("train", {**settings, "seed": seed})) == 2
    assert "seed" in capsys.readouterr().err


# -- readers -----------------------------------------------------------------------------------------------------------

SAVER = """
import dataclasses, sys, torch, time
from support.tiny import make
torch.set_num_threads(1)
model, end = make(), time.monotonic() + 6
turn = 0
while time.monotonic() < end:
    turn += 1
    with torch.no_grad():
        for p in model.shadow.state_dict().values():
            p.fill_(1 + turn % 2)
    model.shadow.config = dataclasses.replace(model.shadow_config, alpha=float(1 + turn % 2))
    model.save_pretrained(sys.argv[1], overwrite=True)
    if turn == 2:
        print("saving", flush=True)
"""


def test_concurrent_readers_see_one_version(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert process.stdout is not None and process.stdout.readline() == "saving\n"
    from umbra.adapters.inspect import inspect

    base, seen = make_base(), []
    while process.poll() is None:
        model = umbra.load(tmp_path / "out", base=base)
        value = model.shadow_config.alpha
        assert all(bool((v == value).all()) for v in model.shadow.state_dict().values())
        model.unload()
        inspect(str(tmp_path / "out"))
        seen.append(value)
    assert set(seen) == {1.0, 2.0} and len(seen) > 20


# -- overwrite ---------------------------------------------------------------------------------------------------------


def test_overwrite_removes_only_umbra_files(settings, tmp_path):
    train({**settings, "max_steps": 9, "save_total_limit": None})
    out = Path(settings["output_dir"])
    for name in ("checkpoint-notes/thesis.txt", "checkpoint-3b/x", "stages/plan.md", "notes.txt"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    (out / "README.md").write_text((out / "README.md").read_text() + "\nAnd this I add.\n")
    train({**settings, "overwrite": True, "save_total_limit": 1})
    assert {p.name for p in out.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-notes", "checkpoint-3b"}
    for name in ("checkpoint-notes/thesis.txt", "checkpoint-3b/x", "stages/plan.md", "notes.txt"):
        assert (out / name).read_text() == "mine"
    assert (out / "README.md").read_text().endswith("And this I add.\n")


def test_card_is_rewritten_unless_edited(saved):
    card = saved / "README.md"
    assert may_replace(card)
    make(seed=5, rank=2).save_pretrained(saved, overwrite=True)
    assert "injection rank 2, " in card.read_text()
    card.write_text(card.read_text().replace("small", "little").replace("# ShadowPEFT adapter", "# An adapter"))
    edited = card.read_text()
    make(seed=5, rank=3).save_pretrained(saved, overwrite=True)
    assert card.read_text() == edited
    card.write_text("# My own\n")
    make(seed=5, rank=3).save_pretrained(saved, overwrite=True)
    assert card.read_text() == "# My own\n"


@pytest.mark.parametrize("name", ["run.json", "adapter_config.json", "checkpoint-7/model.safetensors"])
def test_overwrite_refuses_to_replace_foreign_files(settings, name):
    file = Path(settings["output_dir"]) / name
    file.parent.mkdir(parents=True)
    file.write_text('{"mine": 1, "peft_type": "LORA"}')
    with pytest.raises(umbra.CheckpointError, match=r"not written by|of something else"):
        train({**settings, "overwrite": True})
    assert file.read_text() == '{"mine": 1, "peft_type": "LORA"}'


@pytest.mark.parametrize("how", ["inside", "symlink", "hard link"])
def test_input_is_never_an_output(settings, tmp_path, how):
    train(settings)
    before = Path(settings["output_dir"], "run.json").read_bytes()
    wrong = {**settings, "overwrite": True}
    if how == "inside":
        cases = {
            "train_data": Path(settings["output_dir"], "README.md"), "adapter": Path(settings["output_dir"]),
            "base": Path(settings["output_dir"], "checkpoint-3"), "shadow": Path(settings["output_dir"]),
        }  # fmt: skip
    elif how == "symlink":
        (tmp_path / "link").symlink_to(settings["output_dir"])
        cases = {"adapter": tmp_path / "link", "eval_data": tmp_path / "link" / "run.json"}
    else:
        os.link(Path(settings["output_dir"], "run.json"), tmp_path / "data.jsonl")
        cases = {"train_data": tmp_path / "data.jsonl"}
    for name, path in cases.items():
        given = {k: v for k, v in wrong.items() if name != "adapter" or k not in ("rank", "gate_rank", "dropout")}
        with pytest.raises(umbra.ConfigError, match=f"{name}=.*where the run writes"):
            train({**given, name: str(path)})
    assert Path(settings["output_dir"], "run.json").read_bytes() == before


def test_detach_never_writes_over_its_input(saved, tmp_path, capsys):
    base = tmp_path / "base"
    make_base().save_pretrained(base)
    for out, name in ((saved, "adapter"), (base, "base")):
        assert main(["detach", str(saved), str(out), "--base", str(base), "--overwrite"]) == 2
        assert f"{name}=" in capsys.readouterr().err


# -- a longer run ------------------------------------------------------------------------------------------------------


def test_finished_run_can_be_extended(settings):
    """With a constant rate, as if it had been that long from the beginning; then in epochs, five steps each."""
    whole = {**settings, "output_dir": settings["output_dir"] + "-whole"}
    assert train(settings)["global_step"] == 3
    metrics = train({**settings, "max_steps": 7})
    assert metrics["global_step"] == 7
    expected = train({**whole, "max_steps": 7})
    assert same(weights(settings["output_dir"]), weights(whole["output_dir"]))
    assert metrics["train_loss"] == pytest.approx(expected["train_loss"], abs=1e-12)
    with pytest.raises(umbra.CheckpointError, match=r"max_steps: 7 → 5\) \(it can be made longer, not shorter"):
        train({**settings, "max_steps": 5})
    epochs = {k: v for k, v in settings.items() if k != "max_steps"} | {
        "output_dir": settings["output_dir"] + "-epochs"
    }
    assert train(epochs)["global_step"] == 5
    assert train({**epochs, "num_train_epochs": 1.4})["global_step"] == 7
    assert same(weights(epochs["output_dir"]), weights(whole["output_dir"]))


def test_moved_run_resumes(settings, tmp_path):
    train(settings)
    Path(settings["output_dir"]).rename(tmp_path / "moved")
    moved = {**settings, "output_dir": str(tmp_path / "moved")}
    assert train(moved)["global_step"] == 3
    assert train({**moved, "max_steps": 4})["global_step"] == 4


def test_unrelated_file_in_data_folder_is_no_change(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "a.jsonl", RECORDS)
    before = local_files(str(tmp_path / "data"))
    for name in (".lock", "README.md", "_notes.jsonl", "cache-1.arrow"):
        (tmp_path / "data" / name).write_text("x")
    assert local_files(str(tmp_path / "data")) == before


@pytest.mark.parametrize("change", ["new", "gone", "other"])
def test_resuming_needs_same_glob_files(settings, tmp_path, change):
    for name in "ab":
        write(tmp_path / f"part-{name}.jsonl", RECORDS[:10])
    values = {**settings, "train_data": [str(tmp_path / "part-*.jsonl")], "max_steps": 1}
    metrics = train(values)
    assert train(values) == metrics
    changed = tmp_path / ("part-c.jsonl" if change == "new" else "part-b.jsonl")
    changed.unlink() if change == "gone" else write(changed, RECORDS[10:])
    with pytest.raises(umbra.CheckpointError, match=f"another content of .*{changed.name}"):
        train(values)


def test_extended_run_follows_new_schedule(settings):
    values = {**settings, "lr_scheduler_type": "linear", "warmup_steps": 0, "learning_rate": 1e-3}
    train(values)
    train({**values, "max_steps": 6})
    rates = [h["learning_rate"] for h in history(values["output_dir"]) if "loss" in h]
    assert rates == pytest.approx([1e-3 * r for r in (1, 2 / 3, 1 / 3, 3 / 6, 2 / 6, 1 / 6)])


def test_run_without_final_checkpoint_cannot_be_extended(settings):
    train({**settings, "save_strategy": "no"})
    with pytest.raises(umbra.CheckpointError, match=r"no checkpoint of its end, step 3.*--adapter"):
        train({**settings, "save_strategy": "no", "max_steps": 6})


# -- from an adapter ---------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path, base_folder):
    model = umbra.attach(load_base(base_folder), umbra.ShadowConfig(rank=3, gate_rank=2, dropout=0.0))
    scramble(model.shadow)
    model.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def test_warm_start_begins_with_adapter_loss(settings, adapter, tmp_path):
    """And with its base and its shadow; what is trained is another adapter."""
    from umbra.base.loading import load_tokenizer
    from umbra.data import Collator, encode_all

    given = {k: v for k, v in settings.items() if k not in ("base", "rank", "gate_rank", "dropout")}
    before = Path(adapter, "adapter_model.safetensors").read_bytes()
    train({**given, "adapter": adapter, "per_device_train_batch_size": 20, "max_steps": 1})
    model = umbra.load(adapter)
    batch = Collator(0)(encode_all(RECORDS[:20], load_tokenizer(settings["base"]), max_length=99))
    out = model(**batch)
    expected = float(out.loss + model.shadow_config.auxiliary_loss_weight * out.shadow_loss)
    assert history(settings["output_dir"])[0]["loss"] == pytest.approx(expected, abs=1e-4)
    trained = umbra.load(settings["output_dir"])
    assert trained.shadow_config == model.shadow_config
    assert trained.shadow.adapter_id != model.shadow.adapter_id
    assert Path(adapter, "adapter_model.safetensors").read_bytes() == before
    run = json.loads(Path(settings["output_dir"], "run.json").read_text())
    assert adapter in run["contents"] and run["asked"]["base"] == settings["base"]
    scramble(model.shadow, 9)
    model.save_pretrained(adapter, overwrite=True)
    with pytest.raises(umbra.CheckpointError, match=r"another content of .*adapter"):
        train({**given, "adapter": adapter, "per_device_train_batch_size": 20, "max_steps": 1})


def test_settings_conflicting_with_adapter_are_named(settings, adapter):
    with pytest.raises(umbra.ConfigError, match=r"dropout: 0.0 → 0.1, gate_rank: 2 → 4, rank: 3 → 4"):
        train({**settings, "adapter": adapter})
    assert train({**settings, "rank": 3, "gate_rank": 2, "dropout": 0.0, "adapter": adapter})["global_step"] == 3


def test_warm_started_classifier_keeps_classes(settings, tmp_path):
    def data(*labels):
        return write(
            tmp_path / "c.jsonl",
            [{"text": r["prompt"], "label": labels[i % len(labels)]} for i, r in enumerate(RECORDS)],
        )

    train({**settings, "train_data": data("red", "blue", "green")})
    given = {k: v for k, v in settings.items() if k not in ("rank", "gate_rank", "dropout")}
    again = {**given, "adapter": settings["output_dir"], "output_dir": settings["output_dir"] + "-2"}
    train({**again, "train_data": data("red", "green")})
    assert umbra.load(again["output_dir"]).shadow.classifier["id2label"] == {0: "blue", 1: "green", 2: "red"}
    shutil.rmtree(again["output_dir"])
    cases = ((("red", "white"), "does not know: white", None), ((0.5, 0.7), "trained for single_label", "regression"))
    for labels, message, problem in cases:
        with pytest.raises(umbra.DataError, match=message):
            train({**again, "train_data": data(*labels), "problem_type": problem})
    with pytest.raises(umbra.DataError, match="learned from text and its labels"):
        train({**again, "train_data": settings["train_data"]})
