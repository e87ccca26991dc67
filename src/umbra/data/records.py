"""The data contract: the meaning of each column of a record and of each field of a message, and what is refused.

`normalize` applies it. It returns a record in canonical form: messages as transformers' chat templates read them, tools and tool
calls in OpenAI's nested spelling with arguments as objects. docs/reference/data.md shows `COLUMNS` and `FIELDS` as tables.
"""

import difflib
import json
from collections.abc import Collection
from typing import Any

from umbra.data.from_json import parse_json
from umbra.errors import DataError, shown

Record = dict[str, Any]
Message = dict[str, Any]
MARK = "escalate"  # the column that marks a request that the shadow escalates
ESCALATION = "[REMOTE]"  # the shadow's answer to such a request, by default
NEEDED = "`prompt` and `completion`, `messages`, `text` and `label`, or `text`"

# Columns of each form → their meaning.
COLUMNS: dict[str, dict[str, str]] = {
    "completion": {
        "prompt": "text or messages; context, never learned",
        "completion": "text or messages; the assistant's turns are learned",
        "tools": "functions that the chat template renders; `functions` is read alike",
        "chat_template_kwargs": "arguments of the chat template for this record, over those of the run",
        "also": "a list of further answers that a study counts as right",
        "puzzle": "the entry of reasoning-gym by which a study judges an answer",
        MARK: "true: the pair learns the answer, the shadow learns to escalate",
    },
    "messages": {
        "messages": "a conversation; every assistant turn is learned unless its `weight` is 0; `conversations` (ShareGPT) is read "
        "alike",
        "tools": "as above",
        "chat_template_kwargs": "as above",
        "also": "as above",
        "puzzle": "as above",
        MARK: "as above",
        "parallel_tool_calls": "a setting of OpenAI's API; read and not used",
    },
    "label": {
        "text": "the text to classify; never empty",
        "label": "a class, a list of classes, or a number (`problem_type: regression`)",
    },
    "text": {"text": "learned as a whole; the end token follows"},
}
FORMS = {
    "completion": ("prompt", "completion"),
    "messages": ("messages",),
    "label": ("text", "label"),
}  # and text alone
SPELLINGS = {"functions": "tools", "conversations": "messages"}

# Fields of a message → their meaning.
FIELDS: dict[str, str] = {
    "role": "`system`, `developer`, `user`, `assistant`, `tool`, or another role that the chat template renders; ShareGPT's "
    "`from` with `human` and `gpt` is read alike",
    "content": "text, or a list of text parts; may be null beside `tool_calls` or reasoning; an object in a tool's result "
    "is rendered as JSON; ShareGPT's `value` is read alike",
    "reasoning_content": "the assistant's reasoning, learned before its answer; `reasoning` and `thinking` are read alike, "
    "and so is `<think>…</think>` at the start of `content`",
    "tool_calls": "the assistant's calls, learned; arguments as an object or as JSON text; `function_call` is read alike",
    "tool_call_id": "identifies a tool's result; rendered where the chat template reads it",
    "name": "rendered where the chat template reads it; on a tool's result it may be dropped, elsewhere it is refused then",
    "weight": "of the assistant: 0 is context, 1 is learned",
    "refusal": "null; a refusal's text belongs into `content`",
    "annotations": "empty",
    "audio": "null",
}
ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function": "tool"}
ALIASES = {"from": "role", "value": "content", "reasoning": "reasoning_content", "thinking": "reasoning_content"}
TEXT_PARTS = ("text", "input_text", "output_text")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
FOREIGN = {
    "instruction": "Alpaca's columns: convert with jq -c '{prompt: (.instruction + (if (.input // \"\") != \"\" then "
    "\"\\n\\n\" + .input else \"\" end)), completion: .output}'",
    "chosen": "preference data: train on it with TRL's DPOTrainer (examples/dpo.py)",
    "preferred_output": "preference data: train on it with TRL's DPOTrainer (examples/dpo.py)",
    "choices": "a reply of OpenAI's API: append its message to the `messages` of the request",
    "input_ids": "tokenised data: give the text",
}  # fmt: skip


