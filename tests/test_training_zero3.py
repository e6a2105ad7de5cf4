"""ZeRO-3 is made without the whole model on every rank: the first rank has it, the others a weight at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from contrastive_loss_helpers import run_on_ranks
from training_helpers import this_rank

from fastclip.models import create_model, get_config
from fastclip.training.config import TrainConfig
from fastclip.training.deepspeed_config import resolve_deepspeed
from fastclip.training.deepspeed_engine import _import_deepspeed, _partition
from fastclip.training.engine import build_engine
from fastclip.training.model import model_without_memory

BASE = get_config("ViT-S-16")
LARGE = replace(BASE, text=replace(BASE.text, vocab_size=1024))  # 44 million parameters in matrices of 2 MB at most


def memory(name: str) -> int:
    """Bytes of this process: VmRSS, or VmHWM, its highest since `forget`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def forget() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _start(name: str, world_size: int) -> tuple[TrainConfig, dict[str, Any]]:
    config = TrainConfig(model=name, engine="deepspeed", zero_stage=3, precision="fp32", global_batch=2 * world_size)
    config, ds_config, _ = resolve_deepspeed(config, world_size)
    _import_deepspeed().init_distributed(dist_init_required=False)
    return config, ds_config


def _grown(world_size: int) -> tuple[int, int]:
    processes, (_, ds_config) = this_rank(), _start("ViT-S-16", world_size)
    model_without_memory(get_config("debug"))  # loads what PyTorch needs for it, once
    forget()
    before = memory("VmRSS")
    model = create_model(LARGE) if processes.is_first else model_without_memory(LARGE)
    whole = sum(p.numel() * 4 for p in model.parameters())
    _partition(model, ds_config, torch.float32, processes)
    return whole, memory("VmHWM") - before


def _weights(world_size: int) -> dict[str, Any]:
    processes, (config, ds_config) = this_rank(), _start("debug", world_size)
    torch.manual_seed(processes.rank)
    model = create_model("debug") if processes.is_first else model_without_memory(get_config("debug"))
    state = build_engine(model, config, processes, ds_config).full_state_dict()
    dist.barrier()
    return {name: value.numpy() for name, value in state.items()}


def test_other_ranks_never_hold_the_whole_model() -> None:
    """Half of it is theirs in the end; all of it beside that would be seen, as it is on the first rank."""
    (whole, first), (_, second) = run_on_ranks(2, _grown, 2)
    assert first > whole
    assert second < 0.9 * whole


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_have_the_first_ranks_weights(world_size: int) -> None:
    states = run_on_ranks(world_size, _weights, world_size)
    torch.manual_seed(0)
    expected = create_model("debug").state_dict()
    assert set(states[0]) == set(expected)
    for name, value in states[0].items():
        assert torch.equal(torch.from_numpy(value), expected[name].reshape(value.shape)), name
