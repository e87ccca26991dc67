"""lm-eval runs adapters, on toy tasks from a local file."""

import json
from pathlib import Path

import pytest
import torch

import umbra
from support.tiny import make, scramble
from support.tokenizer import make_tokenizer
from umbra.cli import main

pytest.importorskip("lm_eval")
# lm-eval's own dependencies
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

QUESTIONS = [
    {"question": f"{a}+{b}=", "choices": ["7", "12", "no"], "answer": (a + b) % 3} for a in range(4) for b in range(4)
]
TASKS = {
    "toy_choice": """
        output_type: multiple_choice
        doc_to_text: "{{question}}"
        doc_to_choice: choices
        doc_to_target: answer
        metric_list: [{metric: acc}]
    """,
    "toy_words": """
        output_type: generate_until
        doc_to_text: "{{question}}"
        doc_to_target: "{{choices[answer]}}"
        generation_kwargs: {until: ["!"], max_gen_toks: 6, do_sample: false}
        metric_list: [{metric: exact_match}]
    """,
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "toy.jsonl").write_text("\n".join(json.dumps(q) for q in QUESTIONS) + "\n")
    for name, text in TASKS.items():
        lines = "\n".join(line.strip() for line in text.strip().splitlines())
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/toy.jsonl}}}}\n"
            f"test_split: test\n{lines}\n"
        )
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, base_folder) -> str:
    from umbra.base.loading import load_base

    path = tmp_path_factory.mktemp("adapter")
    model = umbra.attach(scramble(load_base(base_folder), std=0.15), umbra.ShadowConfig(rank=4, alpha=0.5, dropout=0.0))
    scramble(model.shadow, 2)
    model.base.save_pretrained(path / "base")
    make_tokenizer().save_pretrained(path / "base")
    model.base.config.name_or_path = model.base.name_or_path = str(path / "base")
    model.eval().save_pretrained(path / "adapter")
    model.detached().save_pretrained(path / "edge")
    make_tokenizer().save_pretrained(path / "edge")
    return str(path / "adapter")


def answers(samples: list[dict]) -> list:
    return [s["resps"] for s in sorted(samples, key=lambda s: s["doc_id"])]


def evaluated(tasks, model: str, **arguments) -> dict[str, list]:
    """Each sample's answers, without the thousands of tasks that lm-eval's command line reads first."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    given = {"batch_size": 4, "device": "cpu", **arguments}
    found = simple_evaluate(model, given, list(TASKS), task_manager=manager, bootstrap_iters=0)
    return {name: answers(found["samples"][name]) for name in TASKS}


@pytest.mark.compat(
    "Trainers", "lm-eval: `umbra lm_eval run --model umbra --model_args adapter=…`", "loglikelihood, generation"
)
def test_lm_eval_scores_the_attached_model(tasks, adapter, tmp_path):
    """Log-likelihoods equal those of the model called by hand; accuracy follows from them; generation is greedy."""
    out = tmp_path / "results"
    command = [
        "lm_eval", "run", "--model", "umbra", "--model_args", f"adapter={adapter}", "--tasks", *TASKS,
        "--include_path", str(tasks), "--output_path", str(out), "--log_samples", "--device", "cpu", "--batch_size", "4",
    ]  # fmt: skip
    assert main(command) == 0
    results = json.loads(next(out.rglob("results_*.json")).read_text())["results"]
    files = {name: next(out.rglob(f"samples_{name}_*.jsonl")).read_text().splitlines() for name in TASKS}
    found = {name: answers([json.loads(line) for line in lines]) for name, lines in files.items()}
    model, tokenizer = umbra.load(adapter).eval(), make_tokenizer()
    right = 0
    for q, choices, words in zip(QUESTIONS, found["toy_choice"], found["toy_words"], strict=True):
        asked, expected = tokenizer(q["question"], return_tensors="pt")["input_ids"], []
        for choice in q["choices"]:
            ids = torch.tensor([tokenizer(q["question"] + " " + choice)["input_ids"]])
            with torch.no_grad():
                logps = model(ids, use_cache=False).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
            expected.append(float(logps[0, asked.shape[1] - 1 :].sum()))
        assert [float(a[0][0]) for a in choices] == pytest.approx(expected, abs=1e-3)
        right += expected.index(max(expected)) == q["answer"]
        new = model.generate(asked, max_new_tokens=6, do_sample=False)[0, asked.shape[1] :]
        assert words[0][0] == tokenizer.decode(new, skip_special_tokens=True).split("!")[0]
    assert results["toy_choice"]["acc,none"] == pytest.approx(right / len(QUESTIONS))


@pytest.mark.parametrize(("mode", "folder"), [("detached", "edge"), ("base", "base")])
def test_base_and_detached_modes_equal_lm_eval_model(tasks, adapter, mode, folder):
    import umbra.evaluation.lm_eval  # noqa: F401 (registers the model)

    ours = evaluated(tasks, "umbra", adapter=adapter, mode=mode)
    theirs = evaluated(tasks, "hf", pretrained=str(Path(adapter).parent / folder))
    assert ours["toy_words"] == theirs["toy_words"]
    for mine, other in zip(ours["toy_choice"], theirs["toy_choice"], strict=True):
        assert [float(a[0][0]) for a in mine] == pytest.approx([float(a[0][0]) for a in other], abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"mode": "sideways"}, "Unknown mode 'sideways'"),
        ({"batchsize": 3}, "Did you mean 'batch_size'"),
        ({"load_in_4bit": True}, "Unknown key 'load_in_4bit'"),
    ],
)
def test_invalid_model_arguments_are_named(adapter, arguments, says):
    from umbra.evaluation.lm_eval import UmbraLM

    with pytest.raises(umbra.ConfigError, match=says):
        UmbraLM(adapter=adapter, **arguments)


def test_classifier_is_refused(tmp_path):
    from umbra.evaluation.lm_eval import UmbraLM

    model = make("llama", classifier=True, base_options={"num_labels": 3})
    model.base.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(umbra.ConfigError, match="score it with `umbra eval`"):
        UmbraLM(adapter=str(tmp_path / "adapter"), base=str(tmp_path / "base"), device="cpu")


def test_missing_lm_eval_names_its_extra(monkeypatch, capsys):
    monkeypatch.setattr("umbra.cli.results.find_spec", lambda name: None)
    assert main(["lm_eval", "run"]) == 2
    assert "umbra lm_eval needs lm_eval: pip install " in capsys.readouterr().err


@pytest.mark.parametrize("chats", [True, False])
def test_prompting_follows_adapter_or_warns(adapter, chats, tmp_path, capsys):
    from umbra.evaluation.lm_eval import UmbraLM

    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ day }}|{{ mood }}|{% for m in messages %}{{ m.content }}{% endfor %}"
    kwargs = {"day": "Monday", "mood": "calm"}
    model = umbra.load(adapter)
    model.save_pretrained(
        tmp_path / "a", tokenizer=tokenizer, chat_template=chats, chat_template_kwargs=kwargs, overwrite=True
    )
    found = UmbraLM(str(tmp_path / "a"), device="cpu", chat_template_args={"mood": "wild"}, enable_thinking=False)
    assert found.apply_chat_template([{"role": "user", "content": "one"}]) == "Monday|wild|one"
    assert "mood" in capsys.readouterr().err
    for used in (True, False):
        found.chat_template(used)
        assert ("--apply_chat_template" in capsys.readouterr().err) == (used != chats)
