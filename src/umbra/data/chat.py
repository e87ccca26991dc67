"""Format records as text and tokens, with or without the tokenizer's chat template.

    text(record) = prompt₁ answer₁ prompt₂ answer₂ …      answers are learned, prompts are context

A prompt is the chat template's rendering of the messages before a turn, with the generation prompt: the text that a server
sends. The answer is the text that the template adds for the turn. A template that rewrites earlier turns once a conversation
continues (it may drop their reasoning) gives several texts for a record, each equal to a request and its answer.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from umbra.data.conversation import Conversation, as_messages, with_answer
from umbra.data.reasoning import END_OF_THOUGHT
from umbra.data.records import Record, normalize, record_kind
from umbra.data.template import ChatTemplate, reserved_arguments
from umbra.data.tokens import Segments, cut_where_merged, encode, encode_segments, special_ends
from umbra.data.turns import close_answers, render_turns, without_special_ends
from umbra.errors import DataError
from umbra.method.losses import IGNORED


@dataclass(frozen=True)
class ChatFormatter:
    """Format records as text segments and as tokens.

    Args:
        tokenizer: the tokenizer, with its chat template.
        chat_template: whether the template is used for a `prompt` and `completion` given as text; messages always use it.
        chat_template_kwargs: arguments of the template, such as ``{"enable_thinking": False}``.
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template: bool = True
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def template(self) -> ChatTemplate:
        """The tokenizer's chat template with its arguments."""
        return ChatTemplate(self.tokenizer, self.chat_template_kwargs)

    @property
    def chats(self) -> bool:
        """Whether the tokenizer's chat template is used for plain prompts."""
        return self.chat_template and self.tokenizer.chat_template is not None

    # -- text ----------------------------------------------------------------------------------------------------------

    def examples(self, record: Record, max_length: int | None = None) -> list[Segments]:
        """Return the texts of a record as segments, each learned or not.

        Args:
            record: the record.
            max_length: tokens; further texts whose prompts are longer are omitted.

        Returns:
            One text; or several, if the template rewrites earlier turns.

        Raises:
            DataError: messages for a tokenizer without a chat template, a turn or a field that the template does not render, or
                nothing to learn.
        """
        record = normalize(record, "the record")
        kind = record_kind(record, "the record")
        if kind in ("text", "label"):
            return [[(record["text"], True)]]
        if self.is_plain(record):
            return [[(record["prompt"], False), (record["completion"], True)]]
        conversation, first = self._conversation(record)
        messages = enumerate(conversation.messages)
        turns = [i for i, m in messages if i >= first and m["role"] == "assistant" and m.get("weight", 1)]
        if not turns:
            raise DataError("No turn of the assistant has a weight other than 0, so there is nothing to learn.")
        self.template.check_rendered(conversation)
        conversation = without_special_ends(self.template, self.template.in_template_format(conversation))
        texts = render_turns(self.template, conversation, turns, max_length)
        return [close_answers(text, self.template.closing) for text in texts] if kind == "messages" else texts

    def segments(self, record: Record) -> Segments:
        """Return the last text of a record, which contains its last answer."""
        return self.examples(record)[-1]

    def prompt(self, record: Record) -> str:
        """Return the text of a record before its last answer: the model's input."""
        if record_kind(record, "the record") in ("text", "label"):
            return record["text"]
        return "".join(text for text, _ in self.segments(record)[:-1])

    def ask(self, prompt: str) -> str:
        """Return a user's message as the model's input: rendered by the chat template, or as it is."""
        if not self.chats:
            return prompt
        return self.template.render(Conversation([{"role": "user", "content": prompt}]), generation_prompt=True)

    def is_plain(self, record: Record) -> bool:
        """Return whether a record's text is used as it is; text rendered by the chat template brings its own special tokens."""
        kind = record_kind(record, "the record")
        return kind in ("text", "label") or (
            kind == "completion"
            and isinstance(record["prompt"], str)
            and isinstance(record["completion"], str)
            and not self.chats
        )

    def _conversation(self, record: Record) -> tuple[Conversation, int]:
        """Return the conversation of a record, and the index of the first message that may be learned."""
        if self.tokenizer.chat_template is None:
            raise DataError(
                "The data holds messages, but the tokenizer has no chat template: use `prompt` and `completion`."
            )
        tools, arguments = record.get("tools"), record.get("chat_template_kwargs", {})
        if reserved := reserved_arguments() & arguments.keys():
            raise DataError(
                f"'chat_template_kwargs' holds {min(reserved)!r}, which is a parameter of the tokenizer and no variable of a "
                "template: remove it."
            )
        if "messages" in record:
            return Conversation(record["messages"], tools, arguments), 0
        prompt, completion = as_messages(record["prompt"], "user"), as_messages(record["completion"], "assistant")
        return Conversation([*prompt, *completion], tools, arguments), len(prompt)

    # -- tokens --------------------------------------------------------------------------------------------------------

    @property
    def ends(self) -> list[int]:
        """The token ids that end a learned answer."""
        return self.template.ends

    def tokens(self, text: str, plain: bool | None = None) -> list[int]:
        """Return the token ids of a prompt: without an end token, and with one begin token if it is plain text.

        Args:
            text: the prompt.
            plain: whether the text was not rendered by a template; by default, as `ask` returns it.
        """
        return self._begin(encode(self.tokenizer, text), not self.chats if plain is None else plain)

    def _begin(self, ids: list[int], plain: bool) -> list[int]:
        begin = self._special_ends[0] if plain else []
        return ids if ids[: len(begin)] == begin else [*begin, *ids]

    def _end(self) -> list[int]:
        """Return the token ids that end a plain text."""
        end = cast("int | None", self.tokenizer.eos_token_id)
        return self._special_ends[1] if end is None else [end]

    @cached_property
    def _special_ends(self) -> tuple[list[int], list[int]]:
        return special_ends(self.tokenizer)

    def encode_examples(self, record: Record, max_length: int | None = None) -> list[dict[str, np.ndarray]]:
        """Tokenise a record.

        Args:
            record: the record.
            max_length: see `examples`; texts are not cut.

        Returns:
            For each of its `examples`, ``input_ids`` (T,) and ``labels`` (T,), int32; labels are `IGNORED` at tokens that are
            not learned.
        """
        plain = self.is_plain(record)
        texts = [t for text in self.examples(record, max_length) for t in cut_where_merged(self.tokenizer, text)]
        return [self._encode(text, plain) for text in texts]

    def encode(self, record: Record) -> dict[str, np.ndarray]:
        """Tokenise the last of a record's `examples`."""
        return self.encode_examples(record)[-1]

    def _encode(self, segments: Segments, plain: bool) -> dict[str, np.ndarray]:
        pieces = encode_segments(self.tokenizer, segments)
        first, learned = pieces[0]
        pieces[0] = (self._begin(first, plain), learned)
        last, learned = pieces[-1]
        end = self._end() if plain else []
        if end and last[-len(end) :] != end:
            pieces[-1] = ([*last, *end], learned)
        ids = [i for piece, _ in pieces for i in piece]
        labels = [i if learned else IGNORED for piece, learned in pieces for i in piece]
        return {"input_ids": np.asarray(ids, np.int32), "labels": np.asarray(labels, np.int32)}

    def reference(self, record: Record) -> str:
        """Return the last answer in the form of a decoded reply: without special tokens."""
        example = self.encode(record)
        start = _answer_start(example)
        return str(self.tokenizer.decode(example["input_ids"][start:].tolist(), skip_special_tokens=True))

    def encode_escalated(self, record: Record, escalation: str) -> list[dict[str, np.ndarray]]:
        """Tokenise a record that the shadow learns to escalate.

        The attached model learns all answers of the record; the shadow learns all but the last, and ``escalation`` instead of it.

        Returns:
            Examples as of `encode_examples`, with ``shadow_targets`` (T,), the labels of the shadow.
        """
        examples, escalated = self.encode_examples(record), self.encode(with_answer(record, escalation))
        for example in examples[:-1]:
            example["shadow_targets"] = example["labels"]
        last, labels = examples[-1], escalated["labels"]
        last["shadow_targets"] = np.where(_before(_answer_start(last), last["labels"]), last["labels"], IGNORED)
        escalated["shadow_targets"] = np.where(_before(_answer_start(escalated), labels), IGNORED, labels)
        escalated["labels"] = np.full_like(labels, IGNORED)
        return [*examples, escalated]


