"""What goes wrong in one place of a study costs nothing elsewhere."""

import json
import math
import shutil

import pytest
from transformers import AutoConfig

import umbra
from support.studies import METHODS, SIGNS, SUMS, TRAINING, lines, results_of, run_study, study_of, variant
from support.tiny import make_base
from support.tokenizer import make_tokenizer
from umbra.errors import CheckpointError, ConfigError, DataError
from umbra.lab.study import lm_eval_tasks, records, requests, scoring, sweep
from umbra.lab.study import run as run_module
from umbra.lab.study.reading import parse_study
from umbra.lab.study.report import write_report

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
    plain, failing = run_module.score_task, True

    def score(model, mode, name, *more):
        if name == "sign" and failing:
            raise RuntimeError("no such luck")
        return plain(model, mode, name, *more)

    monkeypatch.setattr(run_module, "score_task", score)
    trainings = []
    train = run_module.train_model
    monkeypatch.setattr(run_module, "train_model", lambda *x: trainings.append(1) or train(*x))
    result = run_study(tmp_path, small)
    results = results_of(tmp_path)
    lora = next(v for v in results.variants if v.method == "LoRA")
    assert results.score(lora, "sum", "sum") is not None and results.score(lora, "sum", "sign") is None
    assert "on sign failed: RuntimeError: no such luck" in capsys.readouterr().err
    assert result["failed"] == 2, "the base on sign, LoRA that learned sum"
    report = (tmp_path / "out" / "report.md").read_text()
    assert "1 scores are missing" in report and "seed 0, tested on sign" in report
    count, failing = len(trainings), False
    assert run_study(tmp_path, small)["failed"] == 2 and len(trainings) == count
    assert run_study(tmp_path, small, retry=True)["failed"] == 0
    assert results_of(tmp_path).unscored == []


def test_an_lm_eval_task_without_data_fails_before_training(tmp_path, small, monkeypatch):
    class Manager:
        all_tasks = all_subtasks = ("hellaswag",)

        def load(self, names):
            raise ConnectionError(f"no way to {names[0]}")

    monkeypatch.setattr(lm_eval_tasks, "_manager", lambda options: Manager())
    monkeypatch.setattr(run_module, "train_model", lambda *_: pytest.fail("it was trained"))
    small["tasks"]["skill"] = {"lm_eval": "hellaswag"}
    with pytest.raises(DataError, match="task skill: lm-eval cannot load hellaswag: no way to hellaswag"):
        run_study(tmp_path, {**small, "forgetting": ["skill"]})


def test_peft_record_does_not_list_loss_as_accuracy(tmp_path, small):
    small["tasks"]["sum"] |= {"metric": "loss"}
    run_study(tmp_path, {**small, "transfer": {}})
    output = {}
    for file in (tmp_path / "out" / "runs").glob("*LoRA*.json"):
        record = json.loads(file.read_text())
        output[record["umbra"]["request"]["task"]] = (
            record["train_info"]["metrics"][-1]["test accuracy"],
            record["run_info"]["train_config"]["generation_kwargs"]["max_new_tokens"],
        )
    assert output["sum"][0] is None and 0 <= output["sign"][0] <= 1
    assert output["sign"][1] == 3


def test_fixed_rates_are_reported_beside_a_search(tmp_path, base_folder):
    methods = {"LoRA": {**METHODS["LoRA"], "learning_rate": 0.02}, "Umbra": METHODS["Umbra"]}
    given = study_of(tmp_path, base_folder, methods=methods, seeds=[0], forgetting=[], match=None, transfer={})
    given["tasks"] = {"sum": given["tasks"]["sum"]}
    run_study(tmp_path, given)
    report = (tmp_path / "out" / "report.md").read_text()
    assert "Every method in the search had the same number of trials" in report
    assert "Fixed rates, without a search: LoRA 0.02." in report


def test_a_size_without_effect_is_an_error(tmp_path):
    make_base("qwen3_moe", vocab_size=99).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    given = study_of(
        tmp_path, str(tmp_path / "base"), methods={"PEFT Shadow": METHODS["PEFT Shadow"]}, forgetting=[], search=None
    )
    with pytest.raises(ConfigError, match="for every shadow_intermediate_size"):
        run_study(tmp_path, given)


