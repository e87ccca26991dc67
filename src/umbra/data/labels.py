"""Classification and regression labels."""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor
from transformers import PretrainedConfig

from umbra.errors import DataError, shown

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


@dataclass(frozen=True)
class Labels:
    """The mapping of labels to numbers.

    Args:
        problem_type: one of `PROBLEM_TYPES`.
        names: the classes in the order of their numbers; none for regression.
        width: number of outputs of the model.
    """

    problem_type: str
    names: tuple[str, ...]
    width: int

    @classmethod
    def of(
        cls, values: Iterable[Any], problem_type: str | None = None, where: Callable[[int], str] | None = None
    ) -> "Labels":
        """Infer the classes or targets from the training labels.

        Strings, integers, floats and booleans are classes, named by their text without surrounding white space. Lists of strings
        are several classes at once, and so are lists of 0 and 1, one for each class.

        Args:
            values: the labels.
            problem_type: ``regression`` for targets that are numbers, or text of numbers, or lists of either.
            where: returns the place of a label, for messages.

        Raises:
            DataError: an empty or missing label, labels of different kinds, or a single class.
        """
        values = list(values)
        place = where or (lambda i: f"record {i + 1}")
        for i, value in enumerate(values):
            _check(value, place(i))
        is_list = [isinstance(v, list) for v in values]
        if len(set(is_list)) > 1:
            odd = is_list.index(not is_list[0])
            raise DataError(
                f"{place(odd)}: the label {shown(values[odd])} differs in kind from the first, {shown(values[0])}."
            )
        if problem_type not in (None, *PROBLEM_TYPES):
            raise DataError(f"problem_type must be one of {', '.join(PROBLEM_TYPES)}; got {shown(problem_type)}.")
        if problem_type == "regression":
            return cls("regression", (), _regression_width(values, place))
        if is_list[0] and problem_type == "single_label_classification":
            raise DataError(f"problem_type={problem_type} needs one class as a label, got {shown(values[0])}.")
        if is_list[0]:
            return cls._several(values, place)
        if problem_type == "multi_label_classification":
            raise DataError(f"problem_type={problem_type} needs lists of classes as labels, got {shown(values[0])}.")
        _check_kinds(values, place)
        names = _sorted(values)
        if len(names) < 2:
            raise DataError(f"All labels are {shown(values[0])}: a classifier needs at least two classes.")
        return cls("single_label_classification", tuple(names), len(names))

    @classmethod
    def _several(cls, values: list[list], place: Callable[[int], str]) -> "Labels":
        flat = [x for v in values for x in v]
        if flat and all(isinstance(x, str) for x in flat):
            names = _sorted(flat)
            return cls("multi_label_classification", tuple(names), len(names))
        if not flat:
            raise DataError("All labels are empty lists: a classifier needs at least one class.")
        width = len(values[0])
        for i, value in enumerate(values):
            if len(value) != width or not all(not isinstance(x, str) and x in (0, 1) for x in value):
                raise DataError(
                    f"{place(i)}: the label {shown(value)} is neither a list of class names nor one of {width} zeros and ones, as "
                    "the first; for numbers as targets set problem_type: regression."
                )
        return cls("multi_label_classification", tuple(f"LABEL_{i}" for i in range(width)), width)

    def encode(self, value: object) -> Any:
        """Return one label as a number or as numbers.

        Raises:
            DataError: a class that does not occur in the training data, or no number for regression.
        """
        if self.problem_type == "regression":
            return [_number(x) for x in value] if isinstance(value, list) else _number(value)
        several = self.problem_type == "multi_label_classification"
        if isinstance(value, list) != several:
            raise DataError(f"The label must be {'a list of classes' if several else 'one class'}, got {shown(value)}.")
        if isinstance(value, list):
            if value and all(isinstance(x, int | float) for x in value) and len(value) == self.width:
                return [float(x) for x in value]
            present = {self._index(x) for x in value}
            return [float(i in present) for i in range(self.width)]
        return self._index(value)

    def _index(self, value: object) -> int:
        name = class_name(value)
        if name not in self.names:
            raise DataError(f"The label {shown(value)} is not one of the training data's: {', '.join(self.names)}.")
        return self.names.index(name)

    def config(self) -> dict[str, Any]:
        """Return the mapping as fields of a transformers configuration."""
        names = self.names or tuple(f"LABEL_{i}" for i in range(self.width))
        return {
            "num_labels": self.width,
            "id2label": dict(enumerate(names)),
            "label2id": {n: i for i, n in enumerate(names)},
            "problem_type": self.problem_type,
        }


