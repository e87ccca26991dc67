"""A cache on disk of the base's next-token distributions, so that the base reads each block of text only once.

For each token with a successor it holds the k likeliest next tokens and their log p: see `method.divergences.Teacher`.
"""

import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import dtype_to_descr, open_memmap, write_array_header_1_0
from torch import Tensor
from tqdm import tqdm

from umbra.errors import CheckpointError
from umbra.files.folder import write_text
from umbra.method.divergences import Teacher
from umbra.options import is_main_process

NOTE, TOKENS, LOG_P = "teacher.json", "tokens.npy", "log_p.npy"
TYPES = {TOKENS: np.dtype(np.int32), LOG_P: np.dtype(np.float32)}


@dataclass
class TeacherCache:
    """A folder with the teacher of blocks: tokens and log p (N, T − 1, k).

    Args:
        folder: the folder.
        blocks: (N, T) token ids.
        top_k: number k of next tokens.
        teacher: values that identify the teacher; the content of a cache with other values is discarded.

    Raises:
        CheckpointError: the disk has too little room, or fails.
    """

    folder: Path
    blocks: np.ndarray
    top_k: int
    teacher: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shape = (len(self.blocks), self.blocks.shape[1] - 1, self.top_k)
        text = hashlib.sha256(self.blocks.tobytes()).hexdigest()
        self.about = {"shape": list(self.shape), "sha256": text, "teacher": self.teacher}
        self.done, self.sums = 0, dict.fromkeys(TYPES, 0)  # number of written blocks, and checksums of their bytes
        with self._disk():
            self.folder.mkdir(parents=True, exist_ok=True)
        try:
            known = json.loads((self.folder / NOTE).read_text(encoding="utf-8"))
            if all(known.get(k) == v for k, v in self.about.items()):
                self._open()
                self.done, self.sums = known["done"], known["sums"]
                if any(self._sum(name) != self.sums[name] for name in TYPES):
                    self.done = 0
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            self.done = 0
        if self.done == 0:
            self.sums = dict.fromkeys(TYPES, 0)
            with self._disk():
                self._make_room()

    def _open(self) -> None:
        """Open the arrays for reading. Writing goes through files, so that a full disk raises an error instead of a signal."""
        self.arrays: dict[str, np.memmap] = {name: open_memmap(self.folder / name, "r") for name in TYPES}
        if any(array.shape != self.shape or array.dtype != TYPES[name] for name, array in self.arrays.items()):
            raise ValueError("another shape")

    def _sum(self, name: str) -> int:
        """Return the checksum of all written blocks."""
        total = 0
        for start in range(0, self.done, 64):
            total = zlib.crc32(np.ascontiguousarray(self.arrays[name][start : min(start + 64, self.done)]).data, total)
        return total

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"The teacher cache {self.folder} cannot be written: {error}") from error

    def _make_room(self) -> None:
        """Allocate files of the final size, with no block recorded as written."""
        for name in (NOTE, *TYPES):
            (self.folder / name).unlink(missing_ok=True)
        needed, free = 8 * math.prod(self.shape), shutil.disk_usage(self.folder).free
        if needed > free:
            raise CheckpointError(
                f"{self.folder} needs {needed / 1e9:.1f} GB for {self.top_k} tokens at each position, {free / 1e9:.1f} are free: "
                "lower teacher_top_k, or leave out teacher_cache."
            )
        for name, kind in TYPES.items():
            with (self.folder / name).open("w+b") as file:
                write_array_header_1_0(
                    file, {"descr": dtype_to_descr(kind), "fortran_order": False, "shape": self.shape}
                )
                file.flush()
                os.posix_fallocate(file.fileno(), file.tell(), kind.itemsize * math.prod(self.shape))
        self._open()

    def _put(self, name: str, start: int, values: Tensor) -> None:
        data = np.ascontiguousarray(values.cpu().numpy().astype(TYPES[name])).data
        with (self.folder / name).open("r+b") as file:
            file.seek(self.arrays[name].offset + 4 * start * math.prod(self.shape[1:]))
            file.write(data)
        self.sums[name] = zlib.crc32(data, self.sums[name])

    def fill(self, teacher_of: Callable[[Tensor], Teacher], batch_size: int) -> None:
        """Compute the teacher of every block that is missing; a killed call continues where it stopped.

        Args:
            teacher_of: maps blocks (B, T) to the teacher of their B · (T − 1) tokens that have a successor.
            batch_size: number of blocks in a call.
        """
        bar = tqdm(
            total=len(self.blocks), initial=self.done, desc="run teacher", disable=None if is_main_process() else True
        )
        with bar:
            for start in range(self.done, len(self.blocks), batch_size):
                part = slice(start, min(start + batch_size, len(self.blocks)))
                log_p, tokens = teacher_of(torch.as_tensor(self.blocks[part], dtype=torch.long))
                assert tokens is not None
                with self._disk():
                    self._put(TOKENS, start, tokens)
                    self._put(LOG_P, start, log_p)
                    self.done = part.stop
                    self._note()
                bar.update(part.stop - start)

    def _note(self) -> None:
        beside = self.folder / f"{NOTE}.new"
        write_text(beside, json.dumps({**self.about, "done": self.done, "sums": self.sums}))
        beside.replace(self.folder / NOTE)

    def read(self, rows: Tensor, columns: Tensor, device: torch.device) -> Teacher:
        """Return the teacher of the tokens at positions ``columns`` (M,) of blocks ``rows`` (M,)."""
        at = (rows.cpu().numpy(), columns.cpu().numpy())
        tokens, log_p = (torch.as_tensor(self.arrays[name][at], device=device) for name in TYPES)
        return Teacher(log_p, tokens.long())
