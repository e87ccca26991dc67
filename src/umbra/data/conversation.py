"""Conversations in canonical form, before a chat template renders them."""

import json
from dataclasses import dataclass, field
from typing import Any

from umbra.data.records import Message, Record


@dataclass(frozen=True)
class Conversation:
    """Messages in canonical form, with their tools and the arguments of the chat template.

    Args:
        messages: see `records.normalize`.
        tools: functions in OpenAI's nested spelling.
        arguments: arguments of the chat template for this conversation.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def until(self, end: int) -> "Conversation":
        """Return the conversation that ends before message ``end``."""
        return Conversation(self.messages[:end], self.tools, self.arguments)

    def with_message(self, index: int, **fields: object) -> "Conversation":
        """Return the conversation with fields of one message replaced; None removes a field."""
        message = {k: v for k, v in {**self.messages[index], **fields}.items() if v is not None}
        messages = [*self.messages[:index], message, *self.messages[index + 1 :]]
        return Conversation(messages, self.tools, self.arguments)


def as_messages(value: str | list[Message], role: str) -> list[Message]:
    """Return messages as they are, and text as one message of the given role."""
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def as_parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the content of a message as text parts."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def with_answer(record: Record, answer: str) -> Record:
    """Return the record with its last answer replaced."""
    if isinstance(record.get("completion"), str):
        return {**record, "completion": answer}
    column = "completion" if "completion" in record else "messages"
    messages = record[column]
    last = max(i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight", 1))
    return {**record, column: [*messages[:last], {"role": "assistant", "content": answer}]}


def with_json_arguments(messages: list[Message]) -> list[Message]:
    """Return the messages with the arguments of their tool calls as JSON text, which some templates require."""

    def spell(call: dict[str, Any]) -> dict[str, Any]:
        text = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        return {**call, "function": {**call["function"], "arguments": text}}

    return [
        {**m, "tool_calls": [spell(call) for call in m["tool_calls"]]} if "tool_calls" in m else m for m in messages
    ]
