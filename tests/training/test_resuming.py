"""A run that is killed and run again ends as an uninterrupted one, whatever ends it and wherever it was killed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

import umbra
from support.tiny import make, tokens
from umbra.training import checkpoints, resuming
from umbra.training.train import ShadowTrainer, train

RECORDS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(5) for b in range(5)]
TIMES = ("_runtime", "_per_second")


class Killed(BaseException):
    pass


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


@pytest.fixture
def settings(tmp_path, base_folder):
    """Six steps an epoch, the last of one record; dropout, so that the random state counts."""
    return {
        "base": base_folder, "train_data": write(tmp_path / "train.jsonl", RECORDS[:21]),
        "eval_data": write(tmp_path / "eval.jsonl", RECORDS[21:]), "output_dir": str(tmp_path / "out"), "rank": 4, "gate_rank": 4,
        "dropout": 0.1, "per_device_train_batch_size": 4, "logging_steps": 4, "save_strategy": "steps", "save_steps": 3,
        "disable_tqdm": True, "use_cpu": True, "seed": 7,
    }  # fmt: skip


def timeless(values):
    return {k: v for k, v in values.items() if not k.endswith(TIMES)}


def end_of(folder):
    """Whatever a finished run has come to, but times."""
    run = json.loads(Path(folder, "run.json").read_text())
    weights = {k: v.numpy().tobytes() for k, v in load_file(f"{folder}/adapter_model.safetensors").items()}
    return weights, timeless(run["metrics"]), [timeless(h) for h in run["history"]]


def kill_at(monkeypatch, event, step):
    """Raise at the first event of a trainer from ``step`` on; steps count from the run's beginning."""
    original = getattr(ShadowTrainer, event)

    def fall(self, *args, **options):
        if self.state.global_step >= step:
            raise Killed
        return original(self, *args, **options)

    monkeypatch.setattr(ShadowTrainer, event, fall)


RULES = {
    "max_steps": {"max_steps": 9},
    "whole epochs": {"num_train_epochs": 2},
    "fractional epochs": {"num_train_epochs": 1.5, "lr_scheduler_type": "constant"},
    "accumulated": {"num_train_epochs": 2.5, "gradient_accumulation_steps": 4, "save_steps": 1, "logging_steps": 2},
    "a plateau": {"max_steps": 9, "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 2,
                  "metric_for_best_model": "eval_loss"},
    "warmup and restarts": {"max_steps": 8, "lr_scheduler_type": "cosine_with_restarts", "warmup_steps": 2},
    "logs and saves by epoch": {"num_train_epochs": 2.5, "logging_strategy": "epoch", "save_strategy": "epoch"},
    "logs by epoch": {"num_train_epochs": 2, "logging_strategy": "epoch", "save_steps": 2},
    "the best": {"max_steps": 9, "eval_steps": 3, "load_best_model_at_end": True, "greater_is_better": True,
                 "metric_for_best_model": "eval_loss", "learning_rate": 3e-2},
}  # fmt: skip
MOMENTS = {"in a step": "training_step", "in an evaluation": "evaluation_loop", "in a checkpoint": "_save_rng_state"}


