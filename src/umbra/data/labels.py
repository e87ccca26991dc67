"""Classification and regression labels."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import DataError


@dataclass(frozen=True)
class Labels:
    """How labels become numbers: ``names`` of the classes, or none for regression."""

    problem_type: str
    names: tuple[str, ...]
    width: int

    @classmethod
    def of(cls, values: Iterable[Any]) -> "Labels":
        """Read off the training labels: strings, integers or booleans are classes, floats are regression targets,
        lists of strings are several classes at once, lists of 0 and 1 likewise.

        Raises:
            DataError: labels of different kinds, or a single class.
        """
        values = list(values)
        for value in values:
            for x in value if isinstance(value, list) else [value]:
                if not isinstance(x, str | int | float) or (isinstance(x, float) and not math.isfinite(x)):
                    raise DataError(f"The label {value!r:.80} is neither a name nor a number, nor a list of those.")
        lists = [isinstance(v, list) for v in values]
        if any(lists) and not all(lists):
            raise DataError("Some labels are lists and some are not.")
        if all(lists):
            flat = [x for v in values for x in v]
            if flat and all(isinstance(x, str) for x in flat):
                names = tuple(sorted(set(flat)))
                return cls("multi_label_classification", names, len(names))
            widths = {len(v) for v in values}
            if len(widths) != 1 or not all(isinstance(x, int | float) for x in flat):
                raise DataError("List labels must all be class names, or all numbers of one length.")
            width = widths.pop()
            if set(flat) <= {0, 1}:
                return cls("multi_label_classification", tuple(f"LABEL_{i}" for i in range(width)), width)
            return cls("regression", (), width)
        if any(isinstance(v, float) for v in values):
            if not all(isinstance(v, int | float) for v in values):
                raise DataError("Some labels are numbers and some are not.")
            return cls("regression", (), 1)
        distinct = set(values)
        names = sorted(distinct) if len({type(v) for v in distinct}) == 1 else sorted(distinct, key=str)
        if len(names) < 2:
            raise DataError(f"All labels are {values[0]!r}: a classifier needs at least two classes.")
        return cls("single_label_classification", tuple(map(str, names)), len(names))

    def encode(self, value: Any) -> Any:
        """The number, or numbers, of one label.

        Raises:
            DataError: a class that the training data does not have.
        """
        if self.problem_type == "regression":
            return [float(x) for x in value] if isinstance(value, list) else float(value)
        if isinstance(value, list):
            if all(isinstance(x, int | float) for x in value) and len(value) == self.width:
                return [float(x) for x in value]
            for x in value:
                self._index(x)
            return [float(name in value) for name in self.names]
        return self._index(value)

    def _index(self, value: Any) -> int:
        if str(value) not in self.names:
            raise DataError(f"The label {value!r} is none of the training data's: {', '.join(self.names)}.")
        return self.names.index(str(value))

    def config(self) -> dict[str, Any]:
        """The fields of a transformers configuration that say the same."""
        names = self.names or tuple(f"LABEL_{i}" for i in range(self.width))
        return {
            "num_labels": self.width,
            "id2label": dict(enumerate(names)),
            "label2id": {n: i for i, n in enumerate(names)},
            "problem_type": self.problem_type,
        }
