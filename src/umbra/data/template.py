"""A tokenizer's chat template: how it renders a conversation, and which fields and roles it reads."""

import inspect
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from umbra.data.conversation import Conversation, as_parts, with_json_arguments
from umbra.data.records import Message
from umbra.data.tokens import encode
from umbra.errors import DataError, raising

SENTINEL = "\ue002"  # content that occurs in no template


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: the tokenizer.
        arguments: arguments of the template, such as ``{"enable_thinking": False}``; those of a conversation override them.
    """

    tokenizer: PreTrainedTokenizerBase
    arguments: dict[str, Any] = field(default_factory=dict)
    _reads: dict[str, bool] = field(default_factory=dict, repr=False, compare=False)

    def render(self, conversation: Conversation, generation_prompt: bool = False) -> str:
        """Return the text of a conversation.

        Args:
            conversation: the conversation.
            generation_prompt: whether to append what opens an answer.

        Raises:
            DataError: the template refuses the conversation.
        """
        messages = conversation.messages
        if self._needs_parts:
            messages = [{**m, "content": as_parts(m["content"])} for m in messages]

        def apply(messages: list[Message]) -> str:
            tools = cast("list[dict[str, Any] | Callable[..., object]] | None", conversation.tools)
            text = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=generation_prompt,
                **{**self.arguments, **conversation.arguments},
            )  # fmt: skip
            return cast(str, text)

        def refusal(error: Exception) -> str:  # of any type: a template may raise for roles that it does not know
            return f"The chat template refuses {str(messages)[:200]}: {error!s:.200}"

        if any("tool_calls" in message for message in messages):
            with suppress(DataError), raising(DataError, refusal):
                return apply(messages)
            with raising(DataError, refusal):  # some templates require the arguments of calls as JSON text
                return apply(with_json_arguments(messages))
        with raising(DataError, refusal):
            return apply(messages)

    def check_rendered(self, conversation: Conversation) -> None:
        """Check that the template renders every field and role of a conversation.

        Raises:
            DataError: names the first field or role that the template omits.
        """
        if conversation.tools and not self.changes(
            "tools", conversation, Conversation(conversation.messages, None, conversation.arguments)
        ):
            raise DataError(
                "The chat template does not render `tools`: use another template, or drop them (ignore_columns)."
            )
        systems = sum(message["role"] == "system" for message in conversation.messages)
        for i, message in enumerate(conversation.messages):
            role = message["role"]
            for name in ("tool_calls", "name"):
                if name not in message or (name, role) == ("name", "tool"):
                    continue
                if not self.changes(f"{name} of {role}", conversation, conversation.with_message(i, **{name: None})):
                    raise DataError(
                        f"The chat template does not render {name!r} of the {role}'s messages: use another template, or "
                        "drop it (ignore_columns)."
                    )
            if not message["content"]:
                continue
            beside = " and 'tool_calls'" if "tool_calls" in message else ""
            what = f"{role}{beside}, {i == 0}, {role == 'system' and systems}"
            # Some templates render an assistant's turn only at the end.
            part = conversation.until(i + 1) if role == "assistant" else conversation
            if not self.changes(what, part, part.with_message(i, content=SENTINEL)):
                raise DataError(
                    f"The chat template does not render messages[{i}], with the role {role!r}{beside}: use another template, or "
                    "rewrite the message."
                )

    def changes(self, what: str, one: Conversation, other: Conversation) -> bool:
        """Return whether the template renders two conversations differently; tested once for each kind of difference ``what``."""
        key = f"{what}, {json.dumps(one.arguments, sort_keys=True, default=str)}"
        if key not in self._reads:
            texts = []
            for conversation in (one, other):
                try:
                    texts.append(self.render(self.in_template_format(conversation)))
                except DataError:
                    texts.append(None)
            self._reads[key] = texts[0] != texts[1] or texts[0] is None
        return self._reads[key]

    def in_template_format(self, conversation: Conversation) -> Conversation:
        """Return the conversation in the spelling that the template reads: parts or text, the role developer or system."""
        messages = []
        for message in conversation.messages:
            message = {k: v for k, v in message.items() if k != "weight"}
            if isinstance(message["content"], list) and not self._reads_parts:
                message["content"] = "".join(part["text"] for part in message["content"])
            if message["role"] == "developer" and not self._reads_developer:
                message["role"] = "system"
            messages.append(message)
        return Conversation(messages, conversation.tools, conversation.arguments)

    @property
    def _needs_parts(self) -> bool:
        """Whether the template renders text parts only, and omits plain text or raises."""
        if "parts alone" not in self._reads:
            self._reads["parts alone"] = False
            rendered = ["", ""]
            for i, content in enumerate(("Well?", as_parts("Well?"))):
                with suppress(DataError):
                    rendered[i] = self.render(Conversation([{"role": "user", "content": content}]))
            self._reads["parts alone"] = "Well?" not in rendered[0] and "Well?" in rendered[1]
        return self._reads["parts alone"]

    @property
    def _reads_parts(self) -> bool:
        """Whether the template renders text parts, in the same way as plain text if it renders that."""
        if "parts" not in self._reads:
            self._reads["parts"] = self._needs_parts
            with suppress(DataError):
                plain, parts = (
                    self.render(Conversation([{"role": "user", "content": t}, {"role": "assistant", "content": a}]))
                    for t, a in (("Well?", "Done"), (as_parts("Well?"), as_parts("Done")))
                )
                self._reads["parts"] = plain == parts
        return self._reads["parts"]

    @property
    def _reads_developer(self) -> bool:
        """Whether the template renders the role developer."""
        if "developer" not in self._reads:
            self._reads["developer"] = False
            with suppress(DataError):
                texts = [
                    self.render(
                        Conversation([{"role": "developer", "content": c}, {"role": "user", "content": "Well?"}])
                    )
                    for c in ("One", "Two")
                ]
                self._reads["developer"] = texts[0] != texts[1]
        return self._reads["developer"]

    @cached_property
    def closing(self) -> str:
        """The token that opens the next turn, if the template puts none at the end of the assistant's turns; otherwise ""."""
        turns = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Done"}]
        added = self.tokenizer.added_tokens_decoder
        with suppress(DataError):
            done = self.render(Conversation(turns))
            longer = self.render(Conversation([*turns, turns[0]]))
            after = encode(self.tokenizer, done.rpartition("Done")[2])
            opening = encode(self.tokenizer, longer[len(done) :])[:1] if longer.startswith(done) else []
            if opening and opening[0] in added and not any(i in added for i in after):
                return str(added[opening[0]].content)
        return ""

    @property
    def ends(self) -> list[int]:
        """The token ids that end a learned answer: the tokenizer's end token, and the token that the template puts there."""
        tokens = [cast("int | None", self.tokenizer.eos_token_id)]
        if self.tokenizer.chat_template is not None:
            turns = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Done"}]
            with suppress(DataError):  # some templates require more turns
                after = self.render(Conversation(turns)).rpartition("Done")[2].lstrip()
                first = encode(self.tokenizer, after)[:1]
                tokens += [i for i in first if i in self.tokenizer.added_tokens_decoder]
            tokens += encode(self.tokenizer, self.closing)
        return list(dict.fromkeys(i for i in tokens if i is not None))


@cache
def reserved_arguments() -> frozenset[str]:
    """Return the parameters of `apply_chat_template`, which cannot be passed to a template."""
    parameters = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    return frozenset({*parameters, "messages"} - {"kwargs"})
