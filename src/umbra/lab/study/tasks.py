"""What is learned and what is tested: `TaskOptions`, as a study names it, becomes a `Task` of records.

A task is one of the known sets, files of records of the user's own, or a task of lm-eval, which can only be tested. It is
answered in words (head generate), by a classification head (classify), or scored by the loss of its text (text).
"""

import json
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from umbra.data import MARK, Labels, Record, local_files, read_records, record_kind
from umbra.errors import ConfigError, DataError, unknown_key
from umbra.evaluation.scoring import reference_of
from umbra.files.folder import digest_of
from umbra.lab.study.metrics import LOSS, METRICS, PUZZLE, has_answer, puzzle
from umbra.lab.study.sets import Item, items, known, set_files
from umbra.options import DATA, flag

ALSO, ROW = "also", "puzzle"  # columns of a record: further right answers, and what reasoning-gym judges them by
STUDY_FILE, FIGURES = "study.json", "figures"  # in a study's folder: what its report knows of it, and pictures
WRITTEN = (STUDY_FILE, FIGURES, "report.md", "report.html", "runs", "trials", "adapters", "work")  # all that lies there


@dataclass(frozen=True)
class TaskOptions:
    """One task of a study."""

    set: str | None = flag(None, "a set that is known by name, or reasoning_gym:GENERATOR; default the task's own name")
    data: str | None = flag(None, "folder with NAME.SPLIT.jsonl files of a known set; default the hub")
    train: str | list[str] | None = flag(None, f"in place of a known set, records to learn: {DATA}")
    test: str | list[str] | None = flag(None, "records to test on, likewise; without train, a task that is tested only")
    lm_eval: str | None = flag(None, "a task of lm-eval, which is tested only")
    lm_eval_path: str | None = flag(None, "folder with task files, in place of lm-eval's own")
    head: Literal["generate", "classify", "text"] = flag(
        "generate", "answered in words, by a classification head, or scored by the loss of its text"
    )
    metric: str | None = flag(
        None, "exact, number, squad, or loss: of the right answer, nats a token; default the known set's, or exact"
    )
    pattern: str | None = flag(None, "regular expression whose last match is the answer")
    max_new_tokens: int | None = flag(None, "tokens of an answer; default the known set's, or 64")
    max_length: int = flag(512, "tokens of one example in training")
    words: int | None = flag(None, "words of a known set's text at most")
    train_limit: int | None = flag(None, "records that are learned, the first ones")
    test_limit: int | None = flag(None, "records that are tested, the first ones")
    validation: int = flag(200, "records at the end of the training data that are held out, to choose on")
    scored_on: Literal["test", "validation"] = flag(
        "test", "what runs are scored on: the test set, or what is held out, while choices are being made"
    )
    training: dict = field(default_factory=dict, metadata={"help": "TrainingArguments, over the study's"})

    def check(self, name: str) -> None:
        """Refuse what cannot be loaded, before anything is.

        Raises:
            ConfigError: with the task's name.
        """
        where = f"task {name}"
        if self.train is not None and self.test is None:
            raise ConfigError(f"{where}: train needs test, records to test on.")
        for other in ("set", "data", "words"):
            if self.test is not None and getattr(self, other) is not None:
                raise ConfigError(f"{where}: {other} is of a known set; with test, name files of records alone.")
        for other in ("train", "test", "set", "data", "words", "metric", "pattern"):
            if self.lm_eval is not None and getattr(self, other) is not None:
                raise ConfigError(f"{where}: {other} is not for a task of lm-eval, which brings its own: leave it out.")
        if self.lm_eval is not None and self.head != "generate":
            raise ConfigError(f"{where}: head={self.head} is not for a task of lm-eval: leave it out.")
        if self.scored_on == "validation" and not self.is_learned:
            raise ConfigError(
                f"{where}: scored_on=validation needs records that are learned, of which some are held out."
            )
        if self.metric is not None and self.metric not in (*METRICS, LOSS):
            raise unknown_key(self.metric, (*METRICS, LOSS), f"the metrics ({where})")
        if self.metric == LOSS and self.head == "classify":
            raise ConfigError(
                f"{where}: metric=loss is of an answer in words; a classification head is scored by accuracy."
            )
        if self.test is None and self.lm_eval is None:
            known(self.set or name)
        for key in ("max_new_tokens", "max_length", "words", "train_limit", "test_limit", "validation"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"{where}: {key} must be at least 1, got {value}.")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ConfigError(f"{where}: pattern is no regular expression: {error}") from error

    @property
    def is_learned(self) -> bool:
        """Whether it has records to learn."""
        return self.lm_eval is None and (self.test is None or self.train is not None)

    def files(self, name: str) -> list[Path]:
        """Local files that the records come from, those that are learned first; what a study has written there is none."""
        if self.lm_eval is not None:
            root = Path(self.lm_eval_path or "")
            found = [f.relative_to(root) for f in root.rglob("*") if f.is_file()] if self.lm_eval_path else []
            found = [f for f in found if not any(part.startswith((".", "__pycache__")) for part in f.parts)]
            written = {f.parent / name for f in found if f.name == STUDY_FILE for name in WRITTEN}
            return sorted(root / f for f in found if written.isdisjoint((f, *f.parents)))
        if self.train is not None or self.test is not None:
            return [*local_files(self.train), *local_files(self.test)]
        if self.data is None:
            return []
        name = self.set or name
        return [f for split in known(name).splits for f in set_files(name, split, self.data) if f.is_file()]

    def digest(self, name: str) -> str:
        """Of these files."""
        return digest_of(self.files(name))


