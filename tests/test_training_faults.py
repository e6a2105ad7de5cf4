"""What goes wrong in a run: values that are not finite, ranks that die or stand still, full disks, early signals."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest
import torch
from contrastive_loss_helpers import free_port, run_on_ranks
from training_helpers import ENGINES, command, environment, lines, options, run, small, small_data, this_rank

from fastclip.data import get_tokenizer
from fastclip.errors import UserError
from fastclip.models import get_config, load_checkpoint
from fastclip.training import loop
from fastclip.training.__main__ import parse
from fastclip.training.checkpoint import Checkpoints, NotSaved, find_checkpoint
from fastclip.training.loop import train
from fastclip.training.quarantine import Quarantine

TIMEOUT = 300


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("small") / "data")


def poisoned(data: Path, out: Path, first: int, last: int, **changed: Any) -> str:
    """A run whose image features on rank 1 are not finite in the steps `first` to `last`; what it says at its end."""
    processes, calls = this_rank(), [0]
    build = loop.build_engine

    def poison(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        calls[0] += module.training  # one chunk a step: one forward
        return output * float("nan") if module.training and first <= calls[0] <= last else None

    def build_poisoned(model: Any, *arguments: Any) -> Any:
        if processes.rank == 1:
            model.visual.register_forward_hook(poison)
        return build(model, *arguments)

    with patch.object(loop, "build_engine", build_poisoned):
        try:
            train(parse(options(data, out, chunk_size=8, steps=6, **changed)), processes)
        except UserError as error:
            return str(error)
    return ""


def all_poisoned(data: Path, folder: Path) -> dict[str, str]:
    said = {}
    for engine, stage in ENGINES:
        name = f"{engine}{stage}"
        said[name] = poisoned(data, folder / name, 3, 3, engine=engine, zero_stage=stage)
    said["for good"] = poisoned(data, folder / "for good", 3, 99, engine="torch", max_skipped=1)
    return said


@pytest.fixture(scope="module")
def poisoned_runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    folder = tmp_path_factory.mktemp("poisoned")
    return folder, run_on_ranks(2, all_poisoned, data, folder, timeout=TIMEOUT)


@pytest.mark.parametrize(("engine", "stage"), ENGINES)
def test_features_that_are_not_finite_are_skipped_and_their_samples_named(
    poisoned_runs: Any, engine: str, stage: int
) -> None:
    folder, said = poisoned_runs
    out = folder / f"{engine}{stage}"
    assert [one[out.name] for one in said] == ["", ""]
    assert [line["skipped_steps"] for line in lines(out)] == [0, 0, 1, 1, 1, 1]
    (line,) = [json.loads(text) for text in (out / "quarantine.jsonl").read_text().splitlines()]
    assert (line["step"], line["loss"], line["grad_norm"], line["ranks"]) == (3, None, None, [1])
    assert len(line["keys"]) == len(set(line["keys"])) == 8
    other = json.loads((folder / "torch0" / "quarantine.jsonl").read_text())
    assert line["keys"] == other["keys"]
    weights = load_checkpoint(out).model.state_dict()
    assert all(value.isfinite().all() for value in weights.values())


def test_a_run_that_skips_every_step_ends(poisoned_runs: Any) -> None:
    folder, said = poisoned_runs
    for one in said:
        assert "2 steps in a row had a gradient that is not finite" in one["for good"]
    out = folder / "for good"
    assert len((out / "quarantine.jsonl").read_text().splitlines()) == 2
    assert find_checkpoint("latest", out) == out / "checkpoints" / "step_00000004"


def full_disk(data: Path, folder: Path, engine: str) -> list[str]:
    """What each rank hears when the disk of rank 1 alone is full, and what stays."""
    processes = this_rank()
    tokenizer = get_tokenizer(str(data / "tokenizer.json"), 32)
    made = small(processes, engine, 2, optimizer="adamw")
    checkpoints = Checkpoints(folder / engine, get_config("debug"), tokenizer, {}, processes, 3, in_background=True)
    made.steps(1)
    checkpoints.save(1, made.engine, {}, {})
    checkpoints.wait()
    said = []
    _, most = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for rank, step in ((1, 2), (0, 3)):
        if processes.rank == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most))
        try:
            checkpoints.save(step, made.engine, {}, {})
            checkpoints.wait()
        except NotSaved as failure:
            said.append(str(failure))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        said.append(str(checkpoints.check(find_checkpoint("latest", folder / engine)).step))  # type: ignore[arg-type]
        processes.barrier()
    checkpoints.save(4, made.engine, {}, {})
    checkpoints.wait()
    said.append(str(sorted(path.name for path in (folder / engine / "checkpoints").iterdir())))
    return said


@pytest.mark.parametrize("engine", ["deepspeed", pytest.param("torch", marks=pytest.mark.long)])
def test_a_full_disk_leaves_the_last_good_checkpoint(data: Path, tmp_path: Path, engine: str) -> None:
    for said in run_on_ranks(2, full_disk, data, tmp_path, engine, timeout=TIMEOUT):
        first, one, second, still, names = said
        assert "could not be written: " in first
        assert "could not be written: " in second
        assert (one, still) == ("1", "1")
        assert names == "['step_00000001', 'step_00000004']"


@pytest.mark.long
def test_a_disk_that_fills_up_does_not_end_a_run(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = options(data, out, engine="torch", steps=100_000, save_every=5)
    with by_hand(arguments, 1) as (process,):
        wait_for(lambda: (out / "latest").is_file(), process)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        before = len(lines(out))
        wait_for(lambda: len(lines(out)) > before + 11, process)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        process.terminate()
        said, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, said
    assert "could not be written: " in said
    assert "the run goes on" in said
    assert find_checkpoint("latest", out) == out / "checkpoints" / f"step_{len(lines(out)):08d}"


STUCK = """
import os, sys, time
from fastclip.training import torch_engine
from fastclip.training.__main__ import main
step, count = torch_engine.TorchEngine.step, [0]
def stuck(*arguments):
    count[0] += 1
    if os.environ["RANK"] == "1" and count[0] == 4:
        time.sleep(1000)
    return step(*arguments)
