"""How an adapter is asked: its tokenizer, whether the chat template is used, and the template's arguments.

All three lie in the adapter folder: the tokenizer's files as ``save_pretrained`` writes them, the rest as the entry
`PROMPTING` of its configuration, with a SHA-256 of each of these files. A tokenizer that someone else has put into the
folder (transformers' Trainer does) is the adapter's too; without any, the base's is used.
"""

import hashlib
import json
import re
import sys
import weakref
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedTokenizerBase

from umbra.adapters.files import PROMPTING
from umbra.base import architectures
from umbra.base.loading import load_tokenizer
from umbra.data import ChatFormatter
from umbra.data.chat import reserved_arguments
from umbra.errors import BaseModelError, CheckpointError, ConfigError, shown
from umbra.files import folder
from umbra.options import speaks
from umbra.shadow.pretrained import tokenizer_at_hand

TOKENIZER_FILES = (
    "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
PLAIN_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
LARGEST_FILE = 2**28  # bytes; those of the largest vocabularies today have 2**25


_shared: "weakref.WeakValueDictionary[str, TokenizerFiles]" = weakref.WeakValueDictionary()


class TokenizerFiles:
    """The files of a tokenizer. Equal ones share one object, so that many adapters of a base hold them once."""

    def __init__(self, contents: dict[str, bytes]):
        self.contents = contents

    @classmethod
    def shared(cls, contents: dict[str, bytes]) -> "TokenizerFiles":
        """The object with these contents, by file name."""
        key = json.dumps({name: _sha256(content) for name, content in sorted(contents.items())})
        files = _shared.get(key)
        if files is None:
            files = _shared[key] = cls(contents)
        return files

    @classmethod
    def of(cls, tokenizer: Any) -> "TokenizerFiles":
        """The files that a tokenizer, or the processor around one, saves."""
        with TemporaryDirectory() as scratch:
            save_tokenizer(tokenizer, Path(scratch))
            files = [path for path in Path(scratch).iterdir() if path.is_file()]
            return cls.shared({path.name: path.read_bytes() for path in files})

    @classmethod
    def read(cls, path: Path, digests: dict[str, str | None] | None) -> "TokenizerFiles | None":
        """The tokenizer in an adapter folder; None if there is none.

        Args:
            digests: SHA-256 by file name, null for an unchecked file; None for an unlisted tokenizer.

        Raises:
            CheckpointError: a listed file is missing, changed, or no regular file.
        """
        if digests is None:
            if not folder.find(path, "tokenizer_config.json").exists():
                return None
            digests = {name: None for name in TOKENIZER_FILES if folder.find(path, name).exists()}
        return cls.shared({name: _read(path, name, digest) for name, digest in digests.items()})

    def digests(self) -> dict[str, str]:
        """SHA-256 by file name."""
        return {name: _sha256(content) for name, content in sorted(self.contents.items())}

    def write(self, staging: Path) -> None:
        """Write the files into a folder."""
        for name, content in self.contents.items():
            (staging / name).write_bytes(content)

    def open(self, name: str | None) -> PreTrainedTokenizerBase:
        """The tokenizer, which bears the name of the base.

        Raises:
            CheckpointError: files that transformers cannot load.
        """
        with TemporaryDirectory() as scratch:
            self.write(Path(scratch))
            try:
                tokenizer = load_tokenizer(scratch)
            except Exception as error:  # the tokenizers package raises bare exceptions
                raise CheckpointError(f"The adapter's tokenizer cannot be loaded: {error!s:.500}") from error
        tokenizer.name_or_path = name or ""
        return tokenizer


def save_tokenizer(tokenizer: Any, staging: Path) -> None:
    """Save a tokenizer, or a processor, with all its files in ``staging`` itself.

    Raises:
        OSError: the disk refused.
    """
    several = isinstance(tokenizer.chat_template, dict)  # which would be files in a folder of their own
    options: dict[str, Any] = {"save_jinja_files": False} if several else {}
    try:
        tokenizer.save_pretrained(staging, **options)
    except Exception as error:  # tokenizers knows no other type, for a full disk neither
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
            f"{file} was changed after the adapter was saved. Restore the folder from its source; if the change was intended, "
            "save the adapter again: model.save_pretrained(folder, tokenizer=…)."
        )
    return content


