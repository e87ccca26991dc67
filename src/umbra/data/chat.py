"""Format records as text and tokens, with or without the tokenizer's chat template.

    text(record) = prompt₁ answer₁ prompt₂ answer₂ …      answers are learned, prompts are context

A prompt is what the chat template renders for the messages before a turn, with its generation prompt: the text that a server
sends. The answer is what the template adds for the turn. Templates that render earlier turns in another way once a
conversation goes on (without their reasoning, say) give several texts for a record, each as it is asked.
"""

import inspect
import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from umbra.data.records import Message, Record, normalize, record_kind
from umbra.data.tokens import Segments, cut_where_merged, encode, encode_segments, special_ends
from umbra.errors import DataError
from umbra.method.losses import IGNORED

THINK, END_OF_THOUGHT = "<think>", "</think>"
HIDDEN = {THINK: "\ue000", END_OF_THOUGHT: "\ue001"}  # what templates do not take for reasoning
SENTINEL = "\ue002"
FEW = 4  # turns up to which every prompt is rendered


@dataclass(frozen=True)
class Conversation:
    """Messages in canonical form, with their tools and the arguments of the chat template."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def until(self, end: int) -> "Conversation":
        """The first ``end`` messages."""
        return Conversation(self.messages[:end], self.tools, self.arguments)

    def with_message(self, place: int, **fields: Any) -> "Conversation":
        """The conversation with other fields in one message; None takes a field away."""
        message = {k: v for k, v in {**self.messages[place], **fields}.items() if v is not None}
        messages = [*self.messages[:place], message, *self.messages[place + 1 :]]
        return Conversation(messages, self.tools, self.arguments)


@dataclass(frozen=True)
class ChatFormatter:
    """Turns records into text segments and tokens.

    Args:
        tokenizer: whose chat template is used.
        chat_template: whether it is used for `prompt` and `completion` given as text; messages always need it.
        chat_template_kwargs: arguments of the template, such as ``{"enable_thinking": False}``.
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template: bool = True
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    _reads: dict[str, bool] = field(default_factory=dict, repr=False, compare=False)

    @property
    def chats(self) -> bool:
        """Whether the tokenizer's chat template is used for plain prompts."""
        return self.chat_template and self.tokenizer.chat_template is not None

    # -- text ----------------------------------------------------------------------------------------------------------

    def examples(self, record: Record, max_length: int | None = None) -> list[Segments]:
        """Return the texts of a record as segments, each learned or not; one text, unless the template rewrites earlier turns.

        Args:
            max_length: tokens; further texts whose prompts are longer are left out.

        Raises:
            DataError: messages for a tokenizer without a chat template, a turn or a field that the template does not render, or
                nothing that is learned.
        """
        record = normalize(record, "the record")
        kind = record_kind(record, "the record")
        if kind in ("text", "label"):
            return [[(record["text"], True)]]
        if self.is_plain(record):
            return [[(record["prompt"], False), (record["completion"], True)]]
        conversation, first = self._conversation(record)
        turns = [
            i
            for i, m in enumerate(conversation.messages)
            if i >= first and m["role"] == "assistant" and m.get("weight", 1)
        ]
        if not turns:
            raise DataError("No turn of the assistant has a weight other than 0, so there is nothing to learn.")
        self._check_rendered(conversation)
        conversation = self._once_ended(self._spelled(conversation))
        texts = self._regular(conversation, turns) or self._turn_by_turn(conversation, turns, max_length)
        return [_closed(text, self._closing) for text in texts] if kind == "messages" else texts

    def segments(self, record: Record) -> Segments:
        """Return the last text of a record, which has its last answer."""
        return self.examples(record)[-1]

    def prompt(self, record: Record) -> str:
        """Return the text up to the last answer: what a model is asked."""
        if record_kind(record, "the record") in ("text", "label"):
            return record["text"]
        return "".join(text for text, _ in self.segments(record)[:-1])

    def ask(self, prompt: str) -> str:
        """Return a bare question as the model is asked it."""
        return self._render(Conversation([{"role": "user", "content": prompt}]), answer=True) if self.chats else prompt

    def is_plain(self, record: Record) -> bool:
        """Whether a record's text is read as it is, and not written by the chat template, which brings its special tokens."""
        kind = record_kind(record, "the record")
        return kind in ("text", "label") or (
            kind == "completion"
            and isinstance(record["prompt"], str)
            and isinstance(record["completion"], str)
            and not self.chats
        )

    def _conversation(self, record: Record) -> tuple[Conversation, int]:
        """The conversation of a record, and the first message of its completion."""
        if self.tokenizer.chat_template is None:
            raise DataError(
                "The data holds messages, but the tokenizer has no chat template: use `prompt` and `completion`."
            )
        given, arguments = record.get("tools"), record.get("chat_template_kwargs", {})
        if reserved := reserved_arguments() & arguments.keys():
            raise DataError(f"'chat_template_kwargs' holds {min(reserved)!r}, which is no variable of a template.")
        if "messages" in record:
            return Conversation(record["messages"], given, arguments), 0
        prompt, completion = _as_messages(record["prompt"], "user"), _as_messages(record["completion"], "assistant")
        return Conversation([*prompt, *completion], given, arguments), len(prompt)

    def _turn_by_turn(self, conversation: Conversation, turns: list[int], max_length: int | None) -> list[Segments]:
        """The texts of all turns; each goes on where the one before it ended, or begins anew where that was rewritten."""
        texts: list[Segments] = []
        whole, done = self._render(conversation) if len(turns) > 1 else "", ""
        for i in turns:
            before, answer = self._turn(conversation, i)
            if i != turns[-1]:
                answer = self._within(whole, before, answer)
            if texts and before.startswith(done):
                texts[-1] += [(before[len(done) :], False), (answer, True)]
            elif texts and max_length is not None and len(encode(self.tokenizer, before)) >= max_length:
                break
            else:
                texts.append([(before, False), (answer, True)])
            done = before + answer
        return texts

    def _turn(self, conversation: Conversation, place: int) -> tuple[str, str]:
        """The prompt of a turn and its answer."""
        if place == 0:
            return self._opening(conversation)
        before, after = self._render(conversation.until(place), answer=True), self._render_turn(conversation, place)
        reasoning, rest = _reasoning(conversation.messages[place])
        if reasoning and before.rstrip().endswith(THINK) and THINK in after[len(before) :]:  # opened by both
            conversation = conversation.with_message(place, content=rest.lstrip("\n"), reasoning_content=reasoning)
            after = self._render_turn(conversation, place)
        if after.startswith(before):
            return before, after[len(before) :]
        if not reasoning:
            return before, self._after_common_tokens(before, after)
        if "enable_thinking" not in {**self.chat_template_kwargs, **conversation.arguments}:
            arguments = {**conversation.arguments, "enable_thinking": True}
            return self._turn(Conversation(conversation.messages, conversation.tools, arguments), place)
        raise DataError(
            f"The prompt, as the chat template renders it, ends with {before[-40:]!r}, after which the answer's reasoning cannot "
            "follow: leave out the reasoning, or the chat_template_kwargs that switch it off."
        )

    def _within(self, whole: str, before: str, answer: str) -> str:
        """The answer of a turn that others follow, without the end token that some templates put after the last turn alone."""
        bare = answer.removesuffix(str(self.tokenizer.eos_token or ""))
        if bare == answer or whole.startswith(before + answer) or not whole.startswith(before + bare):
            return answer
        last = encode(self.tokenizer, bare.rstrip())[-1:]
        return bare if last and last[0] in self.tokenizer.added_tokens_decoder else answer

    def _after_common_tokens(self, before: str, after: str) -> str:
        """The rest of a text after the tokens that it begins with as another does."""
        asked, ids = encode(self.tokenizer, before), encode(self.tokenizer, after)
        same = next((n for n, (a, b) in enumerate(zip(asked, ids, strict=False)) if a != b), min(len(asked), len(ids)))
        place = len(self.tokenizer.decode(ids[:same]))
        if self.tokenizer.is_fast:
            encoded: Any = self.tokenizer(after, add_special_tokens=False, return_offsets_mapping=True)
            place = encoded["offset_mapping"][same][0] if same < len(ids) else len(after)
        return after[place:]

    def _opening(self, conversation: Conversation) -> tuple[str, str]:
        """The prompt and the answer of a turn with which the assistant opens the conversation."""
        after, question = self._render_turn(conversation, 0), Conversation([{"role": "user", "content": "Well?"}])
        asked, bare = self._render(question, answer=True), self._render(question)
        header = asked[len(bare) :] if asked.startswith(bare) else ""
        start, _, answer = after.partition(header) if header else ("", "", "")
        if not answer:
            raise DataError(
                "The conversation begins with the assistant, and the chat template does not tell where its answer begins: "
                "put a message of the user or the system before it, or give it the weight 0."
            )
        return start + header, answer

    def _render_turn(self, conversation: Conversation, place: int) -> str:
        """The conversation up to a turn, with the turn's reasoning, also where the template would leave it out."""
        conversation, message = conversation.until(place + 1), conversation.messages[place]
        reasoning, rest = _reasoning(message)
        if not reasoning:
            return self._render(conversation)
        is_field = "reasoning_content" in message
        if self._changes(f"reasoning, {is_field}", conversation, self._with_reasoning(conversation, place, SENTINEL)):
            return self._render(conversation)
        if is_field and END_OF_THOUGHT not in str(self.tokenizer.chat_template):
            raise DataError(
                "The chat template does not render 'reasoning_content': take another template, put it into 'content' as "
                f"{THINK}…{END_OF_THOUGHT}, or leave it out (ignore_columns)."
            )
        text = message["content"] if not is_field else f"{THINK}\n{reasoning.strip()}\n{END_OF_THOUGHT}\n\n{rest}"
        for visible, hidden in HIDDEN.items():
            text = text.replace(visible, hidden)
        rendered = self._render(conversation.with_message(place, content=text, reasoning_content=None))
        for visible, hidden in HIDDEN.items():
            rendered = rendered.replace(hidden, visible)
        return rendered

    def _with_reasoning(self, conversation: Conversation, place: int, text: str) -> Conversation:
        message = conversation.messages[place]
        if "reasoning_content" in message:
            return conversation.with_message(place, reasoning_content=text)
        _, rest = _reasoning(message)
        return conversation.with_message(place, content=f"{THINK}\n{text}\n{END_OF_THOUGHT}{rest}")

    # -- long conversations --------------------------------------------------------------------------------------------

    def _regular(self, conversation: Conversation, turns: list[int]) -> list[Segments] | None:
        """The text of a long conversation whose messages are all rendered alike, from one rendering; None of another one.

        What surrounds the content of a user's and of the assistant's message is read off two messages put after the first
        turn. The text that follows for all messages must be the one that the template renders.
        """
        messages = conversation.messages
        start = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), 0)
        later, roles = messages[start + 1 :], ("user", "assistant")
        plain = all(isinstance(m["content"], str) and m.keys() <= {"role", "content"} for m in messages)
        if len(turns) <= FEW or not (plain and start) or any(m["role"] != roles[i % 2] for i, m in enumerate(later)):
            return None
        probe = conversation.until(start + 1)
        probe.messages.extend({"role": role, "content": f"\t{SENTINEL}\t"} for role in roles)
        before, after = self._render(probe.until(start), answer=True), self._render(probe.until(start + 1))
        if not after.startswith(before):
            return None
        asked, answered = self._render(probe.until(start + 2), answer=True), self._render(probe)
        answer = self._within(asked, before, after[len(before) :])
        ending = after[len(before) + len(answer) :]  # of the last turn alone
        after, answered = before + answer, answered.removesuffix(ending)
        frames = {"user": _frame(after, asked), "assistant": _frame(asked, answered)}
        if None in frames.values():
            return None
        pieces = [before, answer]
        for message in later:
            head, tail, strips = frames[message["role"]] or ("", "", False)
            pieces.append(head + (message["content"].strip() if strips else message["content"]) + tail)
        pieces[-1] += ending
        if "".join(pieces) != self._render(conversation):
            return None
        learned = [False, *(i in set(turns) for i in range(start, turns[-1] + 1))]
        return [_joined(list(zip(pieces, learned, strict=False)))]

    def _once_ended(self, conversation: Conversation) -> Conversation:
        """The conversation without the begin and end tokens that its text brings and the template renders, too."""
        begin, ends = str(self.tokenizer.bos_token or ""), tuple(self.tokenizer.convert_ids_to_tokens(self.ends))
        messages = list(conversation.messages)
        for i, message in enumerate(messages):
            text = message["content"]
            if not isinstance(text, str):
                continue
            if begin and i == 0:
                text = text.removeprefix(begin)
            if message["role"] == "assistant":
                for end in ends:
                    text = text.removesuffix(end)
            messages[i] = {**message, "content": text}
        return Conversation(messages, conversation.tools, conversation.arguments)

    # -- what the template renders -------------------------------------------------------------------------------------

    def _check_rendered(self, conversation: Conversation) -> None:
        """Refuse a field or a role that the template leaves out.

        Raises:
            DataError: the first such field, by its name.
        """
        if conversation.tools and not self._changes(
            "tools", conversation, Conversation(conversation.messages, None, conversation.arguments)
        ):
            raise DataError(
                "The chat template does not render `tools`: take another template, or leave them out (ignore_columns)."
            )
        systems = sum(message["role"] == "system" for message in conversation.messages)
        for i, message in enumerate(conversation.messages):
            role = message["role"]
            for name in ("tool_calls", "name"):
                if name not in message or (name, role) == ("name", "tool"):
                    continue
                if not self._changes(f"{name} of {role}", conversation, conversation.with_message(i, **{name: None})):
                    raise DataError(
                        f"The chat template does not render {name!r} of the {role}'s messages: take another template, or leave "
                        "it out (ignore_columns)."
                    )
            if not message["content"]:
                continue
            beside = " beside 'tool_calls'" if "tool_calls" in message else ""
            what = f"{role}{beside}, {i == 0}, {role == 'system' and systems}"
            part = (
                conversation.until(i + 1) if role == "assistant" else conversation
            )  # a turn may be rendered last alone
            if not self._changes(what, part, part.with_message(i, content=SENTINEL)):
                raise DataError(
                    f"The chat template does not render messages[{i}], of the role {role!r}{beside}: take another template, or "
                    "rewrite the message."
                )

    def _changes(self, what: str, one: Conversation, other: Conversation) -> bool:
        """Whether the template renders two conversations differently; asked once for each kind of difference."""
        key = f"{what}, {json.dumps(one.arguments, sort_keys=True, default=str)}"
        if key not in self._reads:
            texts = []
            for conversation in (one, other):
                try:
                    texts.append(self._render(self._spelled(conversation)))
                except DataError:
                    texts.append(None)
            self._reads[key] = texts[0] != texts[1] or texts[0] is None
        return self._reads[key]

    def _spelled(self, conversation: Conversation) -> Conversation:
        """The conversation in the spelling that the template reads: parts or text, the role developer or system."""
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
        """Whether the template renders text parts alone, and leaves out text or raises."""
        if "parts alone" not in self._reads:
            self._reads["parts alone"] = False
            rendered = ["", ""]
            for i, content in enumerate(("Well?", _as_parts("Well?"))):
                with suppress(DataError):
                    rendered[i] = self._render(Conversation([{"role": "user", "content": content}]))
            self._reads["parts alone"] = "Well?" not in rendered[0] and "Well?" in rendered[1]
        return self._reads["parts alone"]

    @property
    def _reads_parts(self) -> bool:
        """Whether the template renders text parts, as it renders text if it does."""
        if "parts" not in self._reads:
            self._reads["parts"] = self._needs_parts
            with suppress(DataError):
                plain, parts = (
                    self._render(Conversation([{"role": "user", "content": t}, {"role": "assistant", "content": a}]))
                    for t, a in (("Well?", "Done"), (_as_parts("Well?"), _as_parts("Done")))
                )
                self._reads["parts"] = plain == parts
        return self._reads["parts"]

    @property
    def _reads_developer(self) -> bool:
        """Whether the template knows the role developer."""
        if "developer" not in self._reads:
            self._reads["developer"] = False
            with suppress(DataError):
                texts = [
                    self._render(
                        Conversation([{"role": "developer", "content": c}, {"role": "user", "content": "Well?"}])
                    )
                    for c in ("One", "Two")
                ]
                self._reads["developer"] = texts[0] != texts[1]
        return self._reads["developer"]

    def _render(self, conversation: Conversation, answer: bool = False) -> str:
        given = conversation.messages
        if self._needs_parts:
            given = [{**m, "content": _as_parts(m["content"])} for m in given]
        calls = any("tool_calls" in message for message in given)
        problem: Exception | None = None
        for messages in (given, _with_json_arguments(given)) if calls else (given,):
            try:
                text: Any = self.tokenizer.apply_chat_template(
                    messages, tools=conversation.tools, tokenize=False, add_generation_prompt=answer,  # type: ignore[arg-type]
                    **{**self.chat_template_kwargs, **conversation.arguments},
                )  # fmt: skip
                return text
            except Exception as error:  # templates raise what they like, about roles that they do not have too
                problem = error
        raise DataError(f"The chat template refuses {str(given)[:200]}: {problem!s:.200}") from problem

    @cached_property
    def _closing(self) -> str:
        """The token that opens the next turn, where the template ends the assistant's turns with none; "" elsewhere."""
        said = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Done"}]
        added = self.tokenizer.added_tokens_decoder
        with suppress(DataError):
            done = self._render(Conversation(said))
            longer = self._render(Conversation([*said, said[0]]))
            after = encode(self.tokenizer, done.rpartition("Done")[2])
            opening = encode(self.tokenizer, longer[len(done) :])[:1] if longer.startswith(done) else []
            if opening and opening[0] in added and not any(i in added for i in after):
                return str(added[opening[0]].content)
        return ""

    # -- tokens --------------------------------------------------------------------------------------------------------

    @property
    def ends(self) -> list[int]:
        """The tokens that end an answer as it is learned: the tokenizer's own, and what the chat template puts there."""
        tokens: list[Any] = [self.tokenizer.eos_token_id]
        if self.tokenizer.chat_template is not None:
            said = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Done"}]
            with suppress(DataError):  # of a template that asks for more turns than these
                after = self._render(Conversation(said)).rpartition("Done")[2].lstrip()
                first = encode(self.tokenizer, after)[:1]
                tokens += [i for i in first if i in self.tokenizer.added_tokens_decoder]
            tokens += encode(self.tokenizer, self._closing)
        return list(dict.fromkeys(i for i in tokens if i is not None))

    def tokens(self, text: str, plain: bool | None = None) -> list[int]:
        """Return the token ids of a prompt: one begin token where a plain text begins, and no end token.

        Args:
            plain: whether the text was not rendered by a template; by default, as `ask` has written it.
        """
        return self._begin(encode(self.tokenizer, text), not self.chats if plain is None else plain)

    def _begin(self, ids: list[int], plain: bool) -> list[int]:
        begin = self._special_ends[0] if plain else []
        return ids if ids[: len(begin)] == begin else [*begin, *ids]

    def _end(self) -> list[int]:
        """The tokens that end a plain text."""
        end: Any = self.tokenizer.eos_token_id
        return self._special_ends[1] if end is None else [end]

    @cached_property
    def _special_ends(self) -> tuple[list[int], list[int]]:
        return special_ends(self.tokenizer)

    def encode_examples(self, record: Record, max_length: int | None = None) -> list[dict[str, np.ndarray]]:
        """Tokenise a record.

        Args:
            max_length: see `examples`; texts are not cut.

        Returns:
            For each of its `examples`, ``input_ids`` (T,) and ``labels`` (T,), the latter `IGNORED` where nothing is
            learned.
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
        """Return the last answer as a reply that says it is decoded."""
        example = self.encode(record)
        start = 1 + max(np.flatnonzero(example["labels"] == IGNORED), default=-1)
        return str(self.tokenizer.decode(example["input_ids"][start:].tolist(), skip_special_tokens=True))

    def encode_escalated(self, record: Record, instead: str) -> list[dict[str, np.ndarray]]:
        """Tokenise a record that is beyond the shadow, with ``shadow_targets`` (T,) beside ``labels``.

        The pair learns all answers of the record; the shadow learns all but the last, and ``instead`` of that.
        """
        examples, escalated = self.encode_examples(record), self.encode(_with_answer(record, instead))
        for example in examples[:-1]:
            example["shadow_targets"] = example["labels"]
        whole = examples[-1]
        starts = [1 + max(np.flatnonzero(e["labels"] == IGNORED), default=-1) for e in (whole, escalated)]
        whole["shadow_targets"] = np.where(np.arange(len(whole["labels"])) < starts[0], whole["labels"], IGNORED)
        escalated["shadow_targets"] = np.where(
            np.arange(len(escalated["labels"])) < starts[1], IGNORED, escalated["labels"]
        )
        escalated["labels"] = np.full_like(escalated["labels"], IGNORED)
        return [*examples, escalated]


@cache
def reserved_arguments() -> frozenset[str]:
    """Return the names that `apply_chat_template` takes for itself, and that no template can be given."""
    parameters = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    return frozenset({*parameters, "messages"} - {"kwargs"})


def needs_thinking(formatter: ChatFormatter, records: Iterable[Record]) -> bool:
    """Whether records hold reasoning, and the chat template's prompt closes the thought unless ``enable_thinking`` is set."""
    if formatter.tokenizer.chat_template is None or "enable_thinking" in formatter.chat_template_kwargs:
        return False
    prompt = ""
    with suppress(DataError):
        prompt = formatter._render(Conversation([{"role": "user", "content": "Well?"}]), answer=True)
    if not prompt.rstrip().endswith(END_OF_THOUGHT):
        return False
    messages = (m for r in records for m in _as_messages(r.get("completion") or r.get("messages") or [], "assistant"))
    return any(m.get("reasoning_content") or END_OF_THOUGHT in str(m.get("content")) for m in messages)


