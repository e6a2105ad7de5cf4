"""`fastclip doctor`: what it says is what the ops say, and each known clash is told."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import Run, runner

from fastclip.cli import clashes, doctor, machine


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(capsys)


def test_doctor_says_what_is_chosen_and_why(run: Run) -> None:
    from fastclip.ops import attention, contrastive_loss, sigmoid_loss

    status, out, _ = run("doctor")
    assert status == 0
    assert max(map(len, out.splitlines())) <= 80
    assert f"torch            {torch.__version__}" in out
    status, text, _ = run("doctor", "--json")
    assert status == 0
    report = json.loads(text)
    explained = {
        "contrastive_loss": contrastive_loss.explain,
        "sigmoid_loss": sigmoid_loss.explain,
        "attention": attention.explain,
    }
    sizes = {name: dict(cases) for name, cases in doctor.CASES.items()}
    assert len(report["ops"]) >= 10
    for entry in report["ops"]:
        size = sizes[entry["op"]][entry["case"]]
        verdicts = explained[entry["op"]](entry["device"], getattr(torch, entry["dtype"]), size)
        assert entry["verdicts"] == [verdict._asdict() for verdict in verdicts]
        for verdict in verdicts:
            if verdict.chosen:
                assert re.search(rf"{re.escape(entry['case'])} .*{entry['dtype']}.*{verdict.impl}\n", out)
            else:
                assert verdict.reason in " ".join(out.split())


def test_doctor_without_torch(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = machine.inspect_machine()
    monkeypatch.setattr(doctor, "inspect_machine", lambda: {**real, "broken": {"torch": "no libcudart"}})
    monkeypatch.delattr(doctor, "_ops")  # it needs torch
    status, out, _ = run("doctor")
    assert status == 0
    assert "! torch is installed but cannot be imported: no libcudart" in out


def facts(**changed: Any) -> dict[str, Any]:
    """A machine with a GPU on which nothing clashes."""
    versions = {"torch": "2.13.0+cu130", "deepspeed": "0.19.8", "triton": "3.9.0"} | changed.pop("versions", {})
    plain: dict[str, Any] = {
        "packages": {name: (version, "") for name, version in versions.items()},
        "gpus": [{}],
        "compiler": "g++",
        "kernels": None,
        "apex_is_nvidias": None,
        "needs_torch": {},
        "broken": {},
    }
    return plain | changed


@pytest.mark.parametrize(
    ("changed", "level", "about", "words"),
    [
        ({"versions": {"deepspeed": "0.18.9"}}, "clash", "deepspeed", "0.18.9 is older than 0.19.8"),
        ({"versions": {"deepspeed": None}}, "note", "deepspeed", "--engine torch"),
        ({"versions": {"triton": None}}, "clash", "triton", "there is a GPU but no triton"),
        ({"gpus": []}, "note", "triton", "in the interpreter only"),
        ({"gpus": [], "versions": {"xformers": "0.0.35"}}, "note", "xformers", "no attention operator for the CPU"),
        ({"apex_is_nvidias": False}, "clash", "apex", "not NVIDIA's"),
        ({"needs_torch": {"torchvision": "torch==2.12.0"}}, "clash", "torchvision", "built for torch==2.12.0"),
        ({"needs_torch": {"torchvision": "torch>=2.14"}}, "clash", "torchvision", "this is torch 2.13.0+cu130"),
        ({"broken": {"torchvision": "no nms"}}, "clash", "torchvision", "cannot be imported: no nms"),
        ({"kernels": "_C.so was built for torch 2.11, this is"}, "clash", "kernels", "built for torch 2.11"),
        ({"kernels": "the compiled kernels are not built"}, "note", "kernels", "not built"),
        ({"compiler": None}, "note", "compiler", "no C++ compiler"),
    ],
)
def test_what_clashes(changed: dict[str, Any], level: str, about: str, words: str) -> None:
    found = [note for note in clashes.clashes(facts(**changed)) if note.about == about]
    assert any(note.level == level and words in note.text for note in found), found


def test_what_does_not_clash() -> None:
    fine = facts(
        apex_is_nvidias=True,
        needs_torch={"torchvision": "torch==2.13", "xformers": "torch>=2.10", "flash-attn": "torch"},
        versions={"deepspeed": "0.20.0", "xformers": "0.0.35"},
    )
    assert [note.text for note in clashes.clashes(fine) if note.level == "clash"] == []
    assert "gradient_clipping" in clashes.clashes(fine)[0].text


def test_clashes_come_first_and_a_misfit_is_told_once() -> None:
    misfit = facts(needs_torch={"torchvision": "torch==2.1"}, broken={"torchvision": "no nms"})
    notes = clashes.clashes(misfit)
    assert [note.about for note in notes if note.level == "clash"] == ["torchvision"]
    assert "no nms" in notes[0].text


def test_an_apex_that_is_another_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "some_apex").mkdir()
    (tmp_path / "some_apex/__init__.py").touch()
    assert machine._has_module("some_apex", "normalization") is False
    (tmp_path / "some_apex/normalization").mkdir()
    assert machine._has_module("some_apex", "normalization") is True
    assert machine._has_module("no_such_package", "x") is None


def test_what_a_distribution_says_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for needs, wanted in (
        (["numpy", "torch (==2.12.0)"], "torch==2.12.0"),
        (["torchmetrics>=1", "torch>=2.14.0; python_version > '3'"], "torch>=2.14.0"),
        (["torch==1; extra == 'all'"], None),
        (["torch"], None),
        (None, None),
    ):
        monkeypatch.setattr(machine, "requires", lambda name, needs=needs: needs)
        assert machine._need_of_torch("x") == wanted
    monkeypatch.undo()
    assert machine._need_of_torch("no-such-distribution") is None
