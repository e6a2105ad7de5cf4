"""GradCache on two ranks against autograd of the whole batch: uneven shares, DDP, FSDP2, mistakes told on all."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from contrastive_loss_helpers import run_on_ranks
from test_grad_cache import BATCH, Towers, batch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastclip.grad_cache import GradCache
from fastclip.losses import contrastive_loss

STEPS, LR = 3, 0.5
SHARES = {"even": (6, 6), "uneven": (9, 3)}
Gradients = dict[str, Any]


class TwoCalls(Towers):
    """Each tower through forward alone, which is what DDP and FSDP wrap."""

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> dict[str, Tensor]:  # type: ignore
        outputs = {"logit_scale": self.logit_scale.exp()[0]}
        for name, tower, x in (("image", self.image, image), ("text", self.text, text)):
            if x is not None:
                outputs[f"{name}_features"] = nn.functional.normalize(tower(x), dim=-1)
        return outputs


def made() -> TwoCalls:
    torch.manual_seed(0)
    return TwoCalls().double()


def whole() -> dict[str, Any]:
    """Weights after SGD steps of one process."""
    model = made()
    for _ in range(STEPS):
        model.zero_grad()
        contrastive_loss(**model(*batch())).backward()
        sgd(model)
    return weights(model)


def sgd(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter -= LR * parameter.grad


def weights(model: nn.Module) -> dict[str, Any]:
    full = {name: p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for name, p in model.named_parameters()}
    return {name.removeprefix("module."): value.detach().clone().numpy() for name, value in full.items()}


def wrapped(kind: str) -> tuple[nn.Module, list[int]]:
    """The model and the sizes of the gradient reductions it makes, in elements."""
    model, reductions = made(), []
    if kind == "ddp":
        ddp = DistributedDataParallel(model, find_unused_parameters=True)

        def hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP reads the annotations
            reductions.append(bucket.buffer().numel())
            work = dist.all_reduce(bucket.buffer().div_(2), async_op=True)
            return work.get_future().then(lambda future: future.value()[0])

        ddp.register_comm_hook(None, hook)
        return ddp, reductions
    if kind == "fsdp":
        for part in (model.image, model.text):
            fully_shard(part)
        fully_shard(model)
    return model, reductions


def trained(kind: str, share: str, are_apart: bool) -> tuple[dict[str, Any], list[int]]:
    rank, group = dist.get_rank(), dist.group.WORLD
    model, reductions = wrapped(kind)
    first = sum(SHARES[share][:rank])
    image, text = (x[first : first + SHARES[share][rank]] for x in batch())
    forward = functools.partial(model)
    # Without a wrapper the loss's gather sums and the average over ranks is taken by hand.
    towers = {"image": forward, "text": functools.partial(model)} if are_apart else {"clip": forward}
    inputs = {"image": {"image": image}, "text": {"text": text}} if are_apart else {"clip": (image, text)}

    def loss_fn(**outputs: Tensor) -> Tensor:
        # "mean" divides by the pairs of all ranks and is the same on each: its gradient through the gather is the sum.
        return contrastive_loss(**outputs, group=group)

    cache = GradCache(towers, loss_fn, 4, group)
    for _ in range(STEPS):
        model.zero_grad()
        cache.step(inputs)
        if kind == "plain":
            for parameter in model.parameters():
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
                parameter.grad /= 2
        sgd(model)
    return weights(model), reductions


def told_everywhere() -> list[str]:
    """What each rank says when one of them has wrong inputs; afterwards both go on."""
    rank, model = dist.get_rank(), made()
    cache, said = GradCache({"clip": model}, contrastive_loss, 4, dist.group.WORLD), []
    image, text = batch()
    for wrong in ((image[:0], text[:0]), "images"):
        try:
            cache.step({"clip": wrong if rank == 1 else (image, text)})
        except ValueError as error:
            said.append(str(error))
    cache.step({"clip": (image, text)})
    return said


CASES = [
    (kind, share, are_apart)
    for kind in ("plain", "ddp", "fsdp")
    for share in SHARES
    for are_apart in (False, True)
    # FSDP2 leaves weights that a backward does not touch gathered; its root must see both towers in one forward.
    if not (kind == "fsdp" and are_apart)
]


def everything() -> dict[Any, Any]:
    return {case: trained(*case) for case in CASES} | {"said": told_everywhere()}


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, Any]]:
    return run_on_ranks(2, everything)


@pytest.mark.parametrize(("kind", "share", "are_apart"), CASES)
def test_weights_are_those_of_the_whole_batch(ranks: Any, kind: str, share: str, are_apart: bool) -> None:
    truth = whole()
    for found in ranks:
        state, _ = found[kind, share, are_apart]
        assert state.keys() == truth.keys()
        for name, value in truth.items():
            torch.testing.assert_close(torch.from_numpy(state[name]), torch.from_numpy(value), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("share", "are_apart"), [(share, apart) for share in SHARES for apart in (False, True)])
def test_ddp_reduces_once_a_step(ranks: Any, share: str, are_apart: bool) -> None:
    size = sum(p.numel() for p in made().parameters())
    for found in ranks:
        _, reductions = found["ddp", share, are_apart]
        assert sum(reductions) == STEPS * size, f"{BATCH} pairs in chunks of 4"


def test_a_mistake_is_told_on_every_rank(ranks: Any) -> None:
    assert [found["said"][0] for found in ranks][1] == "the inputs of clip are empty"
    assert ranks[1]["said"][1].startswith("the inputs of clip must be a tensor")
    assert ranks[0]["said"] == ["the inputs of another rank are wrong: see its message"] * 2
