"""What is learned from: unlabelled text of the training files, and tasks as prompts and answers."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from umbra.data import Record

Row = dict[str, Any]
HELD_OUT = 300  # rows at the end of a training file: choices are made on them
TESTED = 400  # rows of a test file at most
WORDS = 48  # of a review or of evidence


def rows(data: Path, name: str, split: str) -> list[Row]:
    """The rows of a file, or of a generated set."""
    if name == "gsm_symbolic":
        import reasoning_gym

        count, seed = {"train": (3300, 0), "test": (200, 20_000_000)}[split]
        items = reasoning_gym.create_dataset(name, size=count, seed=seed)
        return [{"question": x["question"], "answer": x["metadata"]["answer_cot"]} for x in items]
    with gzip.open(data / f"{name}.{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# -- tasks -------------------------------------------------------------------------------------------------------------


def hotel_reviews(row: Row) -> Record:
    words = row["text"].split()[:WORDS]
    return {
        "prompt": f"{' '.join(words)}\nIs this review positive, negative, neutral or ambivalent?",
        "completion": row["label"],
    }


def intents(row: Row) -> Record:
    return {"prompt": f"{row['text']}\nWhat is the intent?", "completion": row["label"].replace("_", " ")}


def vitaminc(row: Row) -> Record:
    evidence = " ".join(row["evidence"].split()[:WORDS])
    return {
        "prompt": f"Evidence: {evidence}\nClaim: {row['claim']}\nTrue, False or Neither?",
        "completion": row["label"],
    }


def gsm_symbolic(row: Row) -> Record:
    return {"prompt": row["question"], "completion": row["answer"]}


class Task(NamedTuple):
    """How a row becomes a record, and how it is learned.

    Args:
        steps: of ``batch`` records each, at ``rate``.
        answer: tokens of an answer.
        alone: steps of a shadow that is trained for longer without the base, at ``alone_rate``.
        pattern: whose last match is compared.
    """

    form: Callable[[Row], Record]
    steps: int
    batch: int
    answer: int
    rate: float = 2e-3
    alone: int = 600
    alone_rate: float = 5e-4
    pattern: str | None = None


TASKS = {
    "intents": Task(intents, 120, 8, 8),
    "hotel_reviews": Task(hotel_reviews, 300, 8, 4, 1e-3, alone=1200),
    "vitaminc": Task(vitaminc, 400, 8, 4, 1e-3, alone=1200),
    "gsm_symbolic": Task(gsm_symbolic, 100, 8, 200, pattern=r"####\s*(-?[\d.,]+)"),
}


def write_task(data: Path, name: str, out: Path) -> dict[str, str]:
    """The files of a task: train, choice (held out of the training file) and test."""
    files = {part: out / f"{name}.{part}.jsonl" for part in ("train", "choice", "test")}
    if not all(f.exists() for f in files.values()):
        learned, tested = ([TASKS[name].form(r) for r in rows(data, name, s)] for s in ("train", "test"))
        held = min(HELD_OUT, len(learned) // 4)
        for part, records in zip(files, (learned[:-held], learned[-held:], tested[:TESTED]), strict=True):
            _write(files[part], records)
    return {part: str(f) for part, f in files.items()}


# -- text --------------------------------------------------------------------------------------------------------------

PLAIN: dict[str, Callable[[Row], str]] = {
    "hotel_reviews": lambda r: r["text"],
    "medicine_reviews": lambda r: r["text"],
    "vitaminc": lambda r: f"Evidence: {r['evidence']}\nClaim: {r['claim']}",
    "disfl_qa": lambda r: r["context"],
    "gsm_symbolic": lambda r: f"{r['question']}\n{r['answer']}",
}


def write_text(data: Path, out: Path, documents: int | None = None) -> list[str]:
    """A file of texts for each set, none of which is held out of its training file or in its test file.

    Args:
        documents: of each set at most.
    """
    files = []
    for name, form in PLAIN.items():
        path = out / f"{name}.text.jsonl"
        if not path.exists():
            learned = rows(data, name, "train")
            held = min(HELD_OUT, len(learned) // 4)
            texts = list(dict.fromkeys(form(r) for r in learned[:-held]))
            _write(path, [{"text": t} for t in texts[:documents]])
        files.append(str(path))
    return files


def write_prompts(data: Path, out: Path) -> str:
    """What the base is asked, so that it writes text by itself: the questions of the tasks, a hundred each."""
    path = out / "prompts.jsonl"
    if not path.exists():
        _write(path, [{"prompt": t.form(r)["prompt"]} for n, t in TASKS.items() for r in rows(data, n, "train")[:100]])
    return str(path)


def _write(path: Path, records: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
