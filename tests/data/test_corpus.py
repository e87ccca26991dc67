"""Text to pretrain on: documents, copies, blocks and mixtures, and what the base writes by itself."""

import json

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

import umbra
from support.tiny import make
from support.tokenizer import make_tokenizer, with_begin_token
from umbra.data import ChatFormatter
from umbra.data.corpus import (
    Documents,
    Mixture,
    hold_out,
    pack,
    read_documents,
    without_copies,
)
from umbra.data.generated_text import generate_documents, read_prompts


def test_every_document_form_is_read(tmp_path):
    writer = ChatFormatter(make_tokenizer())
    text = tmp_path / "text.txt"
    text.write_text("0 plus 0 is 0.\n \n0 plus 1 is 1, and 1 plus 0 is 1.\n")
    assert read_documents(str(text), "train", writer).texts[1] == "0 plus 1 is 1, and 1 plus 0 is 1."
    file = tmp_path / "records.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": "a", "completion": c}) for c in "bc"))
    assert read_documents(str(file), "train", writer).texts[0] == "<|user|>a<eos>\n<|assistant|>b<eos>\n"
    assert read_documents(str(file), "train", ChatFormatter(make_tokenizer(), False)).texts == ["ab", "ac"]


def test_documents_get_bos_as_tokenizer_and_one_eos(tmp_path):
    """A chat template brings its own beginnings; whether there is one says nothing of plain text."""
    writer = ChatFormatter(with_begin_token(make_tokenizer()))
    written = {"chat": "<|user|>a<eos>\n<|assistant|>b<eos>\n<eos>", "plain": "<bos>ab<eos>"}
    for name, record in (("chat", {"prompt": "a", "completion": "b"}), ("plain", {"text": "ab"})):
        file = tmp_path / f"{name}.jsonl"
        file.write_text(json.dumps(record) + "\n")
        blocks = pack(read_documents(str(file), "train", writer), writer, 1, "")
        assert writer.tokenizer.decode(blocks.flatten()) == written[name]
    ended = pack(Documents(["ab<eos>"]), writer, 1, "")
    assert writer.tokenizer.decode(ended.flatten()) == "<bos>ab<eos>"


def test_duplicates_are_removed_across_sources():
    kept, copies = without_copies([["a  b", "c", "A b"], ["c\n", "d"]])
    assert kept == [["a  b", "c"], ["d"]]
    assert copies == 2


def test_packed_blocks_concatenate_documents():
    tokenizer = make_tokenizer()
    blocks = pack(Documents(["abc", "de"] * 9), ChatFormatter(tokenizer), 5, "text")
    assert blocks.shape == (12, 5)
    assert tokenizer.decode(blocks.flatten()).startswith("abc<eos>de<eos>abc<eos>")
    with pytest.raises(umbra.DataError, match="fewer than one block of max_length=50"):
        pack(Documents(["abc"]), ChatFormatter(tokenizer), 50, "text")


def test_held_out_blocks_cover_sources_and_enter_no_batch():
    blocks = [np.arange(n * 3).reshape(n, 3) + 1000 * n for n in (40, 10, 1)]
    rest, held_out = hold_out(blocks, 10)
    assert [len(b) for b in rest] == [36, 9, 1]
    assert [len(b) for b in hold_out(blocks, 2)[0]] == [38, 9, 1]
    every = np.concatenate([*rest, held_out])
    assert len({tuple(row) for row in every}) == len(every) == 51
    with pytest.raises(umbra.DataError, match="none can be held out"):
        hold_out([blocks[2]], 10)


def test_mixture_draws_by_weight_without_early_repeats():
    blocks = [np.arange(50)[:, None], 100 + np.arange(10)[:, None]]
    mixture = Mixture(blocks, [1.0, 3.0], 400, seed=1)
    drawn = [int(mixture[i]["input_ids"]) for i in range(400)]
    second = [x for x in drawn if x >= 100]
    assert 260 < len(second) < 340
    assert all(len(set(second[i : i + 10])) == 10 for i in range(0, len(second) - 9, 10)), "each once in a round"
    again = Mixture(blocks, [1.0, 3.0], 400, seed=1)
    assert drawn == [int(again[i]["input_ids"]) for i in range(400)]
    assert drawn != [int(Mixture(blocks, [1.0, 3.0], 400, seed=2)[i]["input_ids"]) for i in range(400)]


def test_mixture_accepts_any_weights():
    blocks = [np.arange(5)[:, None], 100 + np.arange(5)[:, None]]
    drawn = [int(Mixture(blocks, [1e308, 1e308], 40, seed=1)[i]["input_ids"]) >= 100 for i in range(40)]
    assert 10 < sum(drawn) < 30


