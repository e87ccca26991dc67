"""What is learned, for every form × real chat templates × tokenizer families, beside TRL and beside texts written by hand."""

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import trl
from transformers import LlamaConfig
from trl.trainer.sft_trainer import SFTTrainer

from support.tokenizers_of_families import FAMILIES, make_tokenizer
from umbra import DataError
from umbra.data import ChatFormatter, encode_all
from umbra.data.conversation import Conversation
from umbra.data.template import ChatTemplate
from umbra.data.tokens import encode
from umbra.data.turns import turn_by_turn
from umbra.evaluation.scoring import score_generation
from umbra.method.losses import IGNORED

FOLDER = Path(trl.__file__).parent / "chat_templates"
# The end of an answer as it is learned, written by hand: {} is its text.
ANSWERS = {
    "cohere": "{}<|END_OF_TURN_TOKEN|>",
    "cohere2": "{}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "deepseek_r1_distill": "{}<｜end▁of▁sentence｜>",
    "gemma": "{}<end_of_turn>\n",
    "gemma3": "{}<end_of_turn>\n",
    "gemma4_v5": "{}<turn|>\n",
    "glm4moe": "\n<think></think>\n{}",
    "gptoss": "<|channel|>final<|message|>{}<|return|>",
    "lfm2_2_5": "{}<|im_end|>\n",
    "llama3": "{}<|eot_id|>",
    "llama3_1": "{}<|eot_id|>",
    "nemotron_3_nano": "</think>{}<|im_end|>\n",
    "phi3": "{}<|end|>\n",
    "qwen2_5": "{}<|im_end|>\n",
    "qwen3": "<think>\n\n</think>\n\n{}<|im_end|>\n",
    "qwen3_5_nothink": "{}<|im_end|>\n",
    "qwen3_5_think": "\n</think>\n\n{}<|im_end|>\n",
    "qwen3_6": "\n</think>\n\n{}<|im_end|>\n",
    "qwen3_8": "\n</think>\n\n{}<|im_end|>\n",
    "qwen3_instruct_2507": "{}<|im_end|>\n",
}
REASONING = {  # "340" after the reasoning "6*7"
    "deepseek_r1_distill": "6*7\n</think>\n\n340<｜end▁of▁sentence｜>",
    "glm4moe": "\n<think>6*7</think>\n340",
    "nemotron_3_nano": "\n6*7\n</think>\n340<|im_end|>\n",
    "qwen3": "<think>\n6*7\n</think>\n\n340<|im_end|>\n",
    "qwen3_5_nothink": "6*7\n</think>\n\n340<|im_end|>\n",
    "qwen3_5_think": "6*7\n</think>\n\n340<|im_end|>\n",
    "qwen3_6": "6*7\n</think>\n\n340<|im_end|>\n",
    "qwen3_8": "6*7\n</think>\n\n340<|im_end|>\n",
}
SYSTEM = {"role": "system", "content": "You are a fox."}
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "d", "parameters": {"type": "object", "properties": {}}},
}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


CHAT = [user("four?"), assistant("six"), user("Bonjour?"), assistant("Yes. No."), user("One?"), assistant("Two")]
LONG = [m for i in range(8) for m in (user(f"What is {i}?"), assistant(f"It is {i}, you."))]


