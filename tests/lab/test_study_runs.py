"""``umbra study``: every kind of method on tiny tasks, compared with runs by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

import umbra
from support.studies import METHODS, TRAINING, lines, results_of, run_study, study_of, the_record, variant
from support.tokenizer import make_tokenizer
from umbra.base.loading import load_base
from umbra.cli import main
from umbra.data import Collator, encode_all
from umbra.evaluation.scoring import score_adapter, score_classes
from umbra.lab.bench.base import Base
from umbra.lab.bench.methods import trainable
from umbra.lab.study import lm_eval_tasks
from umbra.lab.study.methods import build, count, read_method
from umbra.lab.study.preparation import sizes_of
from umbra.lab.study.reading import parse_study
from umbra.lab.study.run import execute
from umbra.lab.study.scoring import loss_of
from umbra.lab.study.tasks import Task, TaskOptions, load_task
from umbra.options import EvalOptions
from umbra.training.runs import make_arguments

# of PEFT's use of transformers
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


# -- the sweep ---------------------------------------------------------------------------------------------------------


def test_study_scores_every_method_task_and_seed(done):
    results = results_of(done)
    assert results.trained == ["sum", "class"]
    for v in results.variants:
        for task in results.trained:
            result = results.items(v, task, task)
            assert v.is_trained or task == "class" or result
            if v.is_trained:
                assert sorted(result) == [0, 1]
                assert {len(i) for i in result.values()} == {24}
        if v.kind != "base":
            assert results.items(v, "sum", "sign") and results.items(v, "sum", "text")
            assert results.score(v, "sum", "text").mean > 0
    assert {v.name for v in results.variants} == {*METHODS, "Umbra, detached"}


def test_matched_methods_have_equal_parameter_counts(done):
    results = results_of(done)
    for v in results.variants:
        if v.is_trained and v.method != "IA3":
            measured = results.cost(v)["parameters"]
            assert v.kind == "alone" or abs(results.description["parameters"][v.method] - 20000) <= 1000
            assert measured == pytest.approx(
                results.description["parameters"][v.method], abs=200
            )  # of which a classifier's head


def test_reference_method_is_unchanged_by_matching(tmp_path, base_folder):
    methods = {"LoRA": {"kind": "lora"}, "Umbra": {"kind": "umbra"}, "Other": {"kind": "umbra", "rank": 2}}
    study = parse_study(study_of(tmp_path, base_folder, methods=methods, match="Umbra", forgetting=[]))
    fields, counts = sizes_of(study, Base.named(base_folder, torch.bfloat16, torch.device("cpu")))
    assert fields["Umbra"] == {} and "shadow_intermediate_size" in fields["Other"]
    assert all(abs(n - counts["Umbra"]) <= 0.05 * counts["Umbra"] for n in counts.values())


@pytest.mark.parametrize(("kind", "fields"), [("umbra", {"init": "base"}), ("umbra", None), ("alone", None)])
def test_copied_and_pretrained_shadows_keep_their_sizes(kind, fields, base_folder, tmp_path):
    shadow = umbra.attach(load_base(base_folder, dtype="float32"), umbra.ShadowConfig()).detached()
    shadow.save_pretrained(tmp_path / "shadow")
    method = read_method("x", {"kind": kind, **(fields or {"shadow": str(tmp_path / "shadow")})})
    real = build(kind, load_base(base_folder, dtype="float32"), method.fields)
    assert (
        count(Base.named(base_folder, torch.float32, torch.device("cpu")), "x", method, method.fields)
        == trainable(real)
        > 0
    )


def test_chosen_rate_has_lowest_held_out_loss(done):
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
        for record in results.runs:
            if name in results.names_of(record):
                assert record["umbra"]["request"]["training"]["learning_rate"] == best
                assert record["run_info"]["train_config"]["optimizer_kwargs"]["lr"] == best


@pytest.mark.parametrize("mode", ["attached", "detached"])
def test_study_scores_equal_umbra_eval(mode, done):
    record = the_record(done, "sum", "Umbra", 1)
    adapter = next((done / "out" / "adapters").glob("sum--Umbra--seed-1--*"))
    options = EvalOptions(
        str(adapter), str(done / "sum.test.jsonl"), modes=mode, max_new_tokens=3, batch_size=5, dtype="float32"
    )
    assert score_adapter(options)[0].accuracy == pytest.approx(record["umbra"]["scores"]["sum"][mode]["value"])


def test_study_lora_equals_plain_peft_training(done, base_folder, tmp_path):
    """PEFT and transformers called by hand: the same losses, the same answers."""
    from peft import LoraConfig, get_peft_model

    record = the_record(done, "sum", "LoRA", 0)
    rank, rate = record["run_info"]["peft_config"]["r"], record["run_info"]["train_config"]["optimizer_kwargs"]["lr"]
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
    assert trainer.train().training_loss == pytest.approx(record["train_info"]["metrics"][-1]["train loss"], rel=1e-5)
    text = load_task("text", TaskOptions(**given["text"]))
    each = loss_of(model, tokenizer, text, text.test, None, True)[1]
    assert each == pytest.approx(record["umbra"]["scores"]["text"]["attached"]["items"], abs=2e-4)


def test_task_may_be_scored_by_answer_loss(base_folder, tmp_path):
    """Of the answers alone: the questions' tokens are not in it."""
    given = study_of(tmp_path, base_folder)["tasks"]["sum"]
    request = {
        "base": str(base_folder), "dtype": "float32", "kind": "base", "fields": {}, "seed": 0, "task": None, "training": {},
        "tasks": {"sum": {**given, "metric": "loss", "test_limit": 3}}, "tests": ["sum"], "modes": ["attached"],
        "chat_template": False, "batch_size": 2, "is_trial": False,
    }  # fmt: skip
    score = execute(request, tmp_path / "work", None)["scores"]["sum"]["attached"]
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


