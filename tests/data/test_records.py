"""The data contract: what each field of a record means, what is refused by name, and the ends of plain texts."""

import re
from pathlib import Path

import pytest

from support.tokenizers_of_families import FAMILIES, make_tokenizer
from umbra import DataError
from umbra.data import ChatFormatter, Labels, describe_classes, encode_all, normalize
from umbra.data.chat import needs_thinking
from umbra.data.records import COLUMNS, FIELDS
from umbra.method.losses import IGNORED

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CHAT = [USER, ANSWER]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS = [{"type": "text", "text": "b"}]
CALLING = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
}


def learned(tokenizer, example) -> str:
    labels = example["labels"]
    return tokenizer.decode(labels[labels != IGNORED].tolist())


# -- what a field means ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "becomes"),
    [
        ({"from": "gpt", "value": "b"}, ANSWER),
        ({"from": "human", "value": "a"}, USER),
        ({**ANSWER, "refusal": None, "annotations": [], "audio": None, "tool_calls": None}, ANSWER),
        ({**ANSWER, "content": None, "tool_calls": [{"name": "f", "arguments": '{"x": 1}'}]}, CALLING),
        ({**ANSWER, "content": None, "function_call": {"name": "f", "arguments": {"x": 1}}}, CALLING),
        ({"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}, CALLING),
        ({**ANSWER, "content": [{"type": "output_text", "text": "b", "annotations": []}]}, {**ANSWER, "content": PARTS}),
        ({"role": "tool", "content": {"t": 21}}, {"role": "tool", "content": '{"t": 21}'}),
        ({"role": "function", "name": "f", "content": "21"}, {"role": "tool", "name": "f", "content": "21"}),
        ({**ANSWER, "reasoning": "c"}, {**ANSWER, "reasoning_content": "c"}),
    ],
)  # fmt: skip
def test_each_spelling_of_a_message_is_read(message, becomes):
    record = normalize({"messages": [message, *CHAT]}, "here")
    assert record["messages"][0] == becomes
    assert normalize(record, "here") == record


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"text": "a", "foo": 1}, "unknown column 'foo'.*ignore_columns: [foo]"),
        ({"messages": CHAT, "tool": []}, "unknown column 'tool': did you mean 'tools'"),
        ({"messages": [USER, {**ANSWER, "contnet": "x"}]}, "messages[1] has the unknown field 'contnet': did you mean 'content'"),
        ({"messages": CHAT, "images": ["x"]}, "'images': Umbra trains on text alone"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}, "'image': Umbra trains on text"),
        ({"prompt": "a", "completion": "b", "image": "x"}, "'image'"),
        ({"messages": [{**USER, "weight": 0}, ANSWER]}, "'weight' belongs to the assistant"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "'weight' must be 0 or 1, got 0.5"),
        ({"messages": [USER, {**ANSWER, "refusal": "no"}]}, "has 'refusal'"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "{"}]}]}, "'arguments' is not JSON"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"type": "custom", "custom": {}}]}]}, "type 'custom'"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"arguments": {}}]}]}, "does not name its function"),
        ({"messages": CHAT, "tools": [{"type": "web_search"}]}, "type 'web_search'"),
        ({"messages": [USER, ANSWER, USER]}, "ends with the 'user' turn"),
        ({"prompt": "a", "completion": "b", "messages": CHAT}, "columns of several forms"),
        ({"prompt": "a", "completion": "b", "escalate": "yes"}, "'escalate' must be true or false, got 'yes'"),
        ({"text": "a", "label": "x", "escalate": True}, "unknown column 'escalate'"),
        ({"text": "", "label": "neg"}, "'text' is empty"),
        ({"instruction": "a", "output": "b"}, "Alpaca's columns: convert with jq"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference data"),
        ({"prompt": [USER], "completion": [USER]}, "'completion' holds no message of the assistant"),
        ({"prompt": "a", "completion": 4}, "'completion' must be text or a list of messages, got 4"),
        ({"prompt": "a", "completion": "b", "also": "c"}, "'also' must be a list of texts, got 'c'"),
        ({"messages": [{**USER, "tool_call_id": "x"}, ANSWER]}, "'tool_call_id' belongs to a tool's result"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": '{"x": 1, "x": 2}'}]}]}, "has the key 'x' twice"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": '{"x": NaN}'}]}]}, "holds NaN"),
        ({"instruction": "a", "response": "b"}, "the columns 'instruction', 'response'"),
        ({"choices": [], "usage": {}}, "a reply of OpenAI's API"),
        ({"messages": "no json"}, "must be a list, or JSON text of one"),
    ],
)  # fmt: skip
def test_unknown_fields_are_refused_by_name(record, says):
    with pytest.raises(DataError, match="data.jsonl:8.*" + re.escape(says).replace(r"\.\*", ".*")):
        normalize(record, "data.jsonl:8")