def check_template_kwargs(values: dict[str, Any]) -> None:
    """Hold arguments of a chat template to what a template can be given and a configuration file can hold.

    Raises:
        ConfigError: an argument of `apply_chat_template` itself, or a value that is not JSON.
    """
    for name in values:
        if not isinstance(name, str) or name in reserved_arguments():
            raise ConfigError(
                f"chat_template_kwargs holds {shown(name)}, which is no variable of a template: Umbra sets it itself."
            )
    try:
        same = json.loads(json.dumps(values, allow_nan=False)) == values
    except (TypeError, ValueError, RecursionError):
        same = False
    if not same:
        raise ConfigError(f"chat_template_kwargs must be a mapping of JSON values, got {shown(values)}.")


@dataclass(frozen=True)
class Prompting:
    """How an adapter is asked.

    Args:
        tokenizer: None for the base's.
        chat_template: whether the tokenizer's chat template is used, if it has one.
        chat_template_kwargs: arguments of the template, such as ``{"enable_thinking": False}``.

    Raises:
        ConfigError: arguments that `apply_chat_template` has itself, or that are not JSON.
    """

    tokenizer: TokenizerFiles | None = None
    chat_template: bool = True
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_template_kwargs(self.chat_template_kwargs)

    def replaced(self, tokenizer: Any, chat_template: bool | None, chat_template_kwargs: dict | None) -> "Prompting":
        """A copy with another tokenizer (None keeps it), use of the template and arguments (likewise)."""
        given = {"chat_template": chat_template, "chat_template_kwargs": chat_template_kwargs}
        given["tokenizer"] = None if tokenizer is None else TokenizerFiles.of(tokenizer)
        return replace(self, **{k: v for k, v in given.items() if v is not None})

    def settings(self) -> dict[str, Any]:
        """Whether and how the chat template is used."""
        return {"chat_template": self.chat_template, "chat_template_kwargs": self.chat_template_kwargs}

    @property
    def is_default(self) -> bool:
        """Whether the chat template is used without arguments."""
        return self.settings() == Prompting().settings()

    def to_dict(self, is_listed: bool = True) -> dict[str, Any]:
        """The entry of the adapter's configuration.

        Args:
            is_listed: list the tokenizer's files; otherwise whichever lie in the folder are the adapter's.
        """
        listed = None if self.tokenizer is None or not is_listed else self.tokenizer.digests()
        return {**self.settings(), "tokenizer": listed}

    @classmethod
    def read(cls, path: Path, values: dict[str, Any]) -> "Prompting":
        """What an adapter folder says.

        Args:
            values: the entry of its configuration; none in folders of other packages.

        Raises:
            CheckpointError: a damaged entry, or a tokenizer that is missing or was changed.
        """
        kinds = {"chat_template": bool, "chat_template_kwargs": dict, "tokenizer": dict | None}
        wrong = [k for k, v in values.items() if k not in kinds or not isinstance(v, kinds[k])]
        files = values.get("tokenizer")
        wrong += [k for k in files or () if not PLAIN_NAME.fullmatch(k) or k.startswith("adapter_")]
        if wrong:
            raise CheckpointError(f"{path} is damaged: {PROMPTING} has an unusable {shown(wrong[0])}.")
        settings = {k: v for k, v in values.items() if k != "tokenizer"}
        try:
            return cls(TokenizerFiles.read(path, files), **settings)
        except ConfigError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error


# Of adapters of format 2: trained with the base's tokenizer, and with this argument, which was not a setting then.
FORMAT_2_PROMPTING = Prompting(chat_template_kwargs={"enable_thinking": False})


def describe(values: dict[str, Any] | None) -> str:
    """In words, how an adapter with this entry of its configuration (None in format 2) is asked."""
    settings = FORMAT_2_PROMPTING.settings() if values is None else values
    tokenizer = "the base's tokenizer" if values is None else "the tokenizer in its folder, or else the base's"
    tokenizer = "its own tokenizer" if settings.get("tokenizer") else tokenizer
    if not settings["chat_template"]:
        return f"{tokenizer}, without chat template"
    given = settings["chat_template_kwargs"]
    return f"{tokenizer}, with its chat template" + (f" ({json.dumps(given)})" if given else "")


