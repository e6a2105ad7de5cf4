"""Starting, stopping and killing whole runs: the three launchers, signals, SIGKILL at any instant."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from training_helpers import command, environment, lines, losses, options, run, small_data

from fastclip.data.demo import write_demo
from fastclip.training.__main__ import main
from fastclip.training.launch import _shell_status

TIMEOUT = 300


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("small") / "data")


@pytest.fixture(scope="module")
def curve(data: Path) -> list[float]:
    """The losses of the run that all others must give, by engine torch in this process."""
    assert main(options(data, data.parent / "torch", engine="torch")) == 0
    return losses(data.parent / "torch")


@contextmanager
def started(launcher: str, arguments: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A run under way, of which nothing is left afterwards."""
    process = subprocess.Popen(
        command(launcher, arguments), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        for one in tree(process):
            one.kill()
        process.wait()


def tree(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        parent = psutil.Process(process.pid)
        return [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return []


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def has_steps(out: Path, count: int) -> Callable[[], bool]:
    return lambda: (out / "metrics.jsonl").is_file() and (out / "metrics.jsonl").read_text().count("\n") >= count


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=TIMEOUT)
    return process.returncode, said


def check_curve(
    launcher: str, data: Path, out: Path, curve: list[float], **changed: Any
) -> subprocess.CompletedProcess[str]:
    result = run(launcher, options(data, out, **changed))
    assert result.returncode == 0, result.stdout + result.stderr
    assert losses(out) == pytest.approx(curve, rel=1e-5)
    return result


def test_one_process_of_python(data: Path, tmp_path: Path, curve: list[float]) -> None:
    """DeepSpeed with a world of one, no launcher and no MPI; what a log file sees of it."""
    result = check_curve("python", data, tmp_path / "out", curve)
    assert "64 pairs in 3 shards" in result.stdout
    assert "global batch 16 = 1 ranks x 4 chunks of 4" in result.stdout
    assert "debug, deepspeed ZeRO-1, fp32" in result.stdout
    assert "Report: " in result.stdout
    assert "\r" not in result.stderr
    assert all(line.startswith("train: step") for line in result.stderr.splitlines()), result.stderr


@pytest.mark.parametrize("launcher", ["launch", pytest.param("torchrun", marks=pytest.mark.long)])
def test_two_ranks(data: Path, tmp_path: Path, curve: list[float], launcher: str) -> None:
    result = check_curve(launcher, data, tmp_path / "out", curve)
    assert "global batch 16 = 2 ranks x 2 chunks of 4" in result.stdout
    if launcher == "launch":
        assert result.stdout.startswith("Starting 2 process(es) on the CPU under DeepSpeed's launcher\n")
        assert len(result.stdout.splitlines()) == 4
        assert all(line.startswith("train: step") for line in result.stderr.splitlines()), result.stderr


@pytest.mark.long
def test_deepspeed_command(data: Path, tmp_path: Path, curve: list[float]) -> None:
    check_curve("deepspeed", data, tmp_path / "out", curve)


@pytest.mark.long
@pytest.mark.alone
def test_the_demo_at_half_its_chunk_size(tmp_path: Path) -> None:
    """The demo's own model, data, batch and Muon under the launcher: one curve in fp32."""
    data = tmp_path / "data"
    write_demo(data, scenes=8_000)
    for chunk_size in (64, 32):
        words = ["--recipe", "demo", "--data", str(data), "--out", str(tmp_path / str(chunk_size)), "--minutes", "0"]
        words += ["--precision", "fp32", "--steps", "8", "--warmup", "4", "--log-every", "1"]
        result = run("launch", [*words, "--chunk-size", str(chunk_size)], timeout=900)
        assert result.returncode == 0, result.stdout + result.stderr
    whole, half = losses(tmp_path / "64"), losses(tmp_path / "32")
    assert half == pytest.approx(whole, rel=1e-5)
    assert whole[-1] < whole[0]


@pytest.mark.long
@pytest.mark.parametrize(
    "zero",
    [
        {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
        {"stage": 1, "overlap_comm": True},
    ],
)
def test_a_deepspeed_file(data: Path, tmp_path: Path, curve: list[float], zero: dict[str, object]) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": zero}))
    result = check_curve("launch", data, tmp_path / "out", curve, deepspeed_config=file)
    assert f"deepspeed ZeRO-{zero['stage']}" in result.stdout
    line = f"{file} sets zero_optimization.stage: {zero['stage']} (was 1)\n"
    assert (line in result.stdout) == (zero["stage"] != 1)
    assert (f"{file} sets zero_optimization.overlap_comm: True (was False)\n" in result.stdout) == (zero["stage"] == 1)


@pytest.mark.long
def test_what_deepspeed_refuses_is_a_mistake(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"overlap_com": True}}))
    result = run("python", options(data, tmp_path / "out", deepspeed_config=file))
    assert result.returncode == 2
    assert "overlap_com: Extra inputs are not permitted; did you mean 'overlap_comm'?" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "debgu"},
        pytest.param({"steps": 0}, marks=pytest.mark.long),
        pytest.param({"global_batch": 17}, marks=pytest.mark.long),
    ],
)
def test_a_mistake_on_two_ranks_is_told_once(data: Path, tmp_path: Path, changed: dict[str, object]) -> None:
    result = run("deepspeed", options(data, tmp_path / "out", **changed))
    assert result.returncode == 2
    assert result.stderr.count("fastclip train:") == 1
    assert "Traceback" not in result.stderr + result.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_sample_broken_on_one_rank_ends_both(tmp_path: Path) -> None:
    """The mistake is met in the middle of the run by whichever rank reads the data; no rank waits for it."""
    data = small_data(tmp_path / "data", 32, **{f"s{n}": {"png": b"none"} for n in range(1, 32)})
    result = run("launch", options(data, tmp_path / "out", global_batch=2, chunk_size=1, steps=200))
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("fastclip train: shards: sample") == 1
    assert "Traceback" not in result.stderr + result.stdout