def _answer_start(example: dict[str, np.ndarray]) -> int:
    """Return the index of the first token of an example's last answer."""
    return int(1 + max(np.flatnonzero(example["labels"] == IGNORED), default=-1))


def _before(index: int, labels: np.ndarray) -> np.ndarray:
    """Return a mask (T,) of the tokens before an index."""
    return np.arange(len(labels)) < index


def needs_thinking(formatter: ChatFormatter, records: Iterable[Record]) -> bool:
    """Return whether ``enable_thinking`` must be set: records hold reasoning, and the template's prompt closes it by default."""
    if formatter.tokenizer.chat_template is None or "enable_thinking" in formatter.chat_template_kwargs:
        return False
    prompt = ""
    with suppress(DataError):
        prompt = formatter.template.render(Conversation([{"role": "user", "content": "Well?"}]), generation_prompt=True)
    if not prompt.rstrip().endswith(END_OF_THOUGHT):
        return False
    messages = (m for r in records for m in as_messages(r.get("completion") or r.get("messages") or [], "assistant"))
    return any(m.get("reasoning_content") or END_OF_THOUGHT in str(m.get("content")) for m in messages)


def end_tokens(model: PreTrainedModel, formatter: ChatFormatter) -> list[int]:
    """Return the token ids that end an answer: those of the model's generation config, and those of learned answers."""
    config = model.generation_config
    ends = None if config is None else cast("int | list[int] | torch.Tensor | None", config.eos_token_id)
    ends = ends.flatten().tolist() if isinstance(ends, torch.Tensor) else ends
    return list(dict.fromkeys([*(ends if isinstance(ends, list) else [] if ends is None else [ends]), *formatter.ends]))
