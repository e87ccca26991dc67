"""Saving: other adapters, full disks and kills in the middle; the old adapter or the new one, whole."""

import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import umbra
from support.folders import CARD, CONFIG, FILES, TENSOR, WEIGHTS, assert_same_model, contents, names
from support.tiny import make, make_base
from support.tokenizer import make_tokenizer
from umbra import CheckpointError
from umbra.deploy.detach import write_detached

# -- overwriting ---------------------------------------------------------------------------------------------------


def test_another_adapter_is_overwritten_only_on_request(saved):
    before, other = contents(saved), make(seed=5)
    with pytest.raises(CheckpointError, match=r"another adapter.*overwrite=True"):
        other.save_pretrained(saved)
    assert contents(saved) == before
    other.save_pretrained(saved, overwrite=True)
    assert names(saved) == FILES
    assert_same_model(umbra.load(saved, base=make_base(seed=5)), other)


@pytest.mark.parametrize("text", ['{"peft_type": "LORA"}', "damaged", "[]"])
def test_adapter_without_id_counts_as_another(tmp_path, text):
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(CheckpointError, match="another adapter"):
        make().save_pretrained(tmp_path)
    assert (tmp_path / CONFIG).read_text() == text


def test_loaded_adapter_can_be_saved_over_itself(saved):
    model = umbra.load(saved, base=make_base())
    with torch.no_grad():
        model.shadow.couplings.injections["1"].up.weight += 1
    model.save_pretrained(saved)
    assert_same_model(umbra.load(saved, base=make_base()), model)


def test_trainer_may_overwrite_its_folders(saved):
    other = make(seed=5)
    other.save_pretrained(saved, is_main_process=True, state_dict=other.state_dict(), safe_serialization=True)
    assert_same_model(umbra.load(saved, base=make_base(seed=5)), other)


def test_only_main_process_writes(tmp_path, saved):
    before = contents(saved)
    make(seed=5).save_pretrained(saved, is_main_process=False)
    make().save_pretrained(tmp_path / "new", is_main_process=False)
    assert contents(saved) == before
    assert not (tmp_path / "new").exists()


def test_unrelated_files_in_folder_stay(saved):
    (saved / "notes.txt").write_text("mine")
    make(seed=5).save_pretrained(saved, overwrite=True)
    assert names(saved) == {*FILES, "notes.txt"}


def test_gathered_state_dict_is_saved(tmp_path):
    model = make()
    doubled = {k: v * 2 for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=doubled)
    assert torch.equal(load_file(tmp_path / WEIGHTS)[TENSOR], doubled[TENSOR])
    del doubled[TENSOR]
    with pytest.raises(CheckpointError, match=TENSOR):
        model.save_pretrained(tmp_path, state_dict=doubled)


@pytest.mark.parametrize("place", ["a file", "a file/below"])
def test_impossible_output_folder_is_refused(tmp_path, place):
    (tmp_path / "a file").write_text("mine")
    with pytest.raises(CheckpointError, match="a file"):
        make().save_pretrained(tmp_path / place)
    assert (tmp_path / "a file").read_text() == "mine"


# -- full disks ----------------------------------------------------------------------------------------------------


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


def fill_at_weights(monkeypatch):
    monkeypatch.setattr("umbra.adapters.saving.save_file", full_disk)


def fill_within_weights(monkeypatch):
    def half(weights, path, **options):
        save_file(weights, path, **options)
        os.truncate(path, 100)
        full_disk()

    monkeypatch.setattr("umbra.adapters.saving.save_file", half)


def fill_at_text(file: str):
    def fill(monkeypatch):
        write_text = Path.write_text
        monkeypatch.setattr(
            Path, "write_text", lambda path, *a, **k: (full_disk if path.name == file else write_text)(path, *a, **k)
        )

    return fill


def fill_at(target: str):
    return lambda monkeypatch: monkeypatch.setattr(target, full_disk)


