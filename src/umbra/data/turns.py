"""Conversations → text segments: the prompt and the answer of each of the assistant's turns."""

from umbra.data.conversation import Conversation
from umbra.data.reasoning import THINK, render_turn, split_reasoning
from umbra.data.template import SENTINEL, ChatTemplate
from umbra.data.tokens import Segments, encode
from umbra.errors import DataError

FEW = 4  # number of turns up to which every prompt is rendered


def render_turns(
    template: ChatTemplate, conversation: Conversation, turns: list[int], max_length: int | None = None
) -> list[Segments]:
    """Return the texts of a conversation in which the given turns are learned.

    Args:
        template: the chat template.
        conversation: the conversation.
        turns: indices of the assistant's messages that are learned, in order.
        max_length: tokens; further texts whose prompts are longer are omitted.

    Returns:
        One text; or several, if the template rewrites earlier turns once a conversation continues.

    Raises:
        DataError: the template does not render a turn.
    """
    return _from_one_rendering(template, conversation, turns) or turn_by_turn(template, conversation, turns, max_length)


def turn_by_turn(
    template: ChatTemplate, conversation: Conversation, turns: list[int], max_length: int | None
) -> list[Segments]:
    """Return what `render_turns` returns, from two renderings for each turn.

    Each turn continues the text of the previous one, or begins another text if the template rewrote that.
    """
    texts: list[Segments] = []
    whole, done = template.render(conversation) if len(turns) > 1 else "", ""
    for i in turns:
        before, answer = _turn(template, conversation, i)
        if i != turns[-1]:
            answer = _without_last_end(template, whole, before, answer)
        if texts and before.startswith(done):
            texts[-1] += [(before[len(done) :], False), (answer, True)]
        elif texts and max_length is not None and len(encode(template.tokenizer, before)) >= max_length:
            break
        else:
            texts.append([(before, False), (answer, True)])
        done = before + answer
    return texts


def _turn(template: ChatTemplate, conversation: Conversation, index: int) -> tuple[str, str]:
    """Return the prompt of a turn and its answer."""
    if index == 0:
        return _opening(template, conversation)
    before, after = (
        template.render(conversation.until(index), generation_prompt=True),
        render_turn(template, conversation, index),
    )
    reasoning, content = split_reasoning(conversation.messages[index])
    if (
        reasoning and before.rstrip().endswith(THINK) and THINK in after[len(before) :]
    ):  # the prompt and the template both open it
        conversation = conversation.with_message(index, content=content.lstrip("\n"), reasoning_content=reasoning)
        after = render_turn(template, conversation, index)
    if after.startswith(before):
        return before, after[len(before) :]
    if not reasoning:
        return before, _after_common_tokens(template, before, after)
    if "enable_thinking" not in {**template.arguments, **conversation.arguments}:
        arguments = {**conversation.arguments, "enable_thinking": True}
        return _turn(template, Conversation(conversation.messages, conversation.tools, arguments), index)
    raise DataError(
        f"The chat template's prompt ends with {before[-40:]!r}, which the answer's reasoning cannot follow: leave out the "
        "reasoning, or the chat_template_kwargs that switch it off."
    )


def _without_last_end(template: ChatTemplate, whole: str, before: str, answer: str) -> str:
    """Return the answer of a turn that others follow, without an end token that the template puts after the last turn only."""
    bare = answer.removesuffix(str(template.tokenizer.eos_token or ""))
    if bare == answer or whole.startswith(before + answer) or not whole.startswith(before + bare):
        return answer
    last = encode(template.tokenizer, bare.rstrip())[-1:]
    return bare if last and last[0] in template.tokenizer.added_tokens_decoder else answer


def _after_common_tokens(template: ChatTemplate, before: str, after: str) -> str:
    """Return the text ``after`` without the tokens that it shares with the beginning of ``before``."""
    prompt_ids, ids = encode(template.tokenizer, before), encode(template.tokenizer, after)
    same = next(
        (n for n, (a, b) in enumerate(zip(prompt_ids, ids, strict=False)) if a != b), min(len(prompt_ids), len(ids))
    )
    place = len(template.tokenizer.decode(ids[:same]))
    if template.tokenizer.is_fast:
        encoded = template.tokenizer(after, add_special_tokens=False, return_offsets_mapping=True)
        place = encoded["offset_mapping"][same][0] if same < len(ids) else len(after)
    return after[place:]


