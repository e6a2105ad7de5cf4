"""The plan of a run: what it counts is so, what it extends from two small models holds for larger ones."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.plan import CONFIGURATIONS, MOST, model_of, predicted, run
from fastclip.cli.main import main
from fastclip.models import get_config
from fastclip.training.config import TrainConfig
from fastclip.training.plan import Machine, _peak, chunk_activations, memory, parameters, step_time


@pytest.mark.parametrize(("depth", "chunk"), [(6, 6), (4, 12), (12, 4)])
def test_activations_are_linear_in_depth_and_pairs(depth: int, chunk: int) -> None:
    """Measured at two and three blocks, two and four pairs: right at others, to a third of what a plan may be off."""
    model = model_of(128, depth)
    assert chunk_activations(model, "fp32", chunk) == pytest.approx(_peak(model, "fp32", chunk, 32), rel=0.05)


def test_activations_follow_what_they_depend_on() -> None:
    model = model_of(128, 3)
    whole = chunk_activations(model, "fp32", 16)
    assert chunk_activations(model, "bf16", 16) < 0.75 * whole
    assert chunk_activations(model, "fp32", 16, text_tokens=8) < 0.95 * whole
    assert chunk_activations(model, "fp32", 32) == pytest.approx(2 * whole, rel=0.15)


def test_recomputing_keeps_less() -> None:
    model = model_of(128, 12)
    none, selective, full = (chunk_activations(model, "fp32", 16, 32, mode) for mode in ("none", "selective", "full"))
    assert full < 0.6 * selective < 0.5 * none


def test_memory_is_partitioned_by_the_stage() -> None:
    config = TrainConfig(model="debug", global_batch=64, chunk_size=8, precision="bf16")
    count = parameters(get_config("debug"))
    needs = {stage: memory(replace(config, zero_stage=stage), 8) for stage in range(4)}
    assert needs[0].gradients == 2 * count
    assert needs[0].optimizer == 8 * count
    assert needs[1].optimizer == needs[3].optimizer == count
    assert needs[0].weights == 6 * count
    assert needs[1].weights == 2.5 * count
    assert needs[3].weights == 2.75 * count  # its part of master weights and weights, and all that it gathers
    assert needs[1].gradients == needs[2].gradients == 2 * count
    assert needs[3].gradients == 4.25 * count  # with a bucket that it keeps
    assert needs[2].total <= needs[1].total <= needs[0].total
    many = replace(config, zero_stage=2, chunk_size=2)
    assert memory(replace(many, reduction="boundary"), 8).total < memory(many, 8).total
    assert memory(replace(config, optimizer="lion"), 8).optimizer == needs[1].optimizer / 2


def test_the_time_of_a_step() -> None:
    config = TrainConfig(model="ViT-B-32", global_batch=32_768, chunk_size=512)
    machine = Machine()
    eight = step_time(config, 8, machine)
    assert eight.compute > 10 * eight.features
    assert eight.weights == 0
    assert step_time(replace(config, zero_stage=3), 8, machine).weights > 0
    many = replace(config, global_batch=4096 * 512)
    assert step_time(many, 4096, machine, is_ring=True).features > step_time(many, 4096, machine).features
    assert step_time(replace(config, global_batch=512), 1, machine).features == 0
    assert step_time(replace(config, recompute="full"), 8, machine).compute > 1.2 * eight.compute
    half = replace(config, reduction="boundary")
    assert step_time(half, 8, machine).gradients > 7 * eight.gradients


def test_what_is_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "scaling.png"
    words = [
        "plan",
        "--model",
        "debug",
        "--gpus",
        "4",
        "--global-batch",
        "4096",
        "--memory",
        "0.1",
        "--core-rate",
        "50",
    ]
    assert main([*words, "--plot", str(picture)]) == 0
    said = capfd.readouterr().out
    assert said.startswith("debug, 4 GPUs, global batch 4096 = 4 x ")
    assert "memory of a GPU at its peak: 0.1 GB of 0.1" in said
    assert "features gathered" in said
    assert "features round a ring" in said
    data = re.search(r"data: (\d+) pairs/s a GPU take (\d+) CPU cores at 50 pairs/s", said.replace(",", ""))
    assert data
    rate, cores = data.groups()
    assert 50 * int(cores) - 50 <= int(rate) <= 50 * int(cores)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert main(["plan", "--model", "debug", "--gpus", "3", "--global-batch", "64"]) == 2
    assert "--global-batch must be a multiple of --gpus, was 64 of 3" in capfd.readouterr().err
    assert main(["plan", "--model", "debug", "--memory", "0.001"]) == 2
    assert "nothing fits in 85% of 0.001 GB: the least is" in capfd.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("number", [0, 12, 11])
def test_what_a_rank_takes_is_what_was_planned(number: int) -> None:
    width, depth, ranks, fields = CONFIGURATIONS[number]
    guess = predicted(width, depth, ranks, fields)
    assert guess == pytest.approx(run(ranks, width, depth, fields), rel=MOST)
