"""Read everything that holds records into `Rows`: files of any form, folders, saved data sets, data sets of the hub."""

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
from umbra.errors import DataError, shown
from umbra.files import hub

READERS: dict[tuple[str, ...], Callable[[Path], Rows]] = {
    JSON_FILES: read_json,
    CSV_FILES: read_csv,
    PARQUET_FILES: read_parquet,
    ARROW_FILES: read_arrow,
}


def read_records(source: str | list[str], split: str = "train", ignore_columns: Collection[str] = ()) -> Rows:
    """Read records, all of one form, and check every field of them.

    Args:
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
    """The rows of a source, whatever the columns; ``where(i)`` of the result is the place of row ``i``.

    Args:
        source: a file, a folder of files, a data set that was saved to disk, an ``owner/name`` or ``owner/name:configuration``
            of the hub, a glob, or a list of these. ``~`` is the home folder.
        split: a split, with a slice if needed, in the syntax of datasets: ``train[:100]``. The rows of a file belong to any.

    Raises:
        DataError: nothing of this name, a file that cannot be read (with the line), no such split, or no row at all.
    """
    sources = resolve(source)
    names = {cut.name for cut in parse_split(split)}
    loose = next((one for one in sources if one.kind in ("file", "saved")), None)
    if loose and len(names) > 1:
        raise DataError(
            f"{loose.name} has no splits, so that split={shown(split)} would read its rows twice: name one split."
        )
    rows = read_split(split, lambda name: Rows.joined([_read(one, name) for one in sources]))
    if not rows:
        raise DataError(f"{', '.join(one.name for one in sources)} holds no record.")
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
    """The rows of one file, by the end of its name; of another end by its content, if that is JSON.

    Raises:
        DataError: it cannot be read.
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

    try:
        return datasets.load_from_disk(name)
    except Exception as error:  # the library raises a dozen unrelated types
        raise DataError(f"The data set saved in {name} cannot be read: {error!s:.300}") from error


def read_hub(*source: str, split: str) -> Rows:
    """The rows of a split of a data set of the hub: its id, and its configuration if it has several.

    Cells of its CSV files are text, as those of local ones.

    Raises:
        DataError: it cannot be loaded.
    """
    import datasets  # before the look-up: it reads once whether the hub is offline

    name = f"{':'.join(source)}, split {split}"
    try:
        with hub.lookup(source[0]):
            loaded: Any = datasets.load_dataset(*source, split=split)
            if isinstance(loaded, datasets.Dataset) and loaded.builder_name == "csv":
                kinds = {
                    k: datasets.Value("string") if isinstance(f, datasets.Value) else f
                    for k, f in loaded.features.items()
                }
                features = datasets.Features(kinds)
                loaded = datasets.load_dataset(*source, split=split, features=features, keep_default_na=False)
    except Exception as error:  # the library raises a dozen unrelated types
        reason = hub.way_out(source[0], error) or f"{error!s:.300}"
        raise DataError(
            f"{shown(':'.join(source))} is neither a file here nor a data set that can be loaded: {reason}"
        ) from error
    return dataset_rows(loaded, name) if isinstance(loaded, datasets.Dataset) else Rows(loaded)