def test_rate_overridden_by_search_is_refused(tmp_path, base_folder):
    given = study_of(tmp_path, base_folder, methods={"LoRA": METHODS["LoRA"]}, forgetting=[], match=None)
    given["tasks"]["sum"]["training"] = {"learning_rate": 0.1}
    with pytest.raises(ConfigError, match="task sum sets a learning_rate"):
        run_study(tmp_path, given)


def test_duplicate_seeds_are_an_error(tmp_path, small):
    with pytest.raises(ConfigError, match="seeds has duplicates"):
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
    assert all(records.is_complete(r) for r in records.read_all(tmp_path / "out").values())


def test_files_written_by_a_study_are_not_task_files(tmp_path, small, monkeypatch):
    score = {"metric": "acc", "less_is_better": False, "value": 0.5, "values": {}, "items": [0.0, 1.0]}
    monkeypatch.setattr(lm_eval_tasks, "check", lambda *_: None)
    monkeypatch.setattr(lm_eval_tasks, "score", lambda *_: score)
    given = {**small, "forgetting": ["toy"], "keep_adapters": True}
    given["tasks"]["toy"] = {"lm_eval": "toy", "lm_eval_path": str(tmp_path)}
    assert run_study(tmp_path, given, "in/out")["failed"] == 0
    monkeypatch.setattr(sweep, "run", lambda *_: pytest.fail("it was run again"))
    assert run_study(tmp_path, given, "in/out")["failed"] == 0
    assert results_of(tmp_path, "in/out").missing == []


def test_a_lost_gpu_ends_the_study_and_finished_runs_remain(tmp_path, small, monkeypatch):
    plain, error = sweep.run, "RuntimeError: CUDA error: device-side assert triggered"

    def run(request, *more):
        record = plain(request, *more)
        return (
            record if request["kind"] == "base" else records.make(request, {}, "2026-01-01T00:00:00+00:00", 0.0, error)
        )

    monkeypatch.setattr(sweep, "run", run)
    given = {**small, "seeds": [0, 1], "transfer": {"sum": ["sign"]}}
    with pytest.raises(CheckpointError, match="sum, LoRA failed and left the GPU unusable"):
        run_study(tmp_path, given)
    assert len(list((tmp_path / "out" / "runs").glob("*.json"))) == 3
    monkeypatch.setattr(sweep, "run", plain)
    assert run_study(tmp_path, given)["failed"] == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"max_new_tokens": 62},
            "its longest test prompt has 4 tokens, with max_new_tokens=62 66, but .* has 64 positions",
        ),
        ({"max_new_tokens": 62, "metric": "loss", "max_length": 64}, None),
        ({"max_length": 65}, "a record has 65 tokens within max_length=65, .* set max_length to at most 64"),
        ({"max_length": 64}, None),
    ],
)
def test_lengths_beyond_the_base_are_an_error_before_training(change, says, tmp_path, small, monkeypatch):
    read = AutoConfig.from_pretrained(small["base"])
    base = shutil.copytree(small["base"], tmp_path / "base")
    read.max_position_embeddings = 64
    read.save_pretrained(base)
    long = [{"prompt": "1+1=", "completion": "2" * 70}]
    small["tasks"]["sum"] |= {"train": lines(tmp_path / "long.jsonl", SUMS[::2] + long), **change}
    given = {**small, "base": str(base), "chat_template": False}
    asked = []
    monkeypatch.setattr(sweep, "_run_stage", lambda *x: asked.append(1))
    if says is None:
        run_study(tmp_path, given)
    else:
        with pytest.raises(ConfigError, match=f"task sum: {says}"):
            run_study(tmp_path, given)
    assert bool(asked) == (says is None)


