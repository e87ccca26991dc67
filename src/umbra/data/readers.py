"""Read files and data sets into rows."""

import gzip
import json
import zlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from ..errors import DataError
from .records import Record, normalize, record_kind

TABLES = (".parquet", ".csv")  # files that datasets reads as they are


class Rows(list[Record]):
    """Rows, and where each was read."""

    def where(self, i: int) -> str:
        """Return the place of row ``i``."""
        return f"record {i + 1}"


def read_records(source: str, split: str = "train", ignore_columns: Collection[str] = ()) -> Rows:
    """Read records and check every field of them.

    Args:
        ignore_columns: columns of the records and fields of their messages to leave out.

    Returns:
        The records in canonical form: see `normalize`.

    Raises:
        DataError: see `read_rows`; or a column or field that is missing, unknown or malformed, with its place.
    """
    rows = Rows(read_rows(source, split))
    first = {k: v for k, v in rows[0].items() if k not in ignore_columns}
    kind = record_kind(first, f"{source}, {rows.where(0)}")
    for i, row in enumerate(rows):
        rows[i] = normalize(row, f"{source}, {rows.where(i)}", ignore_columns, kind)
    return rows


def read_rows(source: str, split: str = "train") -> list[dict[str, Any]]:
    """As `read_records`, whatever the columns.

    Raises:
        DataError: no such file, a line that is not a JSON object (file and line are named), or no record at all.
    """
    if not source:
        raise DataError("No data given: name a .jsonl file or a datasets hub id.")
    ending = Path(source).suffix.lower()
    if ending in TABLES and Path(source).is_file():
        rows = read_hub(ending[1:], split="train", data_files=source)
    elif ending in (".jsonl", ".gz", ".json") or Path(source).is_file():
        rows = _read_lines(Path(source))
    elif Path(source).exists():
        rows = read_hub(source, split=split)
    else:
        name, _, configuration = source.partition(":")
        rows = read_hub(*filter(None, (name, configuration)), split=split)
    if not rows:
        raise DataError(f"{source} holds no record.")
    return rows


def _read_lines(path: Path) -> list[Record]:
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    records = []
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (
                    ValueError,
                    RecursionError,
                ) as error:  # also numbers that are too long, and what is nested too deep
                    raise DataError(
                        f"{path}:{number} is not JSON: {error}. Each line must be one JSON object."
                    ) from None
                if "\\ud" in line.lower() and not _is_text(record):
                    raise DataError(
                        f"{path}:{number} holds half of a character (a lone surrogate): mend or leave it out."
                    )
                if not isinstance(record, dict):
                    raise DataError(f"{path}:{number} is a JSON {type(record).__name__}, not an object with columns.")
                records.append(record)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return records


def _is_text(value: Any) -> bool:
    """Whether all strings in it can be written as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def read_hub(*source: str, split: str, **more: Any) -> list[Record]:
    """The rows of a data set: its id, and its configuration if it has several; or the folder that one was saved to.

    Raises:
        DataError: it cannot be loaded.
    """
    import datasets

    try:
        if (Path(source[0]) / "state.json").is_file():  # of one split
            return list(datasets.load_from_disk(source[0]))  # type: ignore[arg-type]
        return list(datasets.load_dataset(*source, split=split, **more))  # type: ignore[arg-type]
    except Exception as error:  # the library raises a dozen unrelated types
        raise DataError(
            f"{'/'.join(source)!r} is neither a .jsonl file nor a data set that can be loaded: {error!s:.300}"
        ) from error
