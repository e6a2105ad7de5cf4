"""The drop-in for sentence-transformers' in-batch negatives losses beside the losses themselves."""

from __future__ import annotations

import re
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peers import peer_module
from torch import Tensor, nn

from fastclip.interop import sentence_transformers_losses
from fastclip.testing import relative_error

pytestmark = pytest.mark.peer
SentenceTransformer = peer_module("sentence_transformers").SentenceTransformer
losses, modules = (peer_module(f"sentence_transformers.sentence_transformer.{name}") for name in ("losses", "modules"))
cos_sim, dot_score = (getattr(peer_module("sentence_transformers.util"), name) for name in ("cos_sim", "dot_score"))

SYMMETRIC = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
SERVED: dict[str, dict[str, Any]] = {
    "default": {},
    "dot": {"similarity_fct": dot_score, "scale": 1.0},
    "symmetric": SYMMETRIC,
}
LEFT_ALONE: dict[str, dict[str, Any]] = {
    "directions are query_to_doc, doc_to_doc": {"directions": ("query_to_doc", "doc_to_doc")},
    "two directions share one softmax": {"directions": ("query_to_doc", "doc_to_query")},
    "hardness_mode is 'all_negatives'": {"hardness_mode": "all_negatives", "hardness_strength": 2.0},
    "similarity_fct is <lambda>": {"similarity_fct": lambda a, b: cos_sim(a, b) ** 3},
}
KINDS = {
    "plain": losses.MultipleNegativesRankingLoss,
    "cached": lambda model, **options: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2, **options),
}


class Tokens(modules.InputModule):
    """A tower small enough for a test: embeds ids, with dropout that the cached loss has to play again."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.drop = nn.Embedding(50, 12), nn.Linear(12, 12), nn.Dropout(0.2)

    def forward(self, features: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        x = self.drop(self.embed(features["input_ids"]))
        features["sentence_embedding"] = torch.tanh(self.mix(x.mean(1))) + 0.1
        return features

    def tokenize(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def save(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError


def make(dropout: bool = True) -> nn.Module:
    torch.manual_seed(0)
    tokens = Tokens()
    tokens.drop.p *= dropout
    return SentenceTransformer(modules=[tokens], device="cpu").train()


def columns(n: int, count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, 50, (n, 4), generator=generator) for _ in range(count)]
    return [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]


def run(kind: str, options: dict[str, Any], sentences: list[dict[str, Tensor]], divide: int = 1, **more: Any) -> Any:
    """The value and gradients of one or more accumulated batches."""
    model = make(**more)
    loss = KINDS[kind](model, **options)
    torch.manual_seed(3)
    value = torch.zeros(())
    n = len(sentences[0]["input_ids"]) // divide
    for part in range(divide):
        rows = slice(part * n, (part + 1) * n)
        batch = [{name: x[rows] for name, x in column.items()} for column in sentences]
        result = loss(batch, torch.empty(0)) / divide
        result.backward()
        value = value + result.detach()
    return value, [x.grad for x in model.parameters()]


def assert_same(found: Any, expected: Any) -> None:
    assert relative_error(found[0], expected[0]) < 1e-6
    for x, y in zip(found[1], expected[1], strict=True):
        assert relative_error(x, y) < 1e-5


@pytest.mark.parametrize("divide", [1, 2], ids=["one batch", "accumulated"])
@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("options", SERVED.values(), ids=SERVED)
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradients(kind: str, options: dict[str, Any], negatives: int, divide: int) -> None:
    sentences = columns(8, 2 + negatives)
    before = run(kind, options, sentences, divide)
    with sentence_transformers_losses(), warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("error")
        patch.setattr(torch, "logsumexp", None)  # the library's code needs it
        during = run(kind, options, sentences, divide)
    assert_same(during, before)
    after = run(kind, options, sentences, divide)
    assert torch.equal(after[0], before[0])
    assert all(map(torch.equal, after[1], before[1]))


def test_the_cached_loss_is_the_plain_one() -> None:
    sentences = columns(7, 3)
    with sentence_transformers_losses():
        plain, cached = (run(kind, {}, sentences, dropout=False) for kind in KINDS)
    assert_same(cached, plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reason", LEFT_ALONE)
def test_options_without_a_linear_form_run_the_librarys_code(reason: str, kind: str) -> None:
    sentences, options = columns(6, 2), LEFT_ALONE[reason]
    before = run(kind, options, sentences)
    with sentence_transformers_losses(), pytest.warns(UserWarning, match=re.escape(reason)):
        during = run(kind, options, sentences)
    assert torch.equal(during[0], before[0])


def _rank(rank: int, world_size: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    whole = columns(8, 3)
    rows = slice(4 * rank, 4 * rank + 4)
    own = [{name: x[rows] for name, x in column.items()} for column in whole]
    for kind, options in product(KINDS, SERVED.values()):
        exact = run("plain", options, whole, dropout=False)  # all pairs in one process
        results = [run(kind, {**options, "gather_across_devices": True}, own, dropout=False)]
        with sentence_transformers_losses():
            results.append(run(kind, {**options, "gather_across_devices": True}, own, dropout=False))
        for value, gradients in results:
            for x in (value, *gradients):
                dist.all_reduce(x)
                x /= world_size
            assert_same((value, gradients), exact)
    dist.destroy_process_group()


@pytest.mark.long
def test_across_devices_it_is_the_loss_of_the_full_batch(tmp_path: Path) -> None:
    mp.spawn(_rank, (2, str(tmp_path / "store")), nprocs=2)
