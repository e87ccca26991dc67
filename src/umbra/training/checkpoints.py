"""The checkpoints of a training run: which exist, which are complete, and which are removed."""

import json
import re
import sys
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import NotRequired, TypedDict

from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from umbra.adapters.files import CONFIG_FILE, WEIGHTS_FILE, is_umbra, read_weights
from umbra.adapters.integrity import check_digest
from umbra.errors import CheckpointError, raising
from umbra.files import folder
from umbra.options import is_main_process

PROGRESS = "training_progress.json"  # the state that transformers' own files leave out
NAME = re.compile(r"checkpoint-(\d+)")
DEEPSPEED = "latest"  # a file that DeepSpeed writes beside its own folders


class Sums(TypedDict):
    """What one rank has summed up since its last log."""

    total_loss: float
    loss: float
    shadow_loss: NotRequired[float]
    shadow_since: NotRequired[int | None]


class SavedProgress(TypedDict):
    """The content of `PROGRESS`."""

    logged_step: int
    max_steps: int
    seconds: float
    epoch_ended: bool
    grad_norm: float | None
    learning_rate: float | None
    ranks: list[Sums]


def step_of(path: Path) -> int | None:
    """Return the step in a checkpoint folder's name; None for any other name."""
    match = NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def checkpoints(out: Path) -> list[Path]:
    """Return the folders named checkpoint-N in ``out``, newest first."""
    paths = [p for p in out.glob("checkpoint-*") if step_of(p) is not None and p.is_dir() and not p.is_symlink()]
    return sorted(paths, key=lambda p: step_of(p) or 0, reverse=True)


def rotate(out: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints beyond ``limit``, but never the newest or the best one.

    Args:
        out: the run's folder.
        limit: the number of checkpoints to leave; None or 0 for all.
        best: path of the best checkpoint, if one is tracked.
    """
    protected = {Path(best).name} if best is not None else set()
    paths = checkpoints(out)
    protected |= {p.name for p in paths[:1]}
    removable = [p for p in paths if p.name not in protected]
    if limit is not None and limit > 0:
        for path in removable[max(limit - len(protected), 0) :]:
            with suppress(OSError):
                folder.remove(path)


def read_progress(path: Path) -> SavedProgress | None:
    """Return the content of a checkpoint's `PROGRESS`.

    Returns:
        None if the file is missing or incomplete, as in checkpoints of other trainers and of early versions of Umbra.
    """
    try:
        values = json.loads(folder.read_text(path / PROGRESS))
        ranks = values["ranks"]
        is_complete = (
            ranks and all("total_loss" in r for r in ranks) and SavedProgress.__required_keys__ <= values.keys()
        )
        return values if is_complete else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def last_checkpoint(out: Path) -> str | None:
    """Return the newest complete checkpoint in a run's folder, and report the incomplete ones that are skipped.

    Returns:
        Its path; None if the run has no checkpoint, or was killed while it wrote the first one.

    Raises:
        CheckpointError: checkpoints exist, but all of them are damaged.
    """
    skipped: dict[str, str] = {}
    is_damaged = False
    for path in checkpoints(out):
        problem = _problem(path)
        if problem is None:
            _report(skipped, f"training resumes from {path.name}")
            return str(path)
        skipped[path.name] = problem
        is_damaged = is_damaged or not problem.startswith(TRAINER_STATE_NAME)
    if is_damaged:
        reasons = "; ".join(f"{name}: {problem}" for name, problem in skipped.items())
        raise CheckpointError(
            f"No checkpoint in {out} is complete ({reasons}): restore one, or start over with overwrite (--overwrite)."
        )
    _report(skipped, "training starts over")
    return None


def _report(skipped: dict[str, str], consequence: str) -> None:
    if skipped and is_main_process():
        reasons = "; ".join(f"{name} ({problem})" for name, problem in skipped.items())
        print(f"Incomplete checkpoints are skipped, {consequence}: {reasons}.", file=sys.stderr)


def _problem(path: Path) -> str | None:
    """Return the reason why a checkpoint cannot be resumed from; None if it can."""
    try:
        state = json.loads(folder.read_text(path / TRAINER_STATE_NAME))
        if state["global_step"] != step_of(path):
            return f"{TRAINER_STATE_NAME} belongs to step {state['global_step']}"
    except (OSError, ValueError, LookupError, TypeError):
        return f"{TRAINER_STATE_NAME} is missing or damaged"
    progress = read_progress(path)
    if progress is None:
        return f"{PROGRESS} is missing or damaged"
    ranks = len(progress["ranks"])
    archives = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{i}.pth" for i in range(ranks)]
    if not (path / DEEPSPEED).exists():
        archives += [OPTIMIZER_NAME, SCHEDULER_NAME]
    for name in [*archives, *([SCALER_NAME] if (path / SCALER_NAME).exists() else [])]:
        if not (path / name).is_file():
            return f"{name} is missing"
        if not _is_whole(path / name):
            return f"{name} is damaged"
    return _weights_problem(path)


def _is_whole(file: Path) -> bool:
    """Return whether every member of a torch archive matches its checksum."""
    try:
        with raising(CheckpointError, str), zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except CheckpointError:
        return False


def _weights_problem(path: Path) -> str | None:
    """Return the first problem of the model's files: an Umbra adapter, or the weights of another method; None if all is well."""
    files = sorted({f.name for f in path.glob("*.safetensors")})
    if not files:
        return f"{WEIGHTS_FILE} is missing"
    try:
        if WEIGHTS_FILE in files:
            values = json.loads(folder.read_text(path / CONFIG_FILE))
            if is_umbra(values):
                check_digest(values, read_weights(path), path / CONFIG_FILE)
    except CheckpointError:
        return f"{WEIGHTS_FILE} is damaged, or does not match {CONFIG_FILE}"
    except (OSError, ValueError, AttributeError):
        return f"{CONFIG_FILE} is missing or damaged"
    for name in files:
        try:
            with safe_open(path / name, framework="pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError, RuntimeError) as error:
            return f"{name} is damaged: {error}"
    return None