def test_loss_per_token_is_independent_of_batch(base_folder):
    base, tokenizer = load_base(base_folder, dtype="float32"), make_tokenizer()
    records = [{"text": "1+1=2"}, {"text": "13+25=38, and so on"}, {"text": "1"}]
    task = Task("x", TaskOptions(head="text", max_length=12), [], [], [], "loss", None, 1)
    sums, count, means = 0.0, 0, []
    for r in records:
        ids = torch.tensor([[*tokenizer(r["text"])["input_ids"], tokenizer.eos_token_id]])[:, :12]
        with torch.no_grad():
            logps = base(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])
        sums, count = sums - float(logps.sum()), count + len(logps)
        means.append(-float(logps.mean()))
    result, each = loss_of(base, tokenizer, task, records, None, True)
    assert result == pytest.approx(sums / count, rel=1e-5)
    assert each == pytest.approx(means, abs=1e-4) and len(each) == 3


def test_shadow_alone_never_runs_base(done):
    record = the_record(done, "sum", "Alone", 0)
    assert list(record["umbra"]["scores"]["sum"]) == ["detached"]
    assert (
        record["train_info"]["num_trainable_params"]
        < the_record(done, "sum", "Umbra", 0)["train_info"]["num_trainable_params"] * 1.05
    )


def test_classified_text_is_truncated_as_in_training(base_folder):
    base = load_base(base_folder, classifier={"num_labels": 2, "pad_token_id": 0}, dtype="float32")
    torch.nn.init.normal_(base.score.weight)
    base.config.problem_type, base.config.label2id = "single_label_classification", {"LABEL_0": 0, "LABEL_1": 1}
    records = [{"text": a * 3 + b * 9, "label": "LABEL_0"} for a in "12345678" for b in "+-=" * 2]
    cut = [{**r, "text": r["text"][:3]} for r in records]
    long, short, record = (
        [r["reply"] for r in score_classes(base, make_tokenizer(), result, max_length=length)[0]]
        for result, length in ((records, 3), (cut, None), (records, None))
    )
    assert long == short and record != short


def test_virtual_token_methods_report_loss(base_folder):
    from peft import PromptTuningConfig, get_peft_model

    base, tokenizer = load_base(base_folder, dtype="float32"), make_tokenizer()
    model: Any = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    records = [{"text": "13+25=38"}, {"text": "1+1"}]
    task = Task("x", TaskOptions(head="text"), [], [], [], "loss", None, 1)
    ids = [torch.tensor([[*tokenizer(r["text"])["input_ids"], tokenizer.eos_token_id]]) for r in records]
    with torch.no_grad():
        losses = [float(model(input_ids=i, labels=i).loss) for i in ids]
    # PEFT's own loss counts the first token too, which the prompt predicts
    with torch.no_grad():
        firsts = [-float(model(input_ids=i).logits.log_softmax(-1)[0, 2, i[0, 0]]) for i in ids]
    expected = [
        (n * loss - first) / (n - 1) for i, loss, first in zip(ids, losses, firsts, strict=True) for n in (i.shape[1],)
    ]
    assert loss_of(model, tokenizer, task, records, None, True)[1] == pytest.approx(expected, abs=1e-4)


