"""Known data sets: those of the paper, by hub id, and substitutes in a local folder.

A data set converts its rows to an `Item`; the task decides whether an item becomes a prompt with its answer or a text with its
class (tasks.py). Rows come from the hub, or from ``NAME.SPLIT.jsonl`` (or .jsonl.gz) in a folder, with the columns of the hub;
reasoning-gym generates its rows.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from umbra.data import Rows, read_hub, read_rows
from umbra.errors import ConfigError, DataError, shown, unknown_key
from umbra.lab.study.metrics import PUZZLE, UNANSWERABLE, UNKNOWN
from umbra.options.extras import install_command

Row = dict[str, Any]
LETTERS = "ABCDEFGHIJ"
GYM = "reasoning_gym:"  # followed by the name of a generator
GYM_SEEDS = {"train": 0, "test": 20_000_000}  # of the generators: training and test rows differ
GYM_SIZES = {"train": 3300, "test": 200}


class Item(NamedTuple):
    """One example of a data set.

    Args:
        text: The text that the question is about; a task may truncate it.
        question: The question.
        answer: The answer to learn.
        also: Further right answers.
        puzzle: The row for reasoning-gym's judge.
    """

    text: str
    question: str
    answer: str
    also: tuple[str, ...] = ()
    puzzle: Row | None = None


@dataclass(frozen=True)
class KnownSet:
    """The source of a data set, the conversion of its rows, and the metric of its answers.

    Args:
        form: Converts a row to an item.
        hub: Hub id and configuration name; empty for a data set that is not on the hub.
        splits: The split to train on and the split to test on.
        metric: A key of `metrics.METRICS`, or `metrics.PUZZLE`.
        pattern: A regular expression whose last match is the answer; None for the whole reply.
        max_new_tokens: The maximum length of an answer.
        asks: Whether the question differs by row, so that a classifier needs it as well.
    """

    form: Callable[[Row], Item]
    hub: tuple[str, ...] = ()
    splits: tuple[str, str] = ("train", "test")
    metric: str = "exact"
    pattern: str | None = None
    max_new_tokens: int = 16
    asks: bool = False


# -- forms -------------------------------------------------------------------------------------------------------------


def _choice(row: Row) -> Item:
    if not isinstance(row["choices"], list) or len(row["choices"]) > len(LETTERS):
        raise ValueError(f"choices must be a list of at most {len(LETTERS)} texts")
    options = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, row["choices"], strict=False))
    answer = LETTERS[_index(row["answer"], tuple(LETTERS)[: len(row["choices"])])]
    return Item("", f"{row['question']}\n{options}\nAnswer with the letter.", answer)


def _index(value: str | int, names: Sequence[str]) -> int:
    """Return the index of a name that a row gives by itself or by its index."""
    number = names.index(cast(str, value)) if value in names else int(value)
    if not 0 <= number < len(names):
        raise IndexError(f"{shown(value)} is not in 0 to {len(names) - 1}")
    return number


def _span(row: Row) -> Item:
    answers = list(dict.fromkeys(row["answers"]["text"])) or [UNANSWERABLE]
    question = f"{row['question']}\nAnswer with words of the text, or with {UNANSWERABLE}."
    return Item(row["context"], question, answers[0], tuple(answers[1:]))


def _span_or_unknown(row: Row) -> Item:
    return Item(row["context"], f"{row['question']}\nAnswer with words of the text, or with {UNKNOWN}.", row["answer"])


def _labelled(question: str, names: tuple[str, ...] | None = None) -> Callable[[Row], Item]:
    """Return the conversion of a text and its label: a name, an index into ``names``, or the column label_text."""

    def form(row: Row) -> Item:
        label = row["label"]
        if names is not None:
            label = names[_index(label, names)]
        elif "label_text" in row:
            label = row["label_text"]
        return Item(row["text"], question, str(label))

    return form


def _claim(row: Row) -> Item:
    return Item(f"Evidence: {row['evidence']}", f"Claim: {row['claim']}\nTrue, False or Neither?", row["label"])


def _intent(row: Row) -> Item:
    return Item(row["text"], "What is the intent?", row["label"].replace("_", " "))


def _worked(row: Row) -> Item:
    answer = re.sub(r"<<[^>]*>>", "", row["answer"])  # calculator annotations of GSM8K
    return Item("", row["question"], answer)


def _generated(row: Row) -> Item:
    return Item("", row["question"], (row.get("metadata") or {}).get("answer_cot") or row["answer"], puzzle=row)


STARS = ("1 star", "2 stars", "3 stars", "4 stars", "5 stars")
NEWS = ("World", "Sports", "Business", "Sci/Tech")
SENTIMENT = "Is this review positive, negative, neutral or ambivalent?"
AFTER_HASHES = r"####\s*(-?[\d.,]+)"
FIRST_LETTER = r"^\W*([A-J])\b"  # also of "B." and "(B)"

SETS: dict[str, KnownSet] = {
    # evaluated in the paper
    "mmlu": KnownSet(_choice, ("cais/mmlu", "all"), ("auxiliary_train", "test"), pattern=FIRST_LETTER, max_new_tokens=2),
    "gsm8k": KnownSet(_worked, ("openai/gsm8k", "main"), metric="number", pattern=AFTER_HASHES, max_new_tokens=256),
    "squad_v2": KnownSet(_span, ("rajpurkar/squad_v2",), ("train", "validation"), metric="squad", max_new_tokens=32, asks=True),
    "amazon_reviews": KnownSet(
        _labelled("How many stars does this review give?", STARS), ("mteb/amazon_reviews_multi", "en"), max_new_tokens=4
    ),
    "20newsgroups": KnownSet(_labelled("Which newsgroup is this from?"), ("SetFit/20_newsgroups",), max_new_tokens=12),
    "ag_news": KnownSet(_labelled("World, Sports, Business or Sci/Tech?", NEWS), ("fancyzhx/ag_news",), max_new_tokens=6),
    # substitutes in a local folder
    "hotel_reviews": KnownSet(_labelled(SENTIMENT), max_new_tokens=4),
    "medicine_reviews": KnownSet(_labelled(SENTIMENT), max_new_tokens=4),
    "intents": KnownSet(_intent, max_new_tokens=8),
    "vitaminc": KnownSet(_claim, max_new_tokens=4, asks=True),
    "social_iqa": KnownSet(_choice, pattern=FIRST_LETTER, max_new_tokens=2),
    "strategyqa": KnownSet(_choice, pattern=FIRST_LETTER, max_new_tokens=2),
    "disfl_qa": KnownSet(_span_or_unknown, metric="squad", max_new_tokens=24, asks=True),
    "gsm_symbolic": KnownSet(_generated, metric="number", pattern=AFTER_HASHES, max_new_tokens=200),
}  # fmt: skip


# -- rows --------------------------------------------------------------------------------------------------------------


def known(name: str) -> KnownSet:
    """Return a data set by name.

    Raises:
        ConfigError: an unknown name.
    """
    if name.startswith(GYM):
        return SETS.get(name.removeprefix(GYM), KnownSet(_generated, metric=PUZZLE, max_new_tokens=64))
    if name not in SETS:
        raise unknown_key(name, (*SETS, GYM + "…"), "the known data sets")
    return SETS[name]


def items(name: str, part: str, folder: str | None = None) -> list[Item]:
    """Return all items of a known data set.

    Args:
        name: The name of the data set.
        part: "train" or "test".
        folder: The folder of its files; None for the hub.

    Raises:
        ConfigError: an unknown data set, or one that is neither on the hub nor in a folder.
        DataError: rows that cannot be read or lack a column.
    """
    data_set = known(name)
    split = data_set.splits[part == "test"]
    converted, rows = [], _rows(name, data_set, split, part, folder)
    for i, row in enumerate(rows):
        try:
            item = data_set.form(row)
            if not all(isinstance(x, str) for x in (*item[:3], *item.also)):
                raise TypeError("a value is not a text")
            converted.append(item)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            columns = ", ".join(map(shown, row))
            raise DataError(
                f"{name}, {rows.where(i)} (columns {columns}) does not have the format of this data set: {error!r:.200}."
            ) from error
    return converted


def set_files(name: str, split: str, folder: str) -> list[Path]:
    """Return the existing files of a split in a folder; the first one is read."""
    files = (Path(folder).expanduser() / f"{name}.{split}{ending}" for ending in (".jsonl", ".jsonl.gz"))
    return [file for file in files if file.exists()]


def _rows(name: str, data_set: KnownSet, split: str, part: str, folder: str | None) -> Rows:
    if name == "gsm_symbolic" or name.startswith(GYM):
        return Rows(_generate(name.removeprefix(GYM), part))
    if folder is not None:
        for file in set_files(name, split, folder):
            return read_rows(str(file))
        raise DataError(f"{folder} has neither {name}.{split}.jsonl nor {name}.{split}.jsonl.gz.")
    if not data_set.hub:
        raise ConfigError(f"The data set {name} is not on the hub: set `data` to the folder with {name}.{split}.jsonl.")
    try:
        return read_hub(*data_set.hub, split=split)
    except DataError as error:
        raise DataError(
            f"{str(error).rstrip('.')}. If you have a copy as {name}.{split}.jsonl, set `data` to its folder."
        ) from error


def _generate(generator: str, part: str) -> list[Row]:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ConfigError(f"Data sets of reasoning-gym need it: {install_command('evaluate')}.") from error
    try:
        return list(reasoning_gym.create_dataset(generator, size=GYM_SIZES[part], seed=GYM_SEEDS[part]))
    except ValueError as error:
        raise ConfigError(f"reasoning-gym has no generator {generator!r}: {error}") from error