@pytest.mark.parametrize("rule", RULES)
def test_resumed_run_equals_uninterrupted_run(settings, monkeypatch, rule):
    """Killed in steps, in evaluations and in checkpoints, before the last step and after it."""
    values = {**settings, **RULES[rule]}
    whole = settings["output_dir"] + "-whole"
    last = train({**values, "output_dir": whole})["global_step"]
    expected = end_of(whole)
    for moment, event in MOMENTS.items():
        for step in sorted({last // 2, last}):
            shutil.rmtree(settings["output_dir"], ignore_errors=True)
            with monkeypatch.context() as patch:
                kill_at(patch, event, step)
                if event != "training_step" or step < last:
                    with pytest.raises(Killed):
                        train(values)
                else:
                    train(values)
            train(values)
            assert end_of(settings["output_dir"]) == expected, f"killed {moment} of step {step}"


def test_run_killed_during_final_save_repeats_no_step(settings, monkeypatch):
    """After its last checkpoint, before its adapter and its figures are written; `train_loss` is that of the whole run."""
    values = {**settings, "max_steps": 12, "save_steps": 5, "lr_scheduler_type": "constant"}
    train({**values, "output_dir": settings["output_dir"] + "-whole"})
    for event in ("save_model", "evaluate"):
        shutil.rmtree(settings["output_dir"], ignore_errors=True)
        with monkeypatch.context() as patch:
            kill_at(patch, event, 12)
            with pytest.raises(Killed):
                train({**values, "eval_strategy": "no"} if event == "evaluate" else values)
        if event == "evaluate":
            continue
        metrics = train(values)
        assert metrics["global_step"] == 12
        assert end_of(settings["output_dir"]) == end_of(settings["output_dir"] + "-whole")


def test_time_before_kill_is_counted(settings, monkeypatch):
    values = {**settings, "max_steps": 6, "save_steps": 3}
    step = ShadowTrainer.training_step
    monkeypatch.setattr(ShadowTrainer, "training_step", lambda *a, **k: __import__("time").sleep(0.2) or step(*a, **k))
    with monkeypatch.context() as patch:
        kill_at(patch, "training_step", 4)
        with pytest.raises(Killed):
            train(values)
    metrics = train(values)
    assert 1.2 < metrics["train_runtime"] < 3
    assert metrics["train_steps_per_second"] == pytest.approx(6 / metrics["train_runtime"], rel=0.01)


# -- trainers from Python ----------------------------------------------------------------------------------------------


def trainer(folder, kind=ShadowTrainer, **more):
    ids = tokens(10, 8)
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=2, save_steps=2, logging_steps=3, learning_rate=1e-2, use_cpu=True,
        report_to="none", disable_tqdm=True, lr_scheduler_type="constant", **more,
    )  # fmt: skip
    model = make("llama", dropout=0.1)
    return kind(model, arguments, train_dataset=[{"input_ids": i, "labels": i} for i in ids])


@pytest.mark.parametrize("kind", [ShadowTrainer, resuming.ResumableTrainer])
def test_trainer_resumed_at_end_does_no_step(tmp_path, kind):
    whole = trainer(tmp_path, kind, max_steps=8)
    result = whole.train()
    again = trainer(tmp_path, kind, max_steps=8)
    other = again.train(resume_from_checkpoint=True)
    assert (other.global_step, other.training_loss) == (result.global_step, result.training_loss)
    assert all(torch.equal(v, again.model.state_dict()[k]) for k, v in whole.model.state_dict().items())
    assert [timeless(h) for h in again.state.log_history] == [timeless(h) for h in whole.state.log_history]


def test_unrelated_checkpoint_folders_are_not_rotated(tmp_path):
    (tmp_path / "checkpoint-notes").mkdir()
    (tmp_path / "checkpoint-notes" / "thesis.txt").write_text("mine")
    (tmp_path / "checkpoint-2b").mkdir()
    trainer(tmp_path, max_steps=8, save_total_limit=1).train()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2b", "checkpoint-8", "checkpoint-notes"]
    assert (tmp_path / "checkpoint-notes" / "thesis.txt").read_text() == "mine"


def test_kill_during_rotation_leaves_no_partial_checkpoint(settings, monkeypatch):
    values = {**settings, "max_steps": 9, "save_total_limit": 1}
    train({**values, "output_dir": settings["output_dir"] + "-whole"})
    rmtree = shutil.rmtree

    def half(path, *args, **options):
        if "checkpoint-3" in str(path) and Path(path).exists():
            (Path(path) / "adapter_config.json").unlink()
            raise Killed
        rmtree(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", half)
        with pytest.raises(Killed):
            train(values)
    train(values)
    assert end_of(settings["output_dir"]) == end_of(settings["output_dir"] + "-whole")
    assert {p.name for p in Path(settings["output_dir"]).glob("checkpoint-*")} == {"checkpoint-9"}


# -- which checkpoint --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """A run's folder with checkpoint-2 and checkpoint-4."""
    folder = tmp_path_factory.mktemp("two")
    trainer(folder, max_steps=4).train()
    return folder


def remove(file):
    file.unlink()


def cut(file):
    file.write_bytes(file.read_bytes()[:-20])


def blank(file):
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 4] + bytes(len(data) // 2) + data[len(data) // 4 + len(data) // 2 :])


PARTS = (
    "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "adapter_model.safetensors", "adapter_config.json",
    "training_progress.json",
)  # fmt: skip


@pytest.mark.parametrize("damage", [remove, cut, blank])
@pytest.mark.parametrize("part", PARTS)
def test_incomplete_checkpoint_is_skipped(two_checkpoints, tmp_path, capsys, part, damage):
    folder = shutil.copytree(two_checkpoints, tmp_path / "out")
    damage(folder / "checkpoint-4" / part)
    assert checkpoints.last_checkpoint(folder) == str(folder / "checkpoint-2")
    assert f"checkpoint-4 ({part}" in capsys.readouterr().err or part == "adapter_config.json"
    damage(folder / "checkpoint-2" / part)
    if part == "trainer_state.json":  # as a kill leaves it
        assert checkpoints.last_checkpoint(folder) is None
    else:
        with pytest.raises(umbra.CheckpointError, match=f"No checkpoint in .* is complete .*checkpoint-4: .*{part}"):
            checkpoints.last_checkpoint(folder)


def test_checkpoint_includes_random_state_of_every_rank(two_checkpoints, tmp_path):
    folder = shutil.copytree(two_checkpoints, tmp_path / "out")
    place = folder / "checkpoint-4"
    progress = json.loads((place / checkpoints.PROGRESS).read_text())
    (place / checkpoints.PROGRESS).write_text(json.dumps({**progress, "ranks": progress["ranks"] * 2}))
    (place / "rng_state.pth").rename(place / "rng_state_0.pth")
    assert checkpoints.last_checkpoint(folder) == str(folder / "checkpoint-2")
    shutil.copy(place / "rng_state_0.pth", place / "rng_state_1.pth")
    assert checkpoints.last_checkpoint(folder) == str(place)


def test_run_resumes_from_last_complete_checkpoint(settings, monkeypatch, capsys):
    values = {**settings, "max_steps": 9}
    train({**values, "output_dir": settings["output_dir"] + "-whole"})
    with monkeypatch.context() as patch:
        kill_at(patch, "training_step", 7)
        with pytest.raises(Killed):
            train(values)
    Path(settings["output_dir"], "checkpoint-6", "optimizer.pt").unlink()
    train(values)
    assert "training resumes from checkpoint-3: checkpoint-6 (optimizer.pt is missing)" in capsys.readouterr().err
    assert end_of(settings["output_dir"]) == end_of(settings["output_dir"] + "-whole")


def test_full_disk_prints_one_line_and_run_resumes(settings, monkeypatch):
    values = {**settings, "max_steps": 9}
    train({**values, "output_dir": settings["output_dir"] + "-whole"})
    save = torch.save

    def full(obj, path, *args, **options):
        if "checkpoint-6" in str(path):
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598\n<stack>")
        return save(obj, path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr("torch.save", full)
        with pytest.raises(umbra.CheckpointError, match=r"checkpoint-6 cannot be written: .*Make room") as told:
            train(values)
    assert "\n" not in str(told.value)
    train(values)
    assert end_of(settings["output_dir"]) == end_of(settings["output_dir"] + "-whole")
