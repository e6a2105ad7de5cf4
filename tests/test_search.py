"""Search on features: exact, ordered, in bounded memory; and what it finds in held-out sets."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import image_file, small_tokenizer, write_samples
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastclip.data import EvalSet
from fastclip.evaluation.search import _ordered, _score, best_captions, best_images, search


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def enumerated(queries: Tensor, features: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Every score sorted, best first, then by index; in fp64."""
    scores = (queries.double() @ features.double().T).numpy()
    order = np.stack([np.lexsort((np.arange(len(row)), -row)) for row in scores])[:, :k]
    return np.take_along_axis(scores, order, 1), order


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastclip.evaluation.search._ITEMS", 64)
    monkeypatch.setattr("fastclip.evaluation.search._QUERIES", 4)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("items", [1, 63, 64, 65, 128, 300])
@pytest.mark.parametrize("k", [1, 5, 64, 1000])
def test_is_what_enumeration_finds(items: int, k: int) -> None:
    queries, features = unit(9, 16), unit(items, 16)
    scores, indices = search(queries, features, k)
    wanted_scores, wanted = enumerated(queries, features, k)
    assert indices.tolist() == wanted.tolist()
    assert scores.shape == (9, min(k, items))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), torch.from_numpy(wanted_scores), atol=1e-6, rtol=0)


@pytest.mark.parametrize("items", [70, 9000, 20_000])
@pytest.mark.parametrize("queries", [1, 3, 40])
def test_equal_items_come_in_their_order(items: int, queries: int) -> None:
    """Wherever a row lies, in whichever block, its score is the same to the bit."""
    kinds = torch.randint(0, 7, (items,))
    scores, indices = search(torch.randn(queries, 61), unit(7, 61)[kinds], items)
    for row, order in zip(scores, indices, strict=True):
        assert len(row.unique()) <= 7
        same = row[1:] == row[:-1]
        assert (order[1:] > order[:-1])[same].all()
        assert torch.equal(order.sort().values, torch.arange(items))


@pytest.mark.usefixtures("small_blocks")
def test_zeros_of_both_signs_are_equal() -> None:
    features = torch.zeros(130, 2)
    features[::2] = -0.0
    scores, indices = search(torch.tensor([[1.0, 1.0]]), features, 130)
    assert indices[0].tolist() == list(range(130))
    assert (scores == 0).all()


def test_keys_keep_order_and_bits() -> None:
    values = torch.tensor([-torch.inf, -1e30, -1.0, -1e-45, 0.0, 1e-45, 0.5, 1.0, 3e38, torch.inf])
    keys = _ordered(values)
    assert (keys[1:] > keys[:-1]).all()
    assert torch.equal(_score(keys), values)
    assert _ordered(torch.tensor([-0.0])).item() == 0


def test_bf16_features_are_scored_in_fp32() -> None:
    queries, features = unit(3, 32).bfloat16(), unit(500, 32).bfloat16()
    scores, indices = search(queries, features, 10)
    assert indices.tolist() == enumerated(queries, features, 10)[1].tolist()
    assert scores.dtype == torch.float32