def test_base_continues_writing_after_kill(tmp_path):
    model, writer = make(), ChatFormatter(make_tokenizer())
    asked = {"count": 7, "batch_size": 2, "max_new_tokens": 6, "temperature": 1.0, "seed": 5}

    def write(file, **more):
        return generate_documents(model, writer, ["a", "bcd", "ef"], tmp_path / file, **{**asked, **more})

    whole = write("whole.jsonl")
    assert len(whole) == 7
    assert len(set(whole)) > 4, "it samples"
    assert all(text.startswith(writer.ask(p)) for text, p in zip(whole, ["a", "bcd", "ef"] * 3, strict=False))
    write("cut.jsonl", count=4)
    with (tmp_path / "cut.jsonl").open("ab") as file:
        file.write(b'{"text": "cut in the middle of a character, caf\xc3')
    assert write("cut.jsonl") == whole
    assert [json.loads(line)["text"] for line in (tmp_path / "cut.jsonl").read_text().splitlines()] == whole


Z = make_tokenizer()("z")["input_ids"][0]


class Scripted:
    """A base that says what it is told to, and remembers how it was asked."""

    def __init__(self, answers, tokenizer):
        self.config, self.generation_config, self.device = make().config, GenerationConfig(eos_token_id=Z), "cpu"
        self.rows, self.pad, self.asked = [tokenizer(a)["input_ids"] for a in answers], tokenizer.pad_token_id, {}

    def eval(self):
        return self

    def generate(self, ids, **asked):
        self.asked, width = asked, max(map(len, self.rows))
        new = torch.tensor([row + [self.pad] * (width - len(row)) for row in self.rows])
        return torch.cat((ids, new), 1)


def test_generated_document_ends_at_eos(tmp_path):
    """With the token that it said; what is cut off at the last token has none."""
    tokenizer = make_tokenizer()
    writer, base = ChatFormatter(tokenizer), Scripted(["xy<eos>", "one and on"], tokenizer)
    asked = {"count": 2, "batch_size": 2, "max_new_tokens": 10, "temperature": 0.7, "seed": 5}
    texts = generate_documents(base, writer, ["a", "b"], tmp_path / "own.jsonl", **asked)
    assert texts == [writer.ask("a") + "xy<eos>", writer.ask("b") + "one and on"]
    assert {Z, tokenizer.eos_token_id} <= set(base.asked["eos_token_id"])
    assert base.asked["repetition_penalty"] == 1 and base.asked["temperature"] == 0.7
    blocks = pack(Documents(texts, plain=False, ended=True), writer, 1, "own")
    assert tokenizer.decode(blocks.flatten()) == "".join(texts)


def test_generated_text_ignores_penalties(tmp_path):
    model, writer = make(), ChatFormatter(make_tokenizer())
    asked = {"count": 2, "batch_size": 2, "max_new_tokens": 20, "temperature": 1.0, "seed": 5}
    plain = generate_documents(model, writer, ["a", "b"], tmp_path / "plain.jsonl", **asked)
    model.generation_config.update(repetition_penalty=9.0, min_p=0.5, no_repeat_ngram_size=1)
    assert generate_documents(model, writer, ["a", "b"], tmp_path / "own.jsonl", **asked) == plain


@pytest.mark.parametrize("damage", ["a line in the middle", "an end within a batch"])
def test_damaged_generated_text_is_regenerated_identically(tmp_path, damage):
    model, writer, file = make(), ChatFormatter(make_tokenizer()), tmp_path / "own.jsonl"
    asked = {"count": 6, "batch_size": 2, "max_new_tokens": 6, "temperature": 1.0, "seed": 5}
    whole = generate_documents(model, writer, ["a", "bcd", "ef"], file, **asked)
    lines = file.read_text().splitlines(keepends=True)
    lines = [*lines[:2], '{"text": \n', *lines[3:]] if damage.startswith("a line") else lines[:3]
    file.write_text("".join(lines))
    assert generate_documents(model, writer, ["a", "bcd", "ef"], file, **asked) == whole


def test_byte_order_marks_are_removed(tmp_path):
    (tmp_path / "text.TXT").write_bytes(b"\xef\xbb\xbfone\n\ntwo\n")
    (tmp_path / "text.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": "two"}\n')
    for name in ("text.TXT", "text.jsonl"):
        assert read_documents(str(tmp_path / name), "train", ChatFormatter(make_tokenizer())).texts == ["one", "two"]


def test_generated_text_stays_within_positions(tmp_path):
    model, writer = make(), ChatFormatter(make_tokenizer())
    asked = {"count": 1, "batch_size": 1, "max_new_tokens": 500, "temperature": 1.0, "seed": 5}
    text = generate_documents(model, writer, ["a" * 90], tmp_path / "own.jsonl", **asked)[0]
    assert len(writer.tokens(text)) <= model.config.max_position_embeddings
    with pytest.raises(umbra.DataError, match="but the base has 128 positions"):
        generate_documents(model, writer, ["a" * 150], tmp_path / "more.jsonl", **asked)


@pytest.mark.parametrize("column", ["prompt", "text"])
def test_prompts_are_lines_or_records(tmp_path, column):
    asked = ["What is 1 + 1?", "And 2 + 2?"]
    (tmp_path / "p.txt").write_text("\n".join(asked) + "\n\n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({column: a, "else": 1}) + "\n" for a in asked))
    assert read_prompts(str(tmp_path / "p.txt")) == read_prompts(str(tmp_path / "p.jsonl")) == asked
