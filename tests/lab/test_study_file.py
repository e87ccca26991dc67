"""A study's file: what it may say, what is refused, and the keys of its runs."""

import hashlib
import json
from pathlib import Path

import pytest

from umbra.config import DIALECTS
from umbra.errors import ConfigError, DataError
from umbra.files.folder import digest_of
from umbra.lab.study.reading import parse_study, read_study
from umbra.lab.study.requests import key_of, runs
from umbra.lab.study.tasks import TaskOptions, load_task


@pytest.fixture
def study(tmp_path):
    for name in ("a", "b"):
        for part, prompt in (("train", "1+1="), ("test", "1+2=")):
            (tmp_path / f"{name}.{part}.jsonl").write_text(
                (json.dumps({"prompt": prompt, "completion": "2"}) + "\n") * 4
            )
    tasks = {
        n: {"train": f"{tmp_path}/{n}.train.jsonl", "test": f"{tmp_path}/{n}.test.jsonl", "validation": 1} for n in "ab"
    }
    return {"tasks": tasks, "methods": {"Umbra": {"kind": "umbra", "rank": 4}}, "training": {"max_steps": 2}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": {}}, "has no tasks"),
        ({"method": {}}, "Unknown key 'method'.*Did you mean 'methods'"),
        ({"methods": {"x": {"kind": "lorra"}}}, "Unknown key 'lorra'.*'lora'"),
        ({"methods": {"x": {"r": 8}}}, "method x needs a kind"),
        ({"methods": {"x": {"kind": "lora", "rr": 8}}}, "Unknown key 'rr'.*LoraConfig"),
        ({"methods": {"x": {"kind": "peft", "peft_type": "NONE"}}}, "peft_type of PEFT"),
        ({"methods": {"x": {"kind": "umbra", "ranc": 8}}}, "Unknown key 'ranc'"),
        ({"methods": {"x": {"kind": "umbra", "rank": 0}}}, "rank must be"),
        ({"methods": {"x": {"kind": "lora", "modes": ["detached"]}}}, "modes must be of attached"),
        ({"methods": {"x": {"kind": "base", "rank": 1}}}, "bare base has no fields"),
        ({"methods": {"x": {"kind": "lora", "learning_rate": -1}}}, "learning_rate must be above 0"),
        ({"seeds": []}, "seeds must be"),
        ({"seeds": [-1]}, "seeds must be"),
        ({"dtype": "float8"}, "Unknown dtype"),
        ({"match": "LoRA"}, "Unknown key 'LoRA' in the study's methods"),
        ({"match": 0}, "match must be"),
        ({"reference": "LoRA"}, "study's methods .reference"),
        ({"transfer": {"a": ["c"]}}, "study's tasks .transfer"),
        ({"transfer": {"a": 3}}, "transfer.a must be a list"),
        ({"forgetting": ["a", "b"]}, "Every task of the study is tested only"),
        ({"search": {"learning_rates": [1]}}, "Unknown key 'learning_rates' in search"),
        ({"search": {"tasks": ["c"]}}, "study's tasks .search"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"base": "random:tiny"}, "is for umbra bench"),
        ({"search": {"learning_rate": []}}, "search.learning_rate is empty"),
        ({"search": {"max_steps": 0}}, "search.max_steps must be"),
        ({"search": {"seed": -1}}, "search.seed at least 0"),
        ({"search": {"tasks": ["b"]}, "transfer": {"a": ["b"]}}, "b, which is tested only"),
        ({"forgetting": ["b"]}, "add a method with .kind: base"),
        ({"tasks": {n: {"set": "intents", "data": ".", "head": "classify"} for n in "ab"}, "forgetting": ["b"]},
         "no classification head"),
        ({"methods": {"x": {"kind": "lora", "learning_rate": [1e-3, 1e-2]}}}, "several learning rates, but the study has no"),
        ({"methods": {"x": {"kind": "lora", "learning_rate": "fast"}}}, "method x: learning_rate must be"),
        ({"methods": {"x": {"kind": "lora", "training": 5}}}, "method x: training must be"),
        ({"methods": {"x": {"kind": ["lora"]}}}, "the kinds of method"),
        ({"methods": {"x": {"kind": "lora", "training": {"learning_rate": 1}}}}, "set learning_rate outside training"),
        ({"methods": {"x": {"kind": "umbra", "modes": "detachd"}}}, "modes must be of attached, detached"),
        ({"training": {"per_device_train_batch_size": "eight"}}, "per_device_train_batch_size must be"),
        ({"seeds": [True]}, "seeds must be"),
        ({"forgetting": [{"text": None}]}, r"the study: forgetting must be list\[str\]"),
        ({"transfer": {"a": [{"b": None}]}}, "transfer.a must be a list of tasks"),
        ({"search": {"tasks": [["a"]]}}, r"search: tasks must be list\[str\]"),
        ({"search": {"learning_rate": [[0.1]]}}, r"search: learning_rate must be list\[float\]"),
        ({"ours": [["Umbra"]]}, "the study: ours must be"),
        ({"methods": {"x": {"kind": "umbra", "modes": [["attached"]]}}}, "method x: modes must be of attached, detached"),
        ({"training": {"seed": 3}}, "Unknown key 'seed'"),
        ({"training": {"max_step": 2}}, "max_step"),
        ({"training": {"eval_strategy": "steps"}}, "eval_strategy must be no"),
        ({"search": {"learning_rate": [0.1, 0.1]}}, "has duplicates"),
        ({"reference": "Umbra"}, "Umbra is the only method of kind umbra"),
        ({"methods": {"a\nb": {"kind": "lora"}}}, "unprintable characters"),
        ({"training": {"per_device_train_batch_size": 0}}, "per_device_train_batch_size"),
    ],
)  # fmt: skip
def test_invalid_study_is_refused(change, message, study):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        parse_study({**study, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test": None}, "train needs test"),
        ({"words": 3}, "words is for known data sets"),
        ({"metric": "bleu"}, "Unknown key 'bleu'.*metrics"),
        ({"metric": "loss", "head": "classify"}, "metric=loss needs generated text"),
        ({"pattern": "("}, "no regular expression"),
        ({"validation": 0}, "validation must be at least 1"),
        ({"head": "regress"}, "head must be"),
        ({"steps": 3}, "Unknown key 'steps' in task a"),
        ({"train": None, "test": None}, "known data sets"),
        ({"train": None, "scored_on": "validation"}, "scored_on=validation needs training records"),
        ({"train": None, "test": None, "lm_eval": "x", "metric": "exact"}, "metric is not for a task of lm-eval"),
        (
            {"train": None, "test": None, "lm_eval": "x", "head": "classify"},
            "head=classify is not for a task of lm-eval",
        ),
    ],
)
def test_invalid_task_is_refused(change, message, study):
    study["tasks"]["a"] |= change
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        parse_study(study)


