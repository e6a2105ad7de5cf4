"""The precision of a run where none is asked for: what the device computes in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from contrastive_loss_helpers import run_on_ranks
from training_helpers import options, small_data, this_rank

from fastclip.training import start
from fastclip.training.__main__ import main
from fastclip.training.config import TrainConfig, read_config
from fastclip.training.engine import computes_in_bf16


@pytest.mark.parametrize(
    ("asked", "is_slow", "taken", "said"),
    [
        ("auto", True, "fp32", "cpu has no bf16 products: computes in fp32"),
        ("auto", False, "bf16", ""),
        ("bf16", True, "bf16", "cpu has no bf16 products: this will be far slower than --precision fp32"),
        ("fp32", True, "fp32", ""),
    ],
)
def test_it_is_what_the_device_computes_in(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    asked: str,
    is_slow: bool,
    taken: str,
    said: str,
) -> None:
    monkeypatch.setattr(start, "computes_in_bf16", lambda device: not is_slow)
    data, out = small_data(tmp_path / "data", count=16), tmp_path / "run"
    assert main(options(data, out, engine="torch", precision=asked, steps=1)) == 0
    assert read_config(out / "config.yaml", TrainConfig()).precision == taken
    shown = capfd.readouterr().out
    assert ("has no bf16 products" in shown) == bool(said)
    assert said in shown


def mixed() -> str:
    processes = this_rank()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "computes_in_bf16", lambda device: processes.is_first)
        return start._with_precision(TrainConfig(), processes)[0].precision


def test_ranks_on_unlike_machines_agree() -> None:
    assert run_on_ranks(2, mixed) == ["fp32", "fp32"]


def test_what_this_processor_has() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    if "avx2" in flags:
        assert computes_in_bf16(torch.device("cpu")) == ("avx512f" in flags or "avx512_bf16" in flags)