@dataclass(frozen=True)
class Task:
    """Records, and how answers to them are scored."""

    name: str
    options: TaskOptions
    train: list[Record]
    validation: list[Record]
    test: list[Record]
    metric: str
    pattern: str | None
    max_new_tokens: int

    def score(self, reply: str, record: Record) -> dict[str, float]:
        """What a reply is worth, by names of scores: 0 to 1, the chief one first."""
        if self.metric == PUZZLE:
            return puzzle(reply, record[ROW], self.pattern)
        return METRICS[self.metric](reply, right_answers(record), self.pattern)


def load_task(name: str, options: TaskOptions, chats: bool = True, learned: bool = True) -> Task:
    """All records of a task but lm-eval's: shuffled, always alike, then cut; none that is learned is asked in the test.

    Args:
        chats: whether a chat template is used; without one, the question of a known set ends its line.
        learned: whether it is; what is tested only needs nothing to learn.

    Raises:
        ConfigError: see `TaskOptions.check`.
        DataError: data that cannot be read, too little of it to hold any out, or an answer that no reply can be held to.
    """
    options.check(name)
    learns = options.is_learned and (learned or options.scored_on == "validation")
    metric, pattern, new = options.metric, options.pattern, options.max_new_tokens
    if options.test is not None:
        to_learn: list[Record] = list(read_records(options.train)) if options.train and learns else []
        tested = list(read_records(options.test, "test"))
        wanted = {"classify": ("label",), "text": ("text",), "generate": ("completion", "messages")}[options.head]
        for records in filter(None, (to_learn, tested)):
            if any(r.get(MARK) for r in records):
                raise DataError(
                    f"task {name} has records marked {MARK!r}; a study scores answers: leave the column out."
                )
            if (kind := record_kind(records[0], name)) not in wanted:
                raise DataError(
                    f"task {name} has head={options.head}, which takes {' or '.join(wanted)} records, not {kind}."
                )
    else:
        found = known(options.set or name)
        metric, pattern = metric or found.metric, pattern or found.pattern
        new = new or found.max_new_tokens
        to_learn, tested = (
            [_record(i, options, chats, found.asks) for i in items(options.set or name, part, options.data)]
            if learns or part == "test"
            else []
            for part in ("train", "test")
        )
    seen = {asked(r) for r in tested}
    to_learn = [r for r in to_learn if asked(r) not in seen]
    for records in (to_learn, tested):
        random.Random(0).shuffle(records)
    held = options.validation
    if options.scored_on == "validation" and learns:
        tested = to_learn[-held:]
    if learns and len(to_learn) <= held:
        raise DataError(
            f"task {name} has {len(to_learn)} training records that its test does not ask, of which validation={held} leaves none "
            "to learn."
        )
    task = Task(
        name, options, to_learn[:-held][: options.train_limit], to_learn[-held:], tested[: options.test_limit],
        LOSS if options.head == "text" else metric or "exact", pattern, new or 64,
    )  # fmt: skip
    if options.head == "classify" and task.train:
        _check_classes(task)
    if options.head == "generate" and task.metric in METRICS:
        _check_answers(task)
    return task


def _check_answers(task: Task) -> None:
    for record in task.test:
        if not has_answer(task.metric, reference_of(record), task.pattern):
            sought = f"pattern={task.pattern!r}" if task.pattern else "metric=number"
            raise DataError(
                f"task {task.name}: {sought} finds no answer in {reference_of(record)!r:.200}, which is to be the right one."
            )


def asked(record: Record) -> str:
    """What of a record is given, or all of a text."""
    if "messages" in record:
        return json.dumps(record["messages"][:-1], sort_keys=True)
    return json.dumps(record.get("prompt", record.get("text")), sort_keys=True)


def _check_classes(task: Task) -> None:
    labels = Labels.of(r["label"] for r in (*task.train, *task.validation, *task.test))
    if labels.problem_type != "single_label_classification":
        raise DataError(
            f"task {task.name}: a study compares classifiers of one class each, not of {labels.problem_type}."
        )
    other = {str(r["label"]) for r in task.test} - {str(r["label"]) for r in (*task.train, *task.validation)}
    if other:
        raise DataError(f"task {task.name} tests classes that it does not learn: {', '.join(sorted(other))}.")


def _record(item: Item, options: TaskOptions, chats: bool, asks: bool) -> Record:
    text = " ".join(item.text.split()[: options.words]) if options.words else item.text
    if options.head == "classify":
        return {"text": f"{text}\n{item.question}".strip() if asks or not text else text, "label": item.answer}
    if options.head == "text":
        return {"text": "\n".join(filter(None, (text, item.question, item.answer)))}
    prompt = f"{text}\n{item.question}".strip() + ("" if chats else "\n")
    return {"prompt": prompt, "completion": item.answer, ALSO: list(item.also), ROW: item.puzzle}


def right_answers(record: Record) -> list[str]:
    """All texts that count as right."""
    also = record.get(ALSO)
    return [reference_of(record), *(a for a in (also if isinstance(also, list) else ()) if isinstance(a, str))]


def read_options(name: str, values: Any, check: Any) -> TaskOptions:
    """From a study's mapping; ``check(kind, values, where)`` holds them to a dataclass."""
    options = TaskOptions(**check(TaskOptions, values or {}, f"task {name}"))
    options.check(name)
    return options
