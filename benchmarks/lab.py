"""`python -m benchmarks.lab`: all that a machine can tell in a few minutes, the most valuable first, saved as it goes.

For a GPU that may be gone soon: it takes the interpreter that runs it, makes no environment, needs no network, and
leaves out by name what is missing. Kernels are built where there is a compiler, the kernels' tests run, on a GPU a
training step beside open_clip's, then the benchmarks, in a process of their own: when the GPU is lost or a peer
crashes, a new one goes on behind. After every problem the folder holds rows.csv, plots, summary.md and tuned.json (see
benchmarks.tune); started again on the same folder it goes on where it was. Without a GPU it does the same with the
quick sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, plot, predict, rows, table, tune
from benchmarks.__main__ import LOST
from benchmarks.cases import CASES
from fastclip.errors import UserError
from fastclip.ops import _cuda, _extension

ROOT = machine.ROOT
BUILD_SHARE, TEST_SHARE, STEP_SHARE = 0.2, 0.25, 0.4  # of the time that is left
MOST_STARTS = 10
PROGRESS = re.compile(r"\[(\d+)/(\d+)\] ")


class Lab:
    """One visit: the clock, the folder, and what is to be said of it."""

    def __init__(self, out: Path, budget: float, device: str, is_quick: bool) -> None:
        self.out, self.device, self.is_quick = out, device, is_quick
        self.deadline = time.monotonic() + budget
        self.notes: list[str] = []
        self.csv = out / "rows.csv"
        out.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        """Seconds."""
        return max(0.0, self.deadline - time.monotonic())

    def note(self, line: str) -> None:
        print(line, flush=True)
        self.notes.append(line)
        self.save()

    def save(self) -> None:
        """Summary and plots, from what the CSV holds now."""
        measured = rows.read(self.csv)
        parts = [f"# {machine.machine_name(self.device)}", _versions(), *(f"- {line}" for line in self.notes)]
        parts += [
            "",
            "## Measured, forward + backward",
            "",
            results_table(measured),
            "",
            "## Beside an H200's roofline",
        ]
        parts += ["", table.predicted_table(rows.read(predict.FILE), measured), ""]
        (self.out / "summary.md").write_text("\n".join(parts))
        (self.out / "tuned.json").write_text(tune.to_json(tune.choices(measured)))
        with contextlib.suppress(UserError):  # no matplotlib: the CSV has it all
            plot.draw(measured, self.out)


def _versions() -> str:
    parts = [f"python {platform.python_version()}", f"torch {torch.__version__}", f"triton {machine.triton_version()}"]
    return "\n" + ", ".join([*parts, f"commit {machine.commit()}"]) + "\n"


def results_table(measured: Sequence[rows.Row]) -> str:
    """Every row of the phase "both", and what was not measured with its reason."""
    columns = ("op", "dtype", "shape_json", "impl", "p50_ms", "ratio", "baseline", "peak_mb", "pct_roofline", "error")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    shown = [row for row in measured if row["phase"] == "both" or not row["p50_ms"]]
    lines += ["| " + " | ".join(row[name].replace("|", "/") for name in columns) + " |" for row in shown]
    return "\n".join(lines)


def build(lab: Lab) -> None:
    """The C++ kernels, where they are not built for this torch; on a GPU the CUDA kernels first, where they are not."""
    if lab.device == "cuda":
        _build(lab, "CUDA", "_cuda", _cuda.missing())
    _build(lab, "C++", "_extension", _extension.missing())


def _build(lab: Lab, kind: str, module: str, missing: str | None) -> None:
    if _loads(module):
        return lab.note(f"{kind} kernels: built before")
    if missing is not None:
        return lab.note(f"{kind} kernels: not built, {missing}")
    code = f"from fastclip.ops import {module}; {module}.build()"
    how = _status(lab, [sys.executable, "-c", code], f"build{module}.log", BUILD_SHARE)
    return lab.note(f"{kind} kernels: {how}")


def _loads(module: str) -> bool:
    """In a process of its own: a library loaded here could not be replaced."""
    code = f"import sys; from fastclip.ops import {module}; sys.exit(isinstance({module}.load(), str))"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False).returncode == 0


def test(lab: Lab) -> None:
    """The tests of the kernels: on a GPU, those of Triton and of CUDA run on it."""
    if find_spec("pytest") is None:
        return lab.note("tests: left out, pytest is not installed")
    names = [f"tests/test_{op}{'_triton' if lab.device == 'cuda' else ''}.py" for op in CASES]
    names += ["tests/test_cuda.py"] * (lab.device == "cuda")
    files = [name for name in names if (ROOT / name).exists()]
    command = [sys.executable, "-m", "pytest", "-x", "-m", "not long and not peer", *files]
    return lab.note(f"tests ({', '.join(files)}): {_status(lab, command, 'tests.log', TEST_SHARE)}")


def train_step(lab: Lab) -> None:
    """A whole training step beside compiled open_clip's, on a GPU; its rows are in train_step.csv."""
    if lab.device != "cuda":
        return
    if find_spec("open_clip") is None:
        return lab.note("training step: left out, open_clip is not installed")
    words = [
        "--model",
        "ViT-B-16",
        "--batch",
        "1024",
        "--impl",
        "open_clip",
        "open_clip_32",
        "fastclip",
        "--seconds",
        "10",
    ]
    command = [sys.executable, "-m", "benchmarks.train_step", *words, "--out", str(lab.out / "train_step.csv")]
    return lab.note(f"training step: {_status(lab, command, 'train_step.log', STEP_SHARE)}")


