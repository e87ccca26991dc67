"""What was measured, as JSON: every single time, kept row by row, so that a killed run goes on and a row can be redone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from umbra.errors import CheckpointError
from umbra.files import folder
from umbra.lab.bench.timing import Row

SHAPE = {"header": dict, "trainable": dict, "fitted": dict, "cases": dict, "sessions": list}


class Records:
    """The rows of every case, and of what base, on what machine.

    Args:
        path: of the JSON file; what it holds is kept.
        header: what must be alike for rows to stand in one table.
        session: of the rows that are put from now on; see `machine.session`.
        anew: put aside what the file holds, if it was measured under another header.

    Raises:
        CheckpointError: the file is damaged, or holds another header's rows.
    """

    def __init__(self, path: Path, header: dict[str, Any], session: dict[str, Any], anew: bool = False):
        self.path, self.header, self.session = path, header, session
        self.cases: dict[str, dict[str, Row]] = {}
        self.sizes: dict[str, int] = {}  # trainable parameters of each method
        self.fitted: dict[str, Any] = {}  # LoRA's rank, the shadows' widths
        self.sessions: list[dict[str, Any]] = []
        held = _read(path)
        if held is None or (anew and held["header"] != header):
            return
        changed = sorted(k for k in header.keys() | held["header"].keys() if header.get(k) != held["header"].get(k))
        if changed:
            told = ", ".join(f"{k}: {held['header'].get(k)!r} → {header.get(k)!r}" for k in changed)
            mend = "choose another --name or --out, or --anew"
            raise CheckpointError(f"{path} holds another measurement ({told}): {mend}.")
        self.cases, self.sizes, self.fitted = held["cases"], held["trainable"], held["fitted"]
        self.sessions = held["sessions"]

    def lacks(self, case: str, method: str, rounds: int) -> bool:
        """Whether a row is still to be measured, in so many rounds."""
        row = self.cases.get(case, {}).get(method)
        return row is None or not ("peak" in row or len(row.get("seconds", ())) >= rounds)

    def put(self, case: str, rows: dict[str, Row]) -> None:
        """Take in the rows of a case, and write the file."""
        self.note(case, rows)
        self.write({})

    def note(self, case: str, rows: dict[str, Row]) -> None:
        """Take in the rows of a case."""
        if not rows:
            return
        if self.session not in self.sessions:
            self.sessions.append(self.session)
        number = self.sessions.index(self.session)
        self.cases.setdefault(case, {}).update({name: {**row, "session": number} for name, row in rows.items()})

    def as_dict(self) -> dict[str, Any]:
        """All of it, as in the file."""
        used = {row["session"] for rows in self.cases.values() for row in rows.values()}
        return {
            "header": self.header, "trainable": self.sizes, "fitted": self.fitted, "cases": self.cases,
            "sessions": [s if i in used else None for i, s in enumerate(self.sessions)],
        }  # fmt: skip

    def write(self, files: dict[str, Callable[[Path], Any]]) -> None:
        """Write the JSON file and others beside it, all or none of them.

        Args:
            files: by name, what writes each to a path.
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
        held = json.loads(folder.read_text(file))
        if not all(isinstance(held[key], kind) for key, kind in SHAPE.items()):
            raise ValueError("it has another form")
        return held
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. Remove it, or choose another --name or --out.") from error
