"""Records in, token batches out: what is learned, what is masked, and what is refused."""

import gzip
import json

import datasets
import numpy as np
import pytest

import umbra
from support.tokenizer import make_tokenizer, with_begin_token
from umbra.data import ChatFormatter, Collator, Labels, encode_all, read_records
from umbra.method.losses import IGNORED


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def write(path, records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")
    return str(path)


def learned(tokenizer, example):
    ids, labels = example["input_ids"], example["labels"]
    assert ((labels == ids) | (labels == IGNORED)).all()
    return tokenizer.decode(ids[labels != IGNORED])


def test_only_completion_is_learned_in_chat_template(tokenizer):
    example = ChatFormatter(tokenizer).encode({"prompt": "hi", "completion": "yes"})
    assert tokenizer.decode(example["input_ids"]) == "<|user|>hi<eos>\n<|assistant|>yes<eos>\n"
    assert learned(tokenizer, example) == "yes<eos>\n"


def test_answer_end_is_learned_without_template(tokenizer):
    example = ChatFormatter(tokenizer, chat_template=False).encode({"prompt": "2+2=", "completion": "4"})
    assert tokenizer.decode(example["input_ids"]) == "2+2=4<eos>"
    assert learned(tokenizer, example) == "4<eos>"


def test_every_assistant_turn_is_learned(tokenizer):
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    example = ChatFormatter(tokenizer).encode({"messages": [{"role": r, "content": c} for r, c in turns]})
    assert learned(tokenizer, example) == "b<eos>\nd<eos>\n"


def test_prompt_may_be_messages(tokenizer):
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    writer = ChatFormatter(tokenizer)
    assert learned(tokenizer, writer.encode({"prompt": prompt, "completion": "z"})) == "z<eos>\n"
    assert writer.prompt({"prompt": prompt, "completion": "z"}) == "<|system|>s<eos>\n<|user|>q<eos>\n<|assistant|>"


def test_training_and_generation_prompts_have_equal_tokens(tokenizer):
    writer, record = ChatFormatter(tokenizer), {"prompt": "hello", "completion": "world"}
    asked = writer.tokens(writer.prompt(record))
    assert list(writer.encode(record)["input_ids"][: len(asked)]) == asked
    assert writer.ask("hello") == writer.prompt(record)


@pytest.mark.parametrize("chat_template", [True, False])
def test_only_plain_text_begins_with_special_tokens(chat_template):
    """A rendered conversation has its own; whether the tokenizer could render says nothing of a text."""
    tokenizer = with_begin_token(make_tokenizer())
    writer, messages = ChatFormatter(tokenizer, chat_template), [{"role": "user", "content": "q"}]
    plain = {"prompt": "q", "completion": "z"}
    for record, expected in (({"text": "q"}, True), (plain, not chat_template), ({**plain, "prompt": messages}, False)):
        said = tokenizer.decode(writer.encode(record)["input_ids"])
        assert said.count("<bos>") == said.startswith("<bos>") == expected
        asked = writer.tokens(writer.prompt(record), writer.is_plain(record))
        assert list(writer.encode(record)["input_ids"][: len(asked)]) == asked
    assert (writer.tokens(writer.ask("q"))[0] == 1) == (not chat_template)


def test_disabled_thinking_puts_empty_thoughts_in_prompt(tokenizer):
    """As the families do it that can be asked not to think."""
    thinking = make_tokenizer()
    thinking.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>"
        "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>"
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
    )
    record = {"prompt": "q", "completion": "B"}
    assert learned(thinking, ChatFormatter(thinking).encode(record)) == "<think></think>B\n"
    silent = ChatFormatter(thinking, chat_template_kwargs={"enable_thinking": False})
    assert learned(thinking, silent.encode(record)) == "B\n"
    assert silent.ask("q") == silent.prompt(record) == "<|user|>q\n<|assistant|><think></think>"


def test_lone_surrogate_is_refused(tmp_path):
    with pytest.raises(umbra.DataError, match=r"a.jsonl:2 holds half of a character"):
        read_records(write(tmp_path / "a.jsonl", ['{"text": "\\ud83d\\ude00"}', '{"text": "a\\ud800b"}']))


def test_rewriting_template_learns_last_answer_only(tokenizer):
    forgetful = make_tokenizer()
    forgetful.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] if loop.last or m['role'] == 'user' else '' }}\n"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    example = ChatFormatter(forgetful).encode({"messages": [{"role": r, "content": c} for r, c in turns]})
    assert learned(forgetful, example) == "d\n"


def test_plain_text_is_learned_with_its_end(tokenizer):
    assert learned(tokenizer, ChatFormatter(tokenizer).encode({"text": "abc"})) == "abc<eos>"


def test_long_examples_are_truncated_or_dropped(tokenizer, capsys):
    records = [{"prompt": "a" * 50, "completion": "b"}, {"prompt": "a", "completion": "b"}]
    examples = encode_all(records, tokenizer, max_length=40)
    assert len(examples) == 1
    assert "1 of 2 records cut at 40 tokens, 1 without an answer dropped" in capsys.readouterr().out
    with pytest.raises(umbra.DataError, match="max_length=40"):
        encode_all(records[:1], tokenizer, max_length=40)


def test_batches_are_padded_on_the_right():
    rows = [np.arange(1, 4, dtype=np.int32), np.arange(1, 3, dtype=np.int32)]
    batch = Collator(pad_token_id=0)([{"input_ids": r, "labels": r} for r in rows])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [1, 2, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[1, 2, 3], [1, 2, IGNORED]]


