"""A sweep is kept: run once, killed, gone on with, and told from what is no record."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from transformers import Trainer

import umbra
from support.studies import METHODS, TRAINING, results_of, run_study, study_of, variant
from umbra.files.locks import locked
from umbra.lab.study import records, sweep
from umbra.lab.study import run as run_module
from umbra.lab.study.report import write_report

# of PEFT's use of transformers
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def stamps(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in sorted(folder.glob("*/*.json"))}


def test_only_changed_settings_are_run_again(done, base_folder, monkeypatch):
    asked = []

    def refuse(request, *_):
        asked.append((request["task"], request["method"], request["seed"]))
        return records.make(request, {}, "2026-01-01T00:00:00+00:00", 0.0, "Error: not now")

    monkeypatch.setattr(sweep, "run", refuse)
    before = stamps(done / "out")
    given = study_of(done, base_folder)
    assert run_study(done, given)["failed"] == 0
    assert asked == [] and stamps(done / "out") == before
    given["methods"] = {**METHODS, "LoRA": {**METHODS["LoRA"], "lora_dropout": 0.1}}
    result = run_study(done, {**given, "seeds": [0, 1, 2]}, out="out")
    assert {m for _, m, s in asked if s in (0, 1)} == {"LoRA"}
    assert {s for _, m, s in asked if m != "LoRA"} == {2}
    assert result["failed"] == len(asked)
    assert all(stamps(done / "out")[k] == v for k, v in before.items())
    results = results_of(done)
    assert results.score(variant(results, "LoRA"), "sum", "sum") is None
    assert "not now" in (done / "out" / "report.md").read_text()
    run_study(done, study_of(done, base_folder))  # as the other tests want it


def test_a_failure_is_recorded_and_repeated_with_retry(tmp_path, base_folder, monkeypatch):
    methods = {"LoRA": {"kind": "lora", "r": 2}, "Bad": {"kind": "lora", "r": 2, "training": {"weight_decay": 0.01}}}
    given = study_of(
        tmp_path, base_folder, methods=methods, match=None, search=None, seeds=[0], forgetting=[], transfer={}
    )
    given["tasks"] = {"sum": given["tasks"]["sum"]}
    broken = {"on": True}
    original = run_module.train_model

    def fails(model, task, *others):
        if broken["on"] and others[2]["method"] == "Bad":
            raise RuntimeError("out of luck")
        return original(model, task, *others)

    monkeypatch.setattr(run_module, "train_model", fails)
    assert run_study(tmp_path, given)["failed"] == 1
    assert "out of luck" in (tmp_path / "out" / "report.html").read_text()
    broken["on"] = False
    assert run_study(tmp_path, given)["failed"] == 1
    assert run_study(tmp_path, given, retry=True)["failed"] == 0


def test_two_studies_cannot_write_to_one_folder(tmp_path, base_folder):
    with locked(tmp_path / "out"), pytest.raises(umbra.CheckpointError, match=rf"written by process {os.getpid()} on"):
        run_study(tmp_path, study_of(tmp_path, base_folder))
    assert not (tmp_path / "out" / "runs").exists()


def test_a_killed_study_resumes(tmp_path, base_folder):
    methods = {"LoRA": {"kind": "lora", "r": 2}, "Umbra": METHODS["Umbra"]}
    given = study_of(tmp_path, base_folder, methods=methods, match=None, search=None, forgetting=[], transfer={})
    given["tasks"] = {"sum": given["tasks"]["sum"]}
    given["training"] = {**TRAINING, "max_steps": 60}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(given))
    command = [sys.executable, "-m", "umbra", "study", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    runs = tmp_path / "out" / "runs"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None and not list(runs.glob("*.json")):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {p.name: p.stat().st_mtime_ns for p in runs.glob("*.json")}
    assert before
    assert run_study(tmp_path, given)["failed"] == 0
    after = {p.name: p.stat().st_mtime_ns for p in runs.glob("*.json")}
    assert len(after) == 4 and before.items() <= after.items()
    assert not (tmp_path / "out" / "work").exists()


def test_training_time_before_a_kill_is_included(tmp_path, base_folder, monkeypatch):
    """As it was measured; the answers are those of a run that was not killed."""
    methods = {"LoRA": {"kind": "lora", "r": 2}}
    given = study_of(
        tmp_path, base_folder, methods=methods, match=None, search=None, forgetting=[], transfer={}, seeds=[0]
    )
    given["tasks"] = {"sum": given["tasks"]["sum"]}
    given["training"] = {**TRAINING, "max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    run_study(tmp_path, given, out="whole")
    step = Trainer.training_step

    def fall(trainer, *args, **kwargs):
        if trainer.state.global_step == 5:
            raise KeyboardInterrupt
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", fall)
    with pytest.raises(KeyboardInterrupt):
        run_study(tmp_path, given)
    monkeypatch.setattr(Trainer, "training_step", lambda *a, **k: time.sleep(1) or step(*a, **k))
    assert run_study(tmp_path, given)["failed"] == 0
    (whole,), (resumed,) = ([r for r in records.read_all(tmp_path / out).values() if r["umbra"]["request"]["kind"] == "lora"]
                            for out in ("whole", "out"))  # fmt: skip
    assert (
        resumed["umbra"]["scores"]["sum"]["attached"]["items"] == whole["umbra"]["scores"]["sum"]["attached"]["items"]
    )
    train, pace = resumed["train_info"], resumed["umbra"]["seconds_per_step"]
    assert train["train_time"] == pytest.approx(6 * pace) and train["train_time"] > 2, "two steps of it after the kill"
    assert resumed["umbra"]["request"] == whole["umbra"]["request"]
    assert resumed["train_info"]["metrics"] == whole["train_info"]["metrics"]


def test_damaged_record_is_run_again(done, base_folder):
    file = next((done / "out" / "runs").glob("sum--IA3--seed-0--*.json"))
    whole = file.read_text()
    file.write_text(whole[: len(whole) // 2])
    assert run_study(done, study_of(done, base_folder))["failed"] == 0
    again, first = json.loads(file.read_text()), json.loads(whole)
    assert again["umbra"]["scores"]["sum"]["attached"]["items"] == first["umbra"]["scores"]["sum"]["attached"]["items"]


def test_json_that_is_no_record_or_study_is_skipped_or_reported(done, tmp_path):
    shutil.copytree(done / "out", tmp_path / "out")
    key, record = next(iter(records.read_all(tmp_path / "out").items()))
    file = records.file_of(tmp_path / "out", record["umbra"]["request"])
    for part in ("train_info", "umbra"):
        file.write_text(json.dumps({k: v for k, v in record.items() if k != part}))
        assert key not in records.read_all(tmp_path / "out")
    write_report(tmp_path / "out")
    note = tmp_path / "out" / "study.json"
    note.write_text(json.dumps({k: v for k, v in json.loads(note.read_text()).items() if k != "runs"}))
    with pytest.raises(umbra.CheckpointError, match="holds no study"):
        write_report(tmp_path / "out")


def test_long_names_are_truncated_in_file_names(tmp_path):
    request = {"task": "t" * 300, "kind": "lora", "training": {}, "is_trial": False, "seed": 0, "tasks": {}}
    a, b = (records.file_of(tmp_path, {**request, "method": "影" * 90, "x": x}) for x in "ab")
    assert a != b and len(a.name.encode()) < 200
