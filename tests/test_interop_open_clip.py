"""The drop-ins for open_clip beside open_clip itself: losses on all ranks, towers, its own trainer."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import warnings
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models_helpers import RESNET, TEXT, VIT, assert_same, captions, gradients, images, open_clip_model, perturbed
from peers import open_clip_module
from torch import Tensor, nn

from fastclip import ClipLoss, SigLipLoss
from fastclip.distributed import sum_over_ranks
from fastclip.errors import UserError
from fastclip.interop import open_clip_encoders, open_clip_losses
from fastclip.ops.attention import pack_text
from fastclip.testing import clip_features, relative_error

pytestmark = pytest.mark.peer


def features(n: int, seed: int = 0) -> dict[str, Tensor]:
    """What open_clip's models hand to its losses, with a teacher's."""
    image, text, scale = clip_features(n, 16, scale=20.0, seed=seed)
    teacher = clip_features(n, 12, scale=30.0, seed=seed + 1)
    given = {"image_features": image, "text_features": text, "logit_scale": scale}
    return given | {f"dist_{name}": x.detach() for name, x in zip(given, teacher, strict=True)}


def call(loss: nn.Module, given: dict[str, Tensor], kind: str) -> tuple[list[Tensor], list[Tensor]]:
    """The values of an open_clip loss as its trainer calls it, and the gradients of their sum."""
    inputs = {name: x.detach().clone().requires_grad_(x.requires_grad) for name, x in given.items()}
    if kind != "DistillClipLoss":
        inputs = {name: x for name, x in inputs.items() if not name.startswith("dist_")}
    if kind == "SigLipLoss":
        inputs["logit_bias"] = torch.tensor(-5.0, requires_grad=True)
    if kind == "CoCaLoss":
        n = len(inputs["image_features"])
        inputs |= {"logits": torch.linspace(-1, 1, n * 24).view(n, 4, 6), "labels": torch.arange(n * 4).view(n, 4) % 6}
    values = list(loss(**inputs, output_dict=True).values())
    leaves = [x for x in inputs.values() if x.requires_grad]
    return [value.detach() for value in values], list(torch.autograd.grad(sum(values), leaves))


def losses(rank: int, world_size: int) -> list[tuple[str, nn.Module]]:
    theirs = open_clip_module("open_clip.loss")
    ranks: dict[str, Any] = {"rank": rank, "world_size": world_size}
    gathering = [{"local_loss": a, "gather_with_grad": b} for a, b in product((False, True), repeat=2)]
    found = [
        (name, make(**options, **ranks))
        for options in gathering[: None if world_size > 1 else 1]
        for name, make in (
            ("ClipLoss", theirs.ClipLoss),
            ("DistillClipLoss", theirs.DistillClipLoss),
            ("CoCaLoss", lambda **more: theirs.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=0.5, **more)),
        )
    ]
    impls = ("bidir", "shift", "reduce", "gather") if world_size > 1 else (None,)
    return found + [("SigLipLoss", theirs.SigLipLoss(dist_impl=impl, **ranks)) for impl in impls]


def compare(rank: int, world_size: int) -> None:
    """Every loss before, with the drop-in on and after; logits are not made while it is on."""
    given = features(6, seed=10 * rank)
    for kind, loss in losses(rank, world_size):
        values, grads = call(loss, given, kind)
        with open_clip_losses(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "logsigmoid", None)  # open_clip's code needs these
            ours, our_grads = call(loss, given, kind)
        assert [relative_error(x, y) < 1e-6 for x, y in zip(ours, values, strict=True)] == [True] * len(values), kind
        for name, x, y in zip(("image", "text", "scale", "bias"), our_grads, grads, strict=False):
            if name in ("scale", "bias") and world_size > 1:  # spread differently over the ranks
                x, y = (sum_over_ranks(grad, dist.group.WORLD) for grad in (x, y))
            assert relative_error(x, y) < 1e-5, (kind, name, vars(loss))
        again, again_grads = call(loss, given, kind)
        assert all(map(torch.equal, (*again, *again_grads), (*values, *grads)))


def test_losses_on_one_rank() -> None:
    compare(0, 1)


def _rank(rank: int, world_size: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    warnings.simplefilter("error", UserWarning)
    compare(rank, world_size)
    compare_training(rank, world_size)
    dist.destroy_process_group()


@pytest.mark.long
@pytest.mark.parametrize("world_size", [2, 3])
def test_losses_on_all_ranks(world_size: int, tmp_path: Path) -> None:
    mp.spawn(_rank, (world_size, str(tmp_path / "store")), nprocs=world_size)


def test_no_matrix_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = open_clip_module("open_clip.loss")
    monkeypatch.setattr(theirs.ClipLoss, "get_logits", theirs.ClipLoss.get_logits)
    seen = []
    monkeypatch.setattr(theirs.F, "cross_entropy", lambda *args, **kwargs: seen.append(args) or args[0].sum())
    call(theirs.ClipLoss(), features(6), "ClipLoss")
    assert len(seen) == 2  # the library's own way
    with open_clip_losses():
        call(theirs.ClipLoss(), features(6), "ClipLoss")
    assert len(seen) == 2


def test_on_and_off_and_on() -> None:
    theirs = open_clip_module("open_clip.loss")
    original = theirs.ClipLoss.forward
    first, second = open_clip_losses(), open_clip_losses()
    assert theirs.ClipLoss.forward is original
    assert first.enable() is first
    ours = theirs.ClipLoss.forward
    assert ours is not original
    assert first.enable().enabled
    assert theirs.ClipLoss.forward is ours
    with first:
        assert first.enabled
    assert first.enabled  # as before the block
    second.enable()  # a cell run twice: the later one counts
    assert (first.enabled, second.enabled) == (False, True)
    first.disable()
    assert theirs.ClipLoss.forward is not original
    second.disable()
    second.disable()
    assert theirs.ClipLoss.forward is original
    with pytest.raises(RuntimeError, match="inside"), second:
        raise RuntimeError("inside")
    assert theirs.ClipLoss.forward is original


def test_what_other_code_has_replaced_is_not_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = open_clip_module("open_clip.loss")
    drop_in = open_clip_losses().enable()
    ours = theirs.ClipLoss.forward
    theirs.ClipLoss.forward = lambda self: None
    with pytest.raises(UserError, match="forward of ClipLoss"):
        drop_in.disable()
    theirs.ClipLoss.forward = ours
    drop_in.disable()


def test_a_subclass_with_its_own_logits_keeps_them() -> None:
    theirs = open_clip_module("open_clip.loss")

    class Margin(theirs.ClipLoss):
        def get_logits(self, *args: Any, **kwargs: Any) -> Any:
            return tuple(x - torch.eye(len(x)) for x in super().get_logits(*args, **kwargs))

    class Louder(theirs.ClipLoss):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return {"contrastive_loss": 2 * super().forward(*args, **kwargs)["contrastive_loss"]}

    given = features(6)
    expected = call(Margin(), given, "ClipLoss")[0][0]
    with open_clip_losses():
        with pytest.warns(UserWarning, match="Margin ran without fastclip: it overrides get_logits"):
            assert torch.equal(call(Margin(), given, "ClipLoss")[0][0], expected)
        plain = call(theirs.ClipLoss(), given, "ClipLoss")[0][0]
        torch.testing.assert_close(call(Louder(), given, "ClipLoss")[0][0], 2 * plain)


@pytest.mark.parametrize("kind", ["CLIPTask", "SigLIPTask"])
def test_the_tasks_of_its_main(kind: str) -> None:
    open_clip_module()
    task = pytest.importorskip("open_clip.task", reason="open_clip's main is not on PyPI")
    model = perturbed(open_clip_model(VIT))
    if kind == "SigLIPTask":
        model.logit_bias = nn.Parameter(torch.tensor(-5.0))
    model.output_dict = True
    batch = {"image": images(VIT), "text": captions(VIT)}

    def step(task: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        loss = task.training_forward(batch)[0]["loss"]
        return loss.detach(), gradients(model, (loss,))

    theirs = getattr(task, kind)(model)
    value, grads = step(theirs)
    given = {"CLIPTask": ClipLoss, "SigLIPTask": SigLipLoss}[kind]()
    with open_clip_losses():
        results = [step(theirs), step(getattr(task, kind)(model))]
    for found, found_grads in (*results, step(getattr(task, kind)(model, loss=given))):
        assert relative_error(found, value) < 1e-6
        assert_same(found_grads, grads, 2e-5)
    assert torch.equal(step(theirs)[0], value)


CONFIGS = {
    "vit": VIT,
    "vit-quickgelu": replace(VIT, quick_gelu=True),
    "resnet": RESNET,
}


def outputs(model: nn.Module, config: Any, **more: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    torch.manual_seed(5)
    found = [x for x in model(images(config), captions(config), **more) if isinstance(x, Tensor)]
    return [x.detach() for x in found], gradients(model, tuple(found))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_towers(config: Any, checkpointing: bool) -> None:
    model = perturbed(open_clip_model(config))
    if checkpointing and config is not RESNET:
        model.set_grad_checkpointing()
    expected, grads = outputs(model, config)
    names = set(model.state_dict())
    lengths = []
    hook = model.transformer.resblocks[0].mlp.register_forward_hook(lambda _, given, out: lengths.append(out.shape))
    with open_clip_encoders(model):
        found, found_grads = outputs(model, config)
        assert set(model.state_dict()) == names
    hook.remove()
    assert lengths[0][1] == 28 < 5 * TEXT.context_length  # captions of 3, 12, 7, 1 and 5 tokens, end to end
    for x, y in zip(found, expected, strict=True):
        assert relative_error(x, y) < 1e-5
    assert_same(found_grads, grads, 1e-5)
    again, again_grads = outputs(model, config)
    assert all(map(torch.equal, (*again, *again_grads.values()), (*expected, *grads.values())))


def test_captions_that_are_packed_already_and_padding_that_is_kept() -> None:
    model = perturbed(open_clip_model(VIT)).eval()
    ids = captions(VIT)
    expected = model.encode_text(ids)
    with open_clip_encoders(model):
        assert relative_error(model.encode_text(pack_text(ids)), expected) < 1e-5
    with open_clip_encoders(model, packed_text=False):
        assert torch.equal(model.encode_text(ids), expected)  # open_clip's masked attention


def test_a_copy_made_while_on_uses_its_own_weights() -> None:
    """As an average of the weights (EMA) is made."""
    model = perturbed(open_clip_model(VIT)).eval()
    with open_clip_encoders(model):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert outputs(twin, VIT)[0][1].norm() > 1
        assert not outputs(model, VIT)[0][0].nan_to_num().any()


def test_custom_text_tower_and_what_stays_padded() -> None:
    open_clip = open_clip_module("open_clip.model")
    vision = {"image_size": 24, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16}
    text = {"context_length": 12, "vocab_size": 50, "width": 48, "heads": 3, "layers": 2}
    for more, rows in (
        ({}, 28),
        ({"pool_type": "last"}, 60),
        ({"no_causal_mask": True}, 60),
        ({"embed_cls": True}, 65),
    ):
        model = perturbed(open_clip.CustomTextCLIP(24, vision, {**text, **more}))
        expected, grads = outputs(model, VIT)
        seen: list[int] = []
        hook = model.text.transformer.resblocks[0].mlp.register_forward_hook(
            lambda _, given, out, seen=seen: seen.append(out.shape[:-1].numel())
        )
        with open_clip_encoders(model):
            found, found_grads = outputs(model, VIT)
        hook.remove()
        assert seen == [rows], more
        for x, y in zip(
            (*found, found_grads["text.token_embedding.weight"]),
            (*expected, grads["text.token_embedding.weight"]),
            strict=True,
        ):
            assert relative_error(x, y) < 1e-5, more


def test_nothing_to_replace() -> None:
    with pytest.raises(UserError, match="Linear has no attention"):
        open_clip_encoders(nn.Linear(2, 2)).enable()


class Batches(list):
    """A loader as open_clip's trainer knows it; its main hands on dicts."""

    def __init__(self, rank: int, as_dicts: bool) -> None:
        generator = torch.Generator().manual_seed(rank)
        size = VIT.vision.image_size
        super().__init__(
            (torch.randn(4, 3, size, size, generator=generator), captions(VIT, (3, 12, 7, 5))) for _ in range(4)
        )
        if as_dicts:
            self[:] = [{"image": image, "text": text} for image, text in self]
        self.num_batches, self.num_samples, self.dataloader = 4, 16, self

    def set_epoch(self, epoch: int) -> None:
        pass


