"""What the base says of a text, kept on disk: it then reads every block once, however often the shadow does.

Of each token that has a successor the k likeliest next tokens and their log p, as `divergence.Teacher` has them.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor
from tqdm import tqdm

from .divergence import Teacher
from .errors import CheckpointError
from .folder import write_text
from .options import speaks

NOTE, TOKENS, LOG_P = "teacher.json", "tokens.npy", "log_p.npy"


@dataclass
class TeacherCache:
    """A folder that holds the teacher of blocks (N, T): tokens and log p (N, T − 1, k).

    Args:
        teacher: what tells it from other teachers; kept from another one it is not taken.

    Raises:
        CheckpointError: no room on the disk, or one that refuses.
    """

    folder: Path
    blocks: np.ndarray
    top_k: int
    teacher: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.blocks), self.blocks.shape[1] - 1, self.top_k)
        text = hashlib.sha256(self.blocks.tobytes()).hexdigest()
        self.about = {"shape": list(shape), "sha256": text, "teacher": self.teacher}
        with self._disk():
            self.folder.mkdir(parents=True, exist_ok=True)
        try:
            known = json.loads((self.folder / NOTE).read_text(encoding="utf-8"))
            for name in (TOKENS, LOG_P):
                open_memmap(self.folder / name, "r")  # raises if it is cut off, where r+ would fill it up
            self.tokens, self.log_p = (open_memmap(self.folder / name, "r+") for name in (TOKENS, LOG_P))
            same = all(known.get(k) == v for k, v in self.about.items())
            self.done = known["done"] if same and self.tokens.shape == self.log_p.shape == shape else 0
        except (OSError, ValueError, KeyError, AttributeError):
            self.done = 0
        if self.done == 0:
            with self._disk():
                self._make_room(shape)

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"What the base says cannot be kept in {self.folder}: {error}") from error

    def _make_room(self, shape: tuple[int, ...]) -> None:
        needed, free = 8 * math.prod(shape), shutil.disk_usage(self.folder).free
        if needed > free:
            raise CheckpointError(
                f"{self.folder} needs {needed / 1e9:.1f} GB for {self.top_k} tokens at each place, {free / 1e9:.1f} are free: "
                "lower teacher_top_k, or leave out teacher_cache."
            )
        self.tokens = open_memmap(self.folder / TOKENS, "w+", np.int32, shape)
        self.log_p = open_memmap(self.folder / LOG_P, "w+", np.float32, shape)

    def fill(self, say: Callable[[Tensor], Teacher], batch_size: int) -> None:
        """Ask for every block that is not there yet; a killed call goes on where it was.

        Args:
            say: from blocks (B, T) to the teacher of their B · (T − 1) tokens that have a successor.
        """
        bar = tqdm(total=len(self.blocks), initial=self.done, desc="the base reads", disable=None if speaks() else True)
        with bar:
            for start in range(self.done, len(self.blocks), batch_size):
                part = slice(start, min(start + batch_size, len(self.blocks)))
                log_p, tokens = say(torch.as_tensor(self.blocks[part], dtype=torch.long))
                assert tokens is not None
                shape = (part.stop - start, *self.tokens.shape[1:])
                with self._disk():
                    self.tokens[part], self.log_p[part] = tokens.reshape(shape).cpu(), log_p.reshape(shape).cpu()
                    self.tokens.flush()
                    self.log_p.flush()
                    self.done = part.stop
                    self._note()
                bar.update(part.stop - start)

    def _note(self) -> None:
        beside = self.folder / f"{NOTE}.new"
        write_text(beside, json.dumps({**self.about, "done": self.done}))
        beside.replace(self.folder / NOTE)

    def read(self, rows: Tensor, columns: Tensor, device: torch.device) -> Teacher:
        """The teacher of tokens ``columns`` (M,) of blocks ``rows`` (M,)."""
        at = (rows.cpu().numpy(), columns.cpu().numpy())
        tokens, log_p = (torch.as_tensor(array[at], device=device) for array in (self.tokens, self.log_p))
        return Teacher(log_p, tokens.long())
