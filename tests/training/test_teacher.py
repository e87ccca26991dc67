"""The teacher cache on disk: which content is reused, and what happens on damage or a full disk."""

import json
import os
import resource
import signal

import numpy as np
import pytest
import torch

import umbra
from umbra.method.divergences import Teacher
from umbra.training.teacher_cache import TeacherCache


def test_teacher_cache_of_other_text_is_not_used(tmp_path):
    blocks = np.arange(24, dtype=np.int32).reshape(3, 8)

    def say(ids):
        return Teacher(-torch.ones(7 * len(ids), 2), ids[:, :-1].reshape(-1, 1).expand(-1, 2))

    cache = TeacherCache(tmp_path, blocks, 2)
    cache.fill(say, 2)
    again = TeacherCache(tmp_path, blocks, 2)
    assert again.done == 3
    found = again.read(torch.tensor([2, 0]), torch.tensor([1, 6]), torch.device("cpu"))
    assert found.tokens.tolist() == [[17, 17], [6, 6]]
    assert TeacherCache(tmp_path, blocks + 1, 2).done == 0


def test_teacher_cache_of_other_base_is_not_used(tmp_path):
    blocks = np.zeros((1, 8), np.int32)
    cache = TeacherCache(tmp_path, blocks, 2, {"base": "one"})
    cache.fill(lambda ids: Teacher(-torch.ones(7, 2), torch.zeros(7, 2, dtype=torch.int64)), 1)
    assert TeacherCache(tmp_path, blocks, 2, {"base": "one"}).done == 1
    assert TeacherCache(tmp_path, blocks, 2, {"base": "another"}).done == 0


def test_damaged_cache_is_refilled(tmp_path):
    blocks = np.arange(24, dtype=np.int32).reshape(3, 8)

    def say(ids):
        return Teacher(-torch.ones(7 * len(ids), 2), ids[:, :-1].reshape(-1, 1).expand(-1, 2))

    TeacherCache(tmp_path, blocks, 2).fill(say, 2)
    for damage in (lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:200]), lambda p: p.write_bytes(b"")):
        damage(tmp_path / "log_p.npy")
        cache = TeacherCache(tmp_path, blocks, 2)
        assert cache.done == 0
        cache.fill(say, 2)
        assert TeacherCache(tmp_path, blocks, 2).done == 3


def test_full_disk_is_reported(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(27, "File too large")

    monkeypatch.setattr("umbra.training.teacher_cache.write_text", full)
    cache = TeacherCache(tmp_path, np.zeros((1, 8), np.int32), 2)
    with pytest.raises(umbra.CheckpointError, match=r"cannot be written.*File too large"):
        cache.fill(lambda ids: Teacher(-torch.ones(7, 2), torch.zeros(7, 2, dtype=torch.int64)), 1)


def test_too_small_disk_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(umbra.CheckpointError, match="lower teacher_top_k"):
        TeacherCache(tmp_path, np.zeros((3, 8), np.int32), 2)


BLOCKS = np.arange(40, dtype=np.int32).reshape(5, 8)


def say(ids):
    """Of each token itself and twice itself, at log p that depend on it."""
    tokens = ids[:, :-1].reshape(-1, 1).float()
    return Teacher(-torch.cat([tokens, 2 * tokens], 1) - 1, torch.cat([tokens, 2 * tokens], 1).long())


def assert_whole(folder):
    cache = TeacherCache(folder, BLOCKS, 2)
    cache.fill(say, 2)
    rows, columns = (x.flatten() for x in torch.meshgrid(torch.arange(5), torch.arange(7), indexing="ij"))
    found, expected = cache.read(rows, columns, torch.device("cpu")), say(torch.as_tensor(BLOCKS, dtype=torch.long))
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.log_p, expected.log_p)


def killed(folder, calls):
    """Fill a cache in a process that kills itself at one of the operations on the disk; whether it came through."""
    pid = os.fork()
    if pid == 0:
        left = [calls]

        def counted(function):
            def call(*args, **options):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **options)

            return call

        os.replace, os.unlink = counted(os.replace), counted(os.unlink)
        os.posix_fallocate = counted(os.posix_fallocate)
        TeacherCache._put, TeacherCache._open = counted(TeacherCache._put), counted(TeacherCache._open)
        TeacherCache._note = counted(TeacherCache._note)
        try:
            TeacherCache(folder, BLOCKS, 2).fill(say, 2)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("lost", [None, "log_p.npy", "tokens.npy", "teacher.json"])
def test_unwritten_rows_are_never_read(tmp_path, lost):
    """Killed anywhere, after a file of a whole cache was lost or before there was one."""
    for calls in range(1, 40):
        folder = tmp_path / str(calls)
        if lost is not None:
            TeacherCache(folder, BLOCKS, 2).fill(say, 2)
            (folder / lost).unlink()
        through = killed(folder, calls)
        assert_whole(folder)
        if through:
            break
    assert calls > 8


@pytest.mark.parametrize("name", ["tokens.npy", "log_p.npy"])
def test_lost_rows_are_refilled(tmp_path, name):
    TeacherCache(tmp_path, BLOCKS, 2).fill(say, 2)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[:-100] + bytes(100))
    assert TeacherCache(tmp_path, BLOCKS, 2).done == 0
    assert_whole(tmp_path)


def test_full_disk_during_preallocation_raises(tmp_path):
    """And no signal, which a write into memory would get."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        with pytest.raises(umbra.CheckpointError, match="cannot be written"):
            TeacherCache(tmp_path, BLOCKS, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_whole(tmp_path)
    assert json.loads((tmp_path / "teacher.json").read_text())["done"] == 5
