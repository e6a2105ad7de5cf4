"""`python -m fastclip.training.launch ARGS`: `python -m fastclip.training ARGS` under DeepSpeed's launcher, locally.

A process for every GPU, or where there is none one for each of two cores. DeepSpeed's launcher answers a signal by
killing its ranks; this one hands it to the ranks, which save and end, and passes their exit status on.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil  # not within the handler of a signal: a second one would find half of it

MODULE = "fastclip.training"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: that of `python -m fastclip.training`."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    gpus = _gpus()
    environment = dict(os.environ)
    launcher = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--log_level=critical",
        f"--master_port={_free_port()}",
    ]
    if gpus:
        print(f"Starting {gpus} process(es), one for each GPU, under DeepSpeed's launcher", flush=True)
    else:
        ranks = min(2, len(os.sched_getaffinity(0)))
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        launcher.append(f"--num_accelerators={ranks}")
        print(f"Starting {ranks} process(es) on the CPU under DeepSpeed's launcher", flush=True)
    # In a session of its own, so that Ctrl-C in a terminal comes to this process alone.
    run = subprocess.Popen([*launcher, "--module", MODULE, *arguments], env=environment, start_new_session=True)
    received: list[int] = []

    def forward(number: int, _: object) -> None:
        received.append(number)
        _forward(run.pid, number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, forward)
    status = run.wait()
    return 128 + signal.SIGINT if signal.SIGINT in received else _shell_status(status)


def _gpus() -> int:
    """How many torch sees; without asking it, which takes seconds, where there is no driver's device."""
    if not any(next(Path("/dev").glob(name), None) for name in ("nvidia*", "nvhost*", "kfd", "dxg")):
        return 0
    import torch

    return torch.cuda.device_count()


def _shell_status(status: int) -> int:
    """128 + the number of a signal that ended the launcher (-15), or one of its processes (-15, so that it exits with
    241)."""
    number = -status if status < 0 else 256 - status
    return 128 + number if 1 < number < signal.NSIG else status


def _forward(launcher: int, number: int) -> None:
    """The signal to the ranks, who are the children of the launcher's child; before there are any, to the session:
    that child would still start them."""
    number = signal.SIGTERM if number == signal.SIGHUP else number
    try:
        ranks = [rank for child in psutil.Process(launcher).children() for rank in child.children()]
        for process in ranks:
            process.send_signal(number)
        if not ranks:
            os.killpg(launcher, number)
    except (psutil.NoSuchProcess, ProcessLookupError):  # it has just ended by itself
        pass


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
