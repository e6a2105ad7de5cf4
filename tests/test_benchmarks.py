"""The measuring room: rows, gate, rounds and ratios, one small run of every case, and the tables in the documents."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import __main__ as command
from benchmarks import harness, huge_batch, lab, plot, predict, rows, table, train_step
from benchmarks.case import PHASES, Budget, Case, Problem, Variant
from benchmarks.cases import CASES, ENCODERS, LOSSES
from benchmarks.cases.losses import pairs
from benchmarks.gate import Errors, allowed, errors_of, passes
from benchmarks.goodput import Costs, goodput
from benchmarks.harness import DeviceLost, Run, measure
from benchmarks.memory import peak_cpu
from benchmarks.runner import Remote, Runner
from benchmarks.timing import Sample, interleave, quantiles, ratio, repeats_for
from fastclip.errors import UserError
from fastclip.losses import small

ROOT = Path(__file__).parent.parent
TINY = pairs(24, 8, "float32", has_peak=False)
PRELUDE = f"import sys; sys.path.insert(0, {str(ROOT)!r})"


class Clocked:
    """A subject that takes known times and notes its turns."""

    def __init__(self, name: str, times: list[float], turns: list[str], fails_at: int | None = None) -> None:
        self.name, self.times, self.turns, self.fails_at, self.count = name, times, turns, fails_at, 0

    def block(self, repeats: int) -> Sample:
        self.turns.append(self.name)
        self.count += 1
        if self.count == self.fails_at:
            raise RuntimeError("out of luck")
        value = self.times[(self.count - 1) % len(self.times)]
        return Sample(value, 2 * value)


def faulty_case(fault: Tensor | float) -> Case:
    """The contrastive case with one more variant, whose loss is multiplied by `fault`."""
    case = CASES["contrastive_loss"]

    def variants(problem: Problem) -> list[Variant]:
        ours = case.variant(problem, "auto")
        return [*case.variants(problem), replace(ours, impl="faulty", load=lambda: lambda *x: fault * case.exact(*x))]

    return replace(case, variants=variants)


def run_of(tmp_path: Path, **options: object) -> Run:
    return Run(tmp_path / "rows.csv", seconds=0.0, is_quick=True, **options)  # type: ignore[arg-type]


def test_the_columns_are_those_of_the_design() -> None:
    wanted = (
        "op, impl, device, dtype, shape_json, phase, p50_ms, p20_ms, p80_ms, peak_mb, gflops, pct_roofline, "
        "predicted_ms, ratio, baseline, peer_version, error, budget, machine, torch, triton, commit"
    )
    assert ", ".join(rows.COLUMNS) == wanted


def test_rows_are_appended_and_the_last_of_a_key_counts(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    rows.append(
        path, [rows.make_row(op="a", impl="x", p50_ms=1.23456), rows.make_row(op="a", impl="y", error="why, so")]
    )
    rows.append(path, [rows.make_row(op="a", impl="x", p50_ms=2.0)])
    with path.open() as file:
        assert len(list(csv.reader(file))) == 4
    assert [(row["impl"], row["p50_ms"], row["error"]) for row in rows.read(path)] == [
        ("x", "2", ""),
        ("y", "", "why, so"),
    ]
    with pytest.raises(KeyError, match="speed"):
        rows.make_row(speed=1)


def test_a_file_that_was_cut_off_or_is_another(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    assert rows.read(path) == []
    rows.append(path, [rows.make_row(op="a", commit="c"), rows.make_row(op="b", commit="c")])
    path.write_text(path.read_text()[:-15])
    assert [row["op"] for row in rows.read(path)] == ["a"]
    path.write_text("time,speed\n")
    with pytest.raises(UserError, match="has the columns time,speed; must be op,impl"):
        rows.append(path, [])


@pytest.mark.parametrize("op", LOSSES)
def test_the_gate_passes_eager_and_ours(op: str) -> None:
    case = CASES[op]
    for impl in ("auto", "reference"):
        variant = case.variant(TINY, impl)
        errors = errors_of(case, TINY, variant.load())
        assert passes(errors, allowed(variant.budget, None)), (impl, errors)
        assert 0 < errors.gradient < 4e-6


@pytest.mark.parametrize(
    ("wrong", "which"),
    [
        (lambda case: lambda *x: 1.01 * case.exact(*x), "loss"),
        (lambda case: lambda image, *x: case.exact(image.detach() + 0 * image, *x), "gradient"),
        (lambda case: lambda *x: case.exact(*x) + 0 * x[2].log().sqrt().sub(3).sqrt(), "loss"),  # NaN
        (
            lambda case: lambda image, text, scale, *x: case.exact(image, text, scale.detach() + 0 * scale, *x),
            "gradient",
        ),
    ],
    ids=["value", "no image gradient", "nan", "no scale gradient"],
)
@pytest.mark.parametrize("op", LOSSES)
def test_the_gate_catches_what_is_wrong(op: str, wrong: object, which: str) -> None:
    case = CASES[op]
    assert callable(wrong)
    errors = errors_of(case, TINY, wrong(case))
    most = allowed(case.variant(TINY, "auto").budget, None)
    assert not passes(errors, most)
    assert not getattr(errors, which) <= getattr(most, which)


def test_what_passes_beside_the_baseline() -> None:
    budget, baseline = Budget(1e-5, 4e-6, beside_baseline=2), Errors(1e-3, 5e-6)
    assert allowed(budget, None) == Errors(1e-5, 4e-6)
    assert allowed(budget, baseline) == Errors(1e-5, 1e-5)
    assert not passes(Errors(math.nan, 0.0), allowed(budget, baseline))


def test_rounds_rotate_and_a_failure_takes_no_further_turn() -> None:
    turns: list[str] = []
    subjects = {"a": Clocked("a", [1], turns), "b": Clocked("b", [2], turns, fails_at=2), "c": Clocked("c", [3], turns)}
    samples, failures = interleave(subjects, dict.fromkeys(subjects, 1), seconds=0, least=4, most=9)
    assert "".join(turns) == "abc" + "bca" + "ac" + "ca"
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 4, "c": 4}
    assert str(failures["b"]) == "out of luck"


def test_rounds_end_with_the_time_or_the_most() -> None:
    turns: list[str] = []
    interleave({"a": Clocked("a", [1], turns)}, {"a": 1}, seconds=60, least=2, most=7)
    assert len(turns) == 7


def test_quantiles_by_phase() -> None:
    taken = quantiles([Sample(x, 10 * x) for x in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)])
    assert taken["forward"] == (3.5, 2.0, 5.0)
    assert taken["backward"].p50 == 35
    assert taken["both"] == pytest.approx((38.5, 22.0, 55.0))


def test_a_ratio_is_of_the_middle_of_the_rounds() -> None:
    """A machine that is slow for a round changes nothing: of the medians' ratios one would be 2.5, one 1.5."""
    baseline, ours = [Sample(2, 8), Sample(20, 80), Sample(5, 9)], [Sample(1, 2), Sample(10, 20), Sample(2, 6)]
    assert (ratio(baseline, ours, "forward"), ratio(baseline, ours, "backward")) == (2, 4)
    assert ratio(baseline, ours, "both") == pytest.approx(10 / 3)
    moods = [Sample(x, 0) for x in (1, 1, 1, 2, 2, 2, 2, 900)]
    assert ratio(moods, [Sample(1, 0)] * 8, "forward") == pytest.approx(2 ** (3 / 4))


