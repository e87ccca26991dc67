"""``umbra evaluate`` and ``umbra report``: every kind of method on tiny tasks, kept, resumed, compared with runs by hand."""

import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from transformers import Trainer

import umbra
from conftest import make_tokenizer
from umbra.bases import load_base
from umbra.bench.base import Base
from umbra.bench.methods import trainable
from umbra.cli import main
from umbra.data import Collator, encode_all
from umbra.evaluate import _sizes as sizes_of
from umbra.evaluate import evaluate, harness, plots, record, report
from umbra.evaluate.methods import build, count, read_method
from umbra.evaluate.report import write_report
from umbra.evaluate.results import Results, Variant
from umbra.evaluate.run import _run, loss_of
from umbra.evaluate.statistics import Estimate
from umbra.evaluate.study import Study
from umbra.evaluate.tasks import Task, TaskOptions, load_task
from umbra.options import EvalOptions, EvaluateOptions
from umbra.runs import make_arguments
from umbra.scoring import score_adapter, score_classes

run_module = importlib.import_module("umbra.evaluate.run")  # the package has a function of that name
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning"
)  # PEFT's use of transformers
SUMS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(7) for b in range(7)]
SIGNS = [{"prompt": f"{a}>{b}?", "completion": "yes" if a > b else "no"} for a in range(7) for b in range(7)]
CLASSES = [{"text": r["prompt"], "label": r["completion"]} for r in SIGNS]
TEXTS = [{"text": r["prompt"] + r["completion"]} for r in SUMS]
METHODS = {
    "base": {"kind": "base"},
    "LoRA": {"kind": "lora"},
    "DoRA": {"kind": "dora"},
    "Lily": {"kind": "lily", "stride_A": 2, "num_B": 2},
    "IA3": {"kind": "peft", "peft_type": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "PEFT Shadow": {"kind": "peft_shadow", "shadow_dropout": 0.0},
    "Umbra": {"kind": "umbra", "alpha": 1.0, "rank": 4, "gate_rank": 4, "dropout": 0.0},
    "Alone": {"kind": "alone", "rank": 4, "gate_rank": 4},
}  # fmt: skip
TRAINING = {
    "max_steps": 8,
    "per_device_train_batch_size": 4,
    "use_cpu": True,
    "disable_tqdm": True,
    "learning_rate": 1e-2,
}


def lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def study_of(folder: Path, base: str, **changes) -> dict:
    """All kinds of methods on all heads, two seeds."""
    tasks = {}
    for name, rows, more in (
        ("sum", SUMS, {"max_new_tokens": 3}),
        ("sign", SIGNS, {"max_new_tokens": 3}),
        ("class", CLASSES, {"head": "classify"}),
        ("text", TEXTS, {"head": "text"}),
    ):
        files = {
            "train": lines(folder / f"{name}.train.jsonl", rows[::2]),
            "test": lines(folder / f"{name}.test.jsonl", rows[1::2]),
        }
        tasks[name] = {**files, "validation": 6, **more}
    given = {
        "title": "Tiny", "base": base, "dtype": "float32", "seeds": [0, 1], "match": 20000, "tasks": tasks, "methods": METHODS,
        "training": TRAINING, "transfer": {"sum": ["sign"]}, "forgetting": ["text"], "keep_adapters": True,
        "search": {"learning_rate": [1e-4, 1e-2], "tasks": ["sum"], "max_steps": 4},
    }  # fmt: skip
    return {**given, **changes}


def run_study(folder: Path, given: dict, out: str = "out", **options) -> dict:
    (folder / "study.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    return evaluate(EvaluateOptions(str(folder / "study.yaml"), out=str(folder / out), **options))


@pytest.fixture(scope="module")
def done(tmp_path_factory, base_folder) -> Path:
    """The folder of a study that was run."""
    folder = tmp_path_factory.mktemp("study")
    found = run_study(folder, study_of(folder, base_folder))
    assert found["failed"] == 0
    return folder


def results_of(folder: Path, out: str = "out") -> Results:
    return Results(folder / out, "study.json")


def variant(results: Results, name: str):
    return next(v for v in results.variants if v.name == name)


def the_record(folder: Path, task: str, method: str, seed: int) -> dict:
    return json.loads(next((folder / "out" / "runs").glob(f"{task}--{method}--seed-{seed}--*.json")).read_text())


# -- the sweep ---------------------------------------------------------------------------------------------------------


def test_every_method_task_and_seed_is_scored(done):
    results = results_of(done)
    assert results.trained == ["sum", "class"]
    for v in results.variants:
        for task in results.trained:
            found = results.items(v, task, task)
            assert v.is_trained or task == "class" or found
            if v.is_trained:
                assert sorted(found) == [0, 1]
                assert {len(i) for i in found.values()} == {24}
        if v.kind != "base":
            assert results.items(v, "sum", "sign") and results.items(v, "sum", "text")
            assert results.score(v, "sum", "text").mean > 0
    assert {v.name for v in results.variants} == {*METHODS, "Umbra, detached"}


def test_matched_methods_train_equally_many_parameters(done):
    results = results_of(done)
    for v in results.variants:
        if v.is_trained and v.method != "IA3":
            measured = results.cost(v)["parameters"]
            assert v.kind == "alone" or abs(results.about["parameters"][v.method] - 20000) <= 1000
            assert measured == pytest.approx(
                results.about["parameters"][v.method], abs=200
            )  # of which a classifier's head


def test_the_method_that_others_are_matched_to_stays_as_it_is(tmp_path, base_folder):
    methods = {"LoRA": {"kind": "lora"}, "Umbra": {"kind": "umbra"}, "Other": {"kind": "umbra", "rank": 2}}
    study = Study.of(study_of(tmp_path, base_folder, methods=methods, match="Umbra", forgetting=[]))
    fields, counts = sizes_of(study, Base.named(base_folder, torch.bfloat16, torch.device("cpu")))
    assert fields["Umbra"] == {} and "shadow_intermediate_size" in fields["Other"]
    assert all(abs(n - counts["Umbra"]) <= 0.05 * counts["Umbra"] for n in counts.values())


@pytest.mark.parametrize(("kind", "fields"), [("umbra", {"init": "base"}), ("umbra", None), ("alone", None)])
def test_copied_and_pretrained_shadows_are_counted_as_they_are(kind, fields, base_folder, tmp_path):
    shadow = umbra.attach(load_base(base_folder, dtype="float32"), umbra.ShadowConfig()).detached()
    shadow.save_pretrained(tmp_path / "shadow")
    method = read_method("x", {"kind": kind, **(fields or {"shadow": str(tmp_path / "shadow")})})
    real = build(kind, load_base(base_folder, dtype="float32"), method.fields)
    assert (
        count(Base.named(base_folder, torch.float32, torch.device("cpu")), "x", method, method.fields)
        == trainable(real)
        > 0
    )


def test_the_rate_that_is_trained_with_has_the_lowest_held_out_loss(done):
    results = results_of(done)
    for name in METHODS:
        trials = {
            t["umbra"]["request"]["training"]["learning_rate"]: t["umbra"]["validation_loss"]
            for t in results.trials
            if name in results.names_of(t)
        }
        if name == "base":
            assert not trials
            continue
        assert sorted(trials) == [1e-4, 1e-2]
        best = min(trials, key=trials.__getitem__)
        for kept in results.runs:
            if name in results.names_of(kept):
                assert kept["umbra"]["request"]["training"]["learning_rate"] == best
                assert kept["run_info"]["train_config"]["optimizer_kwargs"]["lr"] == best


@pytest.mark.parametrize("mode", ["attached", "detached"])
def test_scores_are_those_of_umbra_eval(mode, done):
    kept = the_record(done, "sum", "Umbra", 1)
    adapter = next((done / "out" / "adapters").glob("sum--Umbra--seed-1--*"))
    options = EvalOptions(
        str(adapter), str(done / "sum.test.jsonl"), modes=mode, max_new_tokens=3, batch_size=5, dtype="float32"
    )
    assert score_adapter(options)[0].accuracy == pytest.approx(kept["umbra"]["scores"]["sum"][mode]["value"])


def test_lora_is_what_a_user_would_train(done, base_folder, tmp_path):
    """PEFT and transformers called by hand: the same losses, the same answers."""
    from peft import LoraConfig, get_peft_model

    kept = the_record(done, "sum", "LoRA", 0)
    rank, rate = kept["run_info"]["peft_config"]["r"], kept["run_info"]["train_config"]["optimizer_kwargs"]["lr"]
    base, tokenizer = load_base(base_folder, dtype="float32"), make_tokenizer()
    torch.manual_seed(0)
    model = get_peft_model(
        base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    given = study_of(tmp_path, base_folder)["tasks"]
    records = load_task("sum", TaskOptions(**given["sum"])).train
    examples = encode_all(records, tokenizer, max_length=512)
    arguments = make_arguments(tmp_path, {**TRAINING, "learning_rate": rate, "seed": 0, "save_strategy": "no"})
    trainer = Trainer(model=model, args=arguments, train_dataset=examples, data_collator=Collator(0))  # type: ignore[arg-type]
    assert trainer.train().training_loss == pytest.approx(kept["train_info"]["metrics"][-1]["train loss"], rel=1e-5)
    text = load_task("text", TaskOptions(**given["text"]))
    each = loss_of(model, tokenizer, text, text.test, None, True)[1]
    assert each == pytest.approx(kept["umbra"]["scores"]["text"]["attached"]["items"], abs=2e-4)


def test_a_task_may_be_scored_by_the_loss_of_its_answers(base_folder, tmp_path):
    """Of the answers alone: the questions' tokens are not in it."""
    given = study_of(tmp_path, base_folder)["tasks"]["sum"]
    request = {
        "base": str(base_folder), "dtype": "float32", "kind": "base", "fields": {}, "seed": 0, "task": None, "training": {},
        "tasks": {"sum": {**given, "metric": "loss", "test_limit": 3}}, "tests": ["sum"], "modes": ["attached"],
        "chat_template": False, "batch_size": 2, "is_trial": False,
    }  # fmt: skip
    score = _run(request, tmp_path / "work", None)["scores"]["sum"]["attached"]
    base, tokenizer = load_base(base_folder, dtype="float32"), make_tokenizer()
    means = []
    for r in load_task("sum", TaskOptions(**request["tasks"]["sum"]), False).test:
        asked = len(tokenizer(r["prompt"])["input_ids"])
        ids = torch.tensor(
            [tokenizer(r["prompt"])["input_ids"] + tokenizer(r["completion"])["input_ids"] + [tokenizer.eos_token_id]]
        )
        with torch.no_grad():
            logps = base(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])
        means.append(-float(logps[asked - 1 :].mean()))
    assert score["metric"] == "loss" and score["items"] == pytest.approx(means, abs=1e-4)
    assert score["value"] == pytest.approx(sum(means) / 3, abs=1e-4)


def test_the_loss_is_of_a_token_whatever_the_batch(base_folder):
    base, tokenizer = load_base(base_folder, dtype="float32"), make_tokenizer()
    records = [{"text": "1+1=2"}, {"text": "13+25=38, and so on"}, {"text": "1"}]
    task = Task("x", TaskOptions(head="text", max_length=12), [], [], [], "loss", None, 1)
    sums, count, means = 0.0, 0, []
    for r in records:
        ids = torch.tensor([tokenizer(r["text"])["input_ids"]])[:, :12]
        with torch.no_grad():
            logps = base(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])
        sums, count = sums - float(logps.sum()), count + len(logps)
        means += [-float(logps.mean())] if len(logps) else []
    found, each = loss_of(base, tokenizer, task, records, None, True)
    assert found == pytest.approx(sums / count, rel=1e-5)
    assert each == pytest.approx(means, abs=1e-4) and len(each) == 2


def test_a_shadow_alone_never_sees_the_base(done):
    kept = the_record(done, "sum", "Alone", 0)
    assert list(kept["umbra"]["scores"]["sum"]) == ["detached"]
    assert (
        kept["train_info"]["num_trainable_params"]
        < the_record(done, "sum", "Umbra", 0)["train_info"]["num_trainable_params"] * 1.05
    )


# -- kept, resumed, failed ---------------------------------------------------------------------------------------------


def stamps(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in sorted(folder.glob("*/*.json"))}


def test_what_was_run_is_not_run_again_and_what_changed_is(done, base_folder, monkeypatch):
    asked = []

    def refuse(request, *_):
        asked.append((request["task"], request["method"], request["seed"]))
        return record.make(request, {}, "2026-01-01T00:00:00+00:00", 0.0, "Error: not now")

    monkeypatch.setattr(umbra.evaluate, "run", refuse)
    before = stamps(done / "out")
    given = study_of(done, base_folder)
    assert run_study(done, given)["failed"] == 0
    assert asked == [] and stamps(done / "out") == before
    given["methods"] = {**METHODS, "LoRA": {**METHODS["LoRA"], "lora_dropout": 0.1}}
    found = run_study(done, {**given, "seeds": [0, 1, 2]}, out="out")
    assert {m for _, m, s in asked if s in (0, 1)} == {"LoRA"}
    assert {s for _, m, s in asked if m != "LoRA"} == {2}
    assert found["failed"] == len(asked)
    assert all(stamps(done / "out")[k] == v for k, v in before.items())
    results = results_of(done)
    assert results.score(variant(results, "LoRA"), "sum", "sum") is None
    assert "not now" in (done / "out" / "report.md").read_text()
    run_study(done, study_of(done, base_folder))  # as the other tests want it


def test_a_method_that_does_not_fit_the_base_is_told_before_anything_runs(tmp_path, base_folder):
    methods = {"base": {"kind": "base"}, "Bad": {"kind": "peft", "peft_type": "LORA", "target_modules": ["nowhere"]}}
    given = study_of(tmp_path, base_folder, methods=methods, match=None, search=None)
    with pytest.raises(umbra.ConfigError, match=r"method Bad cannot be put on .*nowhere"):
        run_study(tmp_path, given)
    assert not (tmp_path / "out").exists()


def test_a_failure_is_told_kept_and_tried_again_on_demand(tmp_path, base_folder, monkeypatch):
    methods = {"LoRA": {"kind": "lora", "r": 2}, "Bad": {"kind": "lora", "r": 2, "training": {"weight_decay": 0.01}}}
    given = study_of(
        tmp_path, base_folder, methods=methods, match=None, search=None, seeds=[0], forgetting=[], transfer={}
    )
    given["tasks"] = {"sum": given["tasks"]["sum"]}
    broken = {"on": True}
    original = run_module._train

    def fails(model, task, *rest):
        if broken["on"] and rest[2]["method"] == "Bad":
            raise RuntimeError("out of luck")
        return original(model, task, *rest)

    monkeypatch.setattr(run_module, "_train", fails)
    assert run_study(tmp_path, given)["failed"] == 1
    assert "out of luck" in (tmp_path / "out" / "report.html").read_text()
    broken["on"] = False
    assert run_study(tmp_path, given)["failed"] == 1
    assert run_study(tmp_path, given, retry=True)["failed"] == 0


def test_a_loss_that_is_not_finite_is_a_failed_run_and_a_diverged_trial(tmp_path, base_folder, monkeypatch):
    methods = {"LoRA": {"kind": "lora", "r": 2}}
    given = study_of(tmp_path, base_folder, methods=methods, match=None, seeds=[0], forgetting=[], transfer={})
    given["tasks"] = {"sum": {**given["tasks"]["sum"], "metric": "loss"}}
    monkeypatch.setattr(run_module, "loss_of", lambda *_: (float("nan"), [1.0, float("nan")]))
    assert run_study(tmp_path, given)["failed"] == 1
    text = (tmp_path / "out" / "report.md").read_text()
    assert "The loss on sum is not finite: training has diverged." in text
    assert "0.0001: diverged · 0.01: diverged" in text


@pytest.mark.parametrize("task", ["sum", "class"])
def test_weights_that_are_not_finite_are_a_failed_run(tmp_path, base_folder, task):
    """Of NaN, the largest logit is the first: a class like others."""
    methods = {"LoRA": {"kind": "lora", "r": 2}, "Umbra": METHODS["Umbra"]}
    given = study_of(
        tmp_path, base_folder, methods=methods, match=None, search=None, seeds=[0], forgetting=[], transfer={}
    )
    given |= {"tasks": {task: given["tasks"][task]}, "training": {**TRAINING, "learning_rate": 1e30, "max_steps": 4}}
    assert run_study(tmp_path, given)["failed"] == 2
    assert "Training has diverged" in (tmp_path / "out" / "report.md").read_text()


def test_what_is_learned_is_not_tested_as_something_unseen(tmp_path, base_folder):
    given = study_of(tmp_path, base_folder)
    given["tasks"]["sign"]["test"] = lines(tmp_path / "leak.jsonl", SUMS[:20:2] + SIGNS[1::2])
    with pytest.raises(umbra.DataError, match="10 of 34 test records of sign are learned in sum"):
        run_study(tmp_path, given)


@pytest.mark.parametrize(
    ("task", "row"), [("sum", {"prompt": "", "completion": "1"}), ("class", {"text": "", "label": "yes"})]
)
def test_a_prompt_without_tokens_is_told_before_anything_runs(tmp_path, base_folder, task, row):
    given = study_of(tmp_path, base_folder, chat_template=False, match=None, search=None, forgetting=[], transfer={})
    given["tasks"] = {task: given["tasks"][task]}
    given["tasks"][task]["test"] = lines(tmp_path / "none.jsonl", [row])
    with pytest.raises(umbra.DataError, match=f"task {task}: test record 1 asks nothing"):
        run_study(tmp_path, given)


def test_two_at_once_in_one_folder_are_one_too_many(tmp_path, base_folder):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".umbra-evaluate"), pytest.raises(umbra.CheckpointError, match="at work in"):
        run_study(tmp_path, study_of(tmp_path, base_folder))
    assert not (tmp_path / "out" / "runs").exists()