FULL_DISKS = {
    "at the weights": fill_at_weights,
    "within the weights": fill_within_weights,
    "at the configuration": fill_at_text(CONFIG),
    "at the card": fill_at_text(CARD),
    "at the staging folder": fill_at("umbra.files.folder.tempfile.mkdtemp"),
    "at fsync": fill_at("umbra.files.folder.os.fsync"),
    "at the commit": fill_at("umbra.files.folder.Path.rename"),
}


@pytest.mark.parametrize("moment", FULL_DISKS)
def test_full_disk_leaves_old_adapter(saved, monkeypatch, moment):
    before, model = contents(saved), umbra.load(saved, base=make_base())
    with torch.no_grad():
        model.shadow.couplings.injections["1"].up.weight += 1
    with monkeypatch.context() as patch:
        FULL_DISKS[moment](patch)
        with pytest.raises(CheckpointError, match="No space left"):
            model.save_pretrained(saved)
    assert contents(saved) == before
    model.save_pretrained(saved)
    assert names(saved) == FILES
    assert_same_model(umbra.load(saved, base=make_base()), model)


@pytest.mark.parametrize(
    "error", [SafetensorError("I/O error: File too large"), Exception("File too large (os error 27)")]
)
def test_full_disk_for_stock_model_raises_checkpoint_error(tmp_path, monkeypatch, error):
    """As safetensors and tokenizers tell of it."""

    def fails(*_, **__):
        raise error

    model, tokenizer = make(), make_tokenizer()
    where = type(tokenizer) if type(error) is Exception else type(model.detached())
    monkeypatch.setattr(where, "save_pretrained", fails)
    with pytest.raises(CheckpointError, match="File too large"):
        write_detached(model, tmp_path / "out", tokenizer)
    assert not [p for p in (tmp_path / "out").glob("*") if not p.name.startswith(".")]


@pytest.mark.parametrize("call", [1, 2, 3])
def test_disk_failure_after_commit_raises_checkpoint_error(saved, monkeypatch, call):
    """The new adapter is the folder's by then, and reads as a whole."""
    model, replace, calls = umbra.load(saved, base=make_base()), Path.replace, []
    with torch.no_grad():
        model.shadow.couplings.injections["1"].up.weight += 1

    def failing(path, target):
        calls.append(path)
        return full_disk() if len(calls) == call else replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", failing)
        with pytest.raises(CheckpointError, match="No space left"):
            model.save_pretrained(saved)
    assert_same_model(umbra.load(saved, base=make_base()), model)
    model.save_pretrained(saved)
    assert names(saved) == FILES


# -- kills ---------------------------------------------------------------------------------------------------------

# A process that forks one saver per line that it reads, and tells its pid. "loop" saves until it is killed; "crash N"
# ends at the N-th operation on the disk of one save; a saver that came through ends with 0.
SAVER = """
import dataclasses, itertools, os, sys, tempfile
from pathlib import Path
import torch
torch.set_num_threads(1)
import umbra.adapters.saving
from support.tiny import make

def fill(model, value):
    with torch.no_grad():
        for p in model.shadow.state_dict().values():
            p.fill_(value)
    model.shadow.config = dataclasses.replace(model.shadow_config, alpha=float(value))

def crash_at(n):
    calls = [0]
    def counted(function):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] == n:
                os._exit(9)
            return function(*args, **kwargs)
        return call
    for holder, name in [(Path, "write_text"), (Path, "rename"), (Path, "replace"), (Path, "rmdir"), (Path, "chmod"),
                         (Path, "mkdir"), (os, "fsync"), (tempfile, "mkdtemp"), (umbra.adapters.saving, "save_file")]:
        setattr(holder, name, counted(getattr(holder, name)))

model = make()
model.shadow.adapter_id = "the one"
for line in sys.stdin:
    folder, order, *rest = line.rstrip("\\n").split("\\t")
    pid = os.fork()
    if pid == 0:
        if order == "loop":
            for turn in itertools.count():
                if turn == 2:
                    print("saving", os.getpid(), flush=True)
                fill(model, 1 + turn % 2)
                model.save_pretrained(folder)
        fill(model, int(rest[1]))
        crash_at(int(rest[0]))
        model.save_pretrained(folder)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print("ended", status, flush=True)
"""