def _status(lab: Lab, command: list[str], log: str, share: float) -> str:
    """Runs it for at most its share of the time, its output to a file; says in words how it went."""
    start, limit = time.monotonic(), share * lab.left
    with (lab.out / log).open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s, see {log}"
        finally:
            _kill(process)
    last = ((lab.out / log).read_text().strip().splitlines() or [""])[-1].strip("= ")
    return f"{'done' if status == 0 else 'FAILED'} in {time.monotonic() - start:.0f} s ({last})"


def _kill(process: subprocess.Popen[Any]) -> None:
    """With its children, which are one process group; nothing where it has ended."""
    if process.poll() is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def measure(lab: Lab, cases: Sequence[str]) -> None:
    """The benchmarks, in as many processes as it takes."""
    start = 0
    for _ in range(MOST_STARTS):
        command = [sys.executable, "-m", "benchmarks", "--out", str(lab.csv), "--device", lab.device, "--resume"]
        command += ["--start", str(start), "--time-budget", f"{lab.left:.0f}"] + ["--quick"] * lab.is_quick
        command += [part for name in cases for part in ("--case", name)]
        status, reached, total = _watch(lab, command)
        if lab.left == 0:
            return lab.note(f"the time is up at problem {reached} of {total}")
        if status in (0, 1):
            return lab.note(f"all {total} problems done, {lab.left:.0f} s left")
        if status == LOST:
            lab.note(f"the GPU was lost at problem {reached}: going on with a new process")
            start = reached - 1
        elif status < 0:
            lab.note(f"problem {reached} ended its process (signal {-status}): going on behind it")
            start = reached
        else:
            return lab.note(f"the benchmarks ended with status {status} at problem {reached}, see benchmarks.log")
    return lab.note(f"given up after {MOST_STARTS} processes")


def _watch(lab: Lab, command: list[str]) -> tuple[int, int, int]:
    """Exit status, the problem that was reached and how many there are; saves whenever one is done."""
    reached = total = 0
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    timer = threading.Timer(lab.left, _kill, [process])
    timer.start()
    assert process.stdout is not None
    try:
        with (lab.out / "benchmarks.log").open("a") as log:
            for line in process.stdout:
                print(line, end="", flush=True)
                log.write(line)
                log.flush()
                if (found := PROGRESS.match(line)) is not None:
                    reached, total = int(found[1]), int(found[2])
                    lab.save()
        status = process.wait()
    finally:  # whoever ends this process ends all
        timer.cancel()
        _kill(process)
    lab.save()
    return status, reached, total


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lab", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/lab"), help="the folder (build/lab)")
    parser.add_argument("--time-budget", type=float, default=540.0, metavar="S", help="seconds in all (540)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    parser.add_argument("--case", action="append", default=[], help="one op only; may be given again (all)")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    lab = Lab(options.out.resolve(), options.time_budget, device, is_quick=device == "cpu")
    build(lab)
    test(lab)
    train_step(lab)
    measure(lab, options.case)
    print(f"see {lab.out / 'summary.md'}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
