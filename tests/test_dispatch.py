"""The one rule that picks an implementation, and what the contrastive block makes of it."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest
import torch

from fastclip.ops import _cuda, _dispatch, _extension, _tuned
from fastclip.ops.contrastive_loss import explain, implementations

NAMES = ("slow", "fast", "faster")
BROKEN = {"faster": "no such device"}


def test_auto_takes_the_first_that_can_run() -> None:
    assert _dispatch.pick("op", "auto", NAMES, ("faster", "fast", "slow"), BROKEN.get) == "fast"
    assert _dispatch.pick("op", "auto", NAMES, ("faster", "fast", "slow"), {}.get) == "faster"


def test_an_explicit_name_runs_or_raises() -> None:
    assert _dispatch.pick("op", "slow", NAMES, ("fast", "slow"), BROKEN.get) == "slow"
    with pytest.raises(ValueError, match="op: impl='faster' cannot run: no such device"):
        _dispatch.pick("op", "faster", NAMES, ("fast",), BROKEN.get)
    with pytest.raises(ValueError, match="op: impl is 'turbo', must be one of auto, slow, fast, faster"):
        _dispatch.pick("op", "turbo", NAMES, ("fast",), BROKEN.get)
    with pytest.raises(ValueError, match=r"no implementation can run \(faster: no such device\)"):
        _dispatch.pick("op", "auto", NAMES, ("faster",), BROKEN.get)


def test_explain_gives_every_name_a_reason() -> None:
    verdicts = _dispatch.explain("op", NAMES, ("faster", "fast", "slow"), BROKEN.get)
    assert [v.impl for v in verdicts if v.chosen] == ["fast"]
    assert [v.reason for v in verdicts] == ["auto prefers fast here", "first that can run", "no such device"]


def chosen(device: str, dtype: torch.dtype, n: int) -> str:
    return next(v.impl for v in explain(device, dtype, n) if v.chosen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contrastive_block_on_the_cpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "load", lambda: None)
    assert chosen("cpu", dtype, 64) == chosen("cpu", dtype, 8192) == "cpu"
    assert chosen("cpu", torch.float64, 64) == "dense"
    monkeypatch.setattr(_extension, "load", lambda: "not built")
    assert chosen("cpu", dtype, 64) == "dense"
    assert chosen("cpu", dtype, 8192) == "reference"
    assert any(v.reason == "not built" for v in explain("cpu", dtype, 64))


def test_contrastive_block_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tuned, "gpu_name", lambda: "a GPU that nothing was measured on")
    monkeypatch.setattr(_cuda, "why_not", lambda device: None)  # on an H100 or H200
    assert chosen("cuda", torch.bfloat16, 256) == chosen("cuda", torch.bfloat16, 8192) == "cuda"
    assert chosen("cuda", torch.float16, 32768) == "cuda"
    assert chosen("cuda", torch.float32, 32768) == "triton"
    assert chosen("cuda", torch.float64, 32768) == "reference"
    monkeypatch.setattr(_cuda, "why_not", lambda device: "it is another GPU")
    assert chosen("cuda", torch.bfloat16, 32768) == "triton"
    assert any(v == ("cuda", False, "it is another GPU") for v in explain("cuda", torch.bfloat16, 32768))
    monkeypatch.setattr(_cuda, "why_not", lambda device: None)
    monkeypatch.setattr(_dispatch, "has_package", lambda name: False)
    assert chosen("cuda", torch.float16, 32768) == "reference"


@pytest.mark.parametrize("op", ["contrastive_loss", "sigmoid_loss"])
def test_a_gpu_that_is_not_here(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    verdicts = import_module(f"fastclip.ops.{op}").explain("cuda", torch.bfloat16, 32768)
    assert [v.impl for v in verdicts] == ["reference", "dense", "cpu", "triton", "cuda"]
    assert [v.impl for v in verdicts if v.chosen] == ["triton"]
    assert verdicts[-1].reason == "torch finds no GPU"


def test_dense_refuses_what_it_should_not_hold() -> None:
    reason = implementations.why_not("dense", "cpu", torch.float32, 1 << 14, 1 << 14)
    assert reason is not None
    assert "16384 x 16384 logits" in reason


def test_auto_on_the_cpu_imports_no_triton() -> None:
    code = (
        "import sys, torch; from fastclip.losses import ClipLoss; x = torch.eye(3, requires_grad=True);"
        "ClipLoss()(x, x, torch.tensor(1.)).backward(); assert 'triton' not in sys.modules, 'triton was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
