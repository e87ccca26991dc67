"""Format records as text segments and tokens, with or without the tokenizer's chat template."""

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..core import IGNORED
from ..errors import DataError
from .records import Record, record_kind


@dataclass(frozen=True)
class ChatFormatter:
    """Turns records into text segments and tokens, with or without the tokenizer's chat template."""

    tokenizer: PreTrainedTokenizerBase
    chat_template: bool = True
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def chats(self) -> bool:
        """Whether the tokenizer's chat template is used."""
        return self.chat_template and self.tokenizer.chat_template is not None

    def segments(self, record: Record) -> list[tuple[str, bool]]:
        """[(text, whether it is trained on)], in order.

        Raises:
            DataError: messages for a tokenizer without a chat template, or none by the assistant.
        """
        kind = record_kind(record, "the record")
        if kind in ("text", "label"):
            return [(record["text"], True)]
        if kind == "messages":
            return self._chat(record["messages"])
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, str) and not self.chats:
            return [(prompt, False), (completion + (self.tokenizer.eos_token or ""), True)]
        return self._chat([*_as_messages(prompt, "user"), *_as_messages(completion, "assistant")])

    def _chat(self, messages: list[dict]) -> list[tuple[str, bool]]:
        if self.tokenizer.chat_template is None:
            raise DataError(
                "The data holds messages, but the tokenizer has no chat template: use `prompt` and `completion`."
            )
        if messages[-1]["role"] != "assistant":
            raise DataError(
                f"The last message is the {messages[-1]['role']}'s: it must be the assistant's, to be learned."
            )
        whole, segments, done = self._render(messages), [], ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or i == 0:  # nothing was asked yet
                continue
            before, after = self._render(messages[:i], answer=True), self._render(messages[: i + 1])
            # Templates that rewrite earlier turns (dropping their reasoning) leave only the last answer to train on.
            if before.startswith(done) and after.startswith(before) and whole.startswith(after):
                segments += [(before[len(done) :], False), (after[len(before) :], True)]
                done = after
        if not segments:
            raise DataError(
                "The chat template renders a conversation and its beginning differently; no answer can be told apart."
            )
        return segments

    def _render(self, messages: list[dict], answer: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answer, **self.chat_template_kwargs
            )
        except Exception as error:  # templates raise what they like, about roles that they do not have too
            raise DataError(f"The chat template refuses {str(messages)[:200]}: {error!s:.200}") from error
        assert isinstance(text, str)
        return text

    @property
    def ends(self) -> list[int]:
        """The tokens that end an answer as it is learned: the tokenizer's own, and what the chat template puts there."""
        found: list[Any] = [self.tokenizer.eos_token_id]
        if self.tokenizer.chat_template is not None:
            asked, said = {"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Done"}
            with suppress(DataError):  # of a template that asks for more turns than these
                before, whole = self._render([asked], answer=True), self._render([asked, said])
                after = whole[len(before) :].partition("Done")[2].lstrip() if whole.startswith(before) else ""
                first: Any = self.tokenizer(after, add_special_tokens=False)["input_ids"][:1]  # type: ignore[index]
                found += [i for i in first if i in self.tokenizer.added_tokens_decoder]
        return list(dict.fromkeys(i for i in found if i is not None))

    def prompt(self, record: Record) -> str:
        """The text up to the last answer."""
        if record_kind(record, "the record") in ("text", "label"):
            return record["text"]
        return "".join(text for text, _ in self.segments(record)[:-1])

    def ask(self, prompt: str) -> str:
        """A bare question as the model is asked it."""
        return self._render([{"role": "user", "content": prompt}], answer=True) if self.chats else prompt

    def is_plain(self, record: Record) -> bool:
        """Whether a record's text is read as it is, and not written by the chat template, which brings its special tokens."""
        kind = record_kind(record, "the record")
        return kind in ("text", "label") or (
            kind == "completion" and isinstance(record["prompt"], str) and not self.chats
        )

    def tokens(self, text: str, plain: bool | None = None) -> list[int]:
        """Token ids; special tokens only where a plain text begins.

        Args:
            plain: whether that is here; None for what `ask` has written.
        """
        plain = not self.chats if plain is None else plain
        return self.tokenizer(text, add_special_tokens=plain)["input_ids"]  # type: ignore[return-value]

    def encode(self, record: Record) -> dict[str, np.ndarray]:
        """``input_ids`` (T,) and ``labels`` (T,), the latter `IGNORED` where nothing is learned."""
        ids: list[int] = []
        labels: list[int] = []
        plain = self.is_plain(record)
        for text, trained in self.segments(record):
            piece = self.tokens(text, plain and not ids)
            ids += piece
            labels += piece if trained else [IGNORED] * len(piece)
        return {"input_ids": np.asarray(ids, np.int32), "labels": np.asarray(labels, np.int32)}

    def encode_escalated(self, record: Record, instead: str) -> list[dict[str, np.ndarray]]:
        """As `encode`, two examples with ``shadow_targets`` (T,) beside ``labels``: the pair learns all answers of the record,
        the shadow all but the last, and ``instead`` of that."""
        whole, passed = self.encode(record), self.encode(_with_answer(record, instead))
        starts = [1 + max(np.flatnonzero(e["labels"] == IGNORED), default=-1) for e in (whole, passed)]
        whole["shadow_targets"] = np.where(np.arange(len(whole["labels"])) < starts[0], whole["labels"], IGNORED)
        passed["shadow_targets"] = np.where(np.arange(len(passed["labels"])) < starts[1], IGNORED, passed["labels"])
        passed["labels"] = np.full_like(passed["labels"], IGNORED)
        return [whole, passed]


def _with_answer(record: Record, answer: str) -> Record:
    """The record with another last answer."""
    if "messages" in record:
        return {**record, "messages": [*record["messages"][:-1], {**record["messages"][-1], "content": answer}]}
    completion = record["completion"]
    if isinstance(completion, str):
        return {**record, "completion": answer}
    return {**record, "completion": [*completion[:-1], {**completion[-1], "content": answer}]}


def _as_messages(value: Any, role: str) -> list[dict]:
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def end_tokens(model: Any, writer: ChatFormatter) -> list[int]:
    """The tokens that end an answer: those of the model's generation config, and those by which answers are learned to end."""
    told: Any = model.generation_config.eos_token_id
    told = told.flatten().tolist() if isinstance(told, torch.Tensor) else told
    return list(dict.fromkeys([*(told if isinstance(told, list) else [] if told is None else [told]), *writer.ends]))
