"""The exceptions that Umbra raises for errors that users can correct.

    UmbraError
    ├── ConfigError (ValueError)       a field's value, an unknown key, sizes that do not fit together
    ├── BaseModelError (ValueError)    a base that cannot carry a shadow, or another base than the adapter's
    ├── CheckpointError (ValueError)   an adapter folder that is missing, damaged, or must not be overwritten
    ├── DataError (ValueError)         a record, a column or a file of the training or evaluation data
    ├── DetachError (ValueError)       a shadow that no stock model can express
    ├── ExportError (ValueError)       a model that a format cannot hold, or an export with other answers
    └── StateError (RuntimeError)      a coupled block that runs outside its model's forward; a cache of other tokens

Each message states the problem, the value and the fix.
"""

import difflib
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

# Control characters (C0 but for tab and newline, DEL, C1), line separators, bidirectional overrides, lone surrogates.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str) -> str:
    """Return the text with control characters escaped as ``\\uXXXX``, except tabs and newlines."""
    return CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def one_line(text: str) -> str:
    """Return `plain` text on one line: runs of white space become one space."""
    return " ".join(plain(text).split())


class UmbraError(Exception):
    """Root of the hierarchy: ``except UmbraError`` catches every error that Umbra raises deliberately."""

    def __str__(self) -> str:
        """Return the message, `plain`, since it quotes names from untrusted files."""
        return plain(super().__str__())


class ConfigError(UmbraError, ValueError):
    """A configuration that cannot be used."""


class BaseModelError(UmbraError, ValueError):
    """A base model that cannot carry this shadow."""


class CheckpointError(UmbraError, ValueError):
    """An adapter folder that cannot be read or written."""


class DataError(UmbraError, ValueError):
    """Data that cannot be trained or evaluated on."""


class DetachError(UmbraError, ValueError):
    """A shadow that cannot stand alone as a stock model."""


class ExportError(UmbraError, ValueError):
    """A model that cannot be exported to a format, or an export whose answers differ from the model's."""


class StateError(UmbraError, RuntimeError):
    """A coupled block that runs outside the forward of its model, or a cache of other tokens."""


@contextmanager
def raising(kind: type[UmbraError], describe: Callable[[Exception], str]) -> Iterator[None]:
    """Translate a library's exceptions into an error for the user; Umbra's own pass unchanged.

    Args:
        kind: the class to raise.
        describe: returns the message for the library's exception.

    Raises:
        UmbraError: of the given kind, with the library's exception as its cause.
    """
    try:
        yield
    except UmbraError:
        raise
    except Exception as error:
        raise kind(describe(error)) from error


def unknown_key(key: str, known: Iterable[str], where: str, kind: str = "key") -> ConfigError:
    """Return the error for a key that ``where`` lacks, with the nearest known key."""
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}?" if near else f"Known {kind}s: {', '.join(sorted(known))}."
    return ConfigError(f"Unknown {kind} {shown(key)} in {where}. {hint}")


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80
_short.maxlevel = 2


def shown(value: object) -> str:
    """Return the repr of a value for a message, shortened if it is long, deep or contains itself."""
    try:
        return _short.repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        return f"a {type(value).__name__} too long to print"
