"""Every script of examples/ runs on a tiny base and saves a trained adapter."""

import re
import runpy
from pathlib import Path

import pytest
import torch

import umbra

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(p.name for p in EXAMPLES.glob("*.py"))
NEEDS = {"sft.py": "trl", "dpo.py": "trl", "grpo.py": "trl"}


@pytest.fixture
def at_home(tmp_path, monkeypatch, base_folder):
    """Change to a temporary folder, and return the tiny base."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BASE", base_folder)
    return tmp_path


@pytest.mark.parametrize("script", SCRIPTS)
# TRL 1.16's own use of old names of transformers; its Trainer pins memory where there is no accelerator, too
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing.*:FutureWarning", "ignore:'pin_memory':UserWarning")
def test_example_runs(script, at_home):
    pytest.importorskip(NEEDS.get(script, "torch"))
    ran = runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    saved = re.findall(r'"(out/\w+/adapter)"', (EXAMPLES / script).read_text())
    assert bool(saved) == (script != "pipelines.py")
    for folder in saved:
        loaded = umbra.load(folder)
        for name, value in ran["model"].shadow.state_dict().items():
            assert torch.equal(value, loaded.shadow.state_dict()[name]), name
        ups = [i.up.weight for i in loaded.shadow.couplings.injections.values()]
        assert all(bool(up.abs().max() > 0) for up in ups)  # they start at 0: something was learned


def test_lm_eval_example_runs(at_home, base_folder):
    """Run the task next to the script with the script's arguments, without a shell and without indexing lm-eval's tasks."""
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import umbra.evaluation.lm_eval
    from umbra.base.loading import load_base

    text = (EXAMPLES / "lm_eval.sh").read_text()
    assert "umbra lm_eval run --model umbra --model_args" in text and "--tasks sums" in text
    umbra.attach(load_base(base_folder), umbra.ShadowConfig(rank=4)).save_pretrained("adapter")
    tasks = TaskManager(include_path=str(EXAMPLES / "lm_eval"), include_defaults=False)
    found = simple_evaluate(
        "umbra", {"adapter": "adapter", "device": "cpu"}, ["sums"], task_manager=tasks, bootstrap_iters=0
    )
    assert 0 <= found["results"]["sums"]["acc,none"] <= 1


def test_examples_table_is_complete():
    table = (EXAMPLES / "README.md").read_text()
    for path in (*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.sh")):
        assert f"[{path.name}]({path.name})" in table
