"""Time and memory on a CPU or a GPU, and the description of machine and software for result files."""

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
    """The device to measure on.

    Args:
        name: A device of torch, such as cpu or cuda:1.
        threads: The number of torch's threads; None leaves it unchanged.

    Raises:
        ConfigError: torch has no such device.
    """

    def __init__(self, name: str = "cpu", threads: int | None = None):
        try:
            self.torch = torch.device(name)
        except RuntimeError as error:
            raise ConfigError(f"device={name!r} is unknown to torch: use cpu, cuda or cuda:1.") from error
        self.is_cuda = self.torch.type == "cuda"
        if self.torch.type not in ("cpu", "cuda"):
            raise ConfigError(f"umbra bench measures on cpu and cuda, got device={name!r}.")
        if self.is_cuda and (self.torch.index or 0) >= torch.cuda.device_count():
            raise ConfigError(f"device={name!r}, but torch sees {torch.cuda.device_count()} CUDA devices.")
        if threads is not None:
            torch.set_num_threads(threads)

    def synchronize(self) -> None:
        """Wait for all launched kernels."""
        if self.is_cuda:
            torch.cuda.synchronize(self.torch)

    def seconds(self, run: Callable[[], object]) -> float:
        """Return the wall time of one run, from an idle device to an idle device."""
        self.synchronize()
        started = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - started

    def reset_peak_memory(self) -> None:
        """Release free memory and reset the peak."""
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.torch)
            return
        if platform.system() == "Linux":
            CDLL(None).malloc_trim(0)
        if CLEAR.exists():
            CLEAR.write_text("5")  # resets VmHWM to the resident memory

    def memory(self) -> int:
        """Return the bytes in use: allocated tensors on a GPU, resident memory of the process on a CPU."""
        return torch.cuda.memory_allocated(self.torch) if self.is_cuda else _status("VmRSS")

    def peak_memory(self) -> int:
        """Return the peak since `reset_peak_memory`; on systems that cannot reset it, the peak of the process."""
        return torch.cuda.max_memory_allocated(self.torch) if self.is_cuda else _status("VmHWM")

    def describe(self) -> dict[str, Any]:
        """Return the properties of the machine that results depend on."""
        description: dict[str, Any] = {
            "cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(), "memory_gb": _total_memory(),
        }  # fmt: skip
        if self.is_cuda:
            about = torch.cuda.get_device_properties(self.torch)
            description |= {
                "gpu": about.name,
                "gpu_memory_gb": round(about.total_memory / 1e9, 1),
                "cuda": torch.version.cuda,
            }
        return description


def session(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return date, commit, versions and arguments of a measurement."""
    return {"date": date.today().isoformat(), "commit": commit(), "versions": versions(), "arguments": arguments}


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str | None]:
    """Return the version of each package; None if it is not installed."""
    by_package: dict[str, str | None] = {}
    for package in packages:
        try:
            by_package[package] = version(package)
        except PackageNotFoundError:
            by_package[package] = None
    return by_package


def commit() -> str | None:
    """Return the commit of the checkout that Umbra is imported from, with -dirty if edited; None outside a checkout."""
    here = Path(__file__).parent
    git = ["git", "-c", "core.fsmonitor=false"]  # a repository could name any program there
    try:
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", "__init__.py"], cwd=here, capture_output=True)
        if tracked.returncode:
            return None
        described = subprocess.run([*git, "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    except OSError:
        return None
    return described.stdout.strip() or None


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
    """Return a value of /proc/self/status in bytes; on systems without it, the peak of the process."""
    if not STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    line = next(line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024
