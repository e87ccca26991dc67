"""Fixtures for all tests: a tiny base with a tokenizer, an adapter folder, a finished study."""

import gc
import os

import torch

# Triton reads this when it is first imported (transformers imports it): without a GPU, kernels run in its interpreter.
os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from support.tiny import LLAMA_LIKE, make
from support.tokenizer import make_tokenizer

pytest_plugins = ["support.tables", "support.fast"]
torch.set_num_threads(1)
FROZEN: set[Path] = set()  # modules whose first test has started


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Freeze existing objects before a module's first test, so that the trainers' garbage collections skip them."""
    if item.path not in FROZEN:
        FROZEN.add(item.path)
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """Save a tiny random Llama with a character tokenizer."""
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **{**LLAMA_LIKE, "vocab_size": 99})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def done(tmp_path_factory, base_folder) -> Path:
    """Run a study of every kind of method on every kind of task, and return its folder."""
    from support.studies import run_study, study_of

    folder = tmp_path_factory.mktemp("study")
    found = run_study(folder, study_of(folder, base_folder))
    assert found["failed"] == 0
    return folder


@pytest.fixture
def saved(tmp_path) -> Path:
    """Save an adapter of a tiny Llama."""
    make().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"
