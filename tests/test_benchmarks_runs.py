"""What becomes of a run: problems that a machine cannot take, two runs compared, one recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import __main__ as command
from benchmarks import agree, machine, plot, record, rows, table
from benchmarks.cases import CASES
from benchmarks.cases.losses import pairs
from benchmarks.harness import DeviceLost, Measurement, Run, measure

ROOT = Path(__file__).parent.parent
LACKS = "not run: this CPU has no products in bfloat16, without which a call takes 100 times as long"


@pytest.fixture
def avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without bf16 products."""
    monkeypatch.setattr(machine, "computes_in_bf16", lambda device: False)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in the place of benchmarks/results and docs, with what another machine recorded."""
    results = tmp_path / "results"
    results.mkdir()
    for module, name, path in (
        (table, "RESULTS", results),
        (table, "MEASURED", results / "cpu.csv"),
        (table, "DOCUMENT", results / "losses.md"),
        (record, "RECORDED", results / "quick.csv"),
    ):
        monkeypatch.setattr(module, name, path)
    for name in ("cpu.csv", "quick.csv"):
        rows.append(results / name, [rows.make_row(op="contrastive_loss", machine="recorded")])
    (results / "losses.md").write_text(table.with_blocks((ROOT / "docs" / "losses.md").read_text()))
    return results


def whole_run(folder: Path, **fields: object) -> Path:
    """Figures of ours for every problem of `make bench`."""
    for name, is_quick in (("cpu.csv", False), ("quick.csv", True)):
        for case, problem in command.problems_of(None, "cpu", is_quick):
            made = {"op": case.op, "device": "cpu", "dtype": problem.dtype, "shape_json": problem.shape_json}
            made |= {"impl": "auto", "phase": "both", "p50_ms": 1.0, "ratio": 2.0, "machine": "here", "error": 1e-6}
            rows.append(folder / name, [rows.make_row(**made | fields)])
    return folder


@pytest.mark.usefixtures("avx2")
def test_products_that_the_machine_lacks_are_left_out_with_a_row(tmp_path: Path) -> None:
    run = Run(tmp_path / "rows.csv", seconds=0.0, is_quick=True)
    problem = pairs(24, 8, "bfloat16", has_peak=False)
    assert measure(CASES["contrastive_loss"], problem, run) == []
    assert measure(CASES["contrastive_loss"], replace(problem, dtype="float32", impls=("auto",)), run)
    (row,) = (row for row in rows.read(run.out) if row["dtype"] == "bfloat16")
    assert (row["impl"], row["phase"], row["error"], row["p50_ms"]) == ("auto", "both", LACKS, "")
    run.failed = {rows.key_of(row)[:5]}
    before = run.out.read_text()
    measure(CASES["contrastive_loss"], problem, run)
    assert run.out.read_text() == before  # a run that is resumed does not say it twice


@pytest.mark.usefixtures("avx2")
def test_elements_are_measured_without_products(tmp_path: Path) -> None:
    """Nor is their roofline: it takes minutes there."""
    seen = set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.mm.default:
                seen.add(args[0].dtype)
            return func(*args, **kwargs or {})

    machine.roofline.cache_clear()
    case = CASES["gelu"]
    problem = replace(case.quick("cpu")[0], dtype="bfloat16", impls=("auto",))
    with Products():
        written = measure(case, problem, Run(tmp_path / "rows.csv", seconds=0.0, is_quick=True))
    machine.roofline.cache_clear()
    assert {row["impl"] for row in written} == {"eager", "auto"}
    assert seen == {torch.float32}


@pytest.mark.usefixtures("avx2")
def test_the_command_goes_on_behind_what_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, recorded = tmp_path / "rows.csv", tmp_path / "recorded.csv"
    fields = {"op": "sigmoid_loss", "impl": "auto", "device": "cpu", "phase": "both"}
    shape = '{"n": 64, "d": 64}'
    rows.append(
        recorded,
        [
            rows.make_row(**fields, dtype=dtype, shape_json=shape, ratio=1e9, machine="another")
            for dtype in ("float32", "bfloat16")
        ],
    )
    arguments = ["--quick", "--case", "sigmoid_loss", "--device", "cpu", "--seconds", "0.001", "--out", str(out)]
    assert command.main([*arguments, "--recorded", str(recorded)]) == 0
    said = capsys.readouterr().out
    assert said.count(LACKS) == 2
    assert f"not compared with what was recorded: {recorded} is of another, this is" in said
    measured = {(row["dtype"], row["shape_json"]) for row in rows.read(out) if row["p50_ms"]}
    assert {dtype for dtype, _ in measured} == {"float32"}
    assert len(measured) == 2
    recorded.unlink()
    here = machine.machine_name("cpu")
    rows.append(recorded, [rows.make_row(**fields, dtype="float32", shape_json=shape, ratio=1e9, machine=here)])
    assert command.main([*arguments, "--recorded", str(recorded)]) == 1
    assert "slower: sigmoid_loss float32" in capsys.readouterr().out


def test_the_table_says_what_was_left_out() -> None:
    fields = {"op": "sigmoid_loss", "device": "cpu", "phase": "both", "machine": "M", "torch": "T", "commit": "C"}
    fields |= {"shape_json": '{"n": 64, "d": 64}', "impl": "auto"}
    measured = [rows.make_row(**fields, dtype="float32", p50_ms=1.0, ratio=2.0, error=1e-6)]
    measured += [rows.make_row(**fields, dtype="bfloat16", error=LACKS)]
    text = table.measured_table(measured)
    assert f"\n\nbfloat16 {LACKS}.\n\nMeasured on M, torch T, commit C." in text
    assert "| `sigmoid_loss` | bfloat16" not in text
    assert table.measured_table(measured[:1]).count("\n\n") == 1


def run_with(path: Path, ratios: dict[str, float | None], machine_name: str = "M") -> Path:
    path.unlink(missing_ok=True)
    fields = {"op": "a", "device": "cpu", "dtype": "float32", "phase": "both", "machine": machine_name}
    made = [rows.make_row(impl="eager", shape_json=n, ratio=1.0, baseline="eager", **fields) for n in ratios]
    made += [rows.make_row(impl="auto", shape_json=n, ratio=x, baseline="eager", **fields) for n, x in ratios.items()]
    rows.append(path, made)
    return path


def ratios_of(*others: float) -> dict[str, float]:
    """Twenty ratios of 2 but for some."""
    return {str(n): x for n, x in enumerate([*others, *[2.0] * (20 - len(others))])}


@pytest.mark.parametrize(
    ("others", "status", "said"),
    [
        ((2.19, 1.83), 0, "20 ratios, 20 (100.0 %) within 10 %, the farthest is 9.5 % away"),
        ((2.4,), 0, "20 ratios, 19 (95.0 %) within 10 %, the farthest is 20.0 % away\n   20.0 %  2 and 2.4  a auto"),
        ((1.65, 1.65), 1, "20 ratios, 18 (90.0 %) within 10 %, the farthest is 21.2 % away"),
        ((2.6,), 1, "20 ratios, 19 (95.0 %) within 10 %, the farthest is 30.0 % away"),
        ((1.55,), 1, "the farthest is 29.0 % away"),
    ],
)
def test_runs_agree(
    others: tuple[float, ...], status: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = run_with(tmp_path / "a.csv", ratios_of()), run_with(tmp_path / "b.csv", ratios_of(*others))
    for files in ((first, second), (second, first)):
        assert agree.main([str(file) for file in files]) == status
    assert said.partition("\n")[0] in capsys.readouterr().out
    agree.main([str(first), str(second)])
    assert said in capsys.readouterr().out


def test_a_ratio_that_is_missing_agrees_with_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = run_with(tmp_path / "a.csv", ratios_of()), tmp_path / "b.csv"
    run_with(second, ratios_of() | {"0": None, "1": None})
    assert agree.main([str(second), str(first)]) == 1
    said = capsys.readouterr().out
    assert "20 ratios, 18 (90.0 %) within 10 %, the farthest is 0.0 % away" in said
    assert said.count(f"only in {first}: a auto cpu float32") == 2
    assert agree.main([str(first), str(tmp_path / "none.csv")]) == 2
    assert "have no ratio in common: 20 and 0 of their own" in capsys.readouterr().err


def test_runs_of_other_machines_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run_with(tmp_path / "a.csv", ratios_of(), "GPU, sm 1980 MHz, mem 3201 MHz")
    second = run_with(tmp_path / "b.csv", ratios_of(), "GPU, sm 1755 MHz, mem 3201 MHz")
    assert agree.main([str(first), str(second)]) == 0
    capsys.readouterr()
    run_with(second, ratios_of(), "another")
    assert agree.main([str(first), str(second)]) == 2
    assert f"{first} is of GPU; {second} is of another: ratios are compared on one machine only" in (
        capsys.readouterr().err
    )


def test_a_whole_run_is_recorded(places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    folder = whole_run(tmp_path / "run")
    assert record.main([str(folder)]) == 0
    assert f"wrote {places}\n" in capsys.readouterr().out
    for name in ("cpu.csv", "quick.csv"):
        assert (places / name).read_text() == (folder / name).read_text()
    assert "Measured on here, torch" in (places / "losses.md").read_text()
    assert (places / "contrastive_loss_cpu_bfloat16_d512_speed.svg").is_file()


def test_a_run_with_problems_left_out_changes_nothing(
    places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in places.iterdir()}
    folder = whole_run(tmp_path / "run")
    problems = [(case, problem) for case, problem in command.problems_of(None, "cpu", False)]
    case, problem = next(pair for pair in problems if pair[1].dtype == "bfloat16")
    fields = {"op": case.op, "device": "cpu", "dtype": "bfloat16", "shape_json": problem.shape_json, "phase": "both"}
    rows.append(folder / "cpu.csv", [rows.make_row(impl="auto", error=LACKS, **fields)])
    assert record.main([str(folder)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"kept as they were: {places}, {places / 'losses.md'}. Problems without figures")
    assert said.endswith(f": 1 ({LACKS})\n")
    text = (folder / "quick.csv").read_text()
    (folder / "quick.csv").write_text(text[: text[:-1].rindex("\n") + 1])  # the time was up
    record.main([str(folder)])
    assert f"1 (not measured); 1 ({LACKS})" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in places.iterdir()} == before


def test_what_is_no_run_is_not_recorded(places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert record.main([str(tmp_path)]) == 2
    assert f"FOLDER is {tmp_path}, must be that of a run: it has no cpu.csv" in capsys.readouterr().err
    assert record.main([str(places)]) == 2
    assert "must be another one" in capsys.readouterr().err


def test_of_several_looks_the_last_rows_are_recorded(places: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = whole_run(tmp_path / "run", ratio=1.0)
    whole_run(folder, ratio=3.0)
    assert record.main([str(folder)]) == 0
    recorded = (places / "cpu.csv").read_text().splitlines()
    assert len(recorded) == 1 + len(rows.read(folder / "cpu.csv"))
    assert {row["ratio"] for row in rows.read(places / "cpu.csv")} == {"3"}


def test_each_look_adds_rounds_and_holds_nothing_between(tmp_path: Path) -> None:
    run = Run(tmp_path / "rows.csv", seconds=0.0, is_quick=True, is_refined=True)
    problem = pairs(24, 8, "float32", has_peak=False, impls=("auto",))
    with closing(Measurement(CASES["sigmoid_loss"], problem, run)) as measurement:
        for rounds in (1, 2, 3):
            written = measurement.look()
            assert measurement.rounds == rounds
            assert all(not candidate.runner.inputs for candidate in measurement.candidates or ())
        assert rows.read(run.out) == written
        assert len(run.out.read_text().splitlines()) == 1 + 3 * len(written)


class Looked:
    """A measurement whose rounds take as long as they are told."""

    def __init__(self, name: str, seconds: float, looks: list[str], clock: list[float]) -> None:
        self.case, self.problem = SimpleNamespace(op=name), SimpleNamespace(label="")
        self.run = SimpleNamespace(seconds=1)
        self.each, self.seconds, self.rounds, self.looks, self.clock = seconds, seconds, 1, looks, clock

    def look(self) -> None:
        self.looks.append(self.case.op)
        self.rounds += 1
        self.seconds += self.each
        self.clock[0] += self.each

    def rows(self) -> list[rows.Row]:
        return []


def test_what_is_left_of_the_time_goes_to_whom_had_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each some rounds first, then the same time; and none that would end too late."""
    looks: list[str] = []
    clock = [0.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: clock[0])
    of_all = [Looked("longest", 45, looks, clock), Looked("long", 10, looks, clock), Looked("short", 1, looks, clock)]
    command.refine(of_all, 121)  # type: ignore[arg-type]
    assert looks[:13] == ["short"] * 6 + ["long"] * 4 + ["longest"] + ["long"] * 2
    assert looks[13:] == ["short"] * 10
    assert clock[0] == 121


def test_a_gpu_that_is_lost_while_refining_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: Any) -> None:
        raise DeviceLost("an illegal memory access")

    monkeypatch.setattr(command, "refine", lost)
    arguments = ["--quick", "--case", "sigmoid_loss", "--device", "cpu", "--out", str(tmp_path / "rows.csv")]
    assert command.main([*arguments, "--refine", "--time-budget", "-1"]) == command.LOST


def test_time_to_refine_in_must_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--device", "cpu", "--refine", "--out", str(tmp_path / "rows.csv")]) == 2
    assert "--refine needs --time-budget: how long to go on" in capsys.readouterr().err


@pytest.mark.usefixtures("avx2")
def test_plots_are_drawn_without_what_was_left_out(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = Run(tmp_path / "rows.csv", seconds=0.0, is_quick=True)
    for n in (16, 24):
        for dtype in ("float32", "bfloat16"):
            measure(CASES["sigmoid_loss"], pairs(n, 8, dtype, has_peak=False, impls=("auto",)), run)
    (path,) = plot.draw(rows.read(run.out), tmp_path)
    assert path.name == "sigmoid_loss_cpu_float32_d8_speed.svg"
