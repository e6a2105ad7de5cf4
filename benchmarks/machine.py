"""What the numbers were taken on: processor, versions, commit, and the two speeds that bound every kernel."""

from __future__ import annotations

import platform
import shutil
import subprocess
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from fastclip.training.allocator import keep_freed_memory
from fastclip.training.engine import computes_in_bf16

ROOT = Path(__file__).resolve().parent.parent
TRIES = 5


class Roofline(NamedTuple):
    """Operations and bytes a second."""

    product: float
    copy: float

    def milliseconds(self, operations: float, traffic: float) -> float:
        return 1e3 * max(operations / self.product, traffic / self.copy)


def has_products(device: str, dtype: torch.dtype) -> bool:
    """Whether it multiplies matrices of that type; where not, the library takes some hundred times as long."""
    return dtype != torch.bfloat16 or computes_in_bf16(torch.device(device))


@cache
def roofline(device: str, dtype: torch.dtype, is_quick: bool = False) -> Roofline:
    """The library's best of a few products and copies, measured here and now.

    Without products of that type what is measured are those of fp32, in which such a processor computes.
    """
    dtype = dtype if has_products(device, dtype) else torch.float32
    size = 512 if is_quick else (8192 if device == "cuda" else 2048)
    length = (1 << 22) if is_quick else (1 << 28 if device == "cuda" else 1 << 26)  # bytes
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(length, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = _best_seconds(lambda: a @ b, device)
    copied = _best_seconds(lambda: target.copy_(source), device)
    return Roofline(2.0 * size**3 / product, 2.0 * length / copied)


def _best_seconds(action: object, device: str) -> float:
    assert callable(action)
    times = []
    for _ in range(TRIES + 1):  # the first is not warm, and never the best
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def settle_allocator() -> None:
    """Puts glibc's thresholds where its own adaptation leaves them in a long run, and lets it keep what is freed below.

    They move with every size that is freed, and with them whether a call pages its memory in anew: attention in eager
    code took 15 % more or less from one moment of a process to the next. Tensors of 32 MiB or more are paged in by
    each call, as always.
    """
    keep_freed_memory(up_to=32 << 20)


def machine_name(device: str) -> str:
    """Processor and threads, or GPU and its clocks as they are now."""
    if device == "cuda":
        return torch.cuda.get_device_name() + _clocks()
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


@cache
def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _clocks() -> str:
    """For instance ", sm 1980 MHz, mem 3201 MHz"; empty where nvidia-smi does not say."""
    said = _output("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader,nounits")
    sm, _, mem = (said or "").splitlines()[0].partition(", ") if said else ("", "", "")
    return f", sm {sm} MHz, mem {mem} MHz" if sm.isdigit() and mem.isdigit() else ""


def triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return ""


@cache
def commit() -> str:
    """Short, with "+" where files differ from it; empty outside a checkout."""
    sha = _output("git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD")
    if not sha:
        return ""
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no", "--", "fastclip", "csrc")
    return sha + ("+" if changed else "")


def free_memory(device: str) -> int | None:
    """Bytes a process may still take; None where nobody says."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.is_file() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return None


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
