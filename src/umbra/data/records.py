"""The forms of a record, and the checks that every record passes."""

from typing import Any

from ..errors import DataError

Record = dict[str, Any]
COLUMNS = "`prompt` and `completion`, `messages`, `text` and `label`, or `text`"
MARK = "escalate"  # the column that marks what is beyond the shadow
ESCALATION = "[REMOTE]"  # what it then says, by default


def record_kind(record: Record, where: str) -> str:
    """Which form a record has: completion, messages, label or text."""
    keys = record.keys()
    if {"prompt", "completion"} <= keys:
        return "completion"
    if "messages" in keys:
        return "messages"
    if {"text", "label"} <= keys:
        return "label"
    if "text" in keys and "prompt" not in keys:
        return "text"
    raise DataError(f"{where} has the columns {', '.join(map(repr, keys)) or 'none'}; needed are {COLUMNS}.")


def check_record(record: Record, kind: str, where: str) -> None:
    """Check the columns of a record.

    Args:
        kind: the form of the first record.
        where: where it lies, for the message.

    Raises:
        DataError: a column that is missing or of a wrong type.
    """
    columns = {"completion": ("prompt", "completion"), "messages": ("messages",), "label": ("text", "label")}
    for column in columns.get(kind, ("text",)):
        value = record.get(column)
        if value is None:
            raise DataError(f"{where} lacks the column {column!r}, which the first record has.")
        if column == "messages" or (column in ("prompt", "completion") and isinstance(value, list)):
            _check_messages(value, f"{where}, {column}")
        elif column != "label" and not isinstance(value, str):
            raise DataError(f"{where}: {column!r} must be a string, got {type(value).__name__}.")
    _check_mark(record, kind, where)


def _check_mark(record: Record, kind: str, where: str) -> None:
    mark = record.get(MARK)
    if not isinstance(mark, bool | None):
        raise DataError(f"{where}: {MARK!r} must be true or false, got {mark!r:.80}.")
    if mark and kind not in ("completion", "messages"):
        raise DataError(f"{where} is marked {MARK!r}, which needs an answer: `prompt` and `completion`, or `messages`.")


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where} must be a list of messages, got {messages!r}.")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise DataError(f"{where} holds {message!r}; a message has a `role` and a `content`.")
