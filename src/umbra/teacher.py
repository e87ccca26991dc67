"""What the base says of a text, kept on disk: it then reads every block once, however often the shadow does.

Of each token that has a successor the k likeliest next tokens and their log p, as `divergence.Teacher` has them.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor
from tqdm import tqdm

from .divergence import Teacher
from .options import speaks

NOTE, TOKENS, LOG_P = "teacher.json", "tokens.npy", "log_p.npy"


@dataclass
class TeacherCache:
    """A folder that holds the teacher of blocks (N, T): tokens and log p (N, T − 1, k)."""

    folder: Path
    blocks: np.ndarray
    top_k: int

    def __post_init__(self) -> None:
        shape = (len(self.blocks), self.blocks.shape[1] - 1, self.top_k)
        self.about = {"shape": list(shape), "sha256": hashlib.sha256(self.blocks.tobytes()).hexdigest()}
        known = self._read_note()
        self.done = known["done"] if {k: known.get(k) for k in self.about} == self.about else 0
        self.folder.mkdir(parents=True, exist_ok=True)
        mode = "r+" if self.done else "w+"
        self.tokens = open_memmap(self.folder / TOKENS, mode, np.int32, None if self.done else shape)
        self.log_p = open_memmap(self.folder / LOG_P, mode, np.float32, None if self.done else shape)

    def _read_note(self) -> dict:
        try:
            return json.loads((self.folder / NOTE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

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
                self.tokens[part], self.log_p[part] = tokens.reshape(shape).cpu(), log_p.reshape(shape).cpu()
                self.tokens.flush()
                self.log_p.flush()
                self.done = part.stop
                (self.folder / NOTE).write_text(json.dumps({**self.about, "done": self.done}), encoding="utf-8")
                bar.update(part.stop - start)

    def read(self, rows: Tensor, columns: Tensor, device: torch.device) -> Teacher:
        """The teacher of tokens ``columns`` (M,) of blocks ``rows`` (M,)."""
        at = (rows.cpu().numpy(), columns.cpu().numpy())
        tokens, log_p = (torch.as_tensor(array[at], device=device) for array in (self.tokens, self.log_p))
        return Teacher(log_p, tokens.long())
