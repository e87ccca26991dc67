"""Tasks: `TaskOptions`, as a study defines them, and `Task`, the records loaded from them.

A task is a known data set, a user's files of records, or a task of lm-eval, which can only be tested. The answer is generated
text (head: generate), a class (head: classify), or the text itself, scored by its loss (head: text).
"""

import json
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from umbra.data import MARK, Labels, Record, local_files, read_records, record_kind
from umbra.errors import ConfigError, DataError, unknown_key
from umbra.evaluation.scoring import reference_of
from umbra.files.folder import digest_of
from umbra.lab.study.archive import STUDY_FILE, WRITTEN
from umbra.lab.study.mappings import check_mapping
from umbra.lab.study.metrics import LOSS, METRICS, PUZZLE, has_answer, puzzle
from umbra.lab.study.sets import Item, items, known, set_files
from umbra.options import DATA, flag

ALSO, ROW = "also", "puzzle"  # columns of a record: further right answers, and the row for reasoning-gym's judge
KINDS_OF_RECORD = {"classify": ("label",), "text": ("text",), "generate": ("completion", "messages")}  # by head


@dataclass(frozen=True)
class TaskOptions:
    """One task of a study."""

    set: str | None = flag(None, "a known data set, or reasoning_gym:GENERATOR; default the task's name")
    data: str | None = flag(None, "folder with NAME.SPLIT.jsonl files of a known data set; default the hub")
    train: str | list[str] | None = flag(None, f"training records, instead of a known data set: {DATA}")
    test: str | list[str] | None = flag(None, "test records, likewise; without train, the task is tested only")
    lm_eval: str | None = flag(None, "a task of lm-eval, for testing only")
    lm_eval_path: str | None = flag(None, "folder with task files, instead of lm-eval's")
    head: Literal["generate", "classify", "text"] = flag(
        "generate", "generated text, a classification head, or the loss of the text"
    )
    metric: str | None = flag(
        None, "exact, number, squad, or loss (of the right answer, nats/token); default the data set's, or exact"
    )
    pattern: str | None = flag(None, "regular expression whose last match is the answer")
    max_new_tokens: int | None = flag(None, "maximum length of an answer, in tokens; default the data set's, or 64")
    max_length: int = flag(512, "maximum length of a training example, in tokens")
    words: int | None = flag(None, "maximum length of a known data set's texts, in words")
    train_limit: int | None = flag(None, "number of training records, from the first on")
    test_limit: int | None = flag(None, "number of test records, from the first on")
    validation: int = flag(200, "number of records held out from the end of the training data for model selection")
    scored_on: Literal["test", "validation"] = flag(
        "test", "records that runs are scored on: the test set, or the held-out records while defaults are being chosen"
    )
    training: dict = field(default_factory=dict, metadata={"help": "TrainingArguments, over the study's"})

    def check(self, name: str) -> None:
        """Check the options before anything is loaded.

        Args:
            name: The name of the task, for error messages.

        Raises:
            ConfigError: options that exclude each other, or a value outside its range.
        """
        where = f"task {name}"
        self._check_source(where)
        if self.scored_on == "validation" and not self.is_learned:
            raise ConfigError(f"{where}: scored_on=validation needs training records, of which some are held out.")
        if self.metric is not None and self.metric not in (*METRICS, LOSS):
            raise unknown_key(self.metric, (*METRICS, LOSS), f"the metrics ({where})")
        if self.metric == LOSS and self.head == "classify":
            raise ConfigError(
                f"{where}: metric=loss needs generated text; a classification head is scored by accuracy."
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

    def _check_source(self, where: str) -> None:
        """Check that the records come from one source."""
        if self.train is not None and self.test is None:
            raise ConfigError(f"{where}: train needs test, the records to test on.")
        for key in ("set", "data", "words"):
            if self.test is not None and getattr(self, key) is not None:
                raise ConfigError(f"{where}: {key} is for known data sets; with test, give files of records only.")
        for key in ("train", "test", "set", "data", "words", "metric", "pattern"):
            if self.lm_eval is not None and getattr(self, key) is not None:
                raise ConfigError(f"{where}: {key} is not for a task of lm-eval, which defines it: remove it.")
        if self.lm_eval is not None and self.head != "generate":
            raise ConfigError(f"{where}: head={self.head} is not for a task of lm-eval: remove it.")

    @property
    def is_learned(self) -> bool:
        """Whether the task has training records."""
        return self.lm_eval is None and (self.test is None or self.train is not None)

    def files(self, name: str) -> list[Path]:
        """Return the local files of the task, training files first; files that a study has written are not among them."""
        if self.lm_eval is not None:
            root = Path(self.lm_eval_path or "")
            files = [f.relative_to(root) for f in root.rglob("*") if f.is_file()] if self.lm_eval_path else []
            files = [f for f in files if not any(part.startswith((".", "__pycache__")) for part in f.parts)]
            written = {f.parent / name for f in files if f.name == STUDY_FILE for name in WRITTEN}
            return sorted(root / f for f in files if written.isdisjoint((f, *f.parents)))
        if self.train is not None or self.test is not None:
            return [*local_files(self.train), *local_files(self.test)]
        if self.data is None:
            return []
        name = self.set or name
        return [f for split in known(name).splits for f in set_files(name, split, self.data) if f.is_file()]

    def digest(self, name: str) -> str:
        """Return a digest of the contents of these files."""
        return digest_of(self.files(name))


@dataclass(frozen=True)
class Task:
    """The records of a task, and how replies to them are scored.

    Args:
        name: The name of the task.
        options: Its options.
        train: Training records.
        validation: Records held out of the training data.
        test: Test records.
        metric: A key of `METRICS`, `PUZZLE` or `LOSS`.
        pattern: A regular expression whose last match is the answer.
        max_new_tokens: The maximum length of an answer.
    """

    name: str
    options: TaskOptions
    train: list[Record]
    validation: list[Record]
    test: list[Record]
    metric: str
    pattern: str | None
    max_new_tokens: int

    def score(self, reply: str, record: Record) -> dict[str, float]:
        """Return the scores of a reply, between 0 and 1, the main one first."""
        if self.metric == PUZZLE:
            return puzzle(reply, record[ROW], self.pattern)
        return METRICS[self.metric](reply, right_answers(record), self.pattern)


def load_task(name: str, options: TaskOptions, chats: bool = True, learned: bool = True) -> Task:
    """Load the records of a task that is not lm-eval's.

    Records are shuffled with a fixed seed, then cut to the limits. Training records with the prompt of a test record are
    removed.

    Args:
        name: The name of the task.
        options: Its options.
        chats: Whether a chat template is applied; without one, prompts of known data sets end with a line feed.
        learned: Whether the task is trained on; otherwise it needs no training records.

    Raises:
        ConfigError: see `TaskOptions.check`.
        DataError: unreadable data, too few training records, or an answer that replies cannot be compared with.
    """
    options.check(name)
    learns = options.is_learned and (learned or options.scored_on == "validation")
    metric, pattern, max_new_tokens = options.metric, options.pattern, options.max_new_tokens
    if options.test is not None:
        train, test = _user_records(name, options, learns)
    else:
        data_set = known(options.set or name)
        metric, pattern = metric or data_set.metric, pattern or data_set.pattern
        max_new_tokens = max_new_tokens or data_set.max_new_tokens
        train, test = (
            [_record(i, options, chats, data_set.asks) for i in items(options.set or name, part, options.data)]
            if learns or part == "test"
            else []
            for part in ("train", "test")
        )
    test_prompts = {prompt_key(r) for r in test}
    train = [r for r in train if prompt_key(r) not in test_prompts]
    for records in (train, test):
        random.Random(0).shuffle(records)
    held_out = options.validation
    if options.scored_on == "validation" and learns:
        test = train[-held_out:]
    if learns and len(train) <= held_out:
        raise DataError(
            f"task {name} has {len(train)} training records whose prompts are not in its test set; validation={held_out} leaves "
            "none to train on."
        )
    task = Task(
        name, options, train[:-held_out][: options.train_limit], train[-held_out:], test[: options.test_limit],
        LOSS if options.head == "text" else metric or "exact", pattern, max_new_tokens or 64,
    )  # fmt: skip
    if options.head == "classify" and task.train:
        _check_classes(task)
    if options.head == "generate" and task.metric in METRICS:
        _check_answers(task)
    return task


def _user_records(name: str, options: TaskOptions, learns: bool) -> tuple[list[Record], list[Record]]:
    """Read the training and test records of a task from a user's files."""
    train: list[Record] = list(read_records(options.train)) if options.train and learns else []
    test = list(read_records(options.test or [], "test"))
    allowed = KINDS_OF_RECORD[options.head]
    for records in filter(None, (train, test)):
        if any(r.get(MARK) for r in records):
            raise DataError(f"task {name} has records marked {MARK!r}, which a study cannot score: remove the column.")
        if (kind := record_kind(records[0], name)) not in allowed:
            raise DataError(
                f"task {name}: head={options.head} needs {' or '.join(allowed)} records, got {kind} records."
            )
    return train, test


def _check_answers(task: Task) -> None:
    for record in task.test:
        if not has_answer(task.metric, reference_of(record), task.pattern):
            criterion = f"pattern={task.pattern!r}" if task.pattern else "metric=number"
            raise DataError(
                f"task {task.name}: {criterion} matches nothing in the right answer {reference_of(record)!r:.200}."
            )


def prompt_key(record: Record) -> str:
    """Return the prompt of a record, or its text, in a form that can be compared."""
    if "messages" in record:
        return json.dumps(record["messages"][:-1], sort_keys=True)
    return json.dumps(record.get("prompt", record.get("text")), sort_keys=True)


def _check_classes(task: Task) -> None:
    labels = Labels.of(r["label"] for r in (*task.train, *task.validation, *task.test))
    if labels.problem_type != "single_label_classification":
        raise DataError(f"task {task.name}: a study needs one class per record, got {labels.problem_type}.")
    unseen = {str(r["label"]) for r in task.test} - {str(r["label"]) for r in (*task.train, *task.validation)}
    if unseen:
        raise DataError(f"task {task.name}: test classes without a training record: {', '.join(sorted(unseen))}.")


def _record(item: Item, options: TaskOptions, chats: bool, asks: bool) -> Record:
    text = " ".join(item.text.split()[: options.words]) if options.words else item.text
    if options.head == "classify":
        return {"text": f"{text}\n{item.question}".strip() if asks or not text else text, "label": item.answer}
    if options.head == "text":
        return {"text": "\n".join(filter(None, (text, item.question, item.answer)))}
    prompt = f"{text}\n{item.question}".strip() + ("" if chats else "\n")
    return {"prompt": prompt, "completion": item.answer, ALSO: list(item.also), ROW: item.puzzle}


def right_answers(record: Record) -> list[str]:
    """Return all right answers of a record."""
    also = record.get(ALSO)
    return [reference_of(record), *(a for a in (also if isinstance(also, list) else ()) if isinstance(a, str))]


def read_task(name: str, values: object) -> TaskOptions:
    """Parse one entry under ``tasks``.

    Raises:
        ConfigError: see `TaskOptions.check`.
    """
    options = TaskOptions(**check_mapping(TaskOptions, values or {}, f"task {name}"))
    options.check(name)
    return options
