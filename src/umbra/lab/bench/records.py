"""Measurements as JSON: every single time, written row by row, so that a killed run can be resumed and a row repeated."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from umbra.errors import CheckpointError
from umbra.files import folder
from umbra.lab.bench.timing import Row

SHAPE = {"header": dict, "trainable": dict, "fitted": dict, "cases": dict, "sessions": list}


class Records:
    """The rows of every case, with the base and the machine.

    Args:
        path: The JSON file; existing rows are loaded.
        header: What must be equal for rows to be in one table.
        session: The session of new rows; see `machine.session`.
        anew: Discard existing rows that have another header.

    Raises:
        CheckpointError: the file is damaged, or has rows with another header.
    """

    def __init__(self, path: Path, header: dict[str, Any], session: dict[str, Any], anew: bool = False):
        self.path, self.header, self.session = path, header, session
        self.cases: dict[str, dict[str, Row]] = {}
        self.sizes: dict[str, int] = {}  # trainable parameters by method
        self.fitted: dict[str, Any] = {}  # LoRA's rank, the shadows' widths
        self.sessions: list[dict[str, Any]] = []
        stored = _read(path)
        if stored is None or (anew and stored["header"] != header):
            return
        changed = sorted(k for k in header.keys() | stored["header"].keys() if header.get(k) != stored["header"].get(k))
        if changed:
            changes = ", ".join(f"{k}: {stored['header'].get(k)!r} → {header.get(k)!r}" for k in changed)
            raise CheckpointError(
                f"{path} holds another measurement ({changes}): choose another --name or --out, or --anew."
            )
        self.cases, self.sizes, self.fitted = stored["cases"], stored["trainable"], stored["fitted"]
        self.sessions = stored["sessions"]

    def lacks(self, case: str, method: str, rounds: int) -> bool:
        """Return whether a row has to be measured, for a number of rounds."""
        row = self.cases.get(case, {}).get(method)
        return row is None or not ("peak" in row or len(row.get("seconds", ())) >= rounds)

    def put(self, case: str, rows: dict[str, Row]) -> None:
        """Add the rows of a case and write the file."""
        self.note(case, rows)
        self.write({})

    def note(self, case: str, rows: dict[str, Row]) -> None:
        """Add the rows of a case."""
        if not rows:
            return
        if self.session not in self.sessions:
            self.sessions.append(self.session)
        number = self.sessions.index(self.session)
        self.cases.setdefault(case, {}).update({name: {**row, "session": number} for name, row in rows.items()})

    def as_dict(self) -> dict[str, Any]:
        """Return the content of the JSON file."""
        used = {row["session"] for rows in self.cases.values() for row in rows.values()}
        return {
            "header": self.header, "trainable": self.sizes, "fitted": self.fitted, "cases": self.cases,
            "sessions": [s if i in used else None for i, s in enumerate(self.sessions)],
        }  # fmt: skip

    def write(self, files: dict[str, Callable[[Path], object]]) -> None:
        """Write the JSON file and others beside it atomically.

        Args:
            files: By file name, a function that writes the file to a path.
        """

        def write_all(staging: Path) -> None:
            folder.write_text(staging / self.path.name, json.dumps(self.as_dict(), indent=1) + "\n")
            for name, write in files.items():
                write(staging / name)

        folder.write_together(self.path.parent, write_all)


def _read(path: Path) -> dict[str, Any] | None:
    file = folder.find(path.parent, path.name)
    if not file.exists():
        return None
    try:
        values = json.loads(folder.read_text(file))
        if not all(isinstance(values[key], kind) for key, kind in SHAPE.items()):
            raise ValueError("it has another form")
        return values
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. Remove it, or choose another --name or --out.") from error