class Saver:
    """The other end of `SAVER`."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", SAVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def send(self, *words) -> None:
        assert self.process.stdin is not None
        print(*words, sep="\t", file=self.process.stdin, flush=True)

    def hear(self, word: str) -> int:
        assert self.process.stdout is not None
        found, number = self.process.stdout.readline().split()
        assert found == word
        return int(number)

    def crash(self, folder: Path, call: int, value: int) -> int:
        """Exit status of a save of ``value`` that ends at a given operation: 9, or 0 where it came through before."""
        self.send(folder, "crash", call, value)
        return self.hear("ended")


@pytest.fixture(scope="module")
def saver():
    saver = Saver()
    yield saver
    saver.process.stdin.close()
    assert saver.process.wait(60) == 0


def whole_value(folder: Path) -> int:
    """1 or 2: which adapter the folder holds; weights and configuration must agree."""
    model = umbra.load(folder, base=make_base())
    value = model.shadow_config.alpha
    assert value in (1, 2)
    assert all(bool((v == value).all()) for v in model.shadow.state_dict().values())
    return int(value)


def test_killed_save_leaves_one_whole_adapter(saver, tmp_path):
    assert saver.crash(tmp_path, 10**9, 1) == 0
    chance, seen = random.Random(0), set()
    for _ in range(15):
        start = time.perf_counter()
        saver.send(tmp_path, "loop")
        pid = saver.hear("saving")
        two_saves = time.perf_counter() - start
        time.sleep(chance.uniform(0, 2) * two_saves)
        os.kill(pid, signal.SIGKILL)
        assert saver.hear("ended") == -signal.SIGKILL
        seen.add(whole_value(tmp_path))
    assert seen == {1, 2}, "the savers did not get to save"
    assert saver.crash(tmp_path, 10**9, 2) == 0
    assert names(tmp_path) == FILES
    assert whole_value(tmp_path) == 2


def test_save_interrupted_anywhere_leaves_whole_adapter(saver, tmp_path):
    """Over an old adapter: until the commit it is still the old one, from then on the new one."""
    found = []
    for call in range(1, 100):
        folder = tmp_path / str(call)
        assert saver.crash(folder, 10**9, 1) == 0
        if saver.crash(folder, call, 2) == 0:
            break
        found.append(whole_value(folder))
        assert saver.crash(folder, 10**9, 1) == 0, "the next save puts all in order"
        assert names(folder) == FILES
        assert whole_value(folder) == 1
    assert len(found) >= 12
    assert found == sorted(found)
    assert set(found) == {1, 2}


def test_second_interrupted_save_leaves_whole_adapter(saver, tmp_path):
    """A save first finishes what a killed one had committed, and may itself end there."""
    killed_after_commit = 0
    for first in range(1, 100):
        killed = tmp_path / f"{first}"
        assert saver.crash(killed, 10**9, 1) == 0
        if saver.crash(killed, first, 2) == 0:
            break
        if not (killed / ".umbra-commit").exists():
            continue
        killed_after_commit += 1
        for second in range(1, 8):
            folder = shutil.copytree(killed, tmp_path / f"{first} {second}")
            assert saver.crash(folder, second, 1) == 9
            assert whole_value(folder) == 2
    assert killed_after_commit >= 4


def test_interrupted_first_save_leaves_no_partial_adapter(saver, tmp_path):
    whole = []
    for call in range(1, 100):
        folder = tmp_path / str(call)
        if saver.crash(folder, call, 2) == 0:
            break
        try:
            whole.append(whole_value(folder))
        except CheckpointError:
            whole.append(0)
        assert saver.crash(folder, 10**9, 1) == 0
        assert names(folder) == FILES
    assert whole == sorted(whole)
    assert set(whole) == {0, 2}


def test_saved_files_follow_umask(tmp_path):
    before = os.umask(0o027)
    try:
        make().save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == {0o640}