def test_too_little_data_and_wrong_records_are_named(study):
    with pytest.raises(
        DataError, match="4 training records whose prompts are not in its test set; validation=4 leaves none"
    ):
        load_task("a", TaskOptions(**{**study["tasks"]["a"], "validation": 4}))
    with pytest.raises(DataError, match="head=classify needs label records, got completion"):
        load_task("a", TaskOptions(**study["tasks"]["a"], head="classify"))


def test_key_depends_only_on_inputs_of_result(study, tmp_path, monkeypatch):
    def key(**changes):
        made = parse_study({**study, **changes})
        return key_of(next(runs(made, {n: m.fields for n, m in made.methods.items()}, {})))

    first = key()
    with monkeypatch.context() as patch:  # of another version, where a field that is not given means another number
        patch.setitem(DIALECTS["umbra"], "alpha", 0.7)
        other = key()
        given = {"methods": {"Umbra": {"kind": "umbra", "rank": 4, "alpha": 0.7}}}
        patch.setitem(DIALECTS["umbra"], "alpha", 1.0)
        before = key()
        assert before == "240caff700f738f1", "records of schema 1 stay valid"
        assert len({first, other, before, key(**given)}) == 4
    assert key(title="Other", about="words", batch_size=3) == first
    assert key(methods={"Renamed": study["methods"]["Umbra"]}) == first
    assert key(seeds=[1]) != first
    assert key(training={"max_steps": 3}) != first
    assert key(methods={"Umbra": {"kind": "umbra", "rank": 5}}) != first
    assert key(transfer={"a": ["b"]}) != first
    assert key(tasks={"a": {**study["tasks"]["a"], "scored_on": "validation"}}) != first
    assert key(tasks={"a": {**study["tasks"]["a"], "train": "org/a", "test": "org/t"}}) != key(
        tasks={"a": {**study["tasks"]["a"], "train": "org/b", "test": "org/t"}}
    )
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / "config.json").write_text("{}")
    pretrained = {"Umbra": {"kind": "umbra", "shadow": str(tmp_path / "shadow")}}
    before = key(methods=pretrained)
    (tmp_path / "shadow" / "config.json").write_text('{"again": 1}')
    assert key(methods=pretrained) != before
    (tmp_path / "moved.jsonl").write_bytes((tmp_path / "a.train.jsonl").read_bytes())
    moved = {**study["tasks"]["a"], "train": str(tmp_path / "moved.jsonl")}
    assert key(tasks={"a": moved}) == first
    (tmp_path / "moved.jsonl").write_text('{"prompt": "1+1=", "completion": "33"}\n' * 4)
    assert key(tasks={"a": moved}) != first


def test_key_depends_on_lm_eval_files_but_not_their_location(study, tmp_path):
    def key(folder):
        tasks = {**study["tasks"], "b": {"lm_eval": "toy", "lm_eval_path": str(folder)}}
        made = parse_study({**study, "tasks": tasks, "transfer": {"a": ["b"]}})
        return key_of(next(runs(made, {n: m.fields for n, m in made.methods.items()}, {})))

    for folder, data in (("one", "1"), ("two", "1"), ("three", "2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "toy.yaml").write_text("task: toy")
        (tmp_path / folder / "toy.jsonl").write_text(data)
    assert key(tmp_path / "one") == key(tmp_path / "two") != key(tmp_path / "three")


def test_file_digest_is_cached_until_file_changes(tmp_path, monkeypatch):
    read = []
    plain = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *x: read.append(1) or plain(*x))
    file = tmp_path / "weights"
    file.write_text("one")
    first = digest_of([file])
    assert digest_of([file]) == first and len(read) == 1
    assert first == hashlib.sha256(hashlib.sha256(b"one").hexdigest().encode()).hexdigest()[:16]
    file.write_text("three")
    assert digest_of([file]) != first and len(read) == 2


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[2] / "bench" / "studies").glob("*.yaml")), ids=lambda f: f.stem
)
def test_bench_studies_can_be_read(file):
    study = read_study(str(file))
    assert study.trained and all(study.tested(t) for t in study.trained)