def trained(rank: int, world_size: int, siglip: bool, *, local_loss: bool = True) -> dict[str, Tensor]:
    """The weights after open_clip's trainer has made two steps of two accumulated batches each."""
    torch.manual_seed(0)
    model = perturbed(open_clip_model(VIT))
    if siglip:
        model.logit_bias = nn.Parameter(torch.tensor(-5.0))
    model.output_dict = True
    args = argparse.Namespace(
        device="cpu", precision="fp32", distill=False, accum_freq=2, skip_scheduler=True, horovod=False, siglip=siglip,
        grad_clip_norm=None, rank=rank, world_size=world_size, log_every_n_steps=1, batch_size=4, wandb=False,
        local_loss=local_loss, gather_with_grad=local_loss, model="tiny", loss_dist_impl=None,
    )  # fmt: skip
    loss = open_clip_module("open_clip").create_loss(args)
    wrapped = nn.parallel.DistributedDataParallel(model) if world_size > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    has_tasks = importlib.util.find_spec("open_clip.task") is not None  # its main, where this loop is the older one
    train = open_clip_module(f"open_clip_train.{'legacy_' * has_tasks}train").train_one_epoch
    train(wrapped, {"train": Batches(rank, has_tasks)}, loss, 0, optimizer, None, None, None, args)
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def compare_training(rank: int, world_size: int) -> None:
    for siglip in (False, True):
        before = trained(rank, world_size, siglip)
        with open_clip_losses():
            during = trained(rank, world_size, siglip)
        after = trained(rank, world_size, siglip)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert any(not torch.equal(before[name], during[name]) for name in before)  # another order of sums
        for name, weight in before.items():
            torch.testing.assert_close(during[name], weight, rtol=1e-4, atol=1e-6, msg=name)


def test_its_own_trainer_with_accumulation() -> None:
    compare_training(0, 1)
