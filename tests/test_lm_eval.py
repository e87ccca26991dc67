"""lm-eval runs adapters, on toy tasks from a local file."""

import json
from pathlib import Path

import pytest
import torch

import umbra
from conftest import make_tokenizer
from tiny import scramble
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
    from umbra.bases import load_base

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


def run(tasks, tmp_path, model: str, *arguments: str) -> dict:
    """What ``umbra lm_eval run`` finds: results, and every sample's answers."""
    out = tmp_path / "results"
    command = [
        "lm_eval", "run", "--model", model, "--model_args", *arguments, "--tasks", *TASKS, "--include_path", str(tasks),
        "--output_path", str(out), "--log_samples", "--device", "cpu", "--batch_size", "4",
    ]  # fmt: skip
    assert main(command) == 0
    found = {"results": json.loads(next(out.rglob("results_*.json")).read_text())["results"]}
    for name in TASKS:
        lines = next(out.rglob(f"samples_{name}_*.jsonl")).read_text().splitlines()
        found[name] = [s["resps"] for s in sorted(map(json.loads, lines), key=lambda s: s["doc_id"])]
    return found


@pytest.mark.compat(
    "Trainers", "lm-eval: `umbra lm_eval run --model umbra --model_args adapter=…`", "loglikelihood, generation"
)
def test_lm_eval_scores_the_attached_model(tasks, adapter, tmp_path):
    """Log-likelihoods equal those of the model called by hand; accuracy follows from them; generation is greedy."""
    found = run(tasks, tmp_path, "umbra", f"adapter={adapter}")
    model, tokenizer = umbra.load(adapter).eval(), make_tokenizer()
    right = 0
    for q, answers, words in zip(QUESTIONS, found["toy_choice"], found["toy_words"], strict=True):
        asked, expected = tokenizer(q["question"], return_tensors="pt")["input_ids"], []
        for choice in q["choices"]:
            ids = torch.tensor([tokenizer(q["question"] + " " + choice)["input_ids"]])
            with torch.no_grad():
                logps = model(ids, use_cache=False).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
            expected.append(float(logps[0, asked.shape[1] - 1 :].sum()))
        assert [float(a[0][0]) for a in answers] == pytest.approx(expected, abs=1e-3)
        right += expected.index(max(expected)) == q["answer"]
        new = model.generate(asked, max_new_tokens=6, do_sample=False)[0, asked.shape[1] :]
        assert words[0][0] == tokenizer.decode(new, skip_special_tokens=True).split("!")[0]
    assert found["results"]["toy_choice"]["acc,none"] == pytest.approx(right / len(QUESTIONS))


@pytest.mark.parametrize(("mode", "folder"), [("detached", "edge"), ("base", "base")])
def test_the_other_modes_equal_lm_evals_own_model(tasks, adapter, tmp_path, mode, folder):
    ours = run(tasks, tmp_path / "ours", "umbra", f"adapter={adapter},mode={mode}")
    theirs = run(tasks, tmp_path / "theirs", "hf", f"pretrained={Path(adapter).parent / folder}")
    assert ours["toy_words"] == theirs["toy_words"]
    for mine, other in zip(ours["toy_choice"], theirs["toy_choice"], strict=True):
        assert [float(a[0][0]) for a in mine] == pytest.approx([float(a[0][0]) for a in other], abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("mode=sideways", "Unknown mode 'sideways'"),
        ("batchsize=3", "Did you mean 'batch_size'"),
        ("load_in_4bit=True", "Unknown key"),
    ],
)
def test_bad_model_arguments_are_named(tasks, adapter, capsys, arguments, says):
    command = [
        "lm_eval",
        "run",
        "--model",
        "umbra",
        "--model_args",
        f"adapter={adapter},{arguments}",
        "--tasks",
        "toy_words",
    ]
    assert main([*command, "--include_path", str(tasks)]) == 2
    assert says in capsys.readouterr().err
