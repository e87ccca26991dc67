"""How prompts for an adapter are formatted: its tokenizer, whether the chat template is used, and the template's arguments.

All three are stored in the adapter folder: the tokenizer's files as ``save_pretrained`` writes them, the rest as the entry
`PROMPTING` of the configuration, with a SHA-256 checksum of each of these files. A tokenizer that another program has written
into the folder, as transformers' Trainer does, belongs to the adapter too. Without any, the base's tokenizer is used.
"""

import hashlib
import json
import re
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from umbra.adapters.files import PROMPTING
from umbra.base import architectures
from umbra.base.loading import load_tokenizer
from umbra.data import ChatFormatter
from umbra.data.chat import reserved_arguments
from umbra.errors import BaseModelError, CheckpointError, ConfigError, shown
from umbra.files import folder
from umbra.options import is_main_process
from umbra.shadow.network import Shadow
from umbra.shadow.pretrained import tokenizer_at_hand

Tokenizer = PreTrainedTokenizerBase | ProcessorMixin

TOKENIZER_FILES = (
    "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
PLAIN_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
LARGEST_FILE = 2**28  # bytes; the largest vocabularies today take 2**25

_shared: "weakref.WeakValueDictionary[str, TokenizerFiles]" = weakref.WeakValueDictionary()


class TokenizerFiles:
    """The files of a tokenizer. Equal ones share one object, so that many adapters of a base hold them once.

    Args:
        contents: the files' contents by name.
    """

    def __init__(self, contents: dict[str, bytes]):
        self.contents = contents

    @classmethod
    def shared(cls, contents: dict[str, bytes]) -> "TokenizerFiles":
        """Return the object with these contents, and make it if there is none.

        Args:
            contents: the files' contents by name.
        """
        key = json.dumps({name: _sha256(content) for name, content in sorted(contents.items())})
        files = _shared.get(key)
        if files is None:
            files = _shared[key] = cls(contents)
        return files

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "TokenizerFiles":
        """Return the files that a tokenizer or a processor saves.

        Args:
            tokenizer: the tokenizer or processor.

        Raises:
            OSError: the disk refused.
        """
        with TemporaryDirectory() as scratch:
            save_tokenizer(tokenizer, Path(scratch))
            files = [path for path in Path(scratch).iterdir() if path.is_file()]
            return cls.shared({path.name: path.read_bytes() for path in files})

    @classmethod
    def read(cls, path: Path, digests: dict[str, str | None] | None) -> "TokenizerFiles | None":
        """Read the tokenizer in an adapter folder.

        Args:
            path: the folder.
            digests: SHA-256 by file name, null for an unchecked file; None for an unlisted tokenizer.

        Returns:
            The tokenizer's files, or None if there are none.

        Raises:
            CheckpointError: a listed file is missing, changed, or no regular file.
        """
        if digests is None:
            if not folder.find(path, "tokenizer_config.json").exists():
                return None
            digests = {name: None for name in TOKENIZER_FILES if folder.find(path, name).exists()}
        return cls.shared({name: _read(path, name, digest) for name, digest in digests.items()})

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of each file by name."""
        return {name: _sha256(content) for name, content in sorted(self.contents.items())}

    def write(self, staging: Path) -> None:
        """Write the files into the folder ``staging``."""
        for name, content in self.contents.items():
            (staging / name).write_bytes(content)

    def open(self, name: str | None) -> PreTrainedTokenizerBase:
        """Load the tokenizer.

        Args:
            name: the base's name, which becomes the tokenizer's.

        Raises:
            CheckpointError: transformers cannot load the files.
        """
        with TemporaryDirectory() as scratch:
            self.write(Path(scratch))
            try:
                tokenizer = load_tokenizer(scratch)
            except BaseModelError as error:
                raise CheckpointError(f"The adapter's tokenizer cannot be loaded: {error!s:.500}") from error
        tokenizer.name_or_path = name or ""
        return tokenizer


def save_tokenizer(tokenizer: Tokenizer, staging: Path) -> None:
    """Save a tokenizer or processor with all files directly in a folder.

    Args:
        tokenizer: the tokenizer or processor.
        staging: the folder.

    Raises:
        OSError: the disk refused.
    """
    has_several = isinstance(tokenizer.chat_template, dict)  # they would become files in a folder below
    options: dict[str, Any] = {"save_jinja_files": False} if has_several else {}
    try:
        tokenizer.save_pretrained(staging, **options)
    except Exception as error:  # the tokenizers package raises nothing but Exception itself, for a full disk too
        if type(error) is Exception:
            raise OSError(str(error)) from error
        raise


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read(path: Path, name: str, digest: str | None) -> bytes:
    file = folder.find(path, name)
    try:
        folder.check_regular(file)
        if file.stat().st_size > LARGEST_FILE:
            raise OSError(f"it is larger than {LARGEST_FILE:,} bytes")
        content = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} is missing or damaged: {error}. Restore the folder from its source.") from error
    if digest is not None and digest != _sha256(content):
        raise CheckpointError(
            f"{file} was changed after the adapter was saved. Restore the folder from its source; if you meant to change it, "
            "save the adapter again: model.save_pretrained(folder, tokenizer=…)."
        )
    return content


def check_template_kwargs(values: dict[str, Any]) -> None:
    """Check that the arguments of a chat template can be passed to a template and stored as JSON.

    Args:
        values: the arguments.

    Raises:
        ConfigError: a name that is an argument of `apply_chat_template`, or a value that is not JSON.
    """
    for name in values:
        if not isinstance(name, str) or name in reserved_arguments():
            raise ConfigError(
                f"chat_template_kwargs holds {shown(name)}, which is an argument that Umbra sets: pass variables of the "
                "template alone."
            )
    try:
        same = json.loads(json.dumps(values, allow_nan=False)) == values
    except (TypeError, ValueError, RecursionError):
        same = False
    if not same:
        raise ConfigError(f"chat_template_kwargs must be a mapping of JSON values, got {shown(values)}.")


@dataclass(frozen=True)
class Prompting:
    """How prompts for an adapter are formatted.

    Args:
        tokenizer: None for the base's.
        chat_template: whether the tokenizer's chat template is used, if it has one.
        chat_template_kwargs: arguments of the template, such as ``{"enable_thinking": False}``.

    Raises:
        ConfigError: see `check_template_kwargs`.
    """

    tokenizer: TokenizerFiles | None = None
    chat_template: bool = True
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_template_kwargs(self.chat_template_kwargs)

    def replaced(
        self,
        tokenizer: Tokenizer | None,
        chat_template: bool | None,
        chat_template_kwargs: dict[str, Any] | None,
    ) -> "Prompting":
        """Return a copy with the given fields replaced.

        Args:
            tokenizer: another tokenizer or processor; None for the present one.
            chat_template: likewise.
            chat_template_kwargs: likewise.
        """
        return Prompting(
            self.tokenizer if tokenizer is None else TokenizerFiles.of(tokenizer),
            self.chat_template if chat_template is None else chat_template,
            self.chat_template_kwargs if chat_template_kwargs is None else chat_template_kwargs,
        )

    def settings(self) -> dict[str, Any]:
        """Return the fields about the chat template."""
        return {"chat_template": self.chat_template, "chat_template_kwargs": self.chat_template_kwargs}

    @property
    def is_default(self) -> bool:
        """Whether the chat template is used without arguments."""
        return self.settings() == Prompting().settings()

    def to_dict(self, is_listed: bool = True) -> dict[str, Any]:
        """Return the entry of the adapter's configuration.

        Args:
            is_listed: list the tokenizer's files; otherwise the adapter's tokenizer is whichever the folder holds.
        """
        listed = None if self.tokenizer is None or not is_listed else self.tokenizer.digests()
        return {**self.settings(), "tokenizer": listed}

    @classmethod
    def read(cls, path: Path, values: dict[str, Any]) -> "Prompting":
        """Read the tokenizer and the settings of an adapter folder.

        Args:
            path: the folder.
            values: the entry of its configuration; empty for folders of other packages.

        Raises:
            CheckpointError: the entry is damaged, or the tokenizer is missing or was changed.
        """
        types = {"chat_template": bool, "chat_template_kwargs": dict, "tokenizer": dict | None}
        wrong = [k for k, v in values.items() if k not in types or not isinstance(v, types[k])]
        files = values.get("tokenizer")
        wrong += [k for k in files or () if not PLAIN_NAME.fullmatch(k) or k.startswith("adapter_")]
        if wrong:
            raise CheckpointError(f"{path} is damaged: {PROMPTING} has an unusable {shown(wrong[0])}.")
        settings = {k: v for k, v in values.items() if k != "tokenizer"}
        try:
            return cls(TokenizerFiles.read(path, files), **settings)
        except ConfigError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error


class ShadowHolder(Protocol):
    """A `ShadowModel`, as far as this module needs one."""

    base: PreTrainedModel
    shadow: Shadow


# Adapters of format 2 were trained with the base's tokenizer, and with this argument, which was no setting then.
FORMAT_2_PROMPTING = Prompting(chat_template_kwargs={"enable_thinking": False})


def describe(values: dict[str, Any] | None) -> str:
    """Return in words how prompts for an adapter are formatted.

    Args:
        values: the entry of the adapter's configuration; None in format 2.
    """
    settings = FORMAT_2_PROMPTING.settings() if values is None else values
    if settings.get("tokenizer"):
        tokenizer = "the adapter's tokenizer"
    elif values is None:
        tokenizer = "the base's tokenizer"
    else:
        tokenizer = "the tokenizer in the folder if there is one, otherwise the base's"
    if not settings["chat_template"]:
        return f"{tokenizer}, without a chat template"
    arguments = settings["chat_template_kwargs"]
    return f"{tokenizer}, with its chat template" + (f" ({json.dumps(arguments)})" if arguments else "")


def open_formatter(
    model: ShadowHolder, chat_template: bool | None = None, chat_template_kwargs: dict[str, Any] | None = None
) -> ChatFormatter:
    """Return the chat formatter of a model's active adapter, with its tokenizer.

    Args:
        model: a `ShadowModel`.
        chat_template: overrides the adapter's setting, which is reported on stderr.
        chat_template_kwargs: likewise.

    Raises:
        CheckpointError: the adapter's tokenizer cannot be loaded, or does not fit the base.
        BaseModelError: neither the adapter nor the base has a tokenizer.
    """
    prompting: Prompting = model.shadow.prompting or Prompting()
    name = model.base.name_or_path
    if prompting.tokenizer is None:
        tokenizer = load_tokenizer(name)
    else:
        tokenizer, base_tokenizer = prompting.tokenizer.open(name), tokenizer_at_hand(name)
        check_fit(tokenizer, architectures.vocabulary_size(model.base.get_input_embeddings()), base_tokenizer)
        if base_tokenizer is not None and (parts := differences(tokenizer, base_tokenizer)):
            report(f"the adapter's tokenizer is used; the base's has {' and '.join(parts)}.")
    return override(prompting, tokenizer, chat_template, chat_template_kwargs)


def override(
    prompting: Prompting,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: bool | None,
    chat_template_kwargs: dict[str, Any] | None,
) -> ChatFormatter:
    """Return the chat formatter of an adapter with other settings; changes are reported on stderr.

    Args:
        prompting: the adapter's.
        tokenizer: the tokenizer to use.
        chat_template: another setting; None for the adapter's.
        chat_template_kwargs: likewise.

    Raises:
        ConfigError: unusable arguments of the template.
    """
    stored, settings = prompting.settings(), prompting.replaced(None, chat_template, chat_template_kwargs).settings()
    for key, value in settings.items():
        if value != stored[key]:
            report(f"{key} {json.dumps(value)} overrides the adapter's {json.dumps(stored[key])}.")
    return ChatFormatter(tokenizer, **settings)


def report(text: str) -> None:
    """Print a message on stderr, in one process of several."""
    if is_main_process():
        print(f"umbra: {text}", file=sys.stderr)


def check_fit(tokenizer: PreTrainedTokenizerBase, rows: int, base_tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Check an adapter's tokenizer against the base.

    Args:
        tokenizer: the adapter's.
        rows: number of rows in the base's embeddings.
        base_tokenizer: the base's, if it is available.

    Raises:
        CheckpointError: a token has no row in the embeddings, or an id is another token in the base's tokenizer.
    """
    ids = tokenizer.get_vocab()
    base_ids = {} if base_tokenizer is None else base_tokenizer.get_vocab()
    beyond = [t for t, i in sorted(ids.items(), key=lambda item: item[1]) if i >= rows and base_ids.get(t) != i]
    if beyond:
        raise CheckpointError(
            f"The adapter's tokenizer has {len(beyond)} tokens beyond the {rows} rows of the base's embeddings, "
            f"{shown(beyond[0])} first. Use the tokenizer that the adapter was trained with; to add tokens, "
            f"model.resize_token_embeddings({1 + max(ids.values())}), then save with tokenizer=…"
        )
    if base_tokenizer is None:
        return
    roles = (base_tokenizer.bos_token_id, base_tokenizer.eos_token_id, base_tokenizer.unk_token_id)
    reserved = base_tokenizer.added_tokens_decoder.keys() - roles  # which model families rename
    base_tokens = {i: t for t, i in base_ids.items()}
    other = [t for t, i in ids.items() if base_tokens.get(i, t) != t and i not in reserved]
    if other:
        i = ids[other[0]]
        raise CheckpointError(
            f"The adapter's tokenizer is not of this base: {len(other)} tokens differ; token {i} is {shown(other[0])}, but "
            f"{shown(base_tokens[i])} in the base's. Load the adapter with the base that it was trained on."
        )


def differences(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> list[str]:
    """Return in words which parts of another tokenizer differ: vocabulary, special tokens, chat template."""
    parts: dict[str, Callable[[PreTrainedTokenizerBase], object]] = {
        "another vocabulary": lambda t: t.get_vocab(),
        "other special tokens": lambda t: [t.bos_token, t.eos_token, t.unk_token],
        "another chat template": lambda t: t.chat_template,
    }
    return [name for name, part in parts.items() if part(tokenizer) != part(other)]


def check_before_saving(tokenizer: object, rows: int, base: str | None) -> None:
    """Check that a tokenizer which is to be saved with an adapter fits the base.

    Args:
        tokenizer: a tokenizer or processor.
        rows: number of rows in the base's embeddings.
        base: the base's name.

    Raises:
        ConfigError: it is none, or does not fit.
    """
    inner = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    if not isinstance(inner, PreTrainedTokenizerBase):
        raise ConfigError(
            f"tokenizer must be a tokenizer or processor of transformers, got {type(tokenizer).__name__}."
        )
    try:
        check_fit(inner, rows, tokenizer_at_hand(base))
    except (CheckpointError, BaseModelError) as error:
        raise ConfigError(f"tokenizer: {error}") from error