def test_classes_that_a_trained_task_lacks_are_told_before_anything_runs(tmp_path, base_folder):
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


def test_a_text_that_is_classified_is_cut_as_in_training(base_folder):
    base = load_base(base_folder, classifier={"num_labels": 2, "pad_token_id": 0}, dtype="float32")
    torch.nn.init.normal_(base.score.weight)
    base.config.problem_type, base.config.label2id = "single_label_classification", {"LABEL_0": 0, "LABEL_1": 1}
    records = [{"text": a * 3 + b * 9, "label": "LABEL_0"} for a in "12345678" for b in "+-=" * 2]
    cut = [{**r, "text": r["text"][:3]} for r in records]
    long, short, kept = (
        [r["reply"] for r in score_classes(base, make_tokenizer(), found, max_length=length)[0]]
        for found, length in ((records, 3), (cut, None), (records, None))
    )
    assert long == short and kept != short


def test_methods_with_virtual_tokens_have_a_loss(base_folder):
    from peft import PromptTuningConfig, get_peft_model

    base, tokenizer = load_base(base_folder, dtype="float32"), make_tokenizer()
    model: Any = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    records = [{"text": "13+25=38"}, {"text": "1+1"}]
    task = Task("x", TaskOptions(head="text"), [], [], [], "loss", None, 1)
    ids = [torch.tensor([tokenizer(r["text"])["input_ids"]]) for r in records]
    with torch.no_grad():
        losses = [float(model(input_ids=i, labels=i).loss) for i in ids]
    # PEFT's own loss counts the first token too, which the prompt predicts
    with torch.no_grad():
        firsts = [-float(model(input_ids=i).logits.log_softmax(-1)[0, 2, i[0, 0]]) for i in ids]
    expected = [
        (n * loss - first) / (n - 1) for i, loss, first in zip(ids, losses, firsts, strict=True) for n in (i.shape[1],)
    ]
    assert loss_of(model, tokenizer, task, records, None, True)[1] == pytest.approx(expected, abs=1e-4)


