"""Files of an adapter folder: their names, the format's version, and strict readers for JSON and safetensors.

Nothing is unpickled, and no code that a file names is imported.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from umbra import __version__
from umbra.errors import CheckpointError
from umbra.files import folder, hub

Tensors = dict[str, torch.Tensor]
Values = dict[str, Any]  # the content of a JSON file

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "adapter_config.json", "adapter_model.safetensors", "README.md"
TRAINER_FILE = "model.safetensors"  # the name by which transformers' Trainer finds the weights it resumes from
SHADOW_PEFT_FILES = ("shadow_config.json", "shadow_adapter.safetensors", "shadow_modules.safetensors")
TOKENIZER_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt")  # match every file that a tokenizer or processor saves
PREFIX = "shadow."  # of the tensors in WEIGHTS_FILE: their names in the model's state dict

# Entries of CONFIG_FILE.
DIGEST, DRAFT_TOKENS, PROMPTING = "sha256", "draft_tokens", "prompting"
# PEFT and transformers stop at a type that they do not know, with an error that names it.
PEFT_TYPE = "UMBRA: open this folder with umbra.load"
TASKS = {False: "CAUSAL_LM", True: "SEQ_CLS"}  # task_type, by whether the base is a classifier

# Version 1 (2026-11) had neither a digest nor weight samples of quantised bases. Version 2 had no tokenizer, and samples
# of the base's blocks and embeddings alone. Version 3 listed a dialect's constants among the shadow's fields.
FORMAT_VERSION = 4
READABLE_VERSIONS = (2, 3, FORMAT_VERSION)


def read_json(path: Path, name: str) -> Values:
    """Read the JSON object in a file of an adapter folder.

    Args:
        path: the folder.
        name: the file's name.

    Returns:
        The object.

    Raises:
        CheckpointError: the folder or the file is missing, or the file holds no JSON object.
    """
    file = folder.find(path, name)
    if not path.is_dir():
        raise CheckpointError(f"{path} is no adapter folder: it does not exist, or is a file.")
    try:
        values = json.loads(folder.read_text(file), object_pairs_hook=_unique)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is no adapter folder: {name} is missing.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: {error}. Restore the folder from its source.") from error
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{file} is damaged: it holds a {type(values).__name__}. Restore the folder from its source."
        )
    return values


def read_optional_json(path: Path, name: str) -> Values | None:
    """Return the JSON object in a file of an adapter folder, or None if there is no such file; see `read_json`."""
    return read_json(path, name) if folder.find(path, name).exists() else None


def read_config(path: str | Path) -> Values:
    """Read and check the ``adapter_config.json`` of an adapter folder.

    Args:
        path: the folder.

    Returns:
        The file's content.

    Raises:
        CheckpointError: it is missing, not JSON, not written by Umbra, or of a later format.
    """
    return check_config(read_json(Path(path), CONFIG_FILE), folder.find(Path(path), CONFIG_FILE))


def is_umbra(values: Values) -> bool:
    """Return whether Umbra wrote an ``adapter_config.json`` with this content."""
    return str(values.get("peft_type")).partition(":")[0] == "UMBRA"


def check_config(values: Values, file: Path) -> Values:
    """Check that the content of an ``adapter_config.json`` has a readable version and entries of the right types.

    Args:
        values: the content.
        file: where it was read, for the message.

    Returns:
        ``values``.

    Raises:
        CheckpointError: it was not written by Umbra, has a later format, or an entry is missing or of a wrong type.
    """
    if not is_umbra(values):
        raise CheckpointError(
            f"{file} was not written by Umbra (peft_type is {values.get('peft_type')!r:.80}). An adapter of another kind is opened "
            f"by the package that wrote it, PeftModel.from_pretrained(base, {str(file.parent)!r}) for PEFT's."
        )
    version = values.get("format_version")
    if isinstance(version, bool) or version not in READABLE_VERSIONS:
        raise CheckpointError(
            f"{file} has format {version!r:.80}, this is Umbra {__version__} with format {FORMAT_VERSION}: "
            f"load it with the version that wrote it ({values.get('umbra_version')!r:.40})."
        )
    types = {
        "shadow": dict, "shadow_model_config": dict, "base": dict, "task_type": str,
        "base_model_name_or_path": str | None, "adapter_id": str | None, "classifier": dict | None,
        DRAFT_TOKENS: list | None, PROMPTING: dict if version != 2 else dict | None,
    }  # fmt: skip
    wrong = [key for key, type_ in types.items() if not isinstance(values.get(key), type_)]
    if wrong:
        raise CheckpointError(
            f"{file} is damaged: {', '.join(wrong)} missing or of another type. Restore the folder from its source."
        )
    return values


def read_weights(path: str | Path, name: str = WEIGHTS_FILE) -> Tensors:
    """Read all tensors of a safetensors file in an adapter folder.

    Args:
        path: the folder.
        name: the file's name.

    Returns:
        Tensors by name.

    Raises:
        CheckpointError: the file is missing, truncated or corrupted.
    """
    file = folder.find(Path(path), name)
    try:
        folder.check_regular(file)
        with safe_open(file, framework="pt") as tensors:
            return {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"{path} is incomplete: {name} is missing.") from None
    except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{file} is damaged: {error}. Restore the folder from its source.") from error


def local_folder(path: str | Path) -> Path:
    """Return an adapter's local folder, downloaded from the hub where ``path`` is a hub id.

    Args:
        path: a folder, or a hub id (``owner/name``, ``owner/name@revision``).

    Returns:
        The folder itself, or the cached copy of the repository.

    Raises:
        CheckpointError: the path is unusable, or the repository cannot be downloaded.
    """
    try:
        if hub.is_path(str(path)) or "/" not in str(path):
            return Path(path).expanduser()
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is no adapter folder: {error}") from error
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = str(path).partition("@")
    patterns = [CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, *TOKENIZER_PATTERNS, *SHADOW_PEFT_FILES]
    try:
        with hub.lookup(repository):
            return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = hub.offline_advice(repository, error) or error
        raise CheckpointError(f"The adapter {path} cannot be loaded: {reason}") from error


def _unique(pairs: list[tuple[str, Any]]) -> Values:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key stands there twice")
    return values
