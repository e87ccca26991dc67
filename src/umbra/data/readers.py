"""Read records from files of any format, folders, saved data sets and data sets of the hub."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from umbra.data.from_arrow import dataset_rows, read_arrow, read_parquet
from umbra.data.from_csv import read_csv
from umbra.data.from_json import read_json
from umbra.data.records import normalize, record_kind
from umbra.data.rows import Rows
from umbra.data.sources import ARROW_FILES, CSV_FILES, FORMS, JSON_FILES, PARQUET_FILES, Source, folder_splits, resolve
from umbra.data.splits import parse_split, read_split
from umbra.data.text_files import TEXT_FILES, form_of, pieces
from umbra.errors import DataError, raising, shown
from umbra.files import hub

READERS: dict[tuple[str, ...], Callable[[Path], Rows]] = {
    JSON_FILES: read_json,
    CSV_FILES: read_csv,
    PARQUET_FILES: read_parquet,
    ARROW_FILES: read_arrow,
}


def read_records(source: str | list[str], split: str = "train", ignore_columns: Collection[str] = ()) -> Rows:
    """Read records, all of one form, and check all their fields.

    Args:
        source: see `read_rows`.
        split: see `read_rows`.
        ignore_columns: columns of the records and fields of their messages to leave out.

    Returns:
        The records in canonical form: see `normalize`.

    Raises:
        DataError: see `read_rows`; or a column or field that is missing, unknown or malformed, with its place.
    """
    rows = read_rows(source, split)
    kind = record_kind({k: v for k, v in rows[0].items() if k not in ignore_columns}, rows.where(0))
    for i, where in enumerate(rows.places()):
        rows[i] = normalize(rows[i], where, ignore_columns, kind)
    return rows


def read_rows(source: str | list[str], split: str = "train") -> Rows:
    """Return the rows of a source, with any columns; ``where(i)`` of the result is the place of row ``i``.

    Args:
        source: a file, a folder of files, a data set saved to disk, an ``owner/name`` or ``owner/name:configuration``
            of the hub, a glob, or a list of these. ``~`` is the home folder.
        split: a split, with a slice if needed, in the syntax of datasets: ``train[:100]``. A file belongs to every split.

    Raises:
        DataError: no such source, a file that cannot be read (with the line), an unknown split, or no row at all.
    """
    sources = resolve(source)
    names = {cut.name for cut in parse_split(split)}
    unsplit = next((one for one in sources if one.kind in ("file", "saved")), None)
    if unsplit and len(names) > 1:
        raise DataError(
            f"{unsplit.name} has no splits, so split={shown(split)} would read its rows twice: name one split."
        )
    rows = read_split(split, lambda name: Rows.joined([_read(one, name) for one in sources]))
    if not rows:
        raise DataError(f"{', '.join(one.name for one in sources)} contains no record.")
    return rows


def _read(source: Source, split: str) -> Rows:
    match source.kind:
        case "file":
            return read_file(source.path)
        case "folder":
            splits = folder_splits(source.path)
            files = splits.get("") or _split_of(splits, split, source.name)
            return Rows.joined([read_file(file) for file in files])
        case "hub":
            name, _, configuration = source.name.partition(":")
            return read_hub(*filter(None, (name, configuration)), split=split)
    saved = _saved(source.name)
    return dataset_rows(saved if source.kind == "saved" else _split_of(saved, split, source.name), source.name)


def _split_of(splits: dict[str, Any], split: str, name: str) -> Any:
    if split not in splits:
        raise DataError(f"{name} has no split {split!r}: it has {', '.join(map(repr, sorted(splits)))}.")
    return splits[split]


def read_file(path: Path) -> Rows:
    """Return the rows of one file. Its name determines the format; other files are read if they contain JSON.

    Raises:
        DataError: the file cannot be read.
    """
    form = form_of(path)
    for forms, read in READERS.items():
        if form in forms:
            return read(path)
    first = next((piece.lstrip()[:1] for piece in pieces(path) if piece.strip()), "")
    if form not in TEXT_FILES and first in ("{", "["):
        return read_json(path)
    raise DataError(
        f"{path} cannot be read as records: its name ends in {form or 'nothing'}, not as one of {FORMS} does "
        f"({', '.join(end for ends in READERS for end in ends)}, also with .gz, .bz2, .xz or .zst)."
    )


def _saved(name: str) -> Any:
    import datasets

    with raising(DataError, lambda error: f"The data set saved in {name} cannot be read: {error!s:.300}"):
        return datasets.load_from_disk(name)


def read_hub(*source: str, split: str) -> Rows:
    """Return the rows of a split of a data set of the hub. Cells of its CSV files are text, as in local files.

    Args:
        source: the data set's id, and its configuration if it has several.
        split: name of the split.

    Raises:
        DataError: the data set cannot be loaded.
    """
    import datasets  # before the look-up: on import it reads whether the hub is offline

    name = f"{':'.join(source)}, split {split}"

    def failure(error: Exception) -> str:
        reason = hub.offline_advice(source[0], error) or f"{error!s:.300}"
        return f"{shown(':'.join(source))} is neither a local file nor a data set that can be loaded: {reason}"

    with raising(DataError, failure), hub.lookup(source[0]):
        loaded = datasets.load_dataset(*source, split=split)
        if isinstance(loaded, datasets.Dataset) and loaded.builder_name == "csv":
            text = datasets.Value("string")
            kinds = {k: text if isinstance(f, datasets.Value) else f for k, f in loaded.features.items()}
            loaded = datasets.load_dataset(
                *source, split=split, features=datasets.Features(kinds), keep_default_na=False
            )
    return dataset_rows(loaded, name) if isinstance(loaded, datasets.Dataset) else Rows(loaded)
