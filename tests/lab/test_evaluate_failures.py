"""What goes wrong in one place of a study costs nothing elsewhere."""

import importlib
import json
import math
import shutil

import pytest
from transformers import AutoConfig

import umbra
import umbra.lab.study
from support.studies import METHODS, SIGNS, SUMS, TRAINING, lines, results_of, run_study, study_of, variant
from support.tiny import make_base
from support.tokenizer import make_tokenizer
from umbra.errors import CheckpointError, ConfigError, DataError
from umbra.lab.study import harness, record
from umbra.lab.study.report import write_report
from umbra.lab.study.study import Study

run_module = importlib.import_module("umbra.lab.study.run")  # the package has a function of that name
# of PEFT's use of transformers
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


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


def test_failed_test_loses_only_its_score(tmp_path, small, monkeypatch, capsys):
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
    assert "on sign failed: RuntimeError: no such luck" in capsys.readouterr().err
    assert found["failed"] == 2, "the base on sign, LoRA that learned sum"
    report = (tmp_path / "out" / "report.md").read_text()
    assert "1 scores are missing" in report and "seed 0, tested on sign" in report
    count, failing = len(trainings), False
    assert run_study(tmp_path, small)["failed"] == 2 and len(trainings) == count
    assert run_study(tmp_path, small, retry=True)["failed"] == 0
    assert results_of(tmp_path).unscored == []


def test_missing_lm_eval_data_is_reported_before_training(tmp_path, small, monkeypatch):
    class Manager:
        all_tasks = all_subtasks = ("hellaswag",)

        def load(self, names):
            raise ConnectionError(f"no way to {names[0]}")

    monkeypatch.setattr(harness, "_manager", lambda options: Manager())
    monkeypatch.setattr(run_module, "_train", lambda *_: pytest.fail("it was trained"))
    small["tasks"]["skill"] = {"lm_eval": "hellaswag"}
    with pytest.raises(DataError, match="task skill: lm-eval cannot load hellaswag: no way to hellaswag"):
        run_study(tmp_path, {**small, "forgetting": ["skill"]})


def test_peft_record_does_not_list_loss_as_accuracy(tmp_path, small):
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


def test_fixed_rates_are_reported_with_search(tmp_path, base_folder):
    methods = {"LoRA": {**METHODS["LoRA"], "learning_rate": 0.02}, "Umbra": METHODS["Umbra"]}
    given = study_of(tmp_path, base_folder, methods=methods, seeds=[0], forgetting=[], match=None, transfer={})
    given["tasks"] = {"sum": given["tasks"]["sum"]}
    run_study(tmp_path, given)
    report = (tmp_path / "out" / "report.md").read_text()
    assert "Every method that was searched for had as many trials" in report
    assert "at a rate that was given: LoRA 0.02." in report


def test_ineffective_size_is_named(tmp_path):
    make_base("qwen3_moe", vocab_size=99).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    given = study_of(
        tmp_path, str(tmp_path / "base"), methods={"PEFT Shadow": METHODS["PEFT Shadow"]}, forgetting=[], search=None
    )
    with pytest.raises(ConfigError, match="whatever its shadow_intermediate_size"):
        run_study(tmp_path, given)


def test_rate_overridden_by_search_is_refused(tmp_path, base_folder):
    given = study_of(tmp_path, base_folder, methods={"LoRA": METHODS["LoRA"]}, forgetting=[], match=None)
    given["tasks"]["sum"]["training"] = {"learning_rate": 0.1}
    with pytest.raises(ConfigError, match="task sum has a learning_rate of its own"):
        run_study(tmp_path, given)


def test_duplicate_seed_is_refused(tmp_path, small):
    with pytest.raises(ConfigError, match="seeds names one twice"):
        run_study(tmp_path, {**small, "seeds": [0, 0]})


def test_test_only_task_needs_no_training_file(tmp_path, base_folder):
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


def test_study_output_is_not_read_as_task_data(tmp_path, small, monkeypatch):
    score = {"metric": "acc", "less_is_better": False, "value": 0.5, "values": {}, "items": [0.0, 1.0]}
    monkeypatch.setattr(harness, "check", lambda *_: None)
    monkeypatch.setattr(harness, "score", lambda *_: score)
    given = {**small, "forgetting": ["toy"], "keep_adapters": True}
    given["tasks"]["toy"] = {"lm_eval": "toy", "lm_eval_path": str(tmp_path)}
    assert run_study(tmp_path, given, "in/out")["failed"] == 0
    monkeypatch.setattr(umbra.lab.study, "run", lambda *_: pytest.fail("it was run again"))
    assert run_study(tmp_path, given, "in/out")["failed"] == 0
    assert results_of(tmp_path, "in/out").missing == []


