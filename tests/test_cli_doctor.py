"""`fastclip doctor`: what it says is what the ops say, and each known clash is told."""

from __future__ import annotations

import json
import re
from importlib import import_module
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
    status, out, _ = run("doctor")
    assert status == 0
    assert max(map(len, out.splitlines())) <= 80
    assert f"torch {torch.__version__} everything" in " ".join(out.split())
    status, text, _ = run("doctor", "--json")
    assert status == 0
    report = json.loads(text)
    assert {entry["op"] for entry in report["ops"]} == set(doctor.CASES)
    for entry in report["ops"]:
        explain = import_module(f"fastclip.ops.{entry['op']}").explain
        size = [] if entry["size"] is None else [entry["size"]]
        packed = {"is_packed": True} if "packed" in entry["case"] else {}
        verdicts = explain(entry["device"], getattr(torch, entry["dtype"]), *size, **packed)
        assert entry["verdicts"] == [verdict._asdict() for verdict in verdicts]
        for verdict in verdicts:
            if verdict.chosen:
                assert re.search(rf"{re.escape(entry['case'])} .*{entry['dtype']}.*{verdict.impl}\n", out)
            else:
                assert verdict.reason in " ".join(out.split())


def test_doctor_of_one_op_and_shape(run: Run) -> None:
    status, out, _ = run("doctor", "--op", "attention", "--size", "197", "--head-dim", "160", "--dtype", "float16")
    assert status == 0
    assert out.splitlines()[:2] == ["attention", "  cpu  197 tokens  float16  sdpa"]
    assert "triton: it takes heads of up to 128 dimensions, not 160" in out
    assert "cpu: it takes float32 and bfloat16, not torch.float16" in " ".join(out.split())
    status, out, _ = run("doctor", "--op", "layer_norm", "--json")
    assert [entry["dtype"] for entry in json.loads(out)["ops"]] == ["float32", "bfloat16"]


def test_where_a_reason_holds(run: Run) -> None:
    _, out, _ = run("doctor", "--op", "attention")
    told = " ".join(out.split())
    assert "flash_attn: it takes bfloat16 and float16, not torch.float32 (float32)" in told
    assert "reference: auto prefers sdpa here (50 tokens, 577 tokens)" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "3"), "--size, --dtype and --head-dim need --op NAME"),
        (("--op", "layer_norm", "--size", "3"), "--size has no meaning for layer_norm"),
        (("--op", "attention", "--size", "-3"), "must be above 0, were -3 and 64"),
    ],
)
def test_options_that_do_not_fit(run: Run, arguments: tuple[str, ...], message: str) -> None:
    status, _, err = run("doctor", *arguments)
    assert status == 2
    assert message in err


def test_a_deepspeed_json_of_the_users(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    for content, words in (
        ('{"gradient_accumulation_steps": 4}', "! deepspeed_config"),
        ('{"gradient_clipping": 1.0}', "over the generated JSON it sets gradient_clipping: 1.0 (was 0.0)"),
        ('{"gradient_clipping": 0.0}', "over the generated JSON it sets nothing"),
    ):
        file.write_text(content)
        status, out, _ = run("doctor", "--deepspeed-config", str(file))
        assert status == 0
        assert words in " ".join(out.split())


def test_doctor_says_which_kernels_are_built(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = machine.inspect_machine()
    for reason, words in ((None, "GPU compiled, loaded"), ("not built: " + "why " * 30, "GPU not built: why why")):
        monkeypatch.setattr(doctor, "inspect_machine", lambda reason=reason: {**real, "gpu_kernels": reason})
        status, out, _ = run("doctor")
        assert status == 0
        assert words in " ".join(out.split())
        assert max(map(len, out.splitlines())) <= 80


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
        "gpu_kernels": None,
        "apex_is_nvidias": None,
        "needs_torch": {},
        "torch_wants_triton": None,
        "broken": {},
    }
    return plain | changed


@pytest.mark.parametrize(
    ("changed", "level", "about", "words"),
    [
        ({"versions": {"deepspeed": "0.18.9"}}, "clash", "deepspeed", "0.18.9 is older than 0.19.8"),
        ({"versions": {"deepspeed": None}}, "note", "deepspeed", "--engine torch"),
        ({"versions": {"triton": None}}, "clash", "triton", "there is a GPU but no triton"),
        ({"torch_wants_triton": "triton==3.6.0"}, "clash", "triton", "built with triton==3.6.0, this is triton 3.9.0"),
        ({"versions": {"triton": "3.6.0", "numpy": "2.4.6"}}, "note", "triton", "need numpy below 2.4"),
        ({"versions": {"transformers": "4.57.1"}}, "note", "transformers", "pip install 'transformers>=5'"),
        ({"apex_is_nvidias": True}, "note", "apex", 'layer_norm(impl="apex")'),
        ({"gpus": []}, "note", "triton", "in the interpreter only"),
        ({"gpus": [], "versions": {"xformers": "0.0.35"}}, "note", "xformers", "no attention operator for the CPU"),
        ({"apex_is_nvidias": False}, "clash", "apex", "not NVIDIA's"),
        ({"needs_torch": {"torchvision": "torch==2.12.0"}}, "clash", "torchvision", "built for torch==2.12.0"),
        ({"needs_torch": {"torchvision": "torch>=2.14"}}, "clash", "torchvision", "this is torch 2.13.0+cu130"),
        ({"broken": {"torchvision": "no nms"}}, "clash", "torchvision", "cannot be imported: no nms"),
        ({"kernels": "_C.so was built for torch 2.11, this is"}, "clash", "kernels", "built for torch 2.11"),
        ({"kernels": "the compiled kernels are not built"}, "note", "kernels", "not built"),
        ({"gpu_kernels": "not built", "gpus": [{"capability": "90"}]}, "note", "kernels", "take Triton's"),
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
        torch_wants_triton="triton==3.9.0",
        versions={"deepspeed": "0.20.0", "xformers": "0.0.35", "transformers": "5.24.0", "numpy": "2.4.6"},
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
        assert machine._need_of("x", "torch") == wanted
    monkeypatch.undo()
    assert machine._need_of("no-such-distribution", "torch") is None