def open_formatter(
    model: Any, chat_template: bool | None = None, chat_template_kwargs: dict[str, Any] | None = None
) -> ChatFormatter:
    """The tokenizer and chat formatting by which a model's active adapter is asked.

    Args:
        model: a `ShadowModel`.
        chat_template, chat_template_kwargs: override what the adapter carries, which is reported on stderr.

    Raises:
        CheckpointError: a tokenizer that cannot be loaded, or does not fit the base.
        BaseModelError: neither the adapter nor the base has a tokenizer.
    """
    prompting, name = model.shadow.prompting or Prompting(), model.base.name_or_path
    if prompting.tokenizer is None:
        tokenizer = load_tokenizer(name)
    else:
        tokenizer, base_tokenizer = prompting.tokenizer.open(name), tokenizer_at_hand(name)
        check_fit(tokenizer, architectures.vocabulary_size(model.get_input_embeddings()), base_tokenizer)
        if base_tokenizer is not None and (different := differences(tokenizer, base_tokenizer)):
            report(f"the adapter's tokenizer is used; the base's has {' and '.join(different)}.")
    return override(prompting, tokenizer, chat_template, chat_template_kwargs)


def override(
    prompting: Prompting, tokenizer: Any, chat_template: bool | None, chat_template_kwargs: dict[str, Any] | None
) -> ChatFormatter:
    """The chat formatting of an adapter with other settings, which are reported on stderr; None keeps its own.

    Raises:
        ConfigError: unusable arguments of the template.
    """
    own, settings = prompting.settings(), prompting.replaced(None, chat_template, chat_template_kwargs).settings()
    for key, value in settings.items():
        if value != own[key]:
            report(f"{key} {json.dumps(value)} overrides the adapter's {json.dumps(own[key])}.")
    return ChatFormatter(tokenizer, **settings)


def report(text: str) -> None:
    """Tell the user of an override on stderr."""
    if speaks():
        print(f"umbra: {text}", file=sys.stderr)


def check_fit(tokenizer: Any, rows: int, base_tokenizer: Any) -> None:
    """Hold an adapter's tokenizer to the base.

    Args:
        rows: of the base's embeddings.
        base_tokenizer: or None.

    Raises:
        CheckpointError: tokens without a row, or a number that is another token to the base.
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
    roles = {base_tokenizer.bos_token_id, base_tokenizer.eos_token_id, base_tokenizer.unk_token_id}
    reserved = base_tokenizer.added_tokens_decoder.keys() - roles  # which families rename
    base_tokens = {i: t for t, i in base_ids.items()}
    other = [t for t, i in ids.items() if base_tokens.get(i, t) != t and i not in reserved]
    if other:
        i = ids[other[0]]
        raise CheckpointError(
            f"The adapter's tokenizer is not of this base: {len(other)} tokens differ; token {i} is {shown(other[0])}, to the "
            f"base {shown(base_tokens[i])}. Load the adapter with the base that it was trained on."
        )


def differences(tokenizer: Any, other: Any) -> list[str]:
    """What is different in another tokenizer: its vocabulary, special tokens or chat template."""
    parts = {
        "another vocabulary": lambda t: t.get_vocab(),
        "other special tokens": lambda t: [t.bos_token, t.eos_token, t.unk_token],
        "another chat template": lambda t: t.chat_template,
    }
    return [name for name, part in parts.items() if part(tokenizer) != part(other)]


def check_before_saving(tokenizer: Any, rows: int, base: str | None) -> None:
    """Raise a ConfigError where a tokenizer that is to be saved with an adapter does not fit the base."""
    inner = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    if not isinstance(inner, PreTrainedTokenizerBase):
        raise ConfigError(
            f"tokenizer must be a tokenizer or processor of transformers, got {type(tokenizer).__name__}."
        )
    try:
        check_fit(inner, rows, tokenizer_at_hand(base))
    except (CheckpointError, BaseModelError) as error:
        raise ConfigError(f"tokenizer: {error}") from error