def test_repeats_fill_a_block() -> None:
    assert (repeats_for(10), repeats_for(1e-3), repeats_for(0)) == (1, 10, 100)


def test_one_disturbed_call_does_not_set_the_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["sigmoid_loss"]
    runner, clock, calls = Runner(case, TINY, case.variant(TINY, "auto")), [0.0], [0.05, 0.001, 0.002] + 9 * [0.003]
    monkeypatch.setattr("benchmarks.runner.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(runner, "block", lambda repeats: clock.append(clock.pop() + calls.pop(0)))
    assert runner.warm_up() == pytest.approx(0.001)
    assert len(calls) == 2
    calls[:] = [10.0]
    assert runner.warm_up() == 10  # a long one is not called again


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("op", LOSSES)
def test_a_small_run_of_every_case(op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path)
    written = measure(CASES[op], replace(TINY, impls=("auto", "dense")), run)
    by_impl = {row["impl"]: row for row in written if row["phase"] == "both"}
    baseline = written[0]["impl"]
    assert list(by_impl) == [baseline, "auto", "dense"]
    assert len(written) == 3 * len(PHASES)
    for row in written:
        assert rows.number(row["p50_ms"]) > 0  # type: ignore[operator]
        assert float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert float(row["error"]) <= float(row["budget"])
        assert row["baseline"] == baseline
        assert row["machine"].endswith("threads")
        assert row["impl"] != baseline or float(row["ratio"]) == 1
        variant = CASES[op].variant(TINY, row["impl"])
        done = variant.gradient_in_forward and row["phase"] == "backward"
        assert bool(row["pct_roofline"]) is not done
        assert bool(row["ratio"]) is not done
    g = 2 * 24 * 24 * 8 / 1e6
    if CASES[op].variant(TINY, "auto").gradient_in_forward:
        products = {"contrastive_loss": {"forward": 4, "both": 4}, "sigmoid_loss": {"forward": 3, "both": 3}}[op]
    else:
        products = {"forward": 1, "backward": 3, "both": 4}
    for row in written:
        if row["impl"] == "auto" and row["phase"] in products:
            wanted = products[row["phase"]] * g / float(row["p50_ms"])
            assert float(row["gflops"]) == pytest.approx(wanted, rel=2e-3)
    assert rows.read(run.out) == written


def test_whose_forward_makes_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work of a backward that only scales is in its forward: 1295 % of the roofline stood in its row before."""
    monkeypatch.setattr(small, "IN_CACHE", 4 << 20)
    case = CASES["contrastive_loss"]
    for n, impls in ((1024, {"auto", "budget"}), (4096, set())):
        variants = case.variants(pairs(n, 512, "float32"))
        assert {variant.impl for variant in variants if variant.gradient_in_forward} == impls


def test_what_cannot_run_is_named_once(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    problem = replace(TINY, impls=("auto", "triton", "memeff"))
    for _ in range(2):
        measure(CASES["contrastive_loss"], problem, run)
    reasons = [row["error"] for row in rows.read(run.out) if row["impl"] == "memeff"]
    assert len(reasons) == 1
    assert reasons[0].startswith("not run: memeff")
    with run.out.open() as file:
        assert sum("a GPU kernel" in line for line in file) == 1


def test_a_wrong_variant_is_reported_and_not_timed(tmp_path: Path) -> None:
    written = measure(faulty_case(1.01), replace(TINY, impls=("auto", "faulty")), run := run_of(tmp_path))
    assert "faulty" not in {row["impl"] for row in written}
    (row,) = (row for row in rows.read(run.out) if row["impl"] == "faulty")
    assert (row["phase"], row["p50_ms"]) == ("forward", "")
    assert float(row["error"]) == pytest.approx(0.01, rel=1e-2)
    assert float(row["error"]) > float(row["budget"])


def test_a_lost_gpu_is_told_and_ends_the_process(tmp_path: Path) -> None:
    case = CASES["contrastive_loss"]

    def load() -> object:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    broken = replace(case, variants=lambda p: [replace(case.variant(p, "auto"), impl="broken", load=load)])
    with pytest.raises(DeviceLost, match="illegal memory access"):
        measure(broken, TINY, run := run_of(tmp_path))
    (row,) = rows.read(run.out)
    assert row["error"] == "RuntimeError: CUDA error: an illegal memory access was encountered"


def test_what_needs_too_much_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    variants = CASES["contrastive_loss"].variants(pairs(1 << 20, 512, "float32"))
    eager, ours = variants[0], next(variant for variant in variants if variant.impl == "auto")
    problem = pairs(1 << 20, 512, "float32")
    monkeypatch.setattr(harness.machine, "free_memory", lambda device: 64 << 30)
    assert harness._too_large(problem, eager) == "it needs about 32768 GiB, 64 are free"
    assert harness._too_large(problem, ours) is None


def test_a_process_of_its_own_takes_turns_too() -> None:
    remote = Remote(CASES["sigmoid_loss"], TINY, "auto", PRELUDE)
    assert remote.errors().gradient < 4e-6
    for ready in (remote.warm_up, remote.resume):
        ready()
        assert remote.block(2).forward > 0
        remote.rest()
        assert remote.process is None


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell peaks")
def test_memory_of_eager_code_is_its_matrices() -> None:
    """Eager holds several N x N matrices at once, ours none."""
    case, problem = CASES["contrastive_loss"], pairs(2048, 16, "float32")
    matrix = 2048 * 2048 * 4 / (1 << 20)
    eager, ours = (peak_cpu(case, problem, impl) for impl in (case.variants(problem)[0].impl, "auto"))
    assert eager is not None
    assert ours is not None
    assert 3 * matrix < eager < 9 * matrix
    assert 0 <= ours < matrix


def test_the_command_resumes_and_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.csv"
    arguments = ["--quick", "--case", "sigmoid_loss", "--device", "cpu", "--seconds", "0.001", "--out", str(out)]
    arguments += ["--recorded", str(tmp_path / "none.csv")]
    assert command.main([*arguments, "--time-budget", "-1"]) == 0
    assert "the time is up: 4 of 4 problems left out" in capsys.readouterr().out
    assert command.main([*arguments, "--start", "2"]) == 0
    first = rows.read(out)
    assert {row["shape_json"] for row in first} == {json.dumps({"n": 512, "d": 64})}
    assert {row["dtype"] for row in first} == {"float32", "bfloat16"}
    assert command.main([*arguments, "--start", "2", "--resume"]) == 0
    assert rows.read(out) == first
    assert command.main(["--case", "sigmoid"]) == 2
    assert "--case is 'sigmoid', must be one of contrastive_loss, sigmoid_loss" in capsys.readouterr().err
    assert command.main(["--base", "no-such-revision"]) == 2


def test_slower_than_recorded() -> None:
    fields = {"op": "a", "impl": "auto", "phase": "both", "baseline": "open_clip"}
    recorded = [rows.make_row(**fields, ratio=2.0)]
    assert command.slower_than_recorded([rows.make_row(**fields, ratio=1.61)], recorded) == []
    (line,) = command.slower_than_recorded([rows.make_row(**fields, ratio=1.59)], recorded)
    assert "is 1.59 times as fast as open_clip, was 2.00" in line
    assert command.slower_than_recorded([rows.make_row(**fields, ratio=1.59)], []) == []
    elsewhere = [rows.make_row(**fields, ratio=2.0, machine="another")]
    assert command.slower_than_recorded([rows.make_row(**fields, ratio=1.59)], elsewhere) == []


def test_the_most_valuable_come_first_over_all_ops() -> None:
    chosen = command.problems_of(None, "cuda", is_quick=False)
    ranks = [problem.rank for _, problem in chosen]
    assert ranks == sorted(ranks)
    shapes = {(case.op, problem["n"], problem["d"]) for case, problem in chosen}
    for wanted in ((32768, 512), (131072, 512), (131072, 1024), (1 << 20, 512)):
        assert ("contrastive_loss", *wanted) in shapes
    assert ("sigmoid_loss", 65536, 768) in shapes


def test_a_problem_travels_as_json() -> None:
    problem = replace(TINY, impls=("auto",), rank=3)
    assert Problem.from_json(problem.to_json()) == problem
    assert problem.capped(10)["n"] == 10
    assert problem.capped(100) == problem


def test_the_lab_goes_on_behind_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies is followed by one that begins behind it; the folder holds everything known so far."""
    script = tmp_path / "child.py"  # loses the GPU at the first problem, once; aborts at the third
    script.write_text(
        "import os, sys; start = int(sys.argv[sys.argv.index('--start') + 1])\n"
        "for i in range(start, 4):\n"
        "    print(f'[{i + 1}/4] contrastive_loss', flush=True)\n"
        "    if i == 0 and not os.path.exists('lost'): open('lost', 'w'); sys.exit(3)\n"
        "    if i == 2: os.abort()\n"
    )
    commands: list[list[str]] = []
    watch = lab._watch

    def watched(this: lab.Lab, command: list[str]) -> tuple[int, int, int]:
        commands.append(command)
        return watch(this, [command[0], str(script), *command[3:]])

    monkeypatch.setattr(lab, "_watch", watched)
    monkeypatch.setattr(lab, "ROOT", tmp_path)
    visit = lab.Lab(tmp_path / "out", budget=60, device="cpu", is_quick=True)
    rows.append(
        visit.csv, [rows.make_row(op="a", impl="auto", phase="both", shape_json='{"n": 1, "d": 2}', error="why")]
    )
    lab.measure(visit, ["contrastive_loss"])
    assert [command[command.index("--start") + 1] for command in commands] == ["0", "0", "3"]
    assert all("--resume" in command for command in commands)
    summary = (visit.out / "summary.md").read_text()
    assert "the GPU was lost at problem 1" in summary
    assert "problem 3 ended its process (signal 6)" in summary
    assert "all 4 problems done" in summary
    assert "| why |" in summary


def test_the_lab_ends_in_time(tmp_path: Path) -> None:
    visit = lab.Lab(tmp_path / "out", budget=1.0, device="cpu", is_quick=True)
    start = time.monotonic()
    command = [sys.executable, "-c", "import time; print('[1/2] a', flush=True); time.sleep(60)"]
    assert lab._watch(visit, command)[1:] == (1, 2)
    assert time.monotonic() - start < 20
    assert visit.left == 0


def test_the_tables_in_the_document_are_what_the_rows_say() -> None:
    text = table.DOCUMENT.read_text()
    assert table.with_blocks(text) == text, "run python -m benchmarks.table"


def test_the_predictions_are_what_the_cases_say() -> None:
    written = rows.read(predict.FILE)
    assert written == predict.predicted_rows(), "run python -m benchmarks.predict"
    assert not any(row["p50_ms"] for row in written)
    (row,) = (
        row
        for row in written
        if (row["op"], row["phase"], row["dtype"]) == ("contrastive_loss", "both", "bfloat16")
        and json.loads(row["shape_json"]) == {"n": 131072, "d": 512}
    )
    assert float(row["predicted_ms"]) == pytest.approx(89.1, rel=1e-2)


def test_the_measured_table() -> None:
    assert table.measured_table([]) == table.EMPTY
    fields = {"op": "contrastive_loss", "dtype": "float32", "shape_json": '{"n": 8192, "d": 512}', "phase": "both"}
    shared = {**fields, "machine": "M", "torch": "T", "commit": "C"}
    text = table.measured_table(
        [
            rows.make_row(impl="open_clip", p50_ms=1672.0, peak_mb=1536.0, error=5e-6, peer_version="o 3", **shared),
            rows.make_row(impl="auto", p50_ms=773.0, ratio=2.163, peak_mb=61.0, error=2e-6, **shared),
            rows.make_row(impl="memeff", error="not run: not installed", **shared),
        ]
    )
    cells = "8192 x 512 | 1.67 s |  | 773 ms | **2.16** | 1.5 GiB | 61 MiB | 5.0e-06 | 2.0e-06 |"
    assert f"| `contrastive_loss` | float32 | {cells}" in text
    assert text.endswith("Measured on M, torch T, commit C. Eager is o 3.")


def test_plots_are_drawn_and_the_same_rows_make_the_same_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    fields = {"op": "contrastive_loss", "device": "cpu", "dtype": "float32", "phase": "both"}
    made = [
        rows.make_row(impl=impl, p50_ms=float(n), shape_json=json.dumps({"n": n, "d": 64}), **fields)
        for n in (64, 16)
        for impl in ("auto", "open_clip")
    ]
    curves = plot.curves(made, "p50_ms")["contrastive_loss", "cpu", "float32", 64]
    assert curves == {"auto": [(16, 16.0), (64, 64.0)], "open_clip": [(16, 16.0), (64, 64.0)]}
    (path,) = plot.draw(made, tmp_path)
    assert path.name == "contrastive_loss_cpu_float32_d64_speed.svg"
    first = path.read_text()
    plot.draw(made, tmp_path)
    assert path.read_text() == first
    assert "open_clip" in first


def test_the_committed_rows_are_readable() -> None:
    for name in ("cpu", "quick", "h200_predicted"):
        for row in rows.read(ROOT / "benchmarks" / "results" / f"{name}.csv"):
            assert row["op"] in CASES
            assert row["phase"] in PHASES
            for column in ("p50_ms", "p20_ms", "p80_ms", "peak_mb", "gflops", "pct_roofline", "predicted_ms", "ratio"):
                assert row[column] == "" or rows.number(row[column]) is not None


def test_nothing_here_starts_cuda_or_imports_a_peer() -> None:
    code = (
        "import sys, benchmarks.lab; import torch; assert not torch.cuda.is_initialized(); "
        "assert not {'open_clip', 'matplotlib', 'triton'} & {name.split('.')[0] for name in sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


@pytest.mark.parametrize("op", ENCODERS)
def test_the_ops_of_the_encoders_are_measured(op: str, tmp_path: Path) -> None:
    case = CASES[op]
    (problem,) = case.quick("cpu")
    run = Run(tmp_path / "rows.csv", seconds=0.0, is_quick=True)
    written = measure(case, replace(problem, impls=("auto",)), run)
    assert {row["impl"] for row in written} == {case.variants(problem)[0].impl, "auto"}
    for row in written:
        assert float(row["p50_ms"]) > 0
        assert float(row["error"]) <= float(row["budget"])
    assert all(case.problems(device) for device in ("cpu", "cuda"))


@pytest.mark.peer
def test_a_training_step_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Sides that cannot run here have their reason in the row, and the others go on."""
    out, impls = tmp_path / "rows.csv", ("open_clip", "open_clip_32_eager", "fastclip", "fastclip_flash_eager")
    monkeypatch.setitem(
        train_step.SIDES, "fastclip_flash_eager", train_step.Side(is_compiled=False, attention="flash_attn")
    )
    arguments = ["--model", "debug", "--batch", "4", "--seconds", "0", "--out", str(out), "--impl", *impls]
    assert train_step.main(arguments) == 1
    written = {row["impl"]: row for row in rows.read(out)}
    assert set(written) == set(impls)
    failed = written.pop("fastclip_flash_eager")
    assert failed["p50_ms"] == ""
    assert "flash_attn" in failed["error"]
    for row in written.values():
        assert float(row["p50_ms"]) > 0
        assert 0 <= float(row["error"]) <= train_step.BUDGET
    assert float(written["open_clip"]["ratio"]) == 1


def test_the_operations_of_a_run_are_those_of_the_paper() -> None:
    problem = pairs(32768, 512, "bfloat16", "cuda")
    g = 2 * 32768**2 * 512
    for op, products in (("contrastive_loss", 4), ("sigmoid_loss", 3)):
        assert CASES[op].operations(problem, "both") == products * g
        assert sum(CASES[op].operations(problem, phase) for phase in ("forward", "backward")) == products * g
    assert torch.float32 == TINY.torch_dtype


def test_ending_the_lab_ends_its_processes(tmp_path: Path) -> None:
    """SIGTERM, as `timeout` and job schedulers send it."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom benchmarks import lab\n"
        "child = 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'\n"
        "lab.build = lambda visit: lab._watch(visit, [sys.executable, '-c', child])\n"
        f"lab.main(['--out', {str(tmp_path / 'out')!r}, '--device', 'cpu'])\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.terminate()
        assert process.wait(timeout=60) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_goodput_is_the_share_that_is_kept() -> None:
    """Against its expectation: a save's steps are kept if the run lives until then, exp(-time / 600) of the runs."""
    costs = Costs(step=1.0, stall=0.1, durable=0.5, restart=6.0)
    for interval in (1.0, 10.0, 20.0, 60.0):
        began = math.exp(-(costs.restart + costs.durable) / 600)
        expected = began * interval / 600 / math.expm1((interval + costs.stall) / 600)
        assert goodput(costs, interval, 600.0) == pytest.approx(expected, abs=5e-4)
    assert goodput(Costs(1.0, 0.0, 0.0, 0.0), 1.0, 600.0) > 0.999
    assert goodput(Costs(1.0, 0.0, 0.0, 1e6), 1.0, 600.0) == 0


@pytest.mark.long
def test_a_huge_batch_is_measured_or_says_why_not(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    common = ["--chunk", "8", "--out", str(out)]
    assert huge_batch.main(["--model", "debug", "--batches", "16", *common]) == 0
    assert huge_batch.main(["--model", "debug", "--batches", "32", "--time-budget", "0", *common]) == 0
    assert huge_batch.main(["--model", "no-such-model", "--batches", "16", *common]) == 1
    with out.open(newline="") as file:
        done, late, failed = csv.DictReader(file)
    assert float(done["seconds"]) > 0
    assert float(done["pairs_per_second"]) > 0
    assert 0 < float(done["loss"]) < 10
    assert (late["seconds"], late["note"]) == ("", "not run: the time is up")
    assert "no-such-model" in failed["note"]
