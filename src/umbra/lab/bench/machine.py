"""The machine: its clock and its memory, on a CPU or a GPU, and what it is called in a table."""

import os
import platform
import resource
import subprocess
import time
from collections.abc import Callable, Iterable
from ctypes import CDLL
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from umbra.errors import ConfigError

PACKAGES = ("umbra-peft", "torch", "transformers", "peft", "shadow-peft")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Device:
    """Where everything runs.

    Args:
        name: as torch calls it, such as cpu or cuda:1.
        threads: of torch; None leaves torch's choice.

    Raises:
        ConfigError: torch does not know or does not see such a device.
    """

    def __init__(self, name: str = "cpu", threads: int | None = None):
        try:
            self.torch = torch.device(name)
        except RuntimeError as error:
            raise ConfigError(f"device={name!r} is none that torch knows: take cpu, cuda or cuda:1.") from error
        self.is_cuda = self.torch.type == "cuda"
        if self.torch.type not in ("cpu", "cuda"):
            raise ConfigError(f"The referee measures on cpu and cuda, got device={name!r}.")
        if self.is_cuda and (self.torch.index or 0) >= torch.cuda.device_count():
            raise ConfigError(f"device={name!r}, but torch sees {torch.cuda.device_count()} CUDA devices.")
        if threads is not None:
            torch.set_num_threads(threads)

    def synchronize(self) -> None:
        """Wait for all that was launched."""
        if self.is_cuda:
            torch.cuda.synchronize(self.torch)

    def seconds(self, run: Callable[[], Any]) -> float:
        """The wall time of one run, from an idle device to an idle one."""
        self.synchronize()
        began = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - began

    def settle_memory(self) -> None:
        """Give back what is free, and measure the peak from here on."""
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.torch)
            return
        if platform.system() == "Linux":
            CDLL(None).malloc_trim(0)
        if CLEAR.exists():
            CLEAR.write_text("5")  # VmHWM starts again from what is resident now

    def memory(self) -> int:
        """Bytes in use: allocated tensors on a GPU, resident memory of this process on a CPU."""
        return torch.cuda.memory_allocated(self.torch) if self.is_cuda else _status("VmRSS")

    def peak_memory(self) -> int:
        """The most bytes in use since `settle_memory`; of the whole process where the system cannot start anew."""
        return torch.cuda.max_memory_allocated(self.torch) if self.is_cuda else _status("VmHWM")

    def describe(self) -> dict[str, Any]:
        """What a result depends on."""
        found: dict[str, Any] = {
            "cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(), "memory_gb": _total_memory(),
        }  # fmt: skip
        if self.is_cuda:
            about = torch.cuda.get_device_properties(self.torch)
            found |= {
                "gpu": about.name,
                "gpu_memory_gb": round(about.total_memory / 1e9, 1),
                "cuda": torch.version.cuda,
            }
        return found


def session(arguments: dict[str, Any]) -> dict[str, Any]:
    """When, with what versions, at which commit and for which arguments something was measured."""
    return {"date": date.today().isoformat(), "commit": commit(), "versions": versions(), "arguments": arguments}


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str | None]:
    """Of each package, None where it is not installed."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str | None:
    """Of Umbra's own checkout, with -dirty where it was edited; None outside of one."""
    here = Path(__file__).parent
    git = ["git", "-c", "core.fsmonitor=false"]  # which would be a program named by the repository
    try:
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", "__init__.py"], cwd=here, capture_output=True)
        if tracked.returncode:
            return None
        told = subprocess.run([*git, "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    except OSError:
        return None
    return told.stdout.strip() or None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _total_memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _status(key: str) -> int:
    """Bytes, as the kernel tells; elsewhere the largest that this process has ever had."""
    if not STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    line = next(line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024