@pytest.mark.parametrize(
    ("launcher", "number", "status"),
    [
        ("python", signal.SIGTERM, 0),
        pytest.param("python", signal.SIGUSR1, 0, marks=pytest.mark.long),
        pytest.param("python", signal.SIGINT, 130, marks=pytest.mark.long),
        pytest.param("launch", signal.SIGTERM, 0, marks=pytest.mark.long),
        pytest.param("launch", signal.SIGINT, 130, marks=pytest.mark.long),
    ],
)
def test_a_signal_saves_and_ends(data: Path, tmp_path: Path, launcher: str, number: int, status: int) -> None:
    out, engine = tmp_path / "out", "torch" if launcher == "python" else "deepspeed"
    with started(launcher, options(data, out, steps=100_000, schedule="constant", engine=engine)) as process:
        wait_for(has_steps(out, 2), process)
        process.send_signal(number)
        code, said = ended(process)
    assert code == status, said
    assert "Traceback" not in said
    done = len(lines(out))
    assert f"Stopped after {done} steps and saved; --resume latest --out {out} goes on." in said
    assert (out / "latest").read_text() == f"step_{done:08d}\n"
    if launcher == "python":
        assert main(["--resume", "latest", "--out", str(out), "--steps", str(done + 1)]) == 0
        assert [line["step"] for line in lines(out)] == list(range(1, done + 2))


@pytest.mark.long
def test_a_second_ctrl_c_ends_at_once(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with started("launch", options(data, out, steps=100_000)) as process:
        wait_for(has_steps(out, 1), process)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.02)
        code, said = ended(process)
    assert code == 130, said


@pytest.mark.long
def test_sigkill_at_any_instant_loses_nothing(data: Path, tmp_path: Path) -> None:
    """Every step is saved, so that many kills fall into a save; the run that is resumed gives the same curve. As a user
    starts it; test_training_kills.py kills more often, in processes that start faster."""
    out, steps = tmp_path / "out", 40
    arguments = options(data, out, engine="torch", steps=steps, save_every=1, keep=2, chunk_size=16)
    assert run("python", [*arguments, "--out", str(tmp_path / "whole")]).returncode == 0
    dice, status = random.Random(0), -signal.SIGKILL
    for kills in range(4):
        resume = ["--resume", "latest"] if (out / "latest").is_file() else []
        with started("python", [*arguments, *resume]) as process:
            if kills < 3:
                wait_for(has_steps(out, 2 + 8 * kills), process)
                time.sleep(dice.uniform(0, 0.3))
                os.kill(process.pid, signal.SIGKILL)
            status, said = ended(process)
    assert status == 0, said
    assert losses(out) == losses(tmp_path / "whole")
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step_00000039", "step_00000040"]


@pytest.mark.long
def test_a_rank_that_is_killed_ends_the_run(data: Path, tmp_path: Path, curve: list[float]) -> None:
    out = tmp_path / "out"
    with started("launch", options(data, out, steps=100_000, save_every=2)) as process:
        wait_for(lambda: (out / "latest").is_file(), process)
        ranks = [one for one in tree(process) if any("--local_rank=1" in word for word in one.cmdline())]
        (rank,) = (one for one in ranks if "deepspeed" not in " ".join(one.cmdline()))
        rank.kill()
        code, said = ended(process)
        assert code not in (0, 2, 130), said
        assert tree(process) == []
    result = run("launch", options(data, out, steps=len(lines(out)) + 2, resume="latest"))
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("status", "expected"),
    [(0, 0), (1, 1), (2, 2), (-15, 143), (241, 143), (-9, 137), (143, 143), (130, 130), (255, 255)],
)
def test_a_launcher_that_a_signal_ended_has_a_shells_exit_status(status: int, expected: int) -> None:
    assert _shell_status(status) == expected