def test_the_report_is_whole_while_a_further_search_runs(done, base_folder, tmp_path, monkeypatch):
    shutil.copytree(done / "out", tmp_path / "out")
    given = study_of(tmp_path, base_folder, methods={**METHODS, "LoRA 3": {"kind": "lora", "r": 3}})

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("umbra.evaluate.run", stop)
    with pytest.raises(KeyboardInterrupt):
        run_study(tmp_path, given)
    write_report(tmp_path / "out")
    before, after = ((d / "out" / "report.md").read_text() for d in (done, tmp_path))
    row = next(line for line in before.splitlines() if line.startswith("| LoRA |"))
    assert row in after and "runs are missing" in after


def test_a_killed_sweep_goes_on_where_it_was(tmp_path, base_folder):
    methods = {"LoRA": {"kind": "lora", "r": 2}, "Umbra": METHODS["Umbra"]}
    given = study_of(tmp_path, base_folder, methods=methods, match=None, search=None, forgetting=[], transfer={})
    given["tasks"] = {"sum": given["tasks"]["sum"]}
    given["training"] = {**TRAINING, "max_steps": 60}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(given))
    command = [sys.executable, "-m", "umbra", "evaluate", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out")]
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


def test_time_before_a_kill_counts_too(tmp_path, base_folder, monkeypatch):
    """At the pace of what came after it; the answers are those of a run that was not killed."""
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
    monkeypatch.setattr(Trainer, "training_step", lambda *a, **k: time.sleep(0.2) or step(*a, **k))
    assert run_study(tmp_path, given)["failed"] == 0
    (whole,), (resumed,) = ([r for r in record.read_all(tmp_path / out).values() if r["umbra"]["request"]["kind"] == "lora"]
                            for out in ("whole", "out"))  # fmt: skip
    assert (
        resumed["umbra"]["scores"]["sum"]["attached"]["items"] == whole["umbra"]["scores"]["sum"]["attached"]["items"]
    )
    train, pace = resumed["train_info"], resumed["umbra"]["seconds_per_step"]
    assert pace > 0.2 and train["train_time"] == pytest.approx(6 * pace)
    assert resumed["run_info"]["total_time"] > 6 * 0.2


def test_a_damaged_record_counts_as_not_run(done, base_folder):
    file = next((done / "out" / "runs").glob("sum--IA3--seed-0--*.json"))
    whole = file.read_text()
    file.write_text(whole[: len(whole) // 2])
    assert run_study(done, study_of(done, base_folder))["failed"] == 0
    again, first = json.loads(file.read_text()), json.loads(whole)
    assert again["umbra"]["scores"]["sum"]["attached"]["items"] == first["umbra"]["scores"]["sum"]["attached"]["items"]


def test_what_is_json_and_no_record_or_study_is_told_as_such(done, tmp_path):
    shutil.copytree(done / "out", tmp_path / "out")
    key, kept = next(iter(record.read_all(tmp_path / "out").items()))
    file = record.file_of(tmp_path / "out", kept["umbra"]["request"])
    for part in ("train_info", "umbra"):
        file.write_text(json.dumps({k: v for k, v in kept.items() if k != part}))
        assert key not in record.read_all(tmp_path / "out")
    write_report(tmp_path / "out")
    note = tmp_path / "out" / "study.json"
    note.write_text(json.dumps({k: v for k, v in json.loads(note.read_text()).items() if k != "runs"}))
    with pytest.raises(umbra.CheckpointError, match="holds no study"):
        write_report(tmp_path / "out")


def test_an_item_that_is_no_number_costs_its_run_and_not_the_report(done, tmp_path):
    shutil.copytree(done / "out", tmp_path / "out")
    of_lora = variant(results_of(tmp_path), "LoRA")
    kept = next(results_of(tmp_path).of(of_lora, "sum"))
    kept["umbra"]["scores"]["sum"]["attached"]["items"][0] = math.inf
    record.write(tmp_path / "out", kept)
    write_report(tmp_path / "out")
    assert "(1 of 2 seeds)" in (tmp_path / "out" / "report.md").read_text()


def test_a_long_name_is_cut_in_a_files_name(tmp_path):
    request = {"task": "t" * 300, "training": {}, "is_trial": False, "seed": 0, "tasks": {}}
    a, b = (record.file_of(tmp_path, {**request, "method": "影" * 90, "x": x}) for x in "ab")
    assert a != b and len(a.name.encode()) < 200


# -- the record --------------------------------------------------------------------------------------------------------


def test_a_record_has_what_pefts_method_comparison_reads(done):
    """The fields that its processing script takes, with the types that it casts them to."""
    for kept in results_of(done).runs:
        info, train, meta = kept["run_info"], kept["train_info"], kept["meta_info"]
        last = train["metrics"][-1]
        assert isinstance(info["experiment_name"], str) and isinstance(info["train_config"]["model_id"], str)
        assert info["peft_config"] is None or isinstance(info["peft_config"]["peft_type"], str)
        for name in ("memory_reserved_avg", "memory_max", "memory_reserved_99th"):
            assert isinstance(train[f"accelerator_{name}"], int)
        assert isinstance(train["file_size"], int) and isinstance(train["train_time"], float)
        assert isinstance(info["total_time"], float) and train["status"] == "success"
        assert isinstance(last["train samples"], int) and isinstance(last["train total tokens"], int)
        if info["peft_config"] is not None:
            assert isinstance(last["test accuracy"], float) and isinstance(last["train loss"], float)
            assert train["train_time"] > 0 and train["file_size"] > 4 * 200
        assert {
            "peft-version",
            "transformers-version",
            "datasets-version",
            "torch-version",
            "bitsandbytes-version",
        } <= meta["package_info"].keys()
        assert meta["system_info"] and info["created_at"][:2] == "20"


# -- lm-eval -----------------------------------------------------------------------------------------------------------


def test_tasks_of_lm_eval_are_tested_by_name(tmp_path, base_folder):
    pytest.importorskip("lm_eval")
    questions = [
        {"question": f"{a}+{b}=", "choices": ["7", "12", "no"], "answer": (a + b) % 3}
        for a in range(3)
        for b in range(3)
    ]
    lines(tmp_path / "toy.jsonl", questions)
    (tmp_path / "toy.yaml").write_text(
        f"task: toy\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/toy.jsonl}}}}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: choices\ndoc_to_target: answer\n'
        "metric_list: [{metric: acc}]\n"
    )
    methods = {"base": {"kind": "base"}, "LoRA": {"kind": "lora", "r": 2}, "Umbra": METHODS["Umbra"]}
    given = study_of(
        tmp_path, base_folder, methods=methods, match=None, search=None, seeds=[0], transfer={}, forgetting=["toy"]
    )
    given["tasks"] = {"sum": given["tasks"]["sum"], "toy": {"lm_eval": "toy", "lm_eval_path": str(tmp_path)}}
    assert run_study(tmp_path, given)["failed"] == 0
    results = results_of(tmp_path)
    base = load_base(base_folder, dtype="float32")
    tokenizer, right = make_tokenizer(), []
    for q in questions:
        sums = []
        for choice in q["choices"]:
            ids = torch.tensor([tokenizer(f"{q['question']} {choice}")["input_ids"]])
            with torch.no_grad():
                logps = base(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])
            sums.append(float(logps[len(q["question"]) - 1 :].sum()))
        right.append(float(sums.index(max(sums)) == q["answer"]))
    assert results.items(variant(results, "base"), "sum", "toy")[0] == right
    for name in ("LoRA", "Umbra", "Umbra, detached"):
        assert len(results.items(variant(results, name), "sum", "toy")[0]) == 9
    assert "Forgetting" in (tmp_path / "out" / "report.md").read_text()
    lines(tmp_path / "toy.jsonl", questions[:2])  # other data is another run
    assert run_study(tmp_path, given)["failed"] == 0
    assert len(results_of(tmp_path).items(variant(results, "LoRA"), "sum", "toy")[0]) == 2
    given["tasks"]["toy"]["lm_eval"] = "toyy"
    with pytest.raises(
        umbra.ConfigError, match=r"(?s)Unknown key 'toyy' in the tasks of lm-eval .task toy.*Did you mean 'toy'"
    ):
        run_study(tmp_path, given, out="other")


def test_a_metric_of_lm_eval_that_is_no_mean_over_samples_is_a_value_alone(tmp_path, base_folder):
    """Its samples of perplexity are log-likelihoods, of which more is better."""
    pytest.importorskip("lm_eval")
    lines(tmp_path / "toy.jsonl", [{"question": f"{a}+{a}=", "answer": str(2 * a)} for a in range(4)])
    (tmp_path / "toy.yaml").write_text(
        f"task: toy\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/toy.jsonl}}}}\ntest_split: test\n"
        'output_type: loglikelihood\ndoc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
        "metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]\n"
    )
    base, options = load_base(base_folder, dtype="float32"), TaskOptions(lm_eval="toy", lm_eval_path=str(tmp_path))
    found = harness.score(base, make_tokenizer(), options, 2)
    assert found["metric"] == "perplexity" and found["less_is_better"] and found["items"] == []
    assert found["value"] > 1


# -- the report --------------------------------------------------------------------------------------------------------


def test_percents_are_shares_in_every_run_where_one_is_beyond_1(done, tmp_path):
    """Of a metric that is none of the known percents; another test's shares stay."""
    shutil.copytree(done / "out", tmp_path / "out")
    for file in (tmp_path / "out" / "runs").glob("sum--*.json"):
        kept = json.loads(file.read_text())
        scores = kept["umbra"]["scores"].get("sign", {})  # attached, detached
        for score, each in zip(scores.values(), ([61.0] * 24, [0.5] * 24), strict=False):
            score |= {"value": each[0], "items": each}
        file.write_text(json.dumps(kept))
    before, after = results_of(done), results_of(tmp_path)
    for name, share in (("Umbra", 0.61), ("Umbra, detached", 0.005)):
        v = variant(after, name)
        assert after.score(v, "sum", "sign").mean == pytest.approx(share)
        assert after.items(v, "sum", "sum") == before.items(v, "sum", "sum")
        assert after.items(v, "sum", "text") == before.items(v, "sum", "text")


def test_the_page_needs_nothing_else_and_knows_light_and_dark(done):
    text = (done / "out" / "report.html").read_text()
    assert not re.search(r"<(script|img|link|iframe)|url\((?!#)|(src|href)=.(?!#)", text)
    assert "prefers-color-scheme: dark" in text and "currentColor" in text and "#010203" not in text
    assert "font-family: system-ui" in text and "DejaVu" not in text
    assert text.count("<svg") == 4
    for title in (
        "Scores",
        "Wins, ties and losses",
        "What it costs",
        "Transfer",
        "Forgetting",
        "Search for the learning rate",
    ):
        assert f">{title}</h2>" in text
    for name in METHODS:
        assert f">{name}</td>" in text


def test_markdown_and_page_tell_the_same(done):
    written, page = ((done / "out" / f"report.{e}").read_text() for e in ("md", "html"))
    rows = [line for line in written.splitlines() if line.startswith("| ")]
    cells = [[re.sub(r"\*\*", "", c.strip()) for c in row[2:-2].split(" | ")] for row in rows]
    found = re.findall(r"<tr>(.*?)</tr>", page)
    assert cells == [[re.sub(r"<[^>]+>", "", c) for c in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)] for row in found]
    for figure in re.findall(r"\]\((figures/\w+\.png)\)", written):
        assert (done / "out" / figure).read_bytes()[:4] == b"\x89PNG"


def test_losses_stand_on_the_first_page(done, monkeypatch):
    loss, win = Estimate(-0.2, -0.3, -0.1, 2, 24), Estimate(0.2, 0.1, 0.3, 2, 24)
    monkeypatch.setattr(Results, "apart", lambda self, ours, theirs, *_: loss if theirs.name == "LoRA" else win)
    write_report(done / "out", done / "elsewhere")
    text = (done / "elsewhere" / "report.md").read_text()
    first = text[: text.index("## ")]
    for lost in (
        "sum (-20.0 ± 10.0)",
        "sum → sign (-20.0 ± 10.0)",
        "sum → text (-0.200 ± 0.100)",
        "class (-20.0 ± 10.0)",
    ):
        assert f"Umbra to LoRA on {lost}" in first
    assert "are won, 0 tied and 4 lost" in first and "Umbra, detached to" not in first
    assert "with the bare base" in first and "0 lost. No loss is beyond the noise." in first
    monkeypatch.setattr(Results, "apart", lambda self, ours, theirs, *_: win if theirs.is_trained else loss)
    write_report(done / "out", done / "elsewhere")
    text = (done / "elsewhere" / "report.md").read_text()
    assert re.search(r"\*\*Lost:\*\* .*Umbra, detached to base on sum", text[: text.index("## ")])
    assert (done / "elsewhere" / "figures" / "scores.png").exists()


def test_a_score_without_items_has_no_verdict(done):
    results = results_of(done)
    for kept in results.runs:
        for score in kept["umbra"]["scores"].get("sign", {}).values():
            score["items"] = []
    found = results.apart(variant(results, "Umbra"), variant(results, "LoRA"), "sum", "sign")
    assert found.verdict == "" and not any(
        c.tested == "sign" and c.trained == "sum" for c in report._comparisons(results)
    )
    row = next(r for r in report._transfer(results)[0].rows if r[0] == "Umbra − LoRA")
    assert row[1].endswith("(seeds alone)")


def test_many_methods_are_told_apart_in_pictures(done):
    results = results_of(done)
    results.variants = [Variant(f"a method with a name of some length {i}", "attached", "umbra") for i in range(24)]
    found = plots.looks(results)
    assert len({tuple(look.values()) for look in found.values()}) == 24
    figure = plots.pareto(results)
    assert figure.get_size_inches()[1] > 0.18 * 24 * 2


def test_a_missing_seed_is_told(done, tmp_path):
    shutil.copytree(done / "out", tmp_path / "out")
    for file in (tmp_path / "out" / "runs").glob("sum--LoRA--seed-1--*.json"):
        file.unlink()
    write_report(tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "**1 runs are missing:**" in text
    scores, verdicts = (text[text.index(f"## {t}") :] for t in ("Scores", "Wins"))
    for section, name in ((scores, "LoRA"), (verdicts, "Umbra − LoRA")):
        row = next(line for line in section.splitlines() if line.startswith(f"| {name} |"))
        assert row.count("(1 of 2 seeds)") >= 1 and "seeds" not in row.split(" | ")[2]


def test_transfer_to_a_loss_is_in_the_table_and_not_in_the_map(done):
    results = results_of(done)
    results.study["transfer"] = {"sum": ["sign", "text"]}
    section, draw = report._transfer(results)
    assert section.header[2] == "sum → text, loss" and draw().axes[0].get_xticklabels()[-1].get_text() == "sum →\nsign"
    row = next(r for r in section.rows if r[0] == "Umbra − LoRA")
    ours, theirs = (results.score(variant(results, n), "sum", "text").mean for n in ("Umbra", "LoRA"))
    assert row[2].startswith(f"{theirs - ours:+.3f}")
    results.study["transfer"] = {"sum": ["text"]}
    assert report._transfer(results)[0].figure is None


def test_sizes_are_held_to_what_they_were_matched_to(done):
    results = results_of(done)
    first = results.about["parameters"]
    results.study["match"], results.about["parameters"] = 5000.0, {**dict.fromkeys(first, 5000), "IA3": 30}
    assert "Not of equal size: IA3 (0.00 M)." in "".join(report._lead(results))
    results.study["match"], results.about["parameters"] = "LoRA", {**dict.fromkeys(first, 5000), "Umbra": 9000}
    assert "Not of equal size: Umbra (0.01 M)." in "".join(report._lead(results))


def test_every_method_that_is_not_ours_is_a_rival(tmp_path, done):
    shutil.copytree(done / "out", tmp_path / "out")
    about = json.loads((tmp_path / "out" / "study.json").read_text())
    about["study"]["ours"] = ["LoRA"]
    (tmp_path / "out" / "study.json").write_text(json.dumps(about))
    pairs = {(a.name, b.name) for a, b in report._opponents(results_of(tmp_path))}
    assert pairs == {("LoRA", n) for n in ("DoRA", "Lily", "IA3", "PEFT Shadow", "Umbra", "base")}


def test_costs_are_multiples_run_by_run(done, monkeypatch):
    """The multiple is the mean over runs of the same seed and task, with an interval over both."""
    results = results_of(done)
    ours, theirs = (variant(results, n) for n in ("Umbra", "LoRA"))
    found = results.beside(ours, theirs, "seconds")
    seconds = {}
    for kept in results.runs:
        asked = kept["umbra"]["request"]
        seconds[asked["method"], asked["task"], asked["seed"]] = kept["umbra"]["seconds_per_step"]
    by_hand = [seconds["Umbra", t, s] / seconds["LoRA", t, s] for t in results.trained for s in results.study["seeds"]]
    assert found.mean == pytest.approx(sum(by_hand) / len(by_hand)) and found.low < found.mean < found.high
    assert results.beside(theirs, theirs, "seconds").half == 0
    text = (done / "out" / "report.md").read_text()
    assert f"{found.mean:.2f} ± {found.half:.2f} ×" in text[text.index("## What it costs") :]


def test_families_and_ablations_have_sections_of_their_own(tmp_path, base_folder):
    methods = {
        "Umbra": METHODS["Umbra"], "Umbra, α = 0.1": {**METHODS["Umbra"], "alpha": 0.1},
        "LoRA 2": {"kind": "lora", "r": 2, "family": "LoRA"}, "LoRA 4": {"kind": "lora", "r": 4, "family": "LoRA"},
    }  # fmt: skip
    given = study_of(tmp_path, base_folder, methods=methods, match=None, search=None, transfer={}, forgetting=[])
    given |= {"reference": "Umbra", "tasks": {"sum": given["tasks"]["sum"]}, "training": {**TRAINING, "max_steps": 2}}
    given["tasks"]["sum"]["scored_on"] = "validation"
    assert run_study(tmp_path, given)["failed"] == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## Scaling" in text and "| LoRA: LoRA 4 |" in text
    assert "its test set (sum: on what is held out for choices)" in text
    assert len(results_of(tmp_path).items(variant(results_of(tmp_path), "Umbra"), "sum", "sum")[0]) == 6
    ablations = text[text.index("## Ablations") : text.index("## How")]
    assert "| Umbra, α = 0.1 |" in ablations and "| LoRA 2 |" not in ablations


# -- the commands ------------------------------------------------------------------------------------------------------


def test_the_commands_run_report_and_refuse(done, capsys, monkeypatch):
    assert main(["evaluate", str(done / "study.yaml"), "--out", str(done / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["failed"] == 0 and all(Path(f).exists() for f in found["report"])
    assert main(["report", str(done / "out"), "--out", str(done / "again")]) == 0
    assert (done / "again" / "report.html").exists()
    capsys.readouterr()
    monkeypatch.setattr(umbra.evaluate, "evaluate", lambda _: print("loading") or {"failed": 0, "report": []})
    assert main(["evaluate", str(done / "study.yaml"), "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["failed"] == 0 and "loading" in told.err
    monkeypatch.undo()
    assert main(["report", str(done / "nowhere")]) == 2
    assert "holds no study" in capsys.readouterr().err
    assert main(["evaluate", str(done / "nowhere.yaml")]) == 2
    assert "cannot be read as YAML" in capsys.readouterr().err
