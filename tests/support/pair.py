"""Two local gloo processes, started once, that run functions in parallel."""

import multiprocessing
import os
import tempfile
import traceback
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

RANKS = 2
SECONDS = 120  # time limit of one function; a rank that waits for the other gives up earlier


class Pair:
    """Two ranks: ``pair(function, *arguments)`` returns each rank's result. Functions must be importable (see `ranks.py`)."""

    def __init__(self) -> None:
        self.processes: list[Any] = []

    def start(self) -> None:
        context, folder = multiprocessing.get_context("spawn"), tempfile.mkdtemp()
        ends = [context.Pipe() for _ in range(RANKS)]
        self.connections = [mine for mine, _ in ends]
        self.processes = [
            context.Process(target=_serve, args=(rank, f"file://{folder}/store", theirs), daemon=True)
            for rank, (_, theirs) in enumerate(ends)
        ]
        for process in self.processes:
            process.start()

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []

    def __call__(self, function: Any, *arguments: Any, **options: Any) -> list[Any]:
        if not self.processes:
            self.start()
        for connection in self.connections:
            connection.send((function, arguments, options))
        answers = []
        for rank, connection in enumerate(self.connections):
            if not connection.poll(SECONDS):
                answers.append((False, f"rank {rank} has not answered for {SECONDS} s"))
            else:
                answers.append(connection.recv())
        failures = [answer for good, answer in answers if not good]
        if failures:
            if len(failures) < RANKS or len({f.splitlines()[-1] for f in failures}) > 1:
                self.stop()  # one rank has left a collective that the other is in
            raise AssertionError("\n".join(failures))
        return [answer for _, answer in answers]


def _serve(rank: int, store: str, connection: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577", "ACCELERATE_USE_CPU": "true"}
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=SECONDS / 2)
    )
    while True:
        function, arguments, options = connection.recv()
        with ExitStack() as stack:
            stack.callback(_restore, dict(os.environ))
            try:
                connection.send((True, function(*arguments, **options)))
            except BaseException:
                connection.send((False, f"rank {rank}:\n{traceback.format_exc()}"))


def _restore(environment: dict[str, str]) -> None:
    """Restore the process's environment and accelerate's singletons."""
    from accelerate.state import AcceleratorState, GradientState

    os.environ.clear()
    os.environ |= environment
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