def test_lost_gpu_ends_sweep_and_keeps_finished_runs(tmp_path, small, monkeypatch):
    plain, error = umbra.lab.study.run, "RuntimeError: CUDA error: device-side assert triggered"

    def run(request, *more):
        kept = plain(request, *more)
        return kept if request["kind"] == "base" else record.make(request, {}, "2026-01-01T00:00:00+00:00", 0.0, error)

    monkeypatch.setattr(umbra.lab.study, "run", run)
    given = {**small, "seeds": [0, 1], "transfer": {"sum": ["sign"]}}
    with pytest.raises(CheckpointError, match="sum, LoRA failed and took the GPU's context with it"):
        run_study(tmp_path, given)
    assert len(list((tmp_path / "out" / "runs").glob("*.json"))) == 3
    monkeypatch.setattr(umbra.lab.study, "run", plain)
    assert run_study(tmp_path, given)["failed"] == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"max_new_tokens": 62}, "its longest test prompt has 4 tokens, with max_new_tokens=62 66, but .* made for 64"),
        ({"max_new_tokens": 62, "metric": "loss", "max_length": 64}, None),
        ({"max_length": 65}, "a record has 65 tokens within max_length=65, .* set max_length to 64 at most"),
        ({"max_length": 64}, None),
    ],
)
def test_overlong_records_are_reported_before_training(change, says, tmp_path, small, monkeypatch):
    read = AutoConfig.from_pretrained(small["base"])
    base = shutil.copytree(small["base"], tmp_path / "base")
    read.max_position_embeddings = 64
    read.save_pretrained(base)
    long = [{"prompt": "1+1=", "completion": "2" * 70}]
    small["tasks"]["sum"] |= {"train": lines(tmp_path / "long.jsonl", SUMS[::2] + long), **change}
    given = {**small, "base": str(base), "chat_template": False}
    asked = []
    monkeypatch.setattr(umbra.lab.study, "_sweep", lambda *x: asked.append(1))
    if says is None:
        run_study(tmp_path, given)
    else:
        with pytest.raises(ConfigError, match=f"task sum: {says}"):
            run_study(tmp_path, given)
    assert bool(asked) == (says is None)


def test_record_is_independent_of_method_name(tmp_path, small):
    small["methods"] = {"LoRA": METHODS["LoRA"]}
    small["tasks"] = {"sum": small["tasks"]["sum"]}
    request = next(Study.of({**small, "transfer": {}}).runs({"LoRA": METHODS["LoRA"]}, {}))
    for name, seed in (("LoRA", 0), ("Other", 1), ("Renamed", 0)):
        record.write(tmp_path, record.make({**request, "method": name, "seed": seed}, {}, "2026-01-01", 0.0, "Error"))
    assert [f.name.rpartition("--")[0] for f in sorted((tmp_path / "runs").iterdir())] == [
        "sum--Other--seed-1",
        "sum--Renamed--seed-0",
    ]


def test_record_is_independent_of_device(small):
    small["tasks"] = {"sum": small["tasks"]["sum"]}
    request = next(Study.of({**small, "transfer": {}}).runs({"base": {}, "LoRA": {}}, {}))
    kept = record.make(request, {"device": "mps:0"}, "2026-01-01", 0.0, "")
    assert kept["umbra"]["machine"]["cores"]


def test_unsaved_adapters_are_reported_once(tmp_path, small, capsys):
    small["tasks"] = {"sum": small["tasks"]["sum"]}
    given = {**small, "transfer": {}, "seeds": [0, 1]}
    run_study(tmp_path, given)
    assert "keep_adapters" not in capsys.readouterr().err
    given["keep_adapters"] = True
    run_study(tmp_path, given)
    assert capsys.readouterr().err.count("keep_adapters: 2 of 2 finished runs have no adapter in") == 1
    for file in (tmp_path / "out" / "runs").glob("*LoRA*"):
        file.unlink()
    run_study(tmp_path, given)
    assert "keep_adapters" not in capsys.readouterr().err
    assert len(list((tmp_path / "out" / "adapters").iterdir())) == 2


