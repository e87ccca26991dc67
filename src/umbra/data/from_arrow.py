"""Rows from Arrow: Parquet and Arrow files, and data sets of datasets.

Arrow gives all structs of a column the same members, and fills missing ones with nulls. Below the top level these are dropped, so
that each tool call has its original arguments. Columns of class labels give the names of the classes.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from umbra.data.from_json import parse_json
from umbra.data.rows import ROW, Row, Rows
from umbra.data.text_files import EXPANDS, RATIO, check_file
from umbra.errors import DataError

Convert = Callable[[Any], Any]
PANDAS_INDEX = re.compile(r"__index_level_\d+__")
BATCH = 1024  # rows


def read_parquet(path: Path) -> Rows:
    """Return the rows of a Parquet file.

    Raises:
        DataError: a damaged file, or a class without a name.
    """
    import pyarrow.parquet as pq

    check_file(path)
    with _readable(str(path)), pq.ParquetFile(path) as file:
        return _rows(str(path), _bounded(path, file.iter_batches(BATCH)), file.schema_arrow)


def read_arrow(path: Path) -> Rows:
    """Return the rows of an Arrow file: see `read_parquet`."""
    import pyarrow as pa

    check_file(path)
    with _readable(str(path)), pa.memory_map(str(path)) as source:
        try:
            reader: Any = pa.ipc.open_stream(source)
            batches: Iterable[Any] = reader
        except pa.ArrowInvalid:
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        return _rows(str(path), _bounded(path, batches), reader.schema)


def dataset_rows(dataset: Any, name: str) -> Rows:
    """Return the rows of a ``datasets.Dataset``: see `read_parquet`. Images and sounds are not decoded."""
    with _readable(name):
        tables = dataset.with_format("arrow").iter(BATCH)
        return _rows(name, tables, dataset.features.arrow_schema)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError, NotImplementedError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{name} cannot be read: {error!s:.300}") from error


def _bounded(path: Path, batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches; raise a DataError if they are implausibly larger than the file."""
    limit, size = max(EXPANDS, RATIO * path.stat().st_size), 0
    for batch in batches:
        size += batch.nbytes
        if size > limit:
            raise DataError(
                f"{path} cannot be read: its rows take more than {RATIO} times the bytes of the file, {limit:,}, as those of "
                "a compression bomb do. If this is intended, write the file without compression."
            )
        yield batch


def _rows(name: str, batches: Iterable[Any], schema: Any) -> Rows:
    features: dict[str, Any] = {}
    if b"huggingface" in (schema.metadata or {}):
        import datasets

        features = dict(datasets.Features.from_arrow_schema(schema))
    index = (schema.pandas_metadata or {}).get("index_columns", ())
    dropped = {column for column in index if isinstance(column, str) and PANDAS_INDEX.fullmatch(column)}
    converters = {f.name: converter(f.type, features.get(f.name)) for f in schema if f.name not in dropped}
    if len(converters) < len(schema) - len(dropped):
        raise DataError(f"{name} has two columns of the same name: rename one.")
    return Rows.of(name, ROW, _converted(name, batches, converters))


def _converted(
    name: str, batches: Iterable[Any], converters: dict[str, Convert | None]
) -> Iterator[tuple[Row, int, int]]:
    number = 0
    for batch in batches:
        for values in batch.to_pylist():
            number += 1
            row = {}
            for column, convert in converters.items():
                value = values[column]
                try:
                    row[column] = value if convert is None or value is None else convert(value)
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{name}, row {number}, column {column!r}: {error}.") from None
            yield row, number, 0


def converter(kind: Any, feature: Any = None) -> Convert | None:
    """Return a function that converts values of an Arrow type to those of a record; None if they need no conversion.

    Args:
        kind: the type.
        feature: the feature of datasets for the column, or for a part of it.
    """
    import pyarrow as pa
    from datasets import ClassLabel, LargeList, List

    if isinstance(feature, ClassLabel):
        return _class_name(feature.names) if pa.types.is_integer(kind) and feature.names else None
    if isinstance(kind, pa.JsonType):
        return parse_json
    if pa.types.is_map(kind):
        return _map(converter(kind.item_type))
    if pa.types.is_struct(kind):
        inner = feature if isinstance(feature, dict) else {}
        return _struct({f.name: converter(f.type, inner.get(f.name)) for f in kind})
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _list(converter(kind.value_type, feature.feature if isinstance(feature, List | LargeList) else None))
    return None


def _class_name(names: list[str]) -> Convert:
    def convert(number: int) -> str:
        if not 0 <= number < len(names):
            raise ValueError(
                f"{number} is none of the {len(names)} classes" + " (-1 stands for no class)" * (number == -1)
            )
        return names[number]

    return convert


def _list(convert: Convert | None) -> Convert | None:
    if convert is None:
        return None
    return lambda values: [None if value is None else convert(value) for value in values]


def _map(convert: Convert | None) -> Convert:
    return lambda pairs: {key: value if convert is None or value is None else convert(value) for key, value in pairs}


def _struct(members: dict[str, Convert | None]) -> Convert:
    def convert(struct: Row) -> Row:
        given = ((key, value, members[key]) for key, value in struct.items() if value is not None)
        return {key: value if inner is None else inner(value) for key, value, inner in given}

    return convert
