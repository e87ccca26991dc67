"""The commands as a user types them, on a tiny base."""

import contextlib
import io
import json
import re
import subprocess
import sys
import time
from dataclasses import asdict

import pytest

from umbra.cli import VERBS, main
from umbra.cli.parsing import with_underscores
from umbra.config import ShadowConfig
from umbra.config.dialects import CONSTANT_NAMES
from umbra.evaluation.scoring import answer_of
from umbra.options import TrainOptions
from umbra.options.yaml_file import number, read_yaml

RECORDS = [{"prompt": f"say {c}", "completion": c} for c in "abcd"] * 3


def write(path, records):
    path.write_text("\n".join(json.dumps(r) for r in records) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory, base_folder):
    """A folder with data, a configuration and a trained adapter."""
    folder = tmp_path_factory.mktemp("run")
    write(folder / "data.jsonl", RECORDS)
    (folder / "train.yaml").write_text(
        f"base: {base_folder}\ntrain_data: {folder}/data.jsonl\noutput_dir: {folder}/out\nrank: 8\n"
        "learning_rate: 1e-2\nuse_cpu: true\ndisable_tqdm: true\n"
    )
    assert main(["train", str(folder / "train.yaml"), "--rank", "4", "--num-train-epochs=2"]) == 0
    return folder