def class_name(value: object) -> str:
    """Return the name of a class: its text without surrounding white space."""
    return str(value).strip()


def describe_classes(labels: Labels, values: Sequence[Any]) -> list[str]:
    """Return lines for the user: each class with its count, and classes whose names differ only in spelling."""
    if labels.problem_type == "regression":
        return [f"regression on {len(values)} labels"]
    counts = Counter(
        name
        for value in values
        for name in (
            [labels.names[i] for i, x in enumerate(labels.encode(value)) if x]
            if isinstance(value, list)
            else [class_name(value)]
        )
    )
    lines = [f"{len(labels.names)} classes: " + ", ".join(f"{shown(n)} {counts[n]}" for n in labels.names)]
    alike: dict[str, list[str]] = {}
    for name in labels.names:
        alike.setdefault(_spelling(name), []).append(name)
    return lines + [
        f"Nearly the same class twice: {', '.join(map(shown, names))}. Give them one name if one class is meant."
        for names in alike.values()
        if len(names) > 1
    ]


def _spelling(name: str) -> str:
    """Return a name without frequent variations of spelling: case, blanks, punctuation, zeros around a number."""
    try:
        return str(float(name))
    except ValueError:
        plain = unicodedata.normalize("NFKC", name).casefold()
        return re.sub(r"[\W_]+", "", plain) or plain


def _check(value: object, place: str) -> None:
    for x in value if isinstance(value, list) else [value]:
        if x is None or not isinstance(x, str | int | float) or (isinstance(x, float) and not math.isfinite(x)):
            raise DataError(f"{place}: the label {shown(value)} is neither a name nor a number, nor a list of those.")
        if isinstance(x, str) and not x.strip():
            raise DataError(f"{place}: the label is empty.")


def _check_kinds(values: list[Any], place: Callable[[int], str]) -> None:
    """Raise a DataError if some classes are text and others numbers: 1 and "1" could mean one class or two."""
    kinds = [str if isinstance(v, str) else bool if isinstance(v, bool) else float for v in values]
    odd = next((i for i, kind in enumerate(kinds) if kind is not kinds[0]), None)
    if odd is not None:
        raise DataError(
            f"{place(odd)}: the label {shown(values[odd])} differs in kind from the first, {shown(values[0])}: write all as text, "
            "or all as numbers."
        )


def _number(value: object) -> float:
    try:
        number = float(cast("str | float", value))
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"The label {shown(value)} is not a number, which problem_type: regression needs.")
    return number


def _regression_width(values: list[Any], place: Callable[[int], str]) -> int:
    for i, value in enumerate(values):
        if isinstance(value, list) and len(value) != len(values[0]):
            raise DataError(
                f"{place(i)}: the label {shown(value)} holds {len(value)} numbers, the first {len(values[0])}."
            )
        for x in value if isinstance(value, list) else [value]:
            try:
                _number(x)
            except DataError as error:
                raise DataError(f"{place(i)}: {error}") from None
    return len(values[0]) if isinstance(values[0], list) else 1


def _sorted(values: Iterable[Any]) -> list[str]:
    """Return the distinct classes, sorted as numbers if all are, otherwise as text."""
    by_name = {class_name(v): v for v in values}
    numeric = all(isinstance(v, int | float) for v in by_name.values())
    return sorted(by_name, key=lambda name: by_name[name]) if numeric else sorted(by_name)


def prediction_of(logits: Tensor, config: PretrainedConfig) -> dict[str, Any]:
    """Return a classifier's prediction as plain values.

    Args:
        logits: (C,) of one text.
        config: the model's configuration, with the names of the classes.

    Returns:
        ``prediction``, a class, a list of classes, or a number; and for classes ``probabilities`` by name.
    """
    names = cast("dict[int, str]", config.id2label)
    if config.problem_type == "regression" or config.num_labels == 1:
        values = [round(float(x), 6) for x in logits]
        return {"prediction": values[0] if len(values) == 1 else values}
    several = config.problem_type == "multi_label_classification"
    p = logits.sigmoid() if several else logits.softmax(-1)
    prediction = [names[i] for i, z in enumerate(logits) if z > 0] if several else names[int(logits.argmax())]
    return {"prediction": prediction, "probabilities": {names[i]: round(float(x), 6) for i, x in enumerate(p)}}
