"""The data sets that a study knows by name: those of the paper, by hub id, and stand-ins that lie in a folder.

A set turns a row of its own columns into an `Item`. What an item becomes (a prompt and its answer, or a text and its class)
is the task's choice; see tasks.py. Rows come from the hub, or from ``NAME.SPLIT.jsonl`` (or .jsonl.gz) in a folder, with
the hub's columns; those of reasoning-gym are made.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from umbra.data import Rows, read_hub, read_rows
from umbra.errors import ConfigError, DataError, shown, unknown_key
from umbra.lab.study.metrics import PUZZLE, UNANSWERABLE, UNKNOWN

Row = dict[str, Any]
LETTERS = "ABCDEFGHIJ"
GYM = "reasoning_gym:"  # and the name of one of its generators
GYM_SEEDS = {"train": 0, "test": 20_000_000}  # of the generators: what is tested is never trained on
GYM_SIZES = {"train": 3300, "test": 200}


class Item(NamedTuple):
    """A text (which may be cut), what is asked of it, the answer to learn, further answers that are right, and its puzzle."""

    text: str
    question: str
    answer: str
    also: tuple[str, ...] = ()
    puzzle: Row | None = None


@dataclass(frozen=True)
class KnownSet:
    """Where rows are, what becomes of one, and how an answer is scored.

    Args:
        splits: what is trained on, and what is tested on.
        metric: a name of `metrics.METRICS`, or `metrics.PUZZLE`.
        pattern: a regular expression whose last match is the answer; None for all of it.
        max_new_tokens: of an answer.
        asks: whether what is asked differs by row, so that a classifier has to read it, too.
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


def _index(value: Any, names: Sequence[str]) -> int:
    """Of one of ``names``, which a row gives by its name or its number, from 0 on."""
    number = names.index(value) if value in names else int(value)
    if not 0 <= number < len(names):
        raise IndexError(f"{shown(value)} is none of 0 to {len(names) - 1}")
    return number


def _span(row: Row) -> Item:
    found = list(dict.fromkeys(row["answers"]["text"])) or [UNANSWERABLE]
    asked = f"{row['question']}\nAnswer with words of the text, or with {UNANSWERABLE}."
    return Item(row["context"], asked, found[0], tuple(found[1:]))


def _span_or_unknown(row: Row) -> Item:
    return Item(row["context"], f"{row['question']}\nAnswer with words of the text, or with {UNKNOWN}.", row["answer"])


def _labelled(question: str, names: tuple[str, ...] | None = None) -> Callable[[Row], Item]:
    """A text and its label: words, or a number in ``names``, or what the column label_text says."""

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
    answer = re.sub(r"<<[^>]*>>", "", row["answer"])  # GSM8K's notes for a calculator
    return Item("", row["question"], answer)


def _generated(row: Row) -> Item:
    return Item("", row["question"], (row.get("metadata") or {}).get("answer_cot") or row["answer"], puzzle=row)


STARS = ("1 star", "2 stars", "3 stars", "4 stars", "5 stars")
NEWS = ("World", "Sports", "Business", "Sci/Tech")
SENTIMENT = "Is this review positive, negative, neutral or ambivalent?"
AFTER_HASHES = r"####\s*(-?[\d.,]+)"
FIRST_LETTER = r"^\W*([A-J])\b"  # also of "B." and "(B)"

SETS: dict[str, KnownSet] = {
    # of the paper
    "mmlu": KnownSet(_choice, ("cais/mmlu", "all"), ("auxiliary_train", "test"), pattern=FIRST_LETTER, max_new_tokens=2),
    "gsm8k": KnownSet(_worked, ("openai/gsm8k", "main"), metric="number", pattern=AFTER_HASHES, max_new_tokens=256),
    "squad_v2": KnownSet(_span, ("rajpurkar/squad_v2",), ("train", "validation"), metric="squad", max_new_tokens=32, asks=True),
    "amazon_reviews": KnownSet(
        _labelled("How many stars does this review give?", STARS), ("mteb/amazon_reviews_multi", "en"), max_new_tokens=4
    ),
    "20newsgroups": KnownSet(_labelled("Which newsgroup is this from?"), ("SetFit/20_newsgroups",), max_new_tokens=12),
    "ag_news": KnownSet(_labelled("World, Sports, Business or Sci/Tech?", NEWS), ("fancyzhx/ag_news",), max_new_tokens=6),
    # stand-ins of a folder
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
    """The set of this name.

    Raises:
        ConfigError: none.
    """
    if name.startswith(GYM):
        return SETS.get(name.removeprefix(GYM), KnownSet(_generated, metric=PUZZLE, max_new_tokens=64))
    if name not in SETS:
        raise unknown_key(name, (*SETS, GYM + "…"), "the data sets that a study knows")
    return SETS[name]


def items(name: str, part: str, folder: str | None = None) -> list[Item]:
    """All items of a known set.

    Args:
        part: "train" or "test".
        folder: where its files are; None for the hub.

    Raises:
        ConfigError: an unknown set, or one that is neither on the hub nor in a folder.
        DataError: rows that cannot be read, or lack a column.
    """
    given = known(name)
    split = given.splits[part == "test"]
    found, rows = [], _rows(name, given, split, part, folder)
    for i, row in enumerate(rows):
        try:
            item = given.form(row)
            if not all(isinstance(x, str) for x in (*item[:3], *item.also)):
                raise TypeError("a value that should be text is none")
            found.append(item)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            columns = ", ".join(map(shown, row))
            raise DataError(
                f"{name}, {rows.where(i)} (columns {columns}) is not as this set's are: {error!r:.200}."
            ) from error
    return found


def set_files(name: str, split: str, folder: str) -> list[Path]:
    """The files of a known set's split that lie in a folder, of which the first is read."""
    files = (Path(folder).expanduser() / f"{name}.{split}{ending}" for ending in (".jsonl", ".jsonl.gz"))
    return [file for file in files if file.exists()]


def _rows(name: str, given: KnownSet, split: str, part: str, folder: str | None) -> Rows:
    if name == "gsm_symbolic" or name.startswith(GYM):
        return Rows(_made(name.removeprefix(GYM), part))
    if folder is not None:
        for file in set_files(name, split, folder):
            return read_rows(str(file))
        raise DataError(f"{folder} holds neither {name}.{split}.jsonl nor {name}.{split}.jsonl.gz.")
    if not given.hub:
        raise ConfigError(f"The set {name} is on no hub: name the folder that holds {name}.{split}.jsonl as `data`.")
    try:
        return read_hub(*given.hub, split=split)
    except DataError as error:
        raise DataError(
            f"{str(error).rstrip('.')}. With a copy of it in a folder, as {name}.{split}.jsonl, name that folder as `data`."
        ) from error


def _made(generator: str, part: str) -> list[Row]:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ConfigError("The sets of reasoning-gym need it: pip install 'umbra-peft[evaluate]'.") from error
    try:
        return list(reasoning_gym.create_dataset(generator, size=GYM_SIZES[part], seed=GYM_SEEDS[part]))
    except ValueError as error:
        raise ConfigError(f"reasoning-gym has no generator {generator!r}: {error}") from error