class Largest(TorchDispatchMode):
    """The most elements that any tensor had that was made under it."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        views = function is torch.ops.aten.split.Tensor or function is torch.ops.aten.t.default
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and not views:
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("items", [500, 5000])
def test_memory_does_not_grow_with_the_items(items: int) -> None:
    queries, features = unit(40, 8), unit(items, 8)
    with Largest() as largest:
        search(queries, features, 5)
    assert largest.elements <= 64 * 8  # a block of features, more than 4 queries x (64 + 5) scores


def test_no_queries_and_an_unchanged_input() -> None:
    scores, indices = search(torch.empty(0, 4), torch.randn(3, 4), 2)
    assert scores.shape == indices.shape == (0, 2)
    queries, features = unit(2, 4), unit(5, 4)
    kept = queries.clone(), features.clone()
    search(queries, features, 2)
    assert torch.equal(queries, kept[0])
    assert torch.equal(features, kept[1])


@pytest.mark.parametrize(
    ("queries", "features", "k", "message"),
    [
        (torch.zeros(4), torch.zeros(2, 4), 1, r"must be \(Q, D\) and \(N, D\), were \(4,\) and \(2, 4\)"),
        (torch.zeros(1, 4), torch.zeros(2, 3), 1, r"were \(1, 4\) and \(2, 3\)"),
        (torch.zeros(1, 4), torch.zeros(2, 4), 0, "k must be at least 1, was 0"),
        (torch.zeros(1, 4), torch.zeros(0, 4), 1, "features must have 1 to"),
        (torch.zeros(1, 4), torch.full((2, 4), torch.nan), 1, "a score is NaN"),
    ],
)
def test_mistakes(queries: Tensor, features: Tensor, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(queries, features, k)


class Oracle:
    """Stands for an Encoder: an image is its mean colour, a text the colour it names."""

    colours = ("red", "green", "blue")

    def images(self, eval_set: EvalSet) -> Tensor:
        return F.normalize(eval_set.images(0, len(eval_set)).float().mean((2, 3)), dim=1)

    def image(self, image: Any) -> Tensor:
        return F.normalize(torch.from_numpy(np.asarray(image).astype(np.float32).mean((0, 1))), dim=0)

    def texts(self, texts: list[str]) -> Tensor:
        words = [[float(colour in text) for colour in self.colours] for text in texts]
        return F.normalize(torch.tensor(words), dim=1)


def painted(colour: int) -> bytes:
    """A PNG in one of the colours."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8), tuple(255 * (colour == channel) for channel in range(3))).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, EvalSet]:
    """Samples 0 to 5 and 0 to 2, red, green, blue and so on; `data_helpers.sample` names the colours in that order."""
    tokenizer = small_tokenizer(tmp_path)
    found = {}
    for name, count in (("a_test", 6), ("b_test", 3)):
        replaced = {f"s{number}": {"png": painted(number % 3)} for number in range(count)}
        folder = write_samples(tmp_path / name, count, shards=1, **replaced)
        found[name] = EvalSet(folder, tokenizer, 8)
    return found


def test_best_images_of_several_sets(sets: dict[str, EvalSet]) -> None:
    found = best_images(Oracle(), "something green", sets, 3)  # type: ignore[arg-type]
    assert [(hit.set_name, hit.key) for hit in found] == [("a_test", "0001"), ("a_test", "0004"), ("b_test", "0001")]
    assert [hit.caption for hit in found] == [
        "green square on a table 1 0",
        "green circle on a table 4 0",
        "green square on a table 1 0",
    ]
    assert all(hit.score == pytest.approx(1) for hit in found)
    assert found[0].file == painted(1)
    assert len(best_images(Oracle(), "green", sets, 100)) == 9  # type: ignore[arg-type]


@pytest.mark.parametrize("sentence", ["", "  \n"])
def test_an_empty_sentence(sets: dict[str, EvalSet], sentence: str) -> None:
    with pytest.raises(ValueError, match="the sentence is empty"):
        best_images(Oracle(), sentence, sets, 1)  # type: ignore[arg-type]


def test_best_captions_are_all_different(sets: dict[str, EvalSet]) -> None:
    blue = Image.open(io.BytesIO(painted(2)))
    found = best_captions(Oracle(), blue, sets, 7)  # type: ignore[arg-type]
    assert [hit.caption for hit in found[:6]] == [
        f"blue {shape} on a table {number} {turn}"
        for number, shape in ((2, "circle"), (5, "square"))
        for turn in range(3)
    ]
    assert found[5].score == pytest.approx(1)
    assert found[6].score == pytest.approx(0)
    assert len(best_captions(Oracle(), blue, sets, 100)) == 18  # type: ignore[arg-type]


def test_an_image_that_cannot_be_decoded_is_gray(tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "c_test", 3, shards=1, s1={"png": image_file(1)[:30]})
    broken = {"c_test": EvalSet(folder, small_tokenizer(tmp_path), 8)}
    assert len(best_images(Oracle(), "red", broken, 3)) == 3  # type: ignore[arg-type]
    assert broken["c_test"].skipped["unreadable_image"] == 1