# -- the record --------------------------------------------------------------------------------------------------------


def test_record_has_fields_of_peft_method_comparison(done):
    """The fields that its processing script takes, with the types that it casts them to."""
    for record in results_of(done).runs:
        info, train, meta = record["run_info"], record["train_info"], record["meta_info"]
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


def test_lm_eval_aggregate_metric_has_no_items(tmp_path, base_folder):
    """Its samples of perplexity are log-likelihoods, of which more is better."""
    pytest.importorskip("lm_eval")
    lines(tmp_path / "toy.jsonl", [{"question": f"{a}+{a}=", "answer": str(2 * a)} for a in range(4)])
    (tmp_path / "toy.yaml").write_text(
        f"task: toy\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/toy.jsonl}}}}\ntest_split: test\n"
        'output_type: loglikelihood\ndoc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
        "metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]\n"
    )
    base, options = load_base(base_folder, dtype="float32"), TaskOptions(lm_eval="toy", lm_eval_path=str(tmp_path))
    result = lm_eval_tasks.score(base, make_tokenizer(), options, 2)
    assert result["metric"] == "perplexity" and result["less_is_better"] and result["items"] == []
    assert result["value"] > 1


# -- the commands ------------------------------------------------------------------------------------------------------


def test_study_commands_run_report_and_refuse(done, capsys, monkeypatch):
    assert main(["study", str(done / "study.yaml"), "--out", str(done / "out"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["failed"] == 0 and all(Path(f).exists() for f in result["report"])
    assert main(["report", str(done / "out"), "--out", str(done / "again")]) == 0
    assert (done / "again" / "report.html").exists()
    capsys.readouterr()
    monkeypatch.setattr("umbra.lab.study.sweep.run_study", lambda _: print("loading") or {"failed": 0, "report": []})
    assert main(["study", str(done / "study.yaml"), "--json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["failed"] == 0 and "loading" in output.err
    monkeypatch.undo()
    assert main(["report", str(done / "nowhere")]) == 2
    assert "holds no study" in capsys.readouterr().err
    assert main(["study", str(done / "nowhere.yaml")]) == 2
    assert "cannot be read as YAML" in capsys.readouterr().err


def test_base_is_also_scored_by_likelihood(tmp_path, base_folder):
    """Where answers repeat, the bare base has a second row; a record without it, of an earlier version, is read as before."""
    rows = [{"prompt": f"is {i} even", "completion": "no" if i % 2 else "yes"} for i in range(20)]
    tested = lines(tmp_path / "test.jsonl", [{**r, "prompt": f"so {r['prompt']}"} for r in rows[:10]])
    task = {"train": lines(tmp_path / "train.jsonl", rows), "test": tested, "validation": 4}
    given = study_of(tmp_path, base_folder, tasks={"even": task}, methods={"base": {"kind": "base"}})
    for key in ("search", "transfer", "forgetting"):
        given.pop(key)
    given |= {"match": None, "training": {**given["training"], "learning_rate": 1e-3}}
    assert run_study(tmp_path, given)["failed"] == 0
    results = results_of(tmp_path)
    assert [v.name for v in results.variants] == ["base", "base, by likelihood"]
    [record] = results.runs
    score = record["umbra"]["scores"]["even"]["likelihood"]
    assert len(score["items"]) == 10
    assert results.score(results.variants[1], "even", "even").mean == pytest.approx(score["value"])
    assert "base, by likelihood" in (tmp_path / "out" / "report.md").read_text()
    file = next((tmp_path / "out" / "runs").glob("*.json"))
    del record["umbra"]["scores"]["even"]["likelihood"]
    file.write_text(json.dumps(record))
    assert [v.name for v in results_of(tmp_path).variants] == ["base"]
