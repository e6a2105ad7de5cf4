"""The drop-in for transformers' CLIP and SigLIP models beside the models themselves, on one rank and on two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peers import peer_module
from torch import Tensor, nn

from fastclip.errors import UserError
from fastclip.interop import transformers_losses
from fastclip.testing import relative_error

pytestmark = pytest.mark.peer
transformers = peer_module("transformers")

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 60}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "num_patches": 4,
}
KINDS = ("CLIP", "Siglip", "Siglip2")


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    size = {"projection_dim": 24} if kind == "CLIP" else {}
    text = {**TEXT, "max_position_embeddings": 12, "eos_token_id": 59, "bos_token_id": 58, "pad_token_id": 1}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=VISION, **size)
    model = getattr(transformers, f"{kind}Model")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.logit_scale.fill_(2.0)
    return model


def batch(kind: str, n: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 58, (n, 12), generator=generator)
    ids[:, -1] = 59
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "Siglip2":
        shapes = {"pixel_attention_mask": torch.ones(n, 4, dtype=torch.long), "spatial_shapes": torch.full((n, 2), 2)}
        return given | {"pixel_values": torch.randn(n, 4, 192, generator=generator)} | shapes
    return given | {"pixel_values": torch.randn(n, 3, 16, 16, generator=generator)}


def loss_and_gradients(model: nn.Module, given: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    model.zero_grad()
    output = model(**given, return_loss=True)
    output.loss.backward()
    return output, {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The bias of a key has no effect on a softmax: of such zeros rounding is all there is."""
    assert found.keys() == expected.keys()
    floor = 0.01 * max(grad.norm() for grad in expected.values())
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= 2e-5 * grad.norm().clamp(min=floor), name


@pytest.mark.parametrize("kind", KINDS)
def test_on_one_rank_it_is_their_loss_without_logits(kind: str) -> None:
    model, given = make(kind), batch(kind)
    before, grads = loss_and_gradients(model, given)
    with transformers_losses():
        during, our_grads = loss_and_gradients(model, given)
        as_tuple = model(**given, return_loss=True, return_dict=False)
        plain = model(**given)
    assert relative_error(during.loss, before.loss) < 1e-6
    assert_same_gradients(our_grads, grads)
    assert during.logits_per_image is None
    assert type(during) is type(before)
    torch.testing.assert_close(during.image_embeds, before.image_embeds)
    torch.testing.assert_close(during.text_model_output.last_hidden_state, before.text_model_output.last_hidden_state)
    assert torch.equal(as_tuple[0], during.loss)
    assert torch.equal(plain.logits_per_image, before.logits_per_image)
    assert plain.loss is None
    after, after_grads = loss_and_gradients(model, given)
    assert torch.equal(after.loss, before.loss)
    assert all(torch.equal(after_grads[name], grads[name]) for name in grads)


def test_positional_arguments_and_what_is_asked_of_the_towers() -> None:
    model, given = make("CLIP"), batch("CLIP")
    order = (given["input_ids"], given["pixel_values"], given["attention_mask"], None, True)
    expected = model(*order, output_hidden_states=True)
    with transformers_losses():
        found = model(*order, output_hidden_states=True)
    assert relative_error(found.loss, expected.loss) < 1e-6
    assert len(found.vision_model_output.hidden_states) == len(expected.vision_model_output.hidden_states) == 3


def test_under_autocast_the_features_are_those_of_a_product() -> None:
    model, given = make("CLIP"), batch("CLIP")
    exact = model(**given, return_loss=True).loss
    with torch.autocast("cpu", torch.bfloat16):
        theirs = model(**given, return_loss=True).loss
        with transformers_losses():
            ours = model(**given, return_loss=True).loss
    assert ours.dtype == torch.float32
    assert relative_error(ours, exact) <= 2 * relative_error(theirs, exact) + 4e-3


def _rank(rank: int, world_size: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    for kind in KINDS:
        whole = batch(kind)
        expected, grads = loss_and_gradients(make(kind), whole)  # transformers', of all pairs in one process
        rows = slice(3 * rank, 3 * rank + 3)
        with transformers_losses():
            model = nn.parallel.DistributedDataParallel(make(kind))
            output, found = loss_and_gradients(model, {name: x[rows] for name, x in whole.items()})
        loss = output.loss.detach().clone()
        dist.all_reduce(loss)
        assert relative_error(loss / world_size, expected.loss) < 1e-6, kind
        assert_same_gradients({name.removeprefix("module."): x for name, x in found.items()}, grads)
        assert output.image_embeds.shape[0] == 3
        own = dist.new_group([rank], use_local_synchronization=True)
        with transformers_losses(group=own):
            alone = model.module(**{name: x[rows] for name, x in whole.items()}, return_loss=True).loss
        without = model.module(**{name: x[rows] for name, x in whole.items()}, return_loss=True).loss
        assert relative_error(alone, without) < 1e-6
        assert relative_error(without, expected.loss) > 1e-3  # transformers compares a rank's own pairs alone
    dist.destroy_process_group()


@pytest.mark.long
def test_on_two_ranks_it_is_the_loss_of_the_full_batch(tmp_path: Path) -> None:
    mp.spawn(_rank, (2, str(tmp_path / "store")), nprocs=2)


class Pairs(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: x[index] for name, x in batch("CLIP", 12).items()} | {"return_loss": True}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    columns = {name: torch.stack([x[name] for x in samples]) for name in samples[0] if name != "return_loss"}
    return columns | {"return_loss": True}


def test_their_trainer_with_accumulation(tmp_path: Path) -> None:
    def trained() -> tuple[dict[str, Tensor], float]:
        arguments = transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=2, use_cpu=True,
            report_to=[], save_strategy="no", remove_unused_columns=False, disable_tqdm=True, learning_rate=1e-2,
            optim="sgd", lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = transformers.Trainer(make("CLIP"), arguments, train_dataset=Pairs(), data_collator=collate)
        loss = trainer.train().training_loss
        return {name: x.detach().clone() for name, x in trainer.model.named_parameters()}, loss

    before, loss = trained()
    with transformers_losses():
        during, our_loss = trained()
    assert our_loss == pytest.approx(loss, rel=1e-5)
    for name, weight in before.items():
        torch.testing.assert_close(during[name], weight, rtol=1e-5, atol=1e-6)


def test_a_release_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", "4.57.1")
    with pytest.raises(UserError, match=r"transformers is 4\.57\.1, must be 5\.0 or newer"):
        transformers_losses().enable()
