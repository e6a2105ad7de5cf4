"""Processes for the tests of losses across ranks, and the dense formulas they are compared with."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import secrets
import socket
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.context import ForkServerContext
from multiprocessing.reduction import DupFd
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 120  # seconds


def free_port() -> int:
    """One that nothing else takes before it is used: neither the system, which gives away those from 32768 on, nor
    another worker of pytest-xdist, which has another thousand."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = 10000 + 1000 * (worker % 20) + secrets.randbelow(1000)
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("127.0.0.1", port))
            return port


@cache
def _context() -> ForkServerContext:
    """Ranks are forks of a process that has done nothing but the slow imports, once for all of them."""
    context = multiprocessing.get_context("forkserver")
    modules = ["torch._dynamo", "deepspeed", "pytest", "fastclip.training.loop", "fastclip.report.charts"]
    context.set_forkserver_preload(modules)
    return context


class _Surroundings:
    """Environment, output and errors of this process, for a rank: those of the process it is a fork of are older."""

    def __init__(self) -> None:
        self.environment = dict(os.environ)

    def __getstate__(self) -> dict[str, Any]:
        return {"environment": self.environment, "outputs": [DupFd(1), DupFd(2)]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        os.environ.clear()
        os.environ.update(state["environment"])
        for place, output in enumerate(state["outputs"], start=1):
            os.dup2(output.detach(), place)


def _worker(
    rank: int,
    world_size: int,
    port: int,
    surroundings: _Surroundings,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    queue: Any,
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
        queue.put((rank, function(*arguments), None))
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        queue.put((rank, None, traceback.format_exc()))


def run_on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = TIMEOUT) -> list[Any]:
    """function(*arguments) in `world_size` gloo processes; its results, plain Python or NumPy, by rank."""
    context, surroundings, port = _context(), _Surroundings(), free_port()
    queue = context.Queue()
    processes = [
        context.Process(
            target=_worker, args=(rank, world_size, port, surroundings, function, arguments, queue), daemon=True
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results = {}
    try:
        for _ in processes:
            rank, result, error = queue.get(timeout=timeout)
            assert error is None, f"rank {rank}:\n{error}"
            results[rank] = result
        for process in processes:
            process.join(timeout)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(world_size)]