def record_kind(record: Record, where: str) -> str:
    """Return the form of a record: completion, messages, label or text.

    Raises:
        DataError: the columns fit no form, or several.
    """
    keys = {SPELLINGS.get(k, k) for k in record}
    given = {SPELLINGS.get(k, k) for k, v in record.items() if v is not None}
    fitting = [n for n in FORMS if set(FORMS[n]) <= given] or [n for n in FORMS if set(FORMS[n]) <= keys]
    if not fitting and "text" in keys and "prompt" not in keys:
        fitting = ["text"]
    if len(fitting) > 1:
        raise DataError(f"{where} has the columns of several forms ({', '.join(fitting)}): keep those of one.")
    if fitting:
        return fitting[0]
    for column, hint in FOREIGN.items():
        if column in record and (column != "instruction" or "output" in record):
            raise DataError(f"{where} has {hint}.")
    raise DataError(f"{where} has the columns {', '.join(map(shown, record)) or 'none'}; needed are {NEEDED}.")


def normalize(record: Record, where: str, ignore: Collection[str] = (), kind: str | None = None) -> Record:
    """Return a record in canonical form, with all fields checked.

    Args:
        record: the record.
        where: its place, for messages, such as ``train.jsonl:8``.
        ignore: columns of the record and fields of messages to drop.
        kind: the form that the record must have; by default the form of its columns.

    Raises:
        DataError: a missing, unknown or malformed column or field, by its name.
    """
    record = {k: v for k, v in record.items() if k not in ignore}
    kind = _expect(record, where, kind)
    record = {k: v for k, v in record.items() if v is not None}
    known, result = COLUMNS[kind], {}
    for column, value in record.items():
        name = SPELLINGS.get(column, column)
        if name not in known:
            raise _unknown(column, known, f"{where}, a {kind} record", "column")
        if name in result:
            raise DataError(f"{where} has both {column!r} and {name!r}: keep one.")
        result[name] = value
    if kind == "messages":
        result["messages"] = _messages(result["messages"], f"{where}, messages", ignore)
    for column, roles in (("prompt", ()), ("completion", ("assistant",))) if kind == "completion" else ():
        value = result[column]
        if isinstance(value, str):
            continue
        if not isinstance(value, list):
            raise DataError(f"{where}: {column!r} must be text or a list of messages, got {shown(value)}.")
        result[column] = _messages(value, f"{where}, {column}", ignore)
        if roles and not any(m["role"] in roles for m in result[column]):
            raise DataError(f"{where}: {column!r} holds no message of the assistant, so there is nothing to learn.")
    if kind in ("label", "text") and not isinstance(result["text"], str):
        raise DataError(f"{where}: 'text' must be a string, got {shown(result['text'])}.")
    if kind == "label" and not result["text"]:
        raise DataError(f"{where}: 'text' is empty, so there is nothing to classify: leave the record out.")
    if "tools" in result:
        result["tools"] = _tools(result["tools"], where)
    _check_extras(result, where)
    return result


def _expect(record: Record, where: str, kind: str | None) -> str:
    """Return the form of the record, which must be ``kind`` if that is given."""
    kind = kind or record_kind(record, where)
    spelled = {SPELLINGS.get(k, k) for k, v in record.items() if v is not None}
    for column in FORMS.get(kind, ("text",)):
        if column not in spelled:
            raise DataError(f"{where} lacks the column {column!r}, or it is null.")
    return kind


def _check_extras(record: Record, where: str) -> None:
    mark = record.get(MARK)
    if not isinstance(mark, bool | None):
        raise DataError(f"{where}: {MARK!r} must be true or false, got {shown(mark)}.")
    also = record.get("also", [])
    if not isinstance(also, list) or not all(isinstance(answer, str) for answer in also):
        raise DataError(f"{where}: 'also' must be a list of texts, got {shown(also)}.")
    arguments = record.get("chat_template_kwargs", {})
    if not isinstance(arguments, dict):
        raise DataError(f"{where}: 'chat_template_kwargs' must be an object, got {shown(arguments)}.")
    last = record.get("completion", record.get("messages"))
    if isinstance(last, list) and last[-1]["role"] != "assistant":
        raise DataError(
            f"{where} ends with the {shown(last[-1]['role'])} turn: the last message must be the assistant's, to be learned."
        )


