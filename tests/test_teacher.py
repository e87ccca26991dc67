"""What the base says of a text, kept on disk: whose it is, what a damage or a full disk does to it."""

import numpy as np
import pytest
import torch

import umbra
from umbra.divergence import Teacher
from umbra.teacher import TeacherCache


def test_a_teacher_of_another_text_is_not_taken(tmp_path):
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


def test_a_teacher_of_another_base_is_not_taken(tmp_path):
    blocks = np.zeros((1, 8), np.int32)
    cache = TeacherCache(tmp_path, blocks, 2, {"base": "one"})
    cache.fill(lambda ids: Teacher(-torch.ones(7, 2), torch.zeros(7, 2, dtype=torch.int64)), 1)
    assert TeacherCache(tmp_path, blocks, 2, {"base": "one"}).done == 1
    assert TeacherCache(tmp_path, blocks, 2, {"base": "another"}).done == 0


def test_a_cache_that_is_damaged_is_filled_again(tmp_path):
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


def test_a_full_disk_is_told_as_such(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(27, "File too large")

    monkeypatch.setattr("umbra.teacher.write_text", full)
    cache = TeacherCache(tmp_path, np.zeros((1, 8), np.int32), 2)
    with pytest.raises(umbra.CheckpointError, match=r"cannot be kept in .*File too large"):
        cache.fill(lambda ids: Teacher(-torch.ones(7, 2), torch.zeros(7, 2, dtype=torch.int64)), 1)


def test_a_disk_that_is_too_small_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(umbra.CheckpointError, match="lower teacher_top_k"):
        TeacherCache(tmp_path, np.zeros((3, 8), np.int32), 2)