torch_engine.TorchEngine.step = stuck
sys.exit(main())
"""


@contextmanager
def by_hand(arguments: list[str], ranks: int, code: str = "") -> Iterator[list[subprocess.Popen[str]]]:
    """Ranks that nothing watches over, as on the nodes of a cluster; none is left afterwards."""
    words = [sys.executable, *(["-c", code] if code else ["-m", "fastclip.training"]), *arguments]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    shared |= {"LOCAL_WORLD_SIZE": "2"}
    with ExitStack() as stack:
        processes = []
        for rank in range(ranks):
            own = environment() | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            own = environment() if ranks == 1 else own
            process = subprocess.Popen(words, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        yield processes


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


FAULTS = [
    ("stopped", 1, 10.0, "has given no sign of life for"),
    pytest.param("stopped", 0, 10.0, "which holds the rendezvous, has not answered for", marks=pytest.mark.long),
    pytest.param("killed", 1, 10.0, "has given no sign of life for", marks=pytest.mark.long),
    pytest.param("killed", 0, 10.0, "which holds the rendezvous, has not answered for", marks=pytest.mark.long),
    pytest.param("stuck", 1, 10.0, "ranks 0, 1 have stood still for", marks=pytest.mark.long),
    pytest.param("stopped", 0, 40.0, "which holds the rendezvous, has not answered for", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("fault", "culprit", "limit", "message"), FAULTS)
def test_the_others_end_and_name_the_rank(
    data: Path, tmp_path: Path, fault: str, culprit: int, limit: float, message: str
) -> None:
    out = tmp_path / "out"
    arguments = options(data, out, engine="torch", steps=100_000, hang_timeout=limit, schedule="constant")
    with by_hand(arguments, 2, STUCK if fault == "stuck" else "") as ranks:
        wait_for(lambda: (out / "metrics.jsonl").is_file() and len(lines(out)) >= 3, ranks[0])
        began = time.monotonic()
        if fault != "stuck":
            ranks[culprit].send_signal(signal.SIGSTOP if fault == "stopped" else signal.SIGKILL)
        said, _ = ranks[1 - culprit].communicate(timeout=TIMEOUT)
        spent = time.monotonic() - began
        assert ranks[1 - culprit].returncode == 1, said
        if fault == "stuck":
            where, _ = ranks[culprit].communicate(timeout=TIMEOUT)
            assert "in stuck" in where, "where the rank stands is shown"
    (line,) = [line for line in said.splitlines() if line.startswith("fastclip train: ")]
    assert line.startswith("fastclip train: rank"), line
    assert message in line
    assert str(culprit) in line.partition(":")[2].split(" has ")[0]
    assert spent < (60 if limit == 40.0 else 30), f"{spent:.0f} s"


@pytest.mark.parametrize("culprit", [pytest.param(0, marks=pytest.mark.long), 1])
def test_asked_to_end_a_rank_does_not_wait_for_one_that_died(data: Path, tmp_path: Path, culprit: int) -> None:
    """As launchers ask, when one rank has died; this one is far from the next sum that would tell it."""
    out = tmp_path / "out"
    code = STUCK.replace('"1"', f'"{1 - culprit}"')
    code = code.replace("time.sleep(1000)", f"open({str(tmp_path / 'here')!r}, 'w'); time.sleep(1000)")
    with by_hand(options(data, out, engine="torch", steps=100_000), 2, code) as ranks:
        wait_for((tmp_path / "here").exists, ranks[1 - culprit])
        ranks[culprit].kill()
        began = time.monotonic()
        ranks[1 - culprit].terminate()
        said, _ = ranks[1 - culprit].communicate(timeout=TIMEOUT)
    assert time.monotonic() - began < 5
    assert ranks[1 - culprit].returncode == 1, said
    assert f"fastclip train: rank {culprit} (process {ranks[culprit].pid} on" in said
    assert "has died: the run ends" in said


def test_zero_leaves_the_compiler_out_on_a_cpu(data: Path, tmp_path: Path) -> None:
    """It takes seconds to import and nothing calls it; torch's own optimizers, not DeepSpeed's Muon, load a part."""
    for optimizer, steps, part in (("muon", 1, "_dynamo"), ("muon", 2, "_dynamo"), ("adamw", 1, "_inductor.codecache")):
        words = options(data, tmp_path / optimizer, optimizer=optimizer, steps=steps, resume="latest")
        code = (
            "import sys; from fastclip.training.__main__ import main\n"
            f"assert main(sys.argv[1:]) == 0; sys.exit('torch.{part}' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code, *words], env=environment(), timeout=TIMEOUT).returncode == 0


@pytest.mark.long
def test_torchrun_starts_the_ranks_anew(data: Path, tmp_path: Path) -> None:
    """`--max-restarts`: a rank is killed, the run goes on from its snapshot to its end as if nothing had happened."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    changed = {"steps": 40, "snapshot_every": 1, "schedule": "constant"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    words = command("torchrun", options(data, out, resume="latest", **changed))
    words.insert(words.index("--nproc_per_node"), "--max-restarts=1")
    with subprocess.Popen(words, env=environment(), **pipes) as agent:
        try:
            wait_for(lambda: (out / "metrics.jsonl").is_file() and len(lines(out)) >= 3, agent)
            psutil.Process(agent.pid).children()[-1].kill()
            said, _ = agent.communicate(timeout=TIMEOUT)
        finally:
            agent.terminate()
    assert agent.returncode == 0, said
    assert f"Goes on from {out / 'snapshots'}" in said
    assert run("torchrun", options(data, whole, **changed)).returncode == 0
    ours, truth = ([(line["step"], line["loss"]) for line in lines(folder)] for folder in (out, whole))
    assert ours == truth


