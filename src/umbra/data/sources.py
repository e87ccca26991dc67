"""Names of data → sources: files, globs, folders, data sets saved to disk, and data sets of the hub.

Names are resolved on the local disk, so that a mistyped one is refused at once; only ``owner/name`` is looked up on the hub.
"""

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from umbra.data.text_files import COMPRESSIONS, TEXT_FILES, check_file, form_of, reading
from umbra.errors import DataError, shown

JSON_FILES = (".jsonl", ".ndjson", ".json")
CSV_FILES = (".csv", ".tsv", ".tab")
PARQUET_FILES = (".parquet", ".pq")
ARROW_FILES = (".arrow", ".feather")
RECORD_FILES = (*JSON_FILES, *CSV_FILES, *PARQUET_FILES, *ARROW_FILES)
FORMS = "JSON lines, a JSON array, CSV, TSV, Parquet or Arrow"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")
OTHERS = (".zip", ".tar", ".tgz", ".7z", ".rar", ".xlsx", ".xls", ".ods", ".pkl", ".pickle", ".pt", ".npy", ".npz", ".h5", ".db",
          ".sqlite", ".yaml", ".yml", ".xml", ".html", ".pdf", ".docx", ".log", ".dat")  # fmt: skip
SAVED = {"dataset_dict.json": "dict", "state.json": "saved"}
SIDECARS = ("dataset_info.json", "dataset_infos.json", "metadata.json")
SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip


class Source(NamedTuple):
    """A source of rows.

    Args:
        kind: a file; a folder of files; a data set saved to disk, or its splits; a data set of the hub.
        name: its path, or its id with ``:configuration``.
    """

    kind: Literal["file", "folder", "saved", "dict", "hub"]
    name: str

    @property
    def path(self) -> Path:
        """The path of a local source."""
        return Path(self.name)


def listed(source: str | list[str]) -> list[str]:
    """Return the names of one or several sources as a list.

    Raises:
        DataError: no name, or one that is not text.
    """
    names = [os.fspath(name) if isinstance(name, Path) else name for name in _as_list(source)]
    for name in names:
        if not isinstance(name, str):
            raise DataError(f"Data is named by text or a list of texts, got {shown(name)}.")
    if not names or not all(name.strip() for name in names):
        raise DataError(f"No data given: name a file ({FORMS}), a folder, or a data set of the hub.")
    return names


def _as_list(source: object) -> list[Any]:
    return list(source) if isinstance(source, list | tuple) else [source]


def named_sources(names: str | list[str] | None) -> list[str]:
    """Split names at commas, except for the name of an existing file or folder."""
    listing = [names] if isinstance(names, str) else names or []
    parts = [[name] if os.path.exists(os.path.expanduser(name)) else name.split(",") for name in listing]
    return [part.strip() for some in parts for part in some if part.strip()]


def resolve(source: str | list[str]) -> list[Source]:
    """Return all sources that are named, in order; matches of a glob are sorted.

    Raises:
        DataError: no such source, a pipe or device, or the same file twice.
    """
    sources = [one for name in listed(source) for one in _resolve(name)]
    seen: dict[str, str] = {}
    for one in sources:
        key = one.name if one.kind == "hub" else os.path.realpath(one.name)
        if key in seen:
            also = "" if seen[key] == one.name else f", also as {seen[key]}"
            raise DataError(f"{one.name} is named twice{also}: its rows would count double. Name it once.")
        seen[key] = one.name
    return sources


def _resolve(name: str) -> list[Source]:
    expanded = os.path.expanduser(name.strip() if not os.path.lexists(name) else name)
    path = Path(expanded)
    with reading(path):
        exists = path.exists() or path.is_symlink()
    if exists:
        return [_local(path, expanded)]
    if glob.has_magic(expanded):
        matches = sorted(glob.glob(expanded, recursive=True))
        if not matches:
            raise DataError(f"{name} matches no file (from the folder {Path.cwd()}).")
        files = [m for m in matches if not os.path.isdir(m)]
        return [_local(Path(m), m) for m in files or matches]
    if _may_be_on_hub(expanded):
        return [Source("hub", expanded)]
    raise _missing(name, path)


def _local(path: Path, name: str) -> Source:
    with reading(path):
        is_folder = path.is_dir()
    if not is_folder:
        check_file(path)
        return Source("file", name)
    kind = next((kind for file, kind in SAVED.items() if (path / file).is_file()), "folder")
    return Source(cast(Literal["saved", "dict", "folder"], kind), name)


def _may_be_on_hub(name: str) -> bool:
    """Return whether a name that does not exist locally has the form ``owner/name`` or ``owner/name:configuration``."""
    if not HUB_ID.fullmatch(name):
        return False
    suffixes = (*RECORD_FILES, *TEXT_FILES, *OTHERS, *(c.suffix for c in COMPRESSIONS))
    return not name.lower().endswith(suffixes) and not Path(name).parent.exists()