def test_gzipped_lines_are_read(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write('{"text": "a"}\n\n{"text": "b"}\n')
    assert read_records(str(path)) == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (['{"text": "a"}', '{"text": '], r"data.jsonl:2 is not JSON"),
        (['{"text": "a"}', "[1]"], r"data.jsonl:2 is a JSON list"),
        ([{"prompt": "a"}], r"data.jsonl:1 has the columns 'prompt'; needed are `prompt` and `completion`"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], r"data.jsonl:2 lacks the column 'completion'"),
        ([{"prompt": "a", "completion": 3}], r"data.jsonl:1: 'completion' must be text or a list of messages, got 3"),
        ([{"text": "a", "label": None}], r"data.jsonl:1 lacks the column 'label'"),
        ([{"messages": []}], r"data.jsonl:1, messages must be a list of messages"),
        ([{"messages": [{"role": "user"}]}], r"messages\[0\] lacks `content`"),
        ([""], r"contains no record"),
    ],
)
def test_invalid_files_are_refused_with_file_and_line(tmp_path, lines, says):
    with pytest.raises(umbra.DataError, match=says):
        read_records(write(tmp_path / "data.jsonl", lines))


def test_missing_damaged_and_unnamed_data_is_refused(tmp_path):
    with pytest.raises(umbra.DataError, match=r"nothing\.jsonl cannot be read"):
        read_records(str(tmp_path / "nothing.jsonl"))
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(gzip.compress(b'{"text": "a"}\n' * 100)[:30])
    with pytest.raises(umbra.DataError, match="cannot be read"):
        read_records(str(broken))
    flipped = bytearray(gzip.compress(json.dumps({"text": "ab" * 5000}).encode()))
    flipped[20:30] = b"\xff" * 10
    broken.write_bytes(flipped)
    with pytest.raises(umbra.DataError, match="cannot be read"):
        read_records(str(broken))
    for line in ('{"text": ' + "[" * 10**5, '{"text": 1' + "0" * 5000 + "}"):
        with pytest.raises(umbra.DataError, match=r"odd\.jsonl:1 is not JSON"):
            read_records(write(tmp_path / "odd.jsonl", [line]))
    with pytest.raises(umbra.DataError, match="No data given"):
        read_records("")


def test_messages_need_template_and_final_answer(tokenizer):
    bare = make_tokenizer()
    bare.chat_template = None
    with pytest.raises(umbra.DataError, match="no chat template"):
        ChatFormatter(bare).encode({"messages": [{"role": "assistant", "content": "a"}]})
    with pytest.raises(umbra.DataError, match="ends with the 'user' turn"):
        ChatFormatter(tokenizer).encode({"messages": [{"role": "user", "content": "a"}]})


@pytest.mark.parametrize(
    ("values", "problem", "names", "label", "encoded"),
    [
        (["b", "a"], "single_label_classification", ("a", "b"), "b", 1),
        ([10, 2, 2], "single_label_classification", ("2", "10"), 10, 1),
        ([0.5, 2.0], "single_label_classification", ("0.5", "2.0"), 2.0, 1),
        ([" a\n", "b"], "single_label_classification", ("a", "b"), "a ", 0),
        ([["x", "y"], ["x"]], "multi_label_classification", ("x", "y"), ["y"], [0.0, 1.0]),
        ([[0, 1], [1, 1]], "multi_label_classification", ("LABEL_0", "LABEL_1"), [1, 0], [1.0, 0.0]),
    ],
)
def test_problem_type_is_inferred_from_labels(values, problem, names, label, encoded):
    labels = Labels.of(values)
    assert (labels.problem_type, labels.names) == (problem, names)
    assert labels.encode(label) == encoded


@pytest.mark.parametrize("value", [{"x": 1}, float("nan"), [[1]], [float("inf")]])
def test_invalid_labels_are_named(value):
    with pytest.raises(umbra.DataError, match="is neither a name nor a number"):
        Labels.of([value, value])


def test_unusable_labels_are_refused():
    with pytest.raises(umbra.DataError, match="at least two classes"):
        Labels.of(["a", "a"])
    with pytest.raises(umbra.DataError, match=r"record 2: the label .* differs in kind"):
        Labels.of(["a", ["b"]])
    with pytest.raises(umbra.DataError, match="not one of the training data's: a, b"):
        Labels.of(["a", "b"]).encode("c")


def test_folder_files_are_splits(tmp_path):
    for split, text in (("train", "a"), ("test", "b")):
        (tmp_path / f"{split}.csv").write_text(f"text,label\n{text},{text}\n")
    assert read_records(str(tmp_path), "train") == [{"text": "a", "label": "a"}]
    assert read_records(str(tmp_path), "test") == [{"text": "b", "label": "b"}]
    with pytest.raises(umbra.DataError, match="has no split 'validation': it has 'test', 'train'"):
        read_records(str(tmp_path), "validation")


def test_other_tables_and_saved_sets_are_read(tmp_path, monkeypatch):
    rows = datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}])
    rows.to_parquet(tmp_path / "t.parquet")
    rows.to_csv(tmp_path / "t.csv")
    rows.save_to_disk(tmp_path / "saved")
    for name in ("t.parquet", "t.csv", "saved"):
        assert [r["text"] for r in read_records(str(tmp_path / name))] == ["one", "two"]
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *where, split: asked.append((where, split)) or rows)
    read_records("someone/set:easy", "test")
    assert asked == [(("someone/set", "easy"), "test")]
