"""`contrastive_loss` and `ClipLoss` in one process: options, statistics and bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastclip.losses import ClipLoss, contrastive_loss
from fastclip.testing import clip_features, eager_contrastive_loss


def dense_parts(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits, labels = scale * image @ text.T, torch.arange(len(image))
    return F.cross_entropy(logits, labels, reduction="none"), F.cross_entropy(logits.T, labels, reduction="none")


@pytest.mark.parametrize("directions", ["both", "image", "text"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_directions_and_reductions(directions: str, reduction: str) -> None:
    inputs = clip_features(11, 8, dtype=torch.float64, scale=12.0)
    rows, columns = dense_parts(*inputs)
    each = {"both": (rows + columns) / 2, "image": rows, "text": columns}[directions]
    expected = {"mean": each.mean(), "sum": each.sum(), "none": each}[reduction]
    loss = contrastive_loss(*inputs, directions=directions, reduction=reduction)
    torch.testing.assert_close(loss, expected)
    weights = torch.rand_like(loss)
    ours = torch.autograd.grad((loss * weights).sum(), inputs)
    torch.testing.assert_close(ours, torch.autograd.grad((expected * weights).sum(), inputs))


def test_normalize() -> None:
    image, text, scale = clip_features(9, 5, dtype=torch.float64)
    expected = contrastive_loss(image, text, scale)
    torch.testing.assert_close(contrastive_loss(3 * image, text / 7, scale, normalize=True), expected)


def test_scale_of_one_element() -> None:
    image, text, scale = clip_features(9, 5)
    vector = scale.detach().reshape(1).requires_grad_()
    loss = contrastive_loss(image, text, vector)
    assert torch.equal(loss, contrastive_loss(image, text, scale))
    (d_vector,) = torch.autograd.grad(loss, vector)
    assert d_vector.shape == (1,)


def test_statistics() -> None:
    inputs = clip_features(50, 6, kind="clip", scale=8.0)
    loss, stats = contrastive_loss(*inputs, return_stats=True)
    logits = inputs[2] * inputs[0] @ inputs[1].T
    torch.testing.assert_close(stats.row_lse, logits.logsumexp(1))
    torch.testing.assert_close(stats.col_lse, logits.logsumexp(0))
    expected = torch.stack([logits.argmax(1), logits.argmax(0)]) == torch.arange(50)
    assert torch.equal(stats.hits, expected)
    assert 0 < expected.sum() < 100
    assert not any(x.requires_grad for x in stats)
    assert torch.equal(loss, contrastive_loss(*inputs))


def test_hits_of_equal_pairs_are_hits() -> None:
    _, stats = contrastive_loss(*clip_features(8, 5, kind="duplicates"), return_stats=True)
    assert stats.hits.all()


def test_clip_loss_is_the_textbook_loss() -> None:
    inputs = clip_features(12, 7, dtype=torch.float64)
    for options in ({}, {"local_loss": True}, {"gather_with_grad": True, "cache_labels": True}):
        torch.testing.assert_close(ClipLoss(**options)(*inputs), eager_contrastive_loss(*inputs))
    assert ClipLoss()(*inputs, output_dict=True).keys() == {"contrastive_loss"}


def test_clip_loss_uses_the_bias_without_effect() -> None:
    inputs, bias = clip_features(12, 7), torch.tensor(-10.0, requires_grad=True)
    loss = ClipLoss()(*inputs, logit_bias=bias)
    assert torch.equal(loss, ClipLoss()(*inputs))
    assert torch.autograd.grad(loss, bias)[0] == 0


def test_clip_loss_learns() -> None:
    image, text, _ = clip_features(32, 16)
    log_scale = torch.tensor(2.0, requires_grad=True)
    optimizer = torch.optim.Adam([image, text, log_scale], lr=0.05)
    first = last = None
    for _ in range(60):
        loss = ClipLoss()(F.normalize(image, dim=1), F.normalize(text, dim=1), log_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = loss.item() if first is None else first, loss.item()
    assert last < 0.1 < first


IMAGE, TEXT, SCALE = (x.detach() for x in clip_features(4, 3))
IDS = torch.arange(4)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((IMAGE[0], TEXT, SCALE), {}, r"image_features has shape \(3,\), must be \(N, D\)"),
        ((IMAGE[:0], TEXT[:0], SCALE), {}, r"image_features has shape \(0, 3\)"),
        ((IMAGE, TEXT[:3], SCALE), {}, "text_features has 3 rows, must have at least 4"),
        ((IMAGE.long(), TEXT.long(), SCALE), {}, r"image_features is torch.int64"),
        ((IMAGE, TEXT.double(), SCALE), {}, r"text_features is torch.float64 on cpu, must be torch.float32 on cpu"),
        ((IMAGE, TEXT, 100.0), {}, r"logit_scale is 100.0, must be a tensor"),
        ((IMAGE, TEXT, torch.ones(2)), {}, r"logit_scale is a tensor of shape \(2,\)"),
        ((IMAGE, TEXT, torch.tensor(3)), {}, r"logit_scale is torch.int64, must be a floating-point type"),
        ((IMAGE, TEXT, -SCALE), {}, r"logit_scale is not positive, must be above 0"),
        ((IMAGE, None, SCALE), {}, r"text_features is NoneType, must be a tensor"),
        ((IMAGE, TEXT[:, :2], SCALE), {}, r"text_features has D = 2, must be 3"),
        ((IMAGE, TEXT.to("meta"), SCALE), {}, r"text_features is torch.float32 on meta, must be torch.float32 on cpu"),
        ((IMAGE, TEXT.to_sparse(), SCALE), {}, r"text_features is a torch.sparse_coo tensor, must be a dense one"),
        ((IMAGE, TEXT, SCALE), {"labels": [0, 1, 2, 3]}, r"labels is list, must be a tensor of shape \(4,\)"),
        ((IMAGE, TEXT, SCALE), {"labels": IDS[:3]}, r"labels is a tensor of shape \(3,\), must be"),
        ((IMAGE, TEXT, SCALE), {"labels": IDS.int()}, r"labels is torch.int32, must be torch.int64"),
        ((IMAGE, TEXT, SCALE), {"labels": IDS.to("meta")}, r"labels is on meta, must be on cpu"),
        ((IMAGE, TEXT, SCALE), {"labels": IDS + 1}, r"labels has values that number no text"),
        ((IMAGE, TEXT, SCALE), {"labels": IDS - 1}, r"labels has values that number no text"),
        ((IMAGE, TEXT, SCALE), {"labels": IDS // 2}, r"labels has the same value twice"),
        ((IMAGE, TEXT, SCALE), {"group_ids": IDS.float()}, r"group_ids is torch.float32, must be torch.int64"),
        ((IMAGE, TEXT, SCALE), {"group_ids": IDS[:2]}, r"group_ids is a tensor of shape \(2,\), must be"),
        ((IMAGE, TEXT, SCALE), {"group_ids": (IDS,)}, r"group_ids is tuple, must be a tensor or a pair of tensors"),
        ((IMAGE, TEXT, SCALE), {"group_ids": (IDS, IDS[:3])}, r"group_ids\[1\] is a tensor of shape \(3,\)"),
        ((IMAGE, TEXT, SCALE), {"group_ids": (IDS, IDS + 1)}, r"group_ids gives an image another number"),
        ((IMAGE, TEXT, SCALE), {"group_ids": IDS, "labels": IDS}, r"group_ids is one tensor, must be a pair .* with"),
        (
            (IMAGE[:3], TEXT, SCALE),
            {"group_ids": IDS},
            r"group_ids is one tensor, must be a pair .* for 3 images and 4",
        ),
        ((IMAGE, TEXT, SCALE), {"group_mode": "both"}, r"group_mode is 'both', must be 'positive' or 'ignore'"),
        ((IMAGE, TEXT, SCALE), {"weights": torch.ones(4, 1)}, r"weights is a tensor of shape \(4, 1\), must be"),
        ((IMAGE, TEXT, SCALE), {"weights": IDS}, r"weights is torch.int64, must be a floating-point type"),
        ((IMAGE, TEXT, SCALE), {"weights": -torch.ones(4)}, r"weights has negative values, must be at least 0"),
        ((IMAGE, TEXT, SCALE), {"label_smoothing": 1.0}, r"label_smoothing is 1.0, must be .* below 1"),
        ((IMAGE, TEXT, SCALE), {"label_smoothing": -0.1}, r"label_smoothing is -0.1"),
        ((IMAGE, TEXT, SCALE), {"label_smoothing": None}, r"label_smoothing is None"),
        (
            (IMAGE, TEXT, SCALE),
            {"label_smoothing": 0.1, "group_ids": IDS, "group_mode": "ignore"},
            r"label_smoothing is 0.1, must be 0 with group_mode='ignore'",
        ),
        ((IMAGE, TEXT, SCALE), {"ring": True}, r"ring is True, must be False without a group"),
        ((IMAGE, TEXT, SCALE), {"directions": "row"}, r"directions is 'row'"),
        ((IMAGE, TEXT, SCALE), {"reduction": "avg"}, r"reduction is 'avg'"),
        (
            (IMAGE, TEXT, SCALE),
            {"impl": "gpu"},
            "impl is 'gpu', must be one of auto, .*dense, cpu, triton, cuda",
        ),
        (
            (IMAGE.double(), TEXT.double(), SCALE),
            {"impl": "cpu"},
            r"impl='cpu' cannot run: it takes float32 and bfloat16",
        ),
        ((IMAGE.double(), TEXT.double(), SCALE), {"impl": "triton"}, r"impl='triton' cannot run: it takes"),
        ((IMAGE.log(), TEXT, SCALE), {"check_values": True}, r"image_features has values that are not finite"),
        ((IMAGE, TEXT, SCALE / 0), {"check_values": True}, r"logit_scale has values that are not finite"),
    ],
)
def test_bad_input(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        contrastive_loss(*arguments, **options)


def test_weights_that_are_all_zero_have_no_mean() -> None:
    """As in torch: nothing over nothing."""
    assert contrastive_loss(IMAGE, TEXT, SCALE, weights=torch.zeros(4)).isnan()
    assert contrastive_loss(IMAGE, TEXT, SCALE, weights=torch.zeros(4), reduction="sum") == 0


def test_bad_ranks() -> None:
    with pytest.raises(ValueError, match="rank is 2, must be at least 0 and below world_size, which is 2"):
        ClipLoss(rank=2, world_size=2)
    with pytest.raises(ValueError, match="world_size is 2, must be 1 before"):
        ClipLoss(rank=0, world_size=2)(IMAGE, TEXT, SCALE)