def output(capsys, *arguments):
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def test_help_is_fast_and_imports_no_torch():
    code = "import sys, umbra.cli; umbra.cli.main(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "umbra", "--help"], check=True, capture_output=True)
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize(
    "command", ["train", "eval", "study", "report", "generate", "detach", "export", "convert", "inspect", "bench"]
)
def test_every_command_explains_its_flags(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_help_groups_the_verbs(capsys):
    with contextlib.suppress(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert re.findall(r"^([A-Z][a-z]+):$", text, re.MULTILINE) == list(VERBS)
    assert re.findall(r"^    ([a-z_]+)  ", text, re.MULTILINE) == [v for g in VERBS.values() for v in g]


def test_help_without_the_lab_lists_the_other_verbs(monkeypatch, capsys):
    monkeypatch.setattr("umbra.cli.find_spec", lambda name: None)
    main([])
    text = capsys.readouterr().out
    assert "Measure:" in text and "lm_eval" in text and "bench" not in text
    assert main(["study", "x.yaml"]) == 2
    assert "umbra study needs umbra.lab" in capsys.readouterr().err


def test_evaluate_is_the_former_name_of_study(capsys):
    assert main(["evaluate", "/nowhere.yaml"]) == 2
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "umbra: evaluate is now study: umbra study …"
    assert "/nowhere.yaml cannot be read as YAML" in last


def test_an_unknown_verb_names_the_nearest(capsys):
    assert main(["trian", "x.yaml"]) == 2
    assert "Did you mean 'train'?" in capsys.readouterr().err


def test_a_constant_of_a_dialect_has_a_flag(tmp_path):
    from umbra.cli.parsing import run_settings

    (tmp_path / "x.yaml").write_text("constants: {norm: no, bias: true}\nsave_strategy: no\n")
    arguments = [str(tmp_path / "x.yaml"), "--constants.norm", "--constants.down-init=normal", "--init-scale", "0.5"]
    values, as_json = run_settings("umbra train", "", TrainOptions, arguments)
    constants = {"norm": True, "bias": True, "down_init": "normal"}
    assert values == {"constants": constants, "save_strategy": "no", "init_scale": 0.5} and not as_json
    assert asdict(ShadowConfig.from_dict({k: values[k] for k in ("constants", "init_scale")}).constants) == {
        **dict.fromkeys(CONSTANT_NAMES), **constants, "init_scale": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--max-new-tokens=3", "--a-b", "c-d"], ["--max_new_tokens=3", "--a_b", "c-d"]),
        (["--pattern=a-b", "--- x", "-"], ["--pattern=a-b", "--- x", "-"]),
        (["--", "--a-b"], ["--", "--a-b"]),
    ],
)
def test_dashes_in_flags_are_underscores(given, expected):
    assert with_underscores(given) == expected


def test_flags_override_file(run):
    saved = json.loads((run / "out/run.json").read_text())["asked"]
    assert saved["rank"] == 4
    assert saved["learning_rate"] == 0.01
    assert saved["num_train_epochs"] == 2


def test_eval_scores_all_modes_with_intervals(run, capsys):
    found = json.loads(output(capsys, "eval", run / "out", run / "data.jsonl", "--max-new-tokens", 4, "--json"))
    assert [s["mode"] for s in found] == ["base", "attached", "detached"]
    for s in found:
        assert s["total"] == len(RECORDS)
        assert 0 <= s["low"] <= s["accuracy"] <= s["high"] <= 1
    assert found[2]["parameters"] < found[0]["parameters"] < found[1]["parameters"]


def test_eval_writes_replies_and_table(run, capsys):
    replies = run / "replies.jsonl"
    table = output(
        capsys, "eval", run / "out", run / "data.jsonl", "--limit", 3, "--modes", "attached", "--output", replies,
        "--max_new_tokens", 2,
    )  # fmt: skip
    assert "| attached |" in table
    assert len(replies.read_text().splitlines()) == 3


@pytest.mark.parametrize("mode", ["attached", "detached", "base"])
def test_streamed_text_equals_returned_text(run, capsys, mode):
    arguments = ["generate", run / "out", "say a", "--mode", mode, "--max-new-tokens", 5]
    streamed = output(capsys, *arguments)
    assert json.loads(output(capsys, *arguments, "--json"))["answer"].strip() == streamed.strip()


@pytest.mark.parametrize("draft", ["3", "auto"])
def test_generate_reports_draft_acceptance(run, capsys, draft):
    arguments = ["generate", run / "out", "say a", "--max-new-tokens", 6]
    expected = json.loads(output(capsys, *arguments, "--json"))
    found = json.loads(output(capsys, *arguments, "--draft", draft, "--json"))
    assert {k: found[k] for k in ("answer", "tokens")} == {k: expected[k] for k in ("answer", "tokens")}
    assert 0 <= found["accepted"] <= found["drafted"]
    assert found["verified"] < found["tokens"]
    assert main([*map(str, arguments), "--draft", draft]) == 0
    streamed, told = capsys.readouterr()
    assert streamed.strip() == expected["answer"].strip()
    assert "tokens per forward of the base" in told


def test_sampling_is_seeded(run, capsys):
    arguments = ["generate", run / "out", "say a", "--temperature", 5, "--max-new-tokens", 12, "--json"]
    first, again = (json.loads(output(capsys, *arguments))["answer"] for _ in range(2))
    other = json.loads(output(capsys, *arguments, "--seed", 1))["answer"]
    assert first == again != other


def test_inspect_works_without_base(run, capsys):
    text = output(capsys, "inspect", run / "out")
    assert "dialect     umbra" in text
    assert "rank 4" in text
    found = json.loads(output(capsys, "inspect", run / "out", "--json"))
    assert found["parameters"]["total"] == sum(v for k, v in found["parameters"].items() if k != "total")
    assert found["coupled_blocks"] == [1, 2, 3]
    assert found["draft_vocabulary"] == 6, "a, b, c, d, the end of the text and the line break after it"
    assert "drafts      from 6 tokens" in text


def test_detach_writes_stock_model_and_tokenizer(run, capsys):
    out = run / "detached"
    assert "stock transformers model" in output(capsys, "detach", run / "out", out)
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json"} <= {
        p.name for p in out.iterdir()
    }
    written = (out / "model.safetensors").stat().st_mtime_ns
    assert "stock transformers model" in output(capsys, "detach", run / "out", out), "the same again: it is there"
    assert (out / "model.safetensors").stat().st_mtime_ns == written
    assert main(["detach", str(run / "out"), str(out), "--dtype", "bfloat16"]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert "MB" in output(capsys, "detach", run / "out", out, "--overwrite", "--dtype", "bfloat16")
    code = (
        "import sys; sys.modules['umbra'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(out)!r}); t = AutoTokenizer.from_pretrained({str(out)!r})\n"
        "m.generate(**t('say a', return_tensors='pt'), max_new_tokens=3)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train"], "train_data is missing"),
        (["train", "/nowhere.yaml"], "cannot be read as YAML"),
        (["train", "--learning-rat", "1"], "Did you mean 'learning_rate'"),
        (["train", "x.yaml"], "cannot be read"),
        (["train", "--rank", "4", "y"], "Unexpected argument 'y'"),
        (["eval", "/nowhere", "{data}"], "no adapter folder"),
        (["eval", "{out}", "/nowhere.jsonl"], "cannot be read"),
        (["eval", "{out}", "{data}", "--modes", "sideways"], "Unknown mode 'sideways'"),
        (["eval", "{out}", "{data}", "--answer-pattern", "("], "not a valid regular expression"),
        (["eval", "{out}", "{data}", "--output", "/no/where.jsonl"], "lies in a folder that does not exist"),
        (["eval", "{out}", "{data}", "--output", "/tmp"], "is not a writable file"),
        (["eval", "{out}", "{data}", "--modes", ","], "modes is empty"),
        (
            ["eval", "{out}", "{data}", "--answer-pattern", "####"],
            "jsonl:1: answer_pattern='####' does not match the answer",
        ),
        (["generate", "{out}", " "], "prompt is empty"),
        (["generate", "{out}", "a", "--mode", "both"], "Unknown mode"),
        (["generate", "{out}", "a", "--temperature=-1"], "temperature"),
        (["generate", "{out}", "a", "--draft", "0"], "draft must be an integer of at least 1"),
        (["generate", "{out}", "a", "--draft", "many"], "draft must be an integer of at least 1"),
        (["generate", "{out}", "a", "--draft", "2", "--mode", "base"], "--draft needs shadow and base"),
        (["inspect", "{data}"], "no adapter folder"),
        (["eval", "{out}", "{data}", "--limt", "3"], "unrecognized arguments: --limt 3. Did you mean --limit?"),
        (["detach", "{out}", "{out}"], "is not empty"),
        (["detach", "{out}", "/tmp/x", "--dtype", "int8"], "Unknown dtype 'int8'"),
    ],
)
def test_mistakes_print_one_line(run, arguments, says, capsys):
    arguments = [a.format(out=run / "out", data=run / "data.jsonl") for a in arguments]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.startswith("umbra: error: ")
    assert "Traceback" not in error