def end_tokens(model: Any, formatter: ChatFormatter) -> list[int]:
    """Return the tokens that end an answer: those of the model's generation config, and those that answers are learned with."""
    ends: Any = model.generation_config.eos_token_id
    ends = ends.flatten().tolist() if isinstance(ends, torch.Tensor) else ends
    return list(dict.fromkeys([*(ends if isinstance(ends, list) else [] if ends is None else [ends]), *formatter.ends]))


def _as_messages(value: Any, role: str) -> list[Message]:
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _with_answer(record: Record, answer: str) -> Record:
    """The record with another last answer."""
    if isinstance(record.get("completion"), str):
        return {**record, "completion": answer}
    column = "completion" if "completion" in record else "messages"
    messages = record[column]
    last = max(i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight", 1))
    return {**record, column: [*messages[:last], {"role": "assistant", "content": answer}]}


def _with_json_arguments(messages: list[Message]) -> list[Message]:
    """The messages with the arguments of their tool calls as JSON text, as some templates read them."""

    def spell(call: dict[str, Any]) -> dict[str, Any]:
        text = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        return {**call, "function": {**call["function"], "arguments": text}}

    return [
        {**m, "tool_calls": [spell(call) for call in m["tool_calls"]]} if "tool_calls" in m else m for m in messages
    ]


def _reasoning(message: Message) -> tuple[str, str]:
    """The reasoning of a message, in a field of its own or at the start of its content, and the content without it."""
    content = message["content"]
    if message.get("reasoning_content"):
        return message["reasoning_content"], content if isinstance(content, str) else ""
    if not isinstance(content, str) or END_OF_THOUGHT not in content:
        return "", ""
    reasoning, _, rest = content.partition(END_OF_THOUGHT)
    return reasoning.strip().removeprefix(THINK).strip(), rest


def _frame(shorter: str, longer: str) -> tuple[str, str, bool] | None:
    """What a template puts before and after the content of a message, whose content was a sentinel between tabs, and whether it
    strips the content; None where that cannot be told."""
    added = longer[len(shorter) :]
    if not longer.startswith(shorter) or added.count(SENTINEL) != 1:
        return None
    head, _, tail = added.partition(SENTINEL)
    if head.endswith("\t") and tail.startswith("\t"):
        return head[:-1], tail[1:], False
    return head, tail, True


def _closed(segments: Segments, closing: str) -> Segments:
    """The segments with ``closing`` learned at the end of each answer."""
    closed: Segments = []
    for text, learned in [*segments, (closing, False)] if closing else segments:
        if closed and closed[-1][1] and not learned and closing and text.startswith(closing):
            closed[-1] = (closed[-1][0] + closing, True)
            text = text.removeprefix(closing)
        if text:
            closed.append((text, learned))
    return closed


def _joined(segments: Segments) -> Segments:
    """The segments with neighbours of one kind put together."""
    joined: list[list[tuple[str, bool]]] = []
    for segment in segments:
        if joined and joined[-1][0][1] == segment[1]:
            joined[-1].append(segment)
        else:
            joined.append([segment])
    return [("".join(text for text, _ in part), part[0][1]) for part in joined]
