"""Splits and slices of them, in the syntax of datasets: ``train``, ``train[:2]``, ``train[10%:-5%]``, ``train+validation``."""

import re
from collections.abc import Callable
from typing import NamedTuple

from umbra.data.rows import Rows
from umbra.errors import DataError, shown

BOUND = r"-?\d[\d_]*%?"
PART = re.compile(
    rf"(?P<name>\w+(?:\.\w+)*)(?:\[(?P<start>{BOUND})?:(?P<end>{BOUND})?\])?(?:\((?P<rounding>\w+)\))?", re.ASCII
)
ROUNDINGS = (None, "closest", "pct1_dropremainder")


class Cut(NamedTuple):
    """A slice of one split; bounds as written, None for an open end."""

    name: str
    start: str | None = None
    end: str | None = None
    rounding: str | None = None

    def of(self, count: int) -> slice:
        """Return the slice for a split of ``count`` rows."""
        return slice(self._index(self.start, 0, count), self._index(self.end, count, count))

    def _index(self, bound: str | None, default: int, count: int) -> int:
        if bound is None:
            return default
        value = int(bound.rstrip("%"))
        if bound.endswith("%"):
            value = value * (count // 100) if self.rounding == ROUNDINGS[-1] else round(value * count / 100)
        return min(max(value + count, 0) if value < 0 else value, count)


def parse_split(split: str) -> list[Cut]:
    """Parse a split into slices.

    Raises:
        DataError: a malformed split, or a share of more than 100 %.
    """
    cuts = []
    for part in split.split("+") if isinstance(split, str) else [""]:
        match = PART.fullmatch(part.strip())
        cut = Cut(**match.groupdict()) if match else None
        bounds = [b for b in (cut.start, cut.end) if b is not None] if cut else []
        units = {b.endswith("%") for b in bounds}
        shares = [abs(int(b[:-1])) for b in bounds if b.endswith("%")]
        rounds = cut is not None and (cut.rounding is None or True in units) and cut.rounding in ROUNDINGS
        if cut is None or len(units) > 1 or max(shares, default=0) > 100 or not rounds:
            raise DataError(
                f"{shown(split)} is not a split: write a name such as train, with a slice such as train[:100], "
                "train[10%:20%] or train[-50:] if needed, several joined by +."
            )
        cuts.append(cut)
    return cuts


def read_split(split: str, load: Callable[[str], Rows]) -> Rows:
    """Return the rows of a split.

    Args:
        split: names of splits, with slices.
        load: reads all rows of a split by its name.

    Raises:
        DataError: see `parse_split`; or a slice that selects no row.
    """
    cuts = parse_split(split)
    whole = {name: load(name) for name in dict.fromkeys(cut.name for cut in cuts)}
    rows = Rows.joined([whole[cut.name][cut.of(len(whole[cut.name]))] for cut in cuts])
    if not rows and any(whole.values()):
        counts = ", ".join(f"{name} has {len(part)}" for name, part in whole.items())
        raise DataError(f"split={shown(split)} selects no row: {counts}.")
    return rows
