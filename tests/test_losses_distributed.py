"""`contrastive_loss` on several gloo ranks against the matrices of one process, gathered and round a ring."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from contrastive_loss_helpers import run_on_ranks
from losses_helpers import OPTIONS, Problem, make_problem
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastclip.losses import ClipLoss, contrastive_loss
from fastclip.testing import clip_features, relative_error, textbook_contrastive_loss, value_and_gradients

# (images, texts) by rank; "uneven" also has texts that are nobody's
SIZES = {
    1: {"even": ((5,), (5,)), "uneven": ((4,), (7,))},
    2: {"even": ((4, 4), (4, 4)), "extra": ((3, 3), (5, 5)), "uneven": ((1, 6), (2, 6))},
    4: {"even": ((3,) * 4, (3,) * 4), "uneven": ((2, 5, 1, 3), (4, 5, 1, 6))},
}
CASES = [(world_size, sizes) for world_size, kinds in SIZES.items() for sizes in kinds]


def coefficients(n: int) -> torch.Tensor:
    return torch.linspace(1, 2, n, dtype=torch.float64)


def on_this_rank(problem: Problem, wanted: dict[str, Any], group: Any, **more: Any) -> list[Any]:
    """[loss, its gradients for image, text, scale and weights, *stats]."""
    rank, group = dist.get_rank(group), group or dist.group.WORLD
    options = problem.options(wanted, rank)
    leaves = problem.leaves(rank)
    loss, stats = contrastive_loss(*leaves, group=group, return_stats=True, **options, **more)
    inputs = [*leaves, *(options[name] for name in ("weights",) if name in options)]
    factors = coefficients(sum(problem.images))[problem.part(rank)[0]] if loss.ndim else 1
    return [x.detach().numpy() for x in (loss, *torch.autograd.grad((loss * factors).sum(), inputs), *stats)]


def every_case() -> dict[str, list[Any]]:
    """All that the tests ask of this rank, so that there are no more processes than must be."""
    world_size, results = dist.get_world_size(), {}
    for sizes, (images, texts) in SIZES[world_size].items():
        for name, wanted in OPTIONS.items():
            for ring in (False, True):
                key = f"{sizes}, {name}, {'ring' if ring else 'gathered'}"
                results[key] = on_this_rank(make_problem(images, texts), wanted, None, ring=ring)
    more = {2: {"rounded": rounded, "mistakes": mistakes}, 4: {"subgroups": in_subgroups, "largest": largest}}
    return results | {key: function() for key, function in more.get(world_size, {}).items()}


@cache
def ranks(world_size: int) -> list[dict[str, Any]]:
    return run_on_ranks(world_size, every_case)


def truth(problem: Problem, wanted: dict[str, Any]) -> list[torch.Tensor]:
    options, leaves = problem.options(wanted), problem.leaves()
    loss = textbook_contrastive_loss(*leaves, **options)
    inputs = [*leaves, *(options[name] for name in ("weights",) if name in options)]
    factors = coefficients(len(loss)) if loss.ndim else 1
    return [loss.detach(), *torch.autograd.grad((loss * factors).sum(), inputs)]


def assert_ranks_are_right(problem: Problem, wanted: dict[str, Any], results: list[list[Any]]) -> None:
    """The gradient is that of the sum over ranks of what they return."""
    loss, d_image, d_text, d_scale, *d_weights = (x.numpy() for x in truth(problem, wanted))
    times = 1 if loss.ndim else len(results)
    values = list(zip(*results, strict=True))

    def close(a: Any, b: Any, what: str) -> None:
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13, err_msg=what)

    if loss.ndim:
        close(np.concatenate(values[0]), loss, "loss")
    else:
        close(np.array(values[0]), np.full(len(results), loss), "loss")
    close(np.concatenate(values[1]), times * d_image, "d_image_features")
    close(np.concatenate(values[2]), times * d_text, "d_text_features")
    close(np.sum(values[3]), times * d_scale, "d_logit_scale")
    for own in d_weights:
        close(np.concatenate(values[4]), times * own, "d_weights")
    options, leaves = problem.options({k: v for k, v in wanted.items() if k != "weights"}), problem.leaves()
    _, stats = contrastive_loss(*leaves, return_stats=True, impl="reference", **options)
    row_lse, col_lse, hits = values[-3:]
    close(np.concatenate(row_lse), stats.row_lse.numpy(), "row_lse")
    close(np.concatenate(col_lse), stats.col_lse.numpy(), "col_lse")
    assert (np.concatenate(hits, 1) == stats.hits.numpy()).all()


@pytest.mark.parametrize("how", ["gathered", "ring"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("world_size", "sizes"), CASES)
def test_ranks_are_one_process(world_size: int, sizes: str, name: str, how: str) -> None:
    problem = make_problem(*SIZES[world_size][sizes])
    results = [result[f"{sizes}, {name}, {how}"] for result in ranks(world_size)]
    assert_ranks_are_right(problem, OPTIONS[name], results)


def in_subgroups() -> list[list[Any]]:
    """Ranks 0 and 2 solve one problem, ranks 1 and 3 another at the same time: gathered, and round a ring."""
    groups = [dist.new_group(members) for members in ([0, 2], [1, 3])]
    mine = dist.get_rank() % 2
    problem = make_problem(*SIZES[2]["uneven"], seed=mine)
    return [on_this_rank(problem, OPTIONS["positive"], groups[mine], ring=ring) for ring in (False, True)]


def test_subgroups_keep_to_themselves() -> None:
    results = [result["subgroups"] for result in ranks(4)]
    for mine in (0, 1):
        problem = make_problem(*SIZES[2]["uneven"], seed=mine)
        for way in (0, 1):
            assert_ranks_are_right(problem, OPTIONS["positive"], [results[mine][way], results[mine + 2][way]])


def rounded() -> list[list[Any]]:
    """Gradients of bfloat16 features on this rank, gathered and round a ring."""
    image, text, scale = clip_features(64, 32, kind="clip", dtype=torch.bfloat16)
    own = slice(32 * dist.get_rank(), 32 * (dist.get_rank() + 1))
    leaves = (image.detach()[own].requires_grad_(), text.detach()[own].requires_grad_(), scale)
    losses = [partial(contrastive_loss, group=dist.group.WORLD, impl="reference", ring=ring) for ring in (False, True)]
    results = [value_and_gradients(loss, leaves) for loss in losses]
    return [[x.numpy() for x in result] for result in results]


@pytest.mark.parametrize("way", [0, 1])
def test_gradients_of_16_bits_are_summed_over_ranks_in_32(way: int) -> None:
    """1.7e-3 is what rounding to bfloat16 once does; summing two rounded parts and rounding again is above 2e-3."""
    results = [result["rounded"][way] for result in ranks(2)]
    inputs = clip_features(64, 32, kind="clip", dtype=torch.bfloat16)
    exact = value_and_gradients(textbook_contrastive_loss, inputs, torch.float64)
    for which in (1, 2):
        found = torch.from_numpy(np.concatenate([result[which] for result in results])) / 2
        assert relative_error(found, exact[which]) < 1.8e-3


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(made) if isinstance(x, torch.Tensor))])
        return made


def largest() -> list[int]:
    """Gathered, and round a ring."""
    found = []
    for ring in (False, True):
        leaves = make_problem((4,) * 4, (4,) * 4, d=100).leaves(dist.get_rank())
        with Largest() as mode:
            contrastive_loss(*leaves, group=dist.group.WORLD, ring=ring, normalize=True).backward()
        found.append(mode.elements)
    return found


def test_a_ring_holds_no_tensor_of_all_texts() -> None:
    assert [result["largest"] for result in ranks(4)] == [[1600, 400]] * 4


def message(call: Any) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def mistakes() -> list[str]:
    """What this rank is told of mistakes that rank 1 makes alone, and of some that all make."""
    is_wrong, group = dist.get_rank() == 1, dist.group.WORLD
    image, text, scale = (x.detach() for x in clip_features(3, 4))
    labels, weights = torch.arange(3), torch.ones(3)
    twice = torch.tensor([0, 1, 1]) if is_wrong else labels
    negative = -weights if is_wrong else weights
    nothing = image[:0] if is_wrong else image
    return [
        message(lambda: contrastive_loss(image, text, scale, labels=twice, group=group)),
        message(lambda: contrastive_loss(image, text, scale, weights=negative, group=group)),
        message(lambda: contrastive_loss(nothing, text, scale, group=group)),
        message(lambda: ClipLoss(rank=0, world_size=3)(image, text, scale)),
        message(lambda: contrastive_loss(image, text, scale, group=group)),
    ]


def test_mistakes_are_told_on_every_rank() -> None:
    right, wrong = (result["mistakes"] for result in ranks(2))
    assert "labels has the same value twice" in wrong[0]
    assert "weights has negative values" in wrong[1]
    assert "image_features has shape (0, 4)" in wrong[2]
    assert all("input of ranks [1] of the group was refused" in told for told in right[:3])
    assert all("must be those of the group: " in told for told in (right[3], wrong[3]))
    assert right[4] == wrong[4] == "no error"
