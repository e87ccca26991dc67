"""``runs.jsonl.gz``: the description of a study and all of its records in one file, for version control.

The first line is the content of ``study.json``, every other line is one record. A running study writes single files, which are
easier to write atomically; `pack` turns them into an archive, and every reader of a study accepts either form.
"""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from umbra.errors import CheckpointError
from umbra.files import folder

ARCHIVE_FILE, STUDY_FILE, FIGURES = "runs.jsonl.gz", "study.json", "figures"
# Everything that a study writes into its folder.
WRITTEN = (STUDY_FILE, ARCHIVE_FILE, FIGURES, "report.md", "report.html", "runs", "trials", "adapters", "work")
COMMANDS = {"umbra evaluate ": "umbra study "}  # renamed since the first records were written
Record = dict[str, Any]


def read_archive(path: Path) -> tuple[dict[str, Any] | None, list[Record]]:
    """Return the description and the records in the archive of a study's folder; None and none if it has no archive.

    Raises:
        CheckpointError: the archive is damaged.
    """
    file = path / ARCHIVE_FILE
    if not file.exists():
        return None, []
    try:
        first, *others = gzip.decompress(file.read_bytes()).decode("utf-8").splitlines()
        return json.loads(first), [json.loads(line) for line in others]
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise CheckpointError(f"{file} is damaged: {error}. Restore it from version control, or remove it.") from error


def read_description(path: Path) -> dict[str, Any]:
    """Return the content of ``study.json``, from the file itself or from the archive.

    Raises:
        CheckpointError: the folder holds neither, or a damaged one.
    """
    file = folder.find(path, STUDY_FILE)
    try:
        description = json.loads(folder.read_text(file)) if file.exists() else read_archive(path)[0]
        if description is None:
            raise FileNotFoundError(f"neither {STUDY_FILE} nor {ARCHIVE_FILE} is there")
        command = str(description["command"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} holds no study that umbra study has run: {error}") from error
    for old, new in COMMANDS.items():
        command = command.replace(old, new, 1) if command.startswith(old) else command
    return {**description, "command": command}


def pack(description: dict[str, Any], records: list[Record], to: Path) -> Path:
    """Write an archive into the folder ``to`` and return its path. Equal contents give equal bytes.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    lines = [json.dumps(value, ensure_ascii=False, separators=(",", ":")) for value in (description, *records)]
    data = gzip.compress(("\n".join(lines) + "\n").encode("utf-8"), mtime=0)

    def write(staging: Path) -> None:
        (staging / ARCHIVE_FILE).write_bytes(data)

    folder.write_together(to, write)
    return to / ARCHIVE_FILE