def test_unfit_method_is_reported_before_any_run(tmp_path, base_folder):
    methods = {"base": {"kind": "base"}, "Bad": {"kind": "peft", "peft_type": "LORA", "target_modules": ["nowhere"]}}
    given = study_of(tmp_path, base_folder, methods=methods, match=None, search=None)
    with pytest.raises(umbra.ConfigError, match=r"method Bad cannot be put on .*nowhere"):
        run_study(tmp_path, given)
    assert not (tmp_path / "out").exists()


def test_nonfinite_loss_fails_run_and_diverges_trial(tmp_path, base_folder, monkeypatch):
    methods = {"LoRA": {"kind": "lora", "r": 2}}
    given = study_of(tmp_path, base_folder, methods=methods, match=None, seeds=[0], forgetting=[], transfer={})
    given["tasks"] = {"sum": {**given["tasks"]["sum"], "metric": "loss"}}
    monkeypatch.setattr(run_module, "loss_of", lambda *_: (float("nan"), [1.0, float("nan")]))
    assert run_study(tmp_path, given)["failed"] == 1
    text = (tmp_path / "out" / "report.md").read_text()
    assert "The loss on sum is not finite: training has diverged." in text
    assert "0.0001: diverged · 0.01: diverged" in text


@pytest.mark.parametrize("task", ["sum", "class"])
def test_nonfinite_weights_fail_run(tmp_path, base_folder, task):
    """Of NaN, the largest logit is the first: a class like others."""
    methods = {"LoRA": {"kind": "lora", "r": 2}, "Umbra": METHODS["Umbra"]}
    given = study_of(
        tmp_path, base_folder, methods=methods, match=None, search=None, seeds=[0], forgetting=[], transfer={}
    )
    given |= {"tasks": {task: given["tasks"][task]}, "training": {**TRAINING, "learning_rate": 1e30, "max_steps": 4}}
    assert run_study(tmp_path, given)["failed"] == 2
    assert "Training has diverged" in (tmp_path / "out" / "report.md").read_text()


def test_learned_rows_are_not_tested_as_unseen(tmp_path, base_folder):
    given = study_of(tmp_path, base_folder)
    given["tasks"]["sign"]["test"] = lines(tmp_path / "leak.jsonl", SUMS[:20:2] + SIGNS[1::2])
    with pytest.raises(umbra.DataError, match="10 of 34 test records of sign are learned in sum"):
        run_study(tmp_path, given)


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("sum", {"prompt": "", "completion": "1"}, "task sum: test record 1 asks nothing"),
        ("class", {"text": "", "label": "yes"}, r"none\.jsonl:1: 'text' is empty"),
    ],
)
def test_empty_prompt_is_reported_before_any_run(tmp_path, base_folder, task, row, message):
    given = study_of(tmp_path, base_folder, chat_template=False, match=None, search=None, forgetting=[], transfer={})
    given["tasks"] = {task: given["tasks"][task]}
    given["tasks"][task]["test"] = lines(tmp_path / "none.jsonl", [row])
    with pytest.raises(umbra.DataError, match=message):
        run_study(tmp_path, given)


def test_missing_classes_are_reported_before_any_run(tmp_path, base_folder):
    given = study_of(
        tmp_path, base_folder, match=None, search=None, forgetting=[], transfer={"class": ["other"], "other": []}
    )
    files = {
        p: lines(tmp_path / f"other.{p}.jsonl", [{"text": "1", "label": "x"}, {"text": "2", "label": "y"}] * 5)
        for p in ("train", "test")
    }
    given["tasks"]["other"] = {
        **files,
        "test": lines(tmp_path / "o.jsonl", [{"text": "3", "label": "x"}]),
        "validation": 1,
        "head": "classify",
    }
    with pytest.raises(umbra.ConfigError, match="class cannot be tested on other: it does not learn the classes x"):
        run_study(tmp_path, given)
    assert not (tmp_path / "out").exists()


def test_nonnumeric_item_fails_run_but_not_report(done, tmp_path):
    shutil.copytree(done / "out", tmp_path / "out")
    of_lora = variant(results_of(tmp_path), "LoRA")
    kept = next(results_of(tmp_path).of(of_lora, "sum"))
    kept["umbra"]["scores"]["sum"]["attached"]["items"][0] = math.inf
    record.write(tmp_path / "out", kept)
    write_report(tmp_path / "out")
    assert "(1 of 2 seeds)" in (tmp_path / "out" / "report.md").read_text()