def _unknown(name: str, known: Collection[str], where: str, what: str) -> DataError:
    if name in MEDIA:
        return DataError(
            f"{where} has the {what} {name!r}: Umbra trains on text alone, and the model would not see it. Leave these "
            f"records out; for images, train with transformers' Trainer and a processor (docs/reference/data.md)."
        )
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return DataError(
        f"{where} has the unknown {what} {shown(name)}: {hint}known are {', '.join(known)}. "
        f"To drop it, set ignore_columns: [{name}]."
    )


# -- messages ----------------------------------------------------------------------------------------------------------


def _messages(value: object, where: str, ignore: Collection[str]) -> list[Message]:
    value = _parsed(value, where)
    if not isinstance(value, list) or not value:
        raise DataError(f"{where} must be a list of messages, got {shown(value)}.")
    return [_message(m, f"{where}[{i}]", ignore) for i, m in enumerate(value)]


def _message(value: object, where: str, ignore: Collection[str]) -> Message:
    if not isinstance(value, dict):
        raise DataError(f"{where} must be an object with `role` and `content`, got {shown(value)}.")
    message: Message = {}
    for key, field in value.items():
        name = ALIASES.get(key, key)
        if field is None or key in ignore:
            continue
        if name not in FIELDS and name != "function_call":
            raise _unknown(key, FIELDS, where, "field")
        if name in message and message[name] != field:
            raise DataError(f"{where} has {name!r} twice, as {key!r} too: keep one.")
        message[name] = field
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise DataError(f"{where} lacks `role`: {shown(value)}.")
    if role == "function_call":  # ShareGPT's turn of the assistant that is one call
        message = {"role": "assistant", "tool_calls": [_parsed(message.get("content"), where)]}
    message["role"] = ROLES.get(message["role"], message["role"])
    _check_fields(message, where)
    if "function_call" in message:
        message["tool_calls"] = [*message.get("tool_calls", ()), message.pop("function_call")]
    if "tool_calls" in message:
        calls = _parsed(message.pop("tool_calls"), f"{where}, tool_calls")
        if not isinstance(calls, list):
            raise DataError(f"{where}: 'tool_calls' must be a list, got {shown(calls)}.")
        if calls:
            message["tool_calls"] = [_call(call, f"{where}, tool_calls[{i}]") for i, call in enumerate(calls)]
    message["content"] = _content(message, where)
    return message


def _check_fields(message: Message, where: str) -> None:
    """Raise a DataError for a field that does not belong to the message's role, or has an invalid value."""
    role = message["role"]
    for name in ("weight", "tool_calls", "function_call", "reasoning_content", "refusal", "annotations", "audio"):
        if name in message and role != "assistant":
            raise DataError(f"{where}: {name!r} belongs to the assistant, not to the role {shown(role)}.")
    if "tool_call_id" in message and role != "tool":
        raise DataError(f"{where}: 'tool_call_id' belongs to a tool's result, not to the role {shown(role)}.")
    if message.get("weight", 1) not in (0, 1) or isinstance(message.get("weight"), bool | str):
        raise DataError(f"{where}: 'weight' must be 0 or 1, got {shown(message['weight'])}.")
    for name in ("reasoning_content", "name", "tool_call_id"):
        if not isinstance(message.get(name, ""), str):
            raise DataError(f"{where}: {name!r} must be a string, got {shown(message[name])}.")
    if not message.get("reasoning_content", "-"):
        del message["reasoning_content"]
    for name in ("refusal", "annotations", "audio"):
        if message.pop(name, None):
            raise DataError(
                f"{where} has {name!r}, which no chat template renders: put its text into 'content', or set "
                f"ignore_columns: [{name}]."
            )


