"""Tokenisation in which a prompt has the same tokens in inference as at the start of a training record.

A text is tokenised as a whole, as by `apply_chat_template`. Only if a token would span the end of a prompt, or the prompt alone
would be tokenised differently, the text is cut there, and the rest is tokenised as a continuation.
"""

from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

Segments = list[tuple[str, bool]]  # consecutive pieces of one text, and whether each is learned
ANCHORS = ("\n", "x", ".")  # prefixes after which a continuation is tokenised as in the middle of a text


def special_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the tokens that a tokenizer puts before and after a text by itself, such as BOS, or [CLS] and [SEP]."""
    core, whole = encode(tokenizer, "x"), _ids(tokenizer, "x", add_special_tokens=True)
    for start in range(len(whole) - len(core) + 1):
        if whole[start : start + len(core)] == core:
            return whole[:start], whole[start + len(core) :]
    return [], []


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenise a text; no special token is added."""
    return _ids(tokenizer, text, add_special_tokens=False) if text else []


def encode_plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenise a text with the special tokens that the tokenizer puts around it, none of them twice."""
    ids, (begin, end) = encode(tokenizer, text), special_ends(tokenizer)
    ids = ids if ids[: len(begin)] == begin else [*begin, *ids]
    return ids if not end or ids[-len(end) :] == end else [*ids, *end]


def encode_segments(tokenizer: PreTrainedTokenizerBase, segments: Segments) -> list[tuple[list[int], bool]]:
    """Tokenise consecutive segments as one text.

    Returns:
        The token ids of each segment, and whether it is learned. The ids of all segments before a learned one are those of
        `encode` for their text.
    """
    whole = _tokenized(tokenizer, len(tokenizer), "".join(text for text, _ in segments))
    ends, place = [0], 0
    for number, (text, _) in enumerate(segments):
        place += len(text)
        end = whole.count(place)
        starts_answer = number + 1 < len(segments) and segments[number + 1][1]
        if starts_answer and not whole.is_boundary(place, end):
            asked = encode_segments(tokenizer, segments[: number + 1])
            return [*asked, *_continue(tokenizer, segments[number + 1 :])]
        ends.append(end)
    spans = pairwise([*ends[:-1], len(whole.ids)])
    return [(whole.ids[a:b], learned) for (a, b), (_, learned) in zip(spans, segments, strict=True)]


def cut_where_merged(tokenizer: PreTrainedTokenizerBase, segments: Segments) -> list[Segments]:
    """Return the text as one, or one text for each answer if a token would span the end of an earlier prompt.

    Otherwise the prompt of a later turn would not begin with the tokens that are learned for the earlier one.
    """
    answers = [n for n, (_, learned) in enumerate(segments) if learned]
    if len(answers) < 2:
        return [segments]
    whole, place = _tokenized(tokenizer, len(tokenizer), "".join(text for text, _ in segments)), 0
    for number, (text, learned) in enumerate(segments):
        if learned and number < answers[-1] and place and not whole.is_boundary(place, whole.count(place)):
            return [[("".join(text for text, _ in segments[:n]), False), segments[n]] for n in answers]
        place += len(text)
    return [segments]


def _continue(tokenizer: PreTrainedTokenizerBase, segments: Segments) -> list[tuple[list[int], bool]]:
    """Tokenise segments as the continuation of a text, without the blank that some tokenizers put before a first word."""
    text = "".join(text for text, _ in segments)
    for anchor in ANCHORS:
        anchored = _tokenized(tokenizer, len(tokenizer), anchor + text)
        if anchored.is_boundary(len(anchor), anchored.count(len(anchor))):
            return encode_segments(tokenizer, [(anchor, False), *segments])[1:]
    return encode_segments(tokenizer, segments)


@dataclass(frozen=True)
class _Tokenized:
    """A text and its tokens; ``starts`` holds the character at which each begins, None for a tokenizer without offsets."""

    tokenizer: PreTrainedTokenizerBase
    text: str
    ids: list[int]
    starts: list[int] | None

    def count(self, place: int) -> int:
        """Return the number of tokens that begin before a character."""
        if self.starts is not None:
            return bisect_left(self.starts, place)
        before = encode(self.tokenizer, self.text[:place])
        return next(
            (n for n, (a, b) in enumerate(zip(before, self.ids, strict=False)) if a != b),
            min(len(before), len(self.ids)),
        )

    def is_boundary(self, place: int, count: int) -> bool:
        """Return whether the first ``count`` tokens are those of the text up to a character.

        Tokenizers split at added tokens first, so that only the text after the last one has to be compared.
        """
        if self.starts is None:
            return encode(self.tokenizer, self.text[:place]) == self.ids[:count]
        added = _added_tokens(self.tokenizer, len(self.tokenizer))
        last = next((n for n in range(count - 1, -1, -1) if self._is_written(n, added)), 0)
        start = self.starts[last] if last else 0
        return list(_encode_short(self.tokenizer, len(self.tokenizer), self.text[start:place])) == self.ids[last:count]

    def _is_written(self, n: int, added: dict[int, str]) -> bool:
        """Return whether token ``n`` is an added token that the text spells out, and not the unknown token."""
        assert self.starts is not None
        return self.ids[n] in added and self.text.startswith(added[self.ids[n]], self.starts[n])


@lru_cache(maxsize=2)
def _tokenized(tokenizer: PreTrainedTokenizerBase, size: int, text: str) -> _Tokenized:
    if not text or not tokenizer.is_fast:
        return _Tokenized(tokenizer, text, encode(tokenizer, text), None)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return _Tokenized(tokenizer, text, encoded["input_ids"], [start for start, _ in encoded["offset_mapping"]])


@lru_cache(maxsize=8)
def _added_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[int, str]:
    return {i: str(token.content) for i, token in tokenizer.added_tokens_decoder.items()}


@lru_cache(maxsize=64)
def _encode_short(tokenizer: PreTrainedTokenizerBase, size: int, text: str) -> tuple[int, ...]:
    """Encode one of the few texts that open the assistant's turns of a conversation."""
    return tuple(encode(tokenizer, text))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> list[int]:
    encoded = tokenizer(text, add_special_tokens=add_special_tokens)
    return encoded["input_ids"]