def _missing(name: str, path: Path) -> DataError:
    if "://" in name:
        return DataError(f"{name} cannot be read: it is a URL. Download it, and name the file.")
    hint = f" (looked for in {Path.cwd()})" if not path.is_absolute() else ""
    if re.fullmatch(r"[\w.-]+", name) and not path.suffix:
        hint += "; a data set of the hub is named as owner/name"
    if "," in name:
        hint += "; several files are a list, [a.jsonl, b.jsonl]"
    return DataError(f"{name} cannot be read: no such file or folder{hint}.")


def text_files(source: str | list[str]) -> list[Path]:
    """Return the .txt and .md files of a source; an empty list if it contains records.

    Raises:
        DataError: see `resolve`; or text files together with others.
    """
    sources = resolve(source)
    texts = [one.path for one in sources if one.kind == "file" and form_of(one.path) in TEXT_FILES]
    if len(sources) == 1 and sources[0].kind == "folder":
        files = folder_files(sources[0].path, (*RECORD_FILES, ".txt"))
        sources, texts = [Source("file", str(f)) for f in files], [f for f in files if form_of(f) == ".txt"]
    if texts and len(texts) < len(sources):
        other = next(one.name for one in sources if one.path not in texts)
        raise DataError(f"{texts[0]} is text, and {other} contains records: use them in separate runs.")
    return texts


# -- folders -----------------------------------------------------------------------------------------------------------


def folder_files(folder: Path, suffixes: Iterable[str] = RECORD_FILES) -> list[Path]:
    """Return all data files below a folder, sorted by name, except those whose name begins with a dot or an underscore.

    Args:
        folder: the folder.
        suffixes: ends of the names of data files.

    Raises:
        DataError: there is no such file.
    """
    with reading(folder):
        files = [
            file
            for file in sorted(folder.rglob("*"))
            if form_of(file) in suffixes and file.name not in SIDECARS and not file.is_dir()
            if not any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)
        ]
    if not files:
        raise DataError(f"The folder {folder} holds no data: no file that ends in {', '.join(suffixes)}.")
    return files


def folder_splits(folder: Path) -> dict[str, list[Path]]:
    """Return the data files of a folder by split, named by a word in their path (train, validation, test), or "" if none is.

    Raises:
        DataError: no data file; a file that names two splits, or none while others do; or README.md declares configurations.
    """
    _check_configurations(folder)
    splits: dict[str, list[Path]] = {}
    for file in folder_files(folder):
        words = re.split(r"[^a-z]+", file.relative_to(folder).as_posix().lower())
        named = list(dict.fromkeys(SPLITS[word] for word in words if word in SPLITS))
        if len(named) > 1:
            raise DataError(f"{file} names the splits {' and '.join(named)}: name the files in place of their folder.")
        splits.setdefault(named[0] if named else "", []).append(file)
    if len(splits) > 1 and "" in splits:
        others = ", ".join(sorted(name for name in splits if name))
        raise DataError(
            f"The folder {folder} holds {splits[''][0].name} of no split beside files of {others}: name the files in place of "
            "their folder."
        )
    return splits


def _check_configurations(folder: Path) -> None:
    """Raise a DataError for a copy of a hub data set whose card groups files into configurations."""
    card = folder / "README.md"
    if not card.is_file():
        return
    with card.open(encoding="utf-8", errors="replace") as file:
        head = file.read(2**16)
    front = re.match(r"---\s*\n(.*?)\n---", head, re.DOTALL)
    configurations = re.findall(r"config_name:\s*(\S+)", front[1]) if front and "\nconfigs:" in "\n" + front[1] else []
    if len(configurations) > 1:
        raise DataError(
            f"The folder {folder} holds several configurations ({', '.join(configurations[:8])}): name the files of one."
        )


def _is_content(file: Path, source: Source) -> bool:
    """Return whether a file below a folder is data, not a hidden file, a note, or a cache of datasets."""
    hidden = any(part.startswith((".", "_", "cache-")) for part in file.relative_to(source.path).parts)
    is_data = source.kind != "folder" or form_of(file) in (*RECORD_FILES, ".txt")
    return is_data and not hidden and file.is_file()


def local_files(source: str | list[str] | None) -> list[Path]:
    """Return the existing local files on which a source depends."""
    try:
        sources = resolve(source or [])
    except DataError:
        return []
    files = []
    for one in sources:
        if one.kind == "file":
            files.append(one.path)
        elif one.kind != "hub":
            files += sorted(file for file in one.path.rglob("*") if _is_content(file, one))
    return files