def test_ignored_columns_and_fields_are_dropped():
    record = {"id": 7, "messages": [{**USER, "id": 1}, {**ANSWER, "id": 2}]}
    assert normalize(record, "here", ("id",)) == {"messages": CHAT}


def test_documented_table_matches_code():
    page = Path(__file__).parents[2].joinpath("docs/reference/data.md").read_text(encoding="utf-8")
    for form, columns in COLUMNS.items():
        for column, meaning in columns.items():
            assert f"| {form} | `{column}` | {meaning} |" in page
    for name, meaning in FIELDS.items():
        assert f"| `{name}` | {meaning} |" in page


# -- what is learned ---------------------------------------------------------------------------------------------------


def test_only_completion_and_weighted_turns_are_learned():
    tokenizer = make_tokenizer(FAMILIES[0], CHATML)
    wrong = {"role": "assistant", "content": "WRONG"}
    record = {"prompt": [USER, wrong, USER], "completion": [{"role": "assistant", "content": "six"}]}
    assert learned(tokenizer, ChatFormatter(tokenizer).encode(record)) == "six<|im_end|>\n"
    record = {"messages": [USER, {**wrong, "weight": 0}, USER, {**ANSWER, "weight": 1}, USER, {**wrong, "weight": 0}]}
    example = ChatFormatter(tokenizer).encode(record)
    assert learned(tokenizer, example) == "b<|im_end|>\n"
    assert tokenizer.decode(example["input_ids"]).count("WRONG") == 1
    assert ChatFormatter(tokenizer).reference(record) == "b\n"
    with pytest.raises(DataError, match="nothing to learn"):
        ChatFormatter(tokenizer).encode({"messages": [USER, {**wrong, "weight": 0}]})


def test_escalated_turn_is_last_learned_turn():
    tokenizer = make_tokenizer(FAMILIES[0], CHATML)
    record = {"messages": [USER, ANSWER, USER, {"role": "assistant", "content": "WRONG", "weight": 0}]}
    _, escalated = ChatFormatter(tokenizer).encode_escalated(record, "pass")
    targets = escalated["shadow_targets"]
    assert tokenizer.decode(targets[targets != IGNORED].tolist()) == "pass<|im_end|>\n"
    assert tokenizer.decode(escalated["input_ids"]).count("assistant") == 1


@pytest.mark.parametrize("name", ["tokenize", "messages", "chat_template", "add_generation_prompt"])
def test_record_sets_only_template_variables(name):
    tokenizer = make_tokenizer(FAMILIES[0], CHATML)
    with pytest.raises(DataError, match=f"'chat_template_kwargs' holds '{name}'"):
        ChatFormatter(tokenizer).encode({"messages": CHAT, "chat_template_kwargs": {name: True}})


def test_answer_end_is_known_after_open_thought():
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    tokenizer = make_tokenizer(FAMILIES[0], template)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ChatFormatter(tokenizer).ends


def test_existing_end_token_is_not_doubled():
    tokenizer = make_tokenizer(FAMILIES[0], CHATML)
    for end in ("<|im_end|>", "<|endoftext|>"):
        example = ChatFormatter(tokenizer).encode({"prompt": "a", "completion": "yes" + end})
        assert learned(tokenizer, example) == "yes<|im_end|>\n"


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_text_gets_one_bos_and_one_eos(family):
    tokenizer = make_tokenizer(family)
    formatter, begin = ChatFormatter(tokenizer), tokenizer("x")["input_ids"][0]
    begins = begin in tokenizer.all_special_ids
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    bos, eos = (tokenizer.convert_ids_to_tokens(i) for i in (begin, end))
    texts = [
        {"text": "The quick fox."},
        {"prompt": "The quick", "completion": " fox."},
        {"prompt": "The ", "completion": "quick fox."},
    ]
    if begins:
        texts += [{"text": f"{bos}The quick fox.{eos}"}, {"prompt": f"{bos}The", "completion": f" quick fox.{eos}"}]
    for record in texts:
        example = formatter.encode(record)
        ids = example["input_ids"].tolist()
        assert ids.count(end) == 1 and ids[-1] == end == example["labels"][-1]
        assert not begins or (ids.count(begin) == 1 and ids[0] == begin)
        asked = formatter.tokens(formatter.prompt(record), plain=True)
        if "prompt" in record:
            assert ids[: len(asked)] == asked and end not in asked
            assert (example["labels"][: len(asked)] == IGNORED).all() and (
                example["labels"][len(asked) :] != IGNORED
            ).all()
            answer = record["completion"].removesuffix(eos).strip()
            assert formatter.reference(record).strip().replace(" ", "") == answer.replace(" ", "")