@pytest.mark.long
def test_a_run_that_was_suspended_as_a_whole_goes_on(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = options(data, out, engine="torch", steps=100_000, hang_timeout=5.0, schedule="constant")
    with by_hand(arguments, 2) as ranks:
        wait_for(lambda: (out / "metrics.jsonl").is_file() and len(lines(out)) >= 3, ranks[0])
        for number, seconds in ((signal.SIGSTOP, 12), (signal.SIGCONT, 0)):
            for rank in ranks:
                rank.send_signal(number)
            time.sleep(seconds)
        before = len(lines(out))
        wait_for(lambda: len(lines(out)) > before + 3, ranks[0])
        for rank in ranks:
            rank.terminate()
        assert [rank.wait(TIMEOUT) for rank in ranks] == [0, 0]


@pytest.mark.long
def test_a_fault_on_one_rank_is_named_by_the_others(data: Path, tmp_path: Path) -> None:
    code = STUCK.replace("time.sleep(1000)", "raise ZeroDivisionError('a bug')")
    arguments = options(data, tmp_path / "out", engine="torch", steps=100_000, hang_timeout=10.0)
    with by_hand(arguments, 2, code) as ranks:
        said, _ = ranks[0].communicate(timeout=TIMEOUT)
    assert ranks[0].returncode == 1
    assert "has ended: ZeroDivisionError: a bug: the run ends" in said


@pytest.mark.parametrize(
    ("launcher", "delay"),
    [("python", 1.0), *(pytest.param("python", d, marks=pytest.mark.long) for d in (0.05, 0.5, 1.5, 2.0, 2.5, 3.0))]
    + [pytest.param("launch", d, marks=pytest.mark.long) for d in (0.5, 4.0, 6.0)],
)
def test_a_signal_in_the_first_seconds(data: Path, tmp_path: Path, launcher: str, delay: float) -> None:
    """Either nothing is there yet, or a checkpoint that can be taken up; no traceback, nothing left running."""
    out = tmp_path / "out"
    engine = "torch" if launcher == "python" else "deepspeed"
    arguments = options(data, out, engine=engine, steps=100_000)
    process = subprocess.Popen(
        command(launcher, arguments), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    time.sleep(delay)
    process.terminate()
    said, _ = process.communicate(timeout=TIMEOUT)
    assert "Traceback" not in said, said
    found = find_checkpoint("latest", out)
    if process.returncode == 0:
        assert found is not None, said
        done = run("python", ["--resume", "latest", "--out", str(out), "--steps", "1", "--engine", engine])
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        assert process.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM, 1), said
        assert found is None, said
    assert str(out) not in subprocess.run(["ps", "axo", "args"], capture_output=True, text=True, check=True).stdout


def recorded(folder: Path) -> None:
    processes = this_rank()
    keys = [f"{letter}{processes.rank}" for letter in "ab"]
    Quarantine(folder, processes, 1).record(7, 1.0, float("inf"), keys, is_finite=True)


def test_a_gradient_that_is_not_finite_names_all_ranks(tmp_path: Path) -> None:
    """Where all features were finite nobody knows whose sample it was."""
    run_on_ranks(2, recorded, tmp_path)
    line = json.loads((tmp_path / "quarantine.jsonl").read_text())
    assert (line["ranks"], line["keys"]) == ([0, 1], ["a0", "b0", "a1", "b1"])
