"""A tiny base with a tokenizer, and an adapter, as folders on disk."""

import gc
import os

import torch

# Read when triton is first imported, as much of transformers does: without a GPU, test_kernels.py has kernels run in numpy.
os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from support.tables import pytest_addoption, pytest_configure  # noqa: F401 (hooks)
from support.tiny import LLAMA_LIKE, make
from support.tokenizer import make_tokenizer

torch.set_num_threads(1)
FROZEN: set[Path] = set()  # the files whose first test has begun


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """What is there before a file's first test stays, and garbage need not be looked for in it, as trainers do after each run."""
    if item.path not in FROZEN:
        FROZEN.add(item.path)
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """A tiny random Llama with a character tokenizer, saved."""
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **{**LLAMA_LIKE, "vocab_size": 99})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def done(tmp_path_factory, base_folder) -> Path:
    """The folder of a study that was run: every kind of method on every kind of task."""
    from support.studies import run_study, study_of

    folder = tmp_path_factory.mktemp("study")
    found = run_study(folder, study_of(folder, base_folder))
    assert found["failed"] == 0
    return folder


@pytest.fixture
def saved(tmp_path) -> Path:
    """An adapter folder of a tiny llama."""
    make().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"