def test_record_is_independent_of_method_name(tmp_path, small):
    small["methods"] = {"LoRA": METHODS["LoRA"]}
    small["tasks"] = {"sum": small["tasks"]["sum"]}
    request = next(requests.runs(parse_study({**small, "transfer": {}}), {"LoRA": METHODS["LoRA"]}, {}))
    for name, seed in (("LoRA", 0), ("Other", 1), ("Renamed", 0)):
        records.write(tmp_path, records.make({**request, "method": name, "seed": seed}, {}, "2026-01-01", 0.0, "Error"))
    assert [f.name.rpartition("--")[0] for f in sorted((tmp_path / "runs").iterdir())] == [
        "sum--Other--seed-1",
        "sum--Renamed--seed-0",
    ]


def test_record_is_independent_of_device(small):
    small["tasks"] = {"sum": small["tasks"]["sum"]}
    request = next(requests.runs(parse_study({**small, "transfer": {}}), {"base": {}, "LoRA": {}}, {}))
    record = records.make(request, {"device": "mps:0"}, "2026-01-01", 0.0, "")
    assert record["umbra"]["machine"]["cores"]


def test_missing_adapters_are_reported_once(tmp_path, small, capsys):
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


def test_a_method_unfit_for_the_base_is_an_error_before_any_run(tmp_path, base_folder):
    methods = {"base": {"kind": "base"}, "Bad": {"kind": "peft", "peft_type": "LORA", "target_modules": ["nowhere"]}}
    given = study_of(tmp_path, base_folder, methods=methods, match=None, search=None)
    with pytest.raises(umbra.ConfigError, match=r"method Bad cannot be applied to .*nowhere"):
        run_study(tmp_path, given)
    assert not (tmp_path / "out").exists()


def test_nonfinite_loss_fails_run_and_diverges_trial(tmp_path, base_folder, monkeypatch):
    methods = {"LoRA": {"kind": "lora", "r": 2}}
    given = study_of(tmp_path, base_folder, methods=methods, match=None, seeds=[0], forgetting=[], transfer={})
    given["tasks"] = {"sum": {**given["tasks"]["sum"], "metric": "loss"}}
    for module in (run_module, scoring):
        monkeypatch.setattr(module, "loss_of", lambda *_: (float("nan"), [1.0, float("nan")]))
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


def test_training_records_of_a_task_are_not_test_records_of_another(tmp_path, base_folder):
    given = study_of(tmp_path, base_folder)
    given["tasks"]["sign"]["test"] = lines(tmp_path / "leak.jsonl", SUMS[:20:2] + SIGNS[1::2])
    with pytest.raises(umbra.DataError, match="10 of 34 test records of sign are training records of sum"):
        run_study(tmp_path, given)


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("sum", {"prompt": "", "completion": "1"}, "task sum: the prompt of test record 1 has no token"),
        ("class", {"text": "", "label": "yes"}, r"none\.jsonl:1: 'text' is empty"),
    ],
)
def test_a_prompt_without_tokens_is_an_error_before_any_run(tmp_path, base_folder, task, row, message):
    given = study_of(tmp_path, base_folder, chat_template=False, match=None, search=None, forgetting=[], transfer={})
    given["tasks"] = {task: given["tasks"][task]}
    given["tasks"][task]["test"] = lines(tmp_path / "none.jsonl", [row])
    with pytest.raises(umbra.DataError, match=message):
        run_study(tmp_path, given)


def test_unseen_classes_of_a_transfer_are_an_error_before_any_run(tmp_path, base_folder):
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
    with pytest.raises(umbra.ConfigError, match="class cannot be tested on other: it has no training record of x"):
        run_study(tmp_path, given)
    assert not (tmp_path / "out").exists()


def test_an_item_that_is_not_finite_costs_one_run_not_the_report(done, tmp_path):
    shutil.copytree(done / "out", tmp_path / "out")
    of_lora = variant(results_of(tmp_path), "LoRA")
    record = next(results_of(tmp_path).of(of_lora, "sum"))
    record["umbra"]["scores"]["sum"]["attached"]["items"][0] = math.inf
    records.write(tmp_path / "out", record)
    write_report(tmp_path / "out")
    assert "(1 of 2 seeds)" in (tmp_path / "out" / "report.md").read_text()
