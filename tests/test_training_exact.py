"""Five SGD steps on ranks against autograd of the whole batch in fp64: every stage, chunk count, offload and reduction.

Relative L2 of the weights at most 1e-6 over all and 5e-6 for each tensor. A sample here, the whole in the long tier.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from contrastive_loss_helpers import run_on_ranks
from training_helpers import State, error, small, this_rank, whole_batch, without_key_biases

STEPS, TIMEOUT = 5, 500
GLOBAL = {2: 28, 4: 28}  # ranks -> pairs; of 14 or 7 a rank, cut into chunks of
SIZES = {2: {1: 14, 2: 7, 4: 4, 7: 2}, 4: {1: 7, 2: 4, 4: 2, 7: 1}}  # ranks -> {chunks: their size}
OVERALL, EACH, NOTHING = 1e-6, 5e-6, 1e-8
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
OFFLOADS: dict[int, dict[str, Any]] = {1: OFFLOAD, 2: OFFLOAD, 3: OFFLOAD | {"offload_param": {"device": "cpu"}}}


class Setting(NamedTuple):
    """One cell of the matrix; stage -1 is engine torch."""

    stage: int
    chunks: int
    reduction: str = "auto"
    is_offloaded: bool = False
    recompute: str = "none"

    @property
    def label(self) -> str:
        stage = "torch" if self.stage < 0 else f"zero{self.stage}"
        extra = "-offload" * self.is_offloaded + f"-{self.recompute}" * (self.recompute != "none")
        return f"{stage}-{self.chunks}-{self.reduction}{extra}"


def matrix() -> list[Setting]:
    paths = {
        -1: ("auto",),
        0: ("boundary",),
        **dict.fromkeys((1, 2, 3), ("coalesced", "boundary", "unmanaged")),
    }
    return [
        Setting(stage, chunks, reduction, is_offloaded)
        for stage, reductions in paths.items()
        for reduction, is_offloaded, chunks in itertools.product(reductions, (False, True), (1, 2, 4, 7))
        if not (is_offloaded and stage < 1)
    ]


FAST = [
    Setting(0, 7, "boundary"),
    Setting(1, 4, "unmanaged"),
    Setting(2, 2, "coalesced", True),
    Setting(3, 4, "coalesced"),
    Setting(3, 2, recompute="selective"),
    Setting(3, 2, recompute="full"),
]
FOUR_RANKS = [
    Setting(0, 4, "boundary"),
    Setting(1, 7),
    Setting(2, 2, "boundary"),
    Setting(3, 4),
    Setting(3, 7, "auto", True),
]


def worst_tensor(ours: State, truth: State) -> float:
    """The largest relative L2 error of a tensor; one that is 0 in truth counts by its size beside NOTHING."""
    worst = 0.0
    for name, value in truth.items():
        distance, size = float((ours[name].double() - value).norm()), float(value.norm())
        worst = max(worst, distance / size if size > NOTHING else EACH * distance / NOTHING)
    return worst


def errors_of(settings: list[Setting]) -> dict[str, tuple[float, float]]:
    processes, found = this_rank(), {}
    ranks = processes.world_size
    truth, _ = whole_batch(STEPS, GLOBAL[ranks])
    for setting in settings:
        made = small(
            processes,
            "torch" if setting.stage < 0 else "deepspeed",
            max(0, setting.stage),
            OFFLOADS[setting.stage] if setting.is_offloaded else None,
            chunk_size=SIZES[ranks][setting.chunks],
            reduction=setting.reduction,
            recompute=setting.recompute,
            global_batch=GLOBAL[ranks],
        )
        made.steps(STEPS)
        state = made.engine.full_state_dict()
        if processes.is_first:
            found[setting.label] = (error(state, truth), worst_tensor(state, truth))
    return found


def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{key: group[key] for key in ("params", "weight_decay")} for group in groups], lr=1e-3)


def adamw_errors() -> dict[str, float]:
    """Relative error of the weights behind AdamW, of chunks at each stage and of whole batches in another order."""
    processes, found = this_rank(), {}
    truth = without_key_biases(whole_batch(STEPS, GLOBAL[2], adamw)[0])
    control = without_key_biases(whole_batch(STEPS, GLOBAL[2], adamw, torch.float32, is_reordered=True)[0])
    for stage in (-1, 0, 1, 2, 3):
        kind = "torch" if stage < 0 else "deepspeed"
        made = small(processes, kind, max(0, stage), chunk_size=4, global_batch=GLOBAL[2], make_optimizer=adamw)
        made.steps(STEPS)
        state = made.engine.full_state_dict()
        if processes.is_first:
            found[f"{kind}{stage}"] = error(without_key_biases(state), truth)
    return found | {"control": error(control, truth)}


def bf16_errors() -> dict[str, tuple[float, float]]:
    """Relative error of the weights behind SGD in bf16: (in chunks, uncached)."""
    processes, found = this_rank(), {}
    truth, _ = whole_batch(STEPS, GLOBAL[2])
    for stage in (-1, 0, 1, 2, 3):
        kind = "torch" if stage < 0 else "deepspeed"
        errors = []
        for chunk in (4, GLOBAL[2] // 2):
            made = small(processes, kind, max(0, stage), chunk_size=chunk, global_batch=GLOBAL[2], precision="bf16")
            made.steps(STEPS)
            state = made.engine.full_state_dict()
            errors.append(error(state, truth) if processes.is_first else 0.0)
        found[f"{kind}{stage}"] = (errors[0], errors[1])
    return found


def check(found: dict[str, tuple[float, float]], settings: list[Setting]) -> None:
    assert found.keys() == {setting.label for setting in settings}
    wrong = {label: errors for label, errors in found.items() if not (errors[0] <= OVERALL and errors[1] <= EACH)}
    assert not wrong, wrong


def test_a_sample_on_two_ranks() -> None:
    check(run_on_ranks(2, errors_of, FAST, timeout=TIMEOUT)[0], FAST)


@pytest.mark.long
def test_the_whole_matrix_on_two_ranks() -> None:
    check(run_on_ranks(2, errors_of, matrix(), timeout=TIMEOUT)[0], matrix())


@pytest.mark.long
def test_a_sample_on_four_ranks() -> None:
    check(run_on_ranks(4, errors_of, FOUR_RANKS, timeout=TIMEOUT)[0], FOUR_RANKS)


@pytest.mark.long
def test_adamw_is_within_twice_a_reordering_of_its_sums() -> None:
    found = run_on_ranks(2, adamw_errors, timeout=TIMEOUT)[0]
    control = found.pop("control")
    assert len(found) == 5
    assert 0 < control < 1e-6
    assert all(value <= 2 * control for value in found.values()), (found, control)


@pytest.mark.long
def test_bf16_is_within_twice_uncached_bf16() -> None:
    found = run_on_ranks(2, bf16_errors, timeout=TIMEOUT)[0]
    assert len(found) == 5
    assert all(1e-5 < ours <= 2 * uncached for ours, uncached in found.values()), found


if __name__ == "__main__":  # the table of docs/training.md
    for ranks, settings in ((2, matrix()), (4, FOUR_RANKS)):
        for label, (overall, worst) in run_on_ranks(ranks, errors_of, settings, timeout=2000)[0].items():
            print(f"{ranks} ranks {label:32} {overall:.1e} {worst:.1e}", flush=True)