def _content(message: Message, where: str) -> str | list[dict[str, Any]]:
    """Return the text of a message, or its text parts."""
    value = message.get("content")
    if value is None or value == []:
        if message["role"] == "assistant" and message.keys() & {"tool_calls", "reasoning_content"}:
            return ""
        raise DataError(f"{where} lacks `content`: {shown(message)}.")
    if isinstance(value, str):
        return value
    is_parts = isinstance(value, list) and all(
        isinstance(p, str) or (isinstance(p, dict) and "type" in p) for p in value
    )
    if message["role"] == "tool" and isinstance(value, dict | list) and not is_parts:
        return json.dumps(value, ensure_ascii=False)
    if not is_parts:
        raise DataError(f"{where}: 'content' must be text or a list of text parts, got {shown(value)}.")
    parts = [{"type": "text", "text": p} if isinstance(p, str) else p for p in value]
    for part in parts:
        kind, text = part["type"], part.get("text")
        if kind not in TEXT_PARTS:
            what = kind.removesuffix("_url").removeprefix("input_") if isinstance(kind, str) else ""
            if what in MEDIA:
                raise _unknown(what, TEXT_PARTS, where, "part")
            raise DataError(f"{where} has a part of the type {shown(kind)}: only text parts can be learned.")
        if not isinstance(text, str):
            raise DataError(f"{where} has a text part without text: {shown(part)}.")
        if extra := [k for k, v in part.items() if k not in ("type", "text", "annotations") and v is not None]:
            raise _unknown(extra[0], ("type", "text"), f"{where}, a part of content", "field")
    return [{"type": "text", "text": p["text"]} for p in parts]


# -- tools -------------------------------------------------------------------------------------------------------------


def _parsed(value: object, where: str) -> Any:
    """Return the value, parsed from JSON if it is text."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} must be a list, or JSON text of one: {error}, got {shown(value)}.") from None


def _function(value: object, where: str, known: dict[str, tuple[str, ...]], outer: tuple[str, ...]) -> dict[str, Any]:
    """Return the object that names a function, from OpenAI's nested spelling or the flat one, without ``outer`` fields."""
    if not isinstance(value, dict):
        raise DataError(f"{where} must be an object, got {shown(value)}.")
    value = {k: v for k, v in value.items() if v is not None}
    if value.get("type", "function") != "function":
        raise DataError(f"{where} has the type {shown(value['type'])}: only functions can be rendered.")
    inner = value["function"] if "function" in value else {k: v for k, v in value.items() if k not in outer}
    if "function" in value and (extra := value.keys() - {*outer, "function"}):
        raise _unknown(min(extra), (*outer, "function"), where, "field")
    if not isinstance(inner, dict):
        raise DataError(f"{where}: 'function' must be an object, got {shown(inner)}.")
    names = {spelling: name for name, spellings in known.items() for spelling in (name, *spellings)}
    for key in inner:
        if key not in names:
            raise _unknown(key, known, where, "field")
    result = {names[k]: v for k, v in inner.items() if v is not None}
    if not isinstance(result.get("name"), str) or not result["name"]:
        raise DataError(f"{where} does not name its function: {shown(value)}.")
    return result


def _call(value: object, where: str) -> dict[str, Any]:
    """Return a tool call as ``{"type": "function", "function": {"name": …, "arguments": {…}}}``, with its id if it has one."""
    call = _function(value, where, {"name": (), "arguments": ("parameters",)}, ("id", "type", "index"))
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: 'arguments' is not JSON: {error}, got {shown(arguments)}.") from None
    if not isinstance(arguments, dict):
        raise DataError(f"{where}: 'arguments' must be an object or JSON text of one, got {shown(arguments)}.")
    identity = {"id": value["id"]} if isinstance(value, dict) and value.get("id") is not None else {}
    return {**identity, "type": "function", "function": {"name": call["name"], "arguments": arguments}}


def _tools(value: object, where: str) -> list[dict[str, Any]]:
    value = _parsed(value, f"{where}, tools")
    if not isinstance(value, list):
        raise DataError(f"{where}: 'tools' must be a list, got {shown(value)}.")
    known = {"name": (), "description": (), "parameters": ("input_schema",), "strict": (), "return": (), "returns": ()}
    return [
        {"type": "function", "function": _function(tool, f"{where}, tools[{i}]", known, ("type",))}
        for i, tool in enumerate(value)
    ]