def _opening(template: ChatTemplate, conversation: Conversation) -> tuple[str, str]:
    """Return the prompt and the answer of a turn that opens the conversation."""
    after, question = render_turn(template, conversation, 0), Conversation([{"role": "user", "content": "Well?"}])
    asked, bare = template.render(question, generation_prompt=True), template.render(question)
    header = asked[len(bare) :] if asked.startswith(bare) else ""
    start, _, answer = after.partition(header) if header else ("", "", "")
    if not answer:
        raise DataError(
            "The conversation begins with the assistant, and the chat template does not show where the answer begins: put a "
            "message of the user or the system before it, or set its weight to 0."
        )
    return start + header, answer


def _from_one_rendering(template: ChatTemplate, conversation: Conversation, turns: list[int]) -> list[Segments] | None:
    """Return the text of a long conversation if the template renders all its messages alike; None otherwise.

    Two messages after the first turn show what surrounds the content of a user's and of an assistant's message. The text that
    this predicts for all messages must equal the template's rendering.
    """
    messages = conversation.messages
    start = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), 0)
    later, roles = messages[start + 1 :], ("user", "assistant")
    plain = all(isinstance(m["content"], str) and m.keys() <= {"role", "content"} for m in messages)
    if len(turns) <= FEW or not (plain and start) or any(m["role"] != roles[i % 2] for i, m in enumerate(later)):
        return None
    probe = conversation.until(start + 1)
    probe.messages.extend({"role": role, "content": f"\t{SENTINEL}\t"} for role in roles)
    before, after = template.render(probe.until(start), generation_prompt=True), template.render(probe.until(start + 1))
    if not after.startswith(before):
        return None
    asked, answered = template.render(probe.until(start + 2), generation_prompt=True), template.render(probe)
    answer = _without_last_end(template, asked, before, after[len(before) :])
    ending = after[len(before) + len(answer) :]  # after the last turn only
    after, answered = before + answer, answered.removesuffix(ending)
    frames = {"user": _frame(after, asked), "assistant": _frame(asked, answered)}
    if None in frames.values():
        return None
    pieces = [before, answer]
    for message in later:
        head, tail, strips = frames[message["role"]] or ("", "", False)
        pieces.append(head + (message["content"].strip() if strips else message["content"]) + tail)
    pieces[-1] += ending
    if "".join(pieces) != template.render(conversation):
        return None
    learned = [False, *(i in set(turns) for i in range(start, turns[-1] + 1))]
    return [_joined(list(zip(pieces, learned, strict=False)))]


def without_special_ends(template: ChatTemplate, conversation: Conversation) -> Conversation:
    """Return the conversation without begin and end tokens in its text, which the template adds itself."""
    begin, ends = (
        str(template.tokenizer.bos_token or ""),
        tuple(template.tokenizer.convert_ids_to_tokens(template.ends)),
    )
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


def _frame(shorter: str, longer: str) -> tuple[str, str, bool] | None:
    """Return what a template puts before and after the content of a message, and whether it strips the content.

    Args:
        shorter: the text without the message.
        longer: the text with the message, whose content is `SENTINEL` between tabs.

    Returns:
        None if the texts do not show it.
    """
    added = longer[len(shorter) :]
    if not longer.startswith(shorter) or added.count(SENTINEL) != 1:
        return None
    head, _, tail = added.partition(SENTINEL)
    if head.endswith("\t") and tail.startswith("\t"):
        return head[:-1], tail[1:], False
    return head, tail, True


def close_answers(segments: Segments, closing: str) -> Segments:
    """Return the segments with ``closing`` learned at the end of each answer."""
    closed: Segments = []
    for text, learned in [*segments, (closing, False)] if closing else segments:
        if closed and closed[-1][1] and not learned and closing and text.startswith(closing):
            closed[-1] = (closed[-1][0] + closing, True)
            text = text.removeprefix(closing)
        if text:
            closed.append((text, learned))
    return closed


def _joined(segments: Segments) -> Segments:
    """Return the segments, with neighbours of the same kind merged."""
    joined: list[list[tuple[str, bool]]] = []
    for segment in segments:
        if joined and joined[-1][0][1] == segment[1]:
            joined[-1].append(segment)
        else:
            joined.append([segment])
    return [("".join(text for text, _ in part), part[0][1]) for part in joined]