@cache
def formatter(family: str, name: str) -> ChatFormatter:
    return ChatFormatter(make_tokenizer(family, (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")))


def learned(made: ChatFormatter, record: dict) -> list[list[int]]:
    return [[i for i in e["labels"].tolist() if i != IGNORED] for e in made.encode_examples(record)]


def learned_by_trl(tokenizer, records: list[dict]) -> list[list[int]]:
    """By TRL's own preparation of a data set of prompts and completions."""
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=True, _is_vlm=False)
    args = SimpleNamespace(
        dataset_num_proc=None, dataset_text_field="text", assistant_only_loss=False, max_length=None, packing=False,
        packing_strategy=None, pad_token=None, shuffle_dataset=False, truncation_mode="keep_start",
    )  # fmt: skip
    data = datasets.Dataset.from_list(records)
    rows = SFTTrainer._prepare_dataset(trainer, data, tokenizer, args, False, None, "train")
    return [[i for i in row["labels"] if i != IGNORED] for row in rows]


def turns(messages: list[dict]) -> list[dict]:
    """Each turn of the assistant as a record of its own."""
    return [
        {"prompt": messages[:i], "completion": [m]}
        for i, m in enumerate(messages)
        if m["role"] == "assistant"
    ]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ANSWERS)
def test_learned_tokens_equal_trl_and_prompts_equal_transformers(family, name):
    made = formatter(family, name)
    tokenizer = made.tokenizer
    records = turns(CHAT) + turns(LONG[:4])
    expected = learned_by_trl(tokenizer, records)
    for record, ids in zip(records, expected, strict=True):
        asked = tokenizer.apply_chat_template(record["prompt"], add_generation_prompt=True)["input_ids"]
        whole = made.encode(record)["input_ids"].tolist()
        assert made.tokens(made.prompt(record)) == asked == whole[: len(asked)]
        plain = {"prompt": record["prompt"][-1]["content"], "completion": record["completion"][0]["content"]}
        if len(record["prompt"]) == 1:
            assert made.encode(plain)["input_ids"].tolist() == whole
        full = tokenizer.apply_chat_template(record["prompt"] + record["completion"])["input_ids"]
        if full[: len(asked)] == asked:  # TRL trains after a prompt that is asked
            assert whole == full
            assert whole[len(asked) :] == ids
        answer = ANSWERS[name].format(record["completion"][0]["content"])
        text = tokenizer.apply_chat_template(record["prompt"], add_generation_prompt=True, tokenize=False)
        assert made.segments(record)[0] == (text, False)
        assert made.segments(record)[1][0].removesuffix(tokenizer.eos_token or "") == answer
    for messages in (CHAT, LONG):
        together = [i for part in learned(made, {"messages": messages}) for i in part]
        apart = [learned(made, record)[0] for record in turns(messages)]
        assert together == [i for part in in_conversation(made, name, apart) for i in part]


def in_conversation(made: ChatFormatter, name: str, answers: list[list[int]]) -> list[list[int]]:
    """Answers as one conversation has them: Phi's have the text's end once, GLM's end with the next turn's token."""
    if name == "phi3":
        end = [made.tokenizer.eos_token_id] if made.tokenizer.eos_token_id is not None else []
        return [*(a[: len(a) - len(end)] for a in answers[:-1]), answers[-1]] if end else answers
    closing = encode(made.tokenizer, "<|user|>") if name == "glm4moe" else []
    return [a + closing for a in answers]


def one_line_each(text: str) -> str:
    """The text without empty lines: templates space reasoning differently inline and in a field."""
    return "\n".join(line for line in text.removesuffix("<|user|>").split("\n") if line)


@pytest.mark.parametrize("family", FAMILIES[:2])
@pytest.mark.parametrize("name", REASONING)
def test_reasoning_is_learned_inline_and_from_its_field(family, name):
    made, expected = formatter(family, name), one_line_each(REASONING[name])
    inline, fields = assistant("<think>\n6*7\n</think>\n\n340"), ("reasoning_content", "reasoning", "thinking")
    for answer in (inline, *(assistant("340", **{field: "6*7"}) for field in fields)):
        (text,) = made.examples({"prompt": [user("17*20?")], "completion": [answer]})
        assert one_line_each(text[-1][0]) == expected
        texts = made.examples({"messages": [user("a"), answer, user("17*20?"), answer]})
        answers = [t for text in texts for t, is_learned in text if is_learned]
        assert [one_line_each(t) for t in answers] == [expected] * 2


READS_TOOLS = (
    "gemma4_v5", "glm4moe", "gptoss", "lfm2_2_5", "llama3_1", "nemotron_3_nano", "qwen2_5", "qwen3", "qwen3_5_nothink", "qwen3_6",
)  # fmt: skip


@pytest.mark.parametrize("name", READS_TOOLS)
def test_tools_calls_and_results_are_rendered_in_every_spelling(name):
    made = formatter(FAMILIES[0], name)
    arguments = {"city": "Paris", "days": 2}
    nested = {"id": "abcdefghi", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    as_text = {**nested, "function": {"name": "get_weather", "arguments": json.dumps(arguments)}}
    flat = {"name": "get_weather", "arguments": arguments}
    result = {"role": "tool", "tool_call_id": "abcdefghi", "name": "get_weather", "content": "21"}
    spellings = [
        {"tool_calls": [nested]},
        {"tool_calls": [as_text]},
        {"tool_calls": json.dumps([flat])},
        {"function_call": flat},
    ]
    texts = []
    for tools in ([TOOL], [TOOL["function"]], json.dumps([TOOL])):
        for calls in spellings:
            messages = [user("Paris?"), assistant(None, **calls, refusal=None), result, assistant("Sunny.")]
            made_of = made.examples({"tools": tools, "messages": messages})
            texts.append([[(t.replace("abcdefghi", ""), is_learned) for t, is_learned in text] for text in made_of])
    first = texts[0]
    assert all(other == first for other in texts)
    answers = [t for text in first for t, is_learned in text if is_learned]
    assert "get_weather" in answers[0] and "Paris" in answers[0] and "Sunny." in answers[-1]
    context = "".join(t for text in first for t, is_learned in text if not is_learned)
    assert "21" in context and "get_weather" in context.partition("Paris?")[0]
    expected = learned_by_trl(
        made.tokenizer,
        [{"tools": [TOOL], "prompt": [user("Paris?")], "completion": [assistant("", tool_calls=[nested])]}],
    )  # fmt: skip
    ours = learned(made, {"tools": [TOOL], "messages": [user("Paris?"), assistant("", tool_calls=[nested])]})
    if name != "qwen3_6":  # whose newlines around an empty thought TRL merges
        assert ours[0][: len(expected[0])] == expected[0]


@pytest.mark.parametrize(
    ("name", "record", "says"),
    [
        ("llama3", {"tools": [TOOL], "messages": CHAT[:2]}, "does not render `tools`"),
        ("deepseek_r1_distill", {"tools": [TOOL], "messages": CHAT[:2]}, "does not render `tools`"),
        ("lfm2", {"messages": [user("a"), assistant("", tool_calls=[{"name": "f"}])]}, "'tool_calls' of the assistant"),
        ("qwen2_5", {"messages": [{**user("a"), "name": "Bob"}, assistant("b")]}, "'name' of the user"),
        ("qwen3", {"messages": [user("a"), {"role": "critic", "content": "c"}, assistant("b")]}, "role 'critic'"),
        ("gptoss", {"messages": [*CHAT[:2], SYSTEM, *CHAT[:2]]}, r"messages\[2\], with the role 'system'"),
        ("deepseek_r1_distill", {"messages": [SYSTEM, *CHAT[:2], SYSTEM, *CHAT[:2]]}, r"messages\[0\], with the role 'system'"),
        ("llama3_1", {"messages": [user("a"), assistant("b", tool_calls=[{"name": "f"}])]}, "'assistant' and 'tool_calls'"),
        ("gemma", {"messages": [SYSTEM, user("a"), assistant("b")]}, "System role not supported"),
        ("gemma", {"messages": [user("a"), assistant("b", reasoning_content="c")]}, "'reasoning_content'"),
    ],
)  # fmt: skip
def test_content_dropped_by_template_is_refused_by_name(name, record, says):
    with pytest.raises(DataError, match=says):
        formatter(FAMILIES[0], name).examples(record)


@pytest.mark.parametrize("name", ["llama3", "gemma", "gemma3", "qwen2_5", "qwen3", "phi3"])
def test_text_parts_are_rendered_as_text(name):
    made = formatter(FAMILIES[0], name)
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in CHAT]
    assert made.examples({"messages": parts}) == made.examples({"messages": CHAT})


@pytest.mark.parametrize("name", ["idefics3", "smolvlm", "llava_next"])
def test_parts_only_templates_render_plain_text(name):
    made = formatter(FAMILIES[0], name)
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in CHAT]
    (text,) = made.examples({"messages": CHAT})
    assert [text] == made.examples({"messages": parts})
    assert "".join(t for t, _ in text) == made.tokenizer.apply_chat_template(parts, tokenize=False)
    assert ["six" in text[1][0], "Two" in text[-1][0]] == [True, True]


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "gemma3", "phi3", "glm4moe"])
def test_long_conversation_needs_few_renderings(name, monkeypatch):
    made, calls, render = formatter(FAMILIES[0], name), [], ChatTemplate.render
    messages = [m for i in range(200) for m in (user(f"What is {i}?"), assistant(f"It is {i}, you."))]
    by_turn = turn_by_turn(made.template, Conversation(messages[:24]), list(range(1, 24, 2)), None)
    monkeypatch.setattr(ChatTemplate, "render", lambda *a, **k: (calls.append(a), render(*a, **k))[1])
    (text,) = made.examples({"messages": messages})
    assert len(calls) < 30
    joined = "".join(t for t, _ in text)
    assert joined.removesuffix("<|user|>") == made.tokenizer.apply_chat_template(messages, tokenize=False)
    answers = [t.removesuffix("<|user|>") for t, is_learned in text if is_learned]
    exact = [t for text in by_turn for t, is_learned in text if is_learned]
    assert len(answers) == 200 and answers[:11] == exact[:11]


