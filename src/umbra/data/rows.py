"""Rows of a source and their places, as messages show them: ``train.jsonl:8``, ``data.csv:12``, ``x.parquet, row 5``."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, SupportsIndex, overload

import numpy as np

Row = dict[str, Any]
LINE = "{name}:{line}"
RECORD = "{name}, record {number} (line {line})"
ROW = "{name}, row {number}"


class Origin(NamedTuple):
    """A file or a split of a data set, and the form of places in it: one of `LINE`, `RECORD`, `ROW`."""

    name: str
    form: str


class Rows(list[Row]):
    """A list of rows with their places. Slices are `Rows` too; sorted or filtered lists are not.

    Args:
        rows: the rows; the places of other `Rows` are taken over.
        origins: the sources of the rows.
        places: (N, 3) for each row the index of its origin, and its number and line there, both from 1.
    """

    def __init__(
        self, rows: Iterable[Row] = (), origins: Sequence[Origin] = (), places: np.ndarray | None = None
    ) -> None:
        super().__init__(rows)
        if isinstance(rows, Rows) and places is None:
            origins, places = rows._origins, rows._places
        self._origins = tuple(origins)
        self._places = places

    @classmethod
    def of(cls, name: str, form: str, numbered: Iterable[tuple[Row, int, int]]) -> "Rows":
        """Return the rows of one origin, each given with its number and its line."""
        rows, places = [], array("q")
        for row, number, line in numbered:
            rows.append(row)
            places.extend((0, number, line))
        return cls(rows, [Origin(name, form)], np.frombuffer(places, np.int64).reshape(-1, 3))

    @classmethod
    def joined(cls, parts: Sequence["Rows"]) -> "Rows":
        """Return the concatenated rows of all parts."""
        if len(parts) == 1:
            return parts[0]
        origins = [origin for part in parts for origin in part._origins]
        places, first = [np.empty((0, 3), np.int64)], 0
        for part in parts:
            places.append(part._numbers() + np.array([first, 0, 0]))
            first += len(part._origins)
        return cls((row for part in parts for row in part), origins, np.concatenate(places))

    def where(self, i: int) -> str:
        """Return the place of row ``i``."""
        if self._places is None:
            return f"record {range(len(self))[i] + 1}"
        origin, number, line = self._numbers()[i].tolist()
        name, form = self._origins[origin]
        return form.format(name=name, number=number, line=line)

    def places(self) -> Iterator[str]:
        """Return the place of each row."""
        return map(self.where, range(len(self)))

    def take(self, indices: Iterable[int]) -> "Rows":
        """Return the rows at these indices, in their order, with their places."""
        chosen = list(indices)
        places = None if self._places is None else self._numbers()[chosen]
        return Rows(map(super().__getitem__, chosen), self._origins, places)

    @overload
    def __getitem__(self, key: SupportsIndex) -> Row: ...
    @overload
    def __getitem__(self, key: slice) -> "Rows": ...
    def __getitem__(self, key: SupportsIndex | slice) -> object:
        if not isinstance(key, slice):
            return super().__getitem__(key)
        places = None if self._places is None else self._numbers()[key]
        return Rows(super().__getitem__(key), self._origins, places)

    def _numbers(self) -> np.ndarray:
        """Return `places`, which must still match the rows."""
        if self._places is None:
            return np.stack([np.zeros(len(self)), np.arange(1, len(self) + 1), np.zeros(len(self))], 1).astype(np.int64)
        assert len(self._places) == len(self), "rows were added or removed in place: use take() or a plain list"
        return self._places
