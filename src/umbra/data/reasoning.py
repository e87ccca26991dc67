"""The assistant's reasoning: where a message holds it, and how a turn is rendered with it."""

from umbra.data.conversation import Conversation
from umbra.data.records import Message
from umbra.data.template import SENTINEL, ChatTemplate
from umbra.errors import DataError

THINK, END_OF_THOUGHT = "<think>", "</think>"
HIDDEN = {THINK: "\ue000", END_OF_THOUGHT: "\ue001"}  # spellings that no template takes for reasoning


def split_reasoning(message: Message) -> tuple[str, str]:
    """Return the reasoning of a message, from its own field or the start of the content, and the content without it."""
    content = message["content"]
    if message.get("reasoning_content"):
        return message["reasoning_content"], content if isinstance(content, str) else ""
    if not isinstance(content, str) or END_OF_THOUGHT not in content:
        return "", ""
    reasoning, _, answer = content.partition(END_OF_THOUGHT)
    return reasoning.strip().removeprefix(THINK).strip(), answer


def render_turn(template: ChatTemplate, conversation: Conversation, index: int) -> str:
    """Return the text of a conversation up to and including a turn, with the turn's reasoning even if the template omits it.

    Args:
        template: the chat template.
        conversation: the conversation.
        index: the message of the turn.

    Raises:
        DataError: the template renders no reasoning, and none can be put into the content.
    """
    conversation, message = conversation.until(index + 1), conversation.messages[index]
    reasoning, answer = split_reasoning(message)
    if not reasoning:
        return template.render(conversation)
    is_field = "reasoning_content" in message
    if template.changes(f"reasoning, {is_field}", conversation, _with_reasoning(conversation, index, SENTINEL)):
        return template.render(conversation)
    if is_field and END_OF_THOUGHT not in str(template.tokenizer.chat_template):
        raise DataError(
            "The chat template does not render 'reasoning_content': use another template, write it into 'content' as "
            f"{THINK}…{END_OF_THOUGHT}, or drop it (ignore_columns)."
        )
    text = message["content"] if not is_field else f"{THINK}\n{reasoning.strip()}\n{END_OF_THOUGHT}\n\n{answer}"
    for visible, hidden in HIDDEN.items():
        text = text.replace(visible, hidden)
    rendered = template.render(conversation.with_message(index, content=text, reasoning_content=None))
    for visible, hidden in HIDDEN.items():
        rendered = rendered.replace(hidden, visible)
    return rendered


def _with_reasoning(conversation: Conversation, index: int, text: str) -> Conversation:
    """Return the conversation with the reasoning of one message replaced, where the message holds it."""
    message = conversation.messages[index]
    if "reasoning_content" in message:
        return conversation.with_message(index, reasoning_content=text)
    _, answer = split_reasoning(message)
    return conversation.with_message(index, content=f"{THINK}\n{text}\n{END_OF_THOUGHT}{answer}")