@pytest.mark.parametrize("family", FAMILIES[1:4])
def test_turns_without_special_tokens_match_transformers(family):
    """As in Llama 2's template, after whose brackets some tokenizers would put a blank of their own."""
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}"
    )
    tokenizer = make_tokenizer(family, template)
    messages = [USER, {"role": "assistant", "content": "four"}, USER, {"role": "assistant", "content": "six"}]
    formatter = ChatFormatter(tokenizer)
    example = formatter.encode({"messages": messages})
    assert example["input_ids"].tolist() == tokenizer.apply_chat_template(messages)["input_ids"]
    asked = tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True)["input_ids"]
    assert formatter.tokens(formatter.prompt({"messages": messages})) == asked
    assert learned(tokenizer, example).replace(" ", "") == "four</s>six</s>"


def test_record_may_enable_reasoning():
    closing = CHATML.replace(
        "assistant\n{% endif %}",
        "assistant\n<think>\n{% if enable_thinking is not defined or not enable_thinking %}\n</think>\n\n{% endif %}{% endif %}",
    )
    tokenizer = make_tokenizer(FAMILIES[0], closing)
    thoughts = {"prompt": "a", "completion": "<think>\nc\n</think>\n\nb"}
    assert needs_thinking(ChatFormatter(tokenizer), [normalize(thoughts, "")])
    assert not needs_thinking(ChatFormatter(tokenizer), [{"prompt": "a", "completion": "b"}])
    assert not needs_thinking(ChatFormatter(make_tokenizer(FAMILIES[0], CHATML)), [thoughts])
    assert learned(tokenizer, ChatFormatter(tokenizer).encode(thoughts)) == "c\n</think>\n\nb<|im_end|>\n"
    with pytest.raises(DataError, match="which the answer's reasoning cannot follow"):
        ChatFormatter(tokenizer, chat_template_kwargs={"enable_thinking": False}).encode(thoughts)


# -- classes -----------------------------------------------------------------------------------------------------------


def test_text_classes_need_no_option_and_regression_does():
    assert Labels.of(["007", "7"]).names == ("007", "7")
    assert Labels.of([1.0, 0.0]).problem_type == "single_label_classification"
    assert Labels.of(["5.50", "4"], "regression").encode("5.50") == 5.5
    assert Labels.of([[0.5, 1.5], [1, 2]], "regression").width == 2
    with pytest.raises(DataError, match="line 3: The label 'x' is not a number"):
        Labels.of(["1", "x"], "regression", lambda i: f"line {i + 2}")
    with pytest.raises(DataError, match="line 3: the label '7' differs in kind"):
        Labels.of([7, "7"], None, lambda i: f"line {i + 2}")
    with pytest.raises(DataError, match="line 3: the label is empty"):
        Labels.of(["a", " "], None, lambda i: f"line {i + 2}")


def test_single_and_multi_label_records_are_distinguished():
    with pytest.raises(DataError, match="needs one class as a label"):
        Labels.of([["a"], ["b"]], "single_label_classification")
    with pytest.raises(DataError, match="All labels are empty lists"):
        Labels.of([[], []])
    for labels, other in ((Labels.of(["a", "b"]), ["a"]), (Labels.of([["a"], ["b"]]), "a")):
        with pytest.raises(DataError, match="The label must be"):
            labels.encode(other)


def test_classes_are_shown_with_counts_and_near_duplicates():
    values = ["pos", "Pos ", "neg", "neg\n", "neg"]
    lines = describe_classes(Labels.of(values), values)
    assert lines == [
        "3 classes: 'Pos' 1, 'neg' 3, 'pos' 1",
        "Nearly the same class twice: 'Pos', 'pos'. Give them one name if one class is meant.",
    ]


def test_error_names_late_record():
    tokenizer, labels = make_tokenizer(FAMILIES[0], CHATML), Labels.of("xy")
    records = [{"text": text, "label": "y "} for text in ("a", "")]
    with pytest.raises(DataError, match="d, record 2: 'text' is empty"):
        encode_all(records, tokenizer, max_length=8, labels=labels, name="d")
    assert encode_all(records[:1], tokenizer, max_length=8, labels=labels)[0]["labels"] == 1