def test_empty_prompt_is_refused(run, capsys):
    """A template makes a question even of nothing."""
    write(run / "empty.jsonl", [{"prompt": p, "completion": "a"} for p in ("a", "")])
    eval_ = ["eval", str(run / "out"), str(run / "empty.jsonl"), "--modes", "base"]
    assert main(eval_) == 0
    assert main([*eval_, "--chat-template=no"]) == 2
    assert "umbra: error: Record 2 has an empty prompt" in capsys.readouterr().err


def test_flags_parse_like_file_values(tmp_path):
    (tmp_path / "x.yaml").write_text("k: {min_lr: 1e-5, more: [1e-3, no]}\n")
    assert number("{min_lr: 1e-5, more: [1e-3, no]}") == read_yaml(str(tmp_path / "x.yaml"))["k"]
    assert number("{min_lr: 1e-5}") == {"min_lr": 1e-5}


def test_prompt_is_read_from_stdin(run, capsys, monkeypatch):
    said = []
    for prompt, text in (("say a", ""), ("-", "say a\n")):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert main(["generate", str(run / "out"), prompt, "--max-new-tokens", "4", "--json"]) == 0
        said.append(json.loads(capsys.readouterr().out))
        said[-1].pop("seconds", None)
    assert said[0] == said[1]


def test_classifier_is_scored_by_accuracy(tmp_path, base_folder, capsys):
    data = write(
        tmp_path / "classes.jsonl", [{"text": c * 3, "label": "vowel" if c in "ae" else "consonant"} for c in "abcdef"]
    )
    flags = [
        "--base",
        base_folder,
        "--train-data",
        data,
        "--output-dir",
        str(tmp_path / "out"),
        "--use_cpu",
        "--disable_tqdm",
    ]
    assert main(["train", *flags, "--learning-rate", "1e-2", "--num_train_epochs", "20"]) == 0
    capsys.readouterr()
    found = {s["mode"]: s for s in json.loads(output(capsys, "eval", tmp_path / "out", data, "--json"))}
    assert found["attached"]["accuracy"] == 1
    assert main(["generate", str(tmp_path / "out"), "a"]) == 2
    assert "classifies" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pattern", "text", "answer"),
    [
        (None, " seven\n", "seven"), (r"#### (\d+)|(unknown)", "#### 5, or unknown", "unknown"),
        (r"#### (\d+)|(unknown)", "unknown #### 5", "5"), (r"\d+", "1 and 22", "22"), (r"(\d+)", "none", ""),
        (r"yes|(no)", "yes", "yes"),
    ],
)  # fmt: skip
def test_answer_is_last_match_or_its_group(pattern, text, answer):
    assert answer_of(text, pattern) == answer