def test_turns_rewritten_by_template_are_learned_separately(capsys):
    made = formatter(FAMILIES[0], "qwen3")
    texts = made.examples({"messages": CHAT})
    assert [text[-1][0] for text in texts] == [ANSWERS["qwen3"].format(m["content"]) for m in CHAT[1::2]]
    examples = encode_all([{"messages": CHAT}], made.tokenizer, max_length=1000, name="d")
    assert len(examples) == 3
    assert "1 of 1 conversations are learned turn by turn" in capsys.readouterr().out
    assert len(made.encode_examples({"messages": LONG}, max_length=40)) < len(made.encode_examples({"messages": LONG}))


class Parrot:
    """A model whose replies are the learned tokens of each record's last answer."""

    def __init__(self, made: ChatFormatter, records: list[dict]):
        self.config, self.device = LlamaConfig(), torch.device("cpu")
        self.generation_config = SimpleNamespace(eos_token_id=made.tokenizer.eos_token_id)
        examples = [made.encode(record) for record in records]
        self.asked = [made.tokens(made.prompt(r), made.is_plain(r)) for r in records]
        self.replies = [e["input_ids"][len(a) :].tolist() for e, a in zip(examples, self.asked, strict=True)]

    def eval(self) -> None:
        pass

    def generate(self, input_ids, attention_mask, pad_token_id, **_):
        rows = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        replies = [self.replies[self.asked.index(row)] for row in rows]
        width = max(map(len, replies))
        padded = torch.tensor([reply + [pad_token_id] * (width - len(reply)) for reply in replies])
        return torch.cat([input_ids, padded], 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "name", ["deepseek_r1_distill", "gemma3", "llama3", "phi3", "qwen2_5", "qwen3", "qwen3_5_think"]
)
def test_learned_tokens_score_as_correct_reply(family, name):
    made = formatter(family, name)
    records = [{"prompt": "four?", "completion": " six "}, {"messages": CHAT}, {"messages": LONG[:6]}]
    if name in REASONING:
        records.append({"prompt": "17*20?", "completion": "<think>\n6*7\n</think>\n\n340"})
    if name.startswith("qwen"):
        records.append({"tools": [TOOL], "messages": CHAT[:2]})
    replies, _, _ = score_generation(Parrot(made, records), made, records, batch_size=3)  # type: ignore[arg-type]
    assert [reply["correct"] for reply in replies] == [True] * len(records)
