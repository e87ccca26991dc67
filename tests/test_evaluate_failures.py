"""What goes wrong in one place of a study costs nothing elsewhere."""

import importlib
import json

import pytest

from conftest import make_tokenizer
from test_evaluate import METHODS, SIGNS, SUMS, TRAINING, lines, results_of, run_study, study_of
from tiny import make_base
from umbra.errors import ConfigError, DataError
from umbra.evaluate import harness, record

run_module = importlib.import_module("umbra.evaluate.run")  # the package has a function of that name


@pytest.fixture
def small(tmp_path, base_folder):
    """One method beside the base, one seed; what is learned is tested on another task, too."""
    changes = {
        "methods": {n: METHODS[n] for n in ("base", "LoRA")},
        "seeds": [0],
        "search": None,
        "forgetting": [],
        "match": None,
    }
    given = study_of(tmp_path, base_folder, **changes, keep_adapters=False)
    given["tasks"] = {n: given["tasks"][n] for n in ("sum", "sign")}
    return given


def test_a_test_that_fails_costs_its_own_score_alone(tmp_path, small, monkeypatch, capsys):
    plain, failing = run_module._score, True

    def score(model, mode, name, *more):
        if name == "sign" and failing:
            raise RuntimeError("no such luck")
        return plain(model, mode, name, *more)

    monkeypatch.setattr(run_module, "_score", score)
    trainings = []
    train = run_module._train
    monkeypatch.setattr(run_module, "_train", lambda *x: trainings.append(1) or train(*x))
    found = run_study(tmp_path, small)
    results = results_of(tmp_path)
    lora = next(v for v in results.variants if v.method == "LoRA")
    assert results.score(lora, "sum", "sum") is not None and results.score(lora, "sum", "sign") is None
    assert "on sign failed: RuntimeError: no such luck" in capsys.readouterr().out
    assert found["failed"] == 2, "the base on sign, LoRA that learned sum"
    report = (tmp_path / "out" / "report.md").read_text()
    assert "1 scores are missing" in report and "seed 0, tested on sign" in report
    count, failing = len(trainings), False
    assert run_study(tmp_path, small)["failed"] == 2 and len(trainings) == count
    assert run_study(tmp_path, small, retry=True)["failed"] == 0
    assert results_of(tmp_path).unscored == []


def test_an_lm_eval_task_without_its_data_is_told_before_training(tmp_path, small, monkeypatch):
    class Manager:
        all_tasks = all_subtasks = ("hellaswag",)

        def load(self, names):
            raise ConnectionError(f"no way to {names[0]}")

    monkeypatch.setattr(harness, "_manager", lambda options: Manager())
    monkeypatch.setattr(run_module, "_train", lambda *_: pytest.fail("it was trained"))
    small["tasks"]["skill"] = {"lm_eval": "hellaswag"}
    with pytest.raises(DataError, match="task skill: lm-eval cannot load hellaswag: no way to hellaswag"):
        run_study(tmp_path, {**small, "forgetting": ["skill"]})


def test_a_loss_is_no_accuracy_in_pefts_form(tmp_path, small):
    small["tasks"]["sum"] |= {"metric": "loss"}
    run_study(tmp_path, {**small, "transfer": {}})
    told = {}
    for file in (tmp_path / "out" / "runs").glob("*LoRA*.json"):
        kept = json.loads(file.read_text())
        told[kept["umbra"]["request"]["task"]] = (
            kept["train_info"]["metrics"][-1]["test accuracy"],
            kept["run_info"]["train_config"]["generation_kwargs"]["max_new_tokens"],
        )
    assert told["sum"][0] is None and 0 <= told["sign"][0] <= 1
    assert told["sign"][1] == 3


def test_given_rates_are_told_beside_a_search(tmp_path, base_folder):
    methods = {"LoRA": {**METHODS["LoRA"], "learning_rate": 0.02}, "Umbra": METHODS["Umbra"]}
    given = study_of(tmp_path, base_folder, methods=methods, seeds=[0], forgetting=[], match=None, transfer={})
    given["tasks"] = {"sum": given["tasks"]["sum"]}
    run_study(tmp_path, given)
    report = (tmp_path / "out" / "report.md").read_text()
    assert "Every method that was searched for had as many trials" in report
    assert "at a rate that was given: LoRA 0.02." in report


def test_a_size_that_changes_nothing_is_named(tmp_path):
    make_base("qwen3_moe", vocab_size=99).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    given = study_of(
        tmp_path, str(tmp_path / "base"), methods={"PEFT Shadow": METHODS["PEFT Shadow"]}, forgetting=[], search=None
    )
    with pytest.raises(ConfigError, match="whatever its shadow_intermediate_size"):
        run_study(tmp_path, given)


def test_a_rate_that_the_search_would_override_is_refused(tmp_path, base_folder):
    given = study_of(tmp_path, base_folder, methods={"LoRA": METHODS["LoRA"]}, forgetting=[], match=None)
    given["tasks"]["sum"]["training"] = {"learning_rate": 0.1}
    with pytest.raises(ConfigError, match="task sum has a learning_rate of its own"):
        run_study(tmp_path, given)


def test_a_seed_twice_is_refused(tmp_path, small):
    with pytest.raises(ConfigError, match="seeds names one twice"):
        run_study(tmp_path, {**small, "seeds": [0, 0]})


def test_a_task_that_is_only_tested_needs_no_training_file(tmp_path, base_folder):
    """Beside one that is learned."""
    signs = lines(tmp_path / "signs.jsonl", SIGNS[:6])
    sums = {
        "train": lines(tmp_path / "a.jsonl", SUMS[::2]),
        "test": lines(tmp_path / "b.jsonl", SUMS[1::2]),
        "validation": 6,
    }
    given = {
        "base": base_folder, "dtype": "float32", "seeds": [0], "training": TRAINING, "methods": {"LoRA": METHODS["LoRA"]},
        "tasks": {"sum": sums, "sign": {"test": signs, "train": signs, "validation": 6, "max_new_tokens": 3}},
        "transfer": {"sum": ["sign"]},
    }  # fmt: skip
    assert run_study(tmp_path, given)["failed"] == 0
    assert all(record.is_whole(r) for r in record.read_all(tmp_path / "out").values())
