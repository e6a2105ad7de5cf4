"""`DistillClipLoss`: its term against the dense formula and fp64, its memory, and open_clip's."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from contrastive_loss_helpers import run_on_ranks
from peers import open_clip_module
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastclip.losses import ClipLoss, DistillClipLoss
from fastclip.ops.distill_loss import distill_rows, reference
from fastclip.testing import clip_features, relative_error, value_and_gradients

N, D, TEACHER_D = 12, 7, 5
GATHERS = [(local_loss, gather_with_grad) for local_loss in (False, True) for gather_with_grad in (False, True)]


def eager_distill_rows(*tensors: Tensor) -> Tensor:
    left, right, scale, teacher_left, teacher_right, teacher_scale = tensors
    target = (teacher_scale * teacher_left @ teacher_right.T).softmax(1)
    return -(target * (scale * left @ right.T).log_softmax(1)).sum(1)


def sides(n: int, m: int, dtype: torch.dtype = torch.float64, scale: float = 20.0) -> list[Tensor]:
    left, right, logit_scale = clip_features(max(n, m), D, kind="clip", dtype=dtype, scale=scale)
    teacher = clip_features(max(n, m), TEACHER_D, kind="clip", dtype=dtype, scale=scale / 2, seed=1)
    rows = (left[:n], right[:m], logit_scale, teacher[0][:n], teacher[1][:m], teacher[2])
    return [x.detach().clone() for x in rows]


def loss_of(tensors: list[Tensor], *, eager: bool = False) -> tuple[Tensor, ...]:
    """The weighted sum of the rows, and its gradients for the student's three."""
    teacher, weights = tensors[3:], torch.linspace(0.5, 2, len(tensors[0]), dtype=torch.float64)

    def total(*student: Tensor) -> Tensor:
        others = [x.to(student[0].dtype) for x in teacher] if eager else teacher
        rows = eager_distill_rows(*student, *others) if eager else distill_rows(student, tuple(others))
        return (rows * weights.to(rows.dtype)).sum()

    return value_and_gradients(total, tuple(tensors[:3]), torch.float64 if eager else None)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 9), (12, 12), (31, 50)])
def test_rows_in_fp64(n: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 4 * m)  # several chunks
    tensors = sides(n, m)
    for ours, exact in zip(loss_of(tensors), loss_of(tensors, eager=True), strict=True):
        assert (ours - exact).norm() <= 1e-12 * exact.norm() + 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    models = sides(6, 9, dtype)
    torch.library.opcheck(torch.ops.fastclip.distill_loss_fwd.default, tuple(models))
    torch.library.opcheck(torch.ops.fastclip.distill_loss_bwd.default, (torch.ones(6), *models))


def test_compiles_to_one_graph_for_every_batch_size() -> None:
    torch._dynamo.reset()
    frames = CompileCounterWithBackend("aot_eager")
    module = DistillClipLoss()
    loss = torch.compile(lambda *x: sum(module(*x)), backend=frames, fullgraph=True, dynamic=True)
    for n in (32, 48, 80):
        student, teacher = clip_features(n, 16), clip_features(n, 8, seed=1)
        inputs = (*student, *(x.detach() for x in teacher))
        plain = torch.autograd.grad(sum(module(*inputs)), student)
        for value, truth in zip(torch.autograd.grad(loss(*inputs), student), plain, strict=True):
            assert relative_error(value, truth) < 1e-5
    graphs = [graph for graph in frames.graphs if any(node.op == "call_function" for node in graph.graph.nodes)]
    assert len(graphs) == 1


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_rows_in_lower_precision(dtype: torch.dtype, bound: float) -> None:
    """Only the gradients of the features are rounded to their type."""
    tensors = sides(40, 70, dtype, scale=100.0)
    for ours, exact in zip(loss_of(tensors), loss_of(tensors, eager=True), strict=True):
        assert relative_error(ours, exact) < bound


def test_gradcheck_fp64() -> None:
    tensors = sides(4, 6, scale=5.0)
    student = [x.requires_grad_() for x in tensors[:3]]
    assert torch.autograd.gradcheck(lambda *x: distill_rows(x, tuple(tensors[3:])), student)


def test_a_student_like_its_teacher_has_no_gradient() -> None:
    left, right, scale, *_ = sides(9, 9, torch.float32)
    student = [x.clone().requires_grad_() for x in (left, right, scale)]
    loss = distill_rows(tuple(student), (left, right, scale)).sum()
    assert all(not grad.any() for grad in torch.autograd.grad(loss, student))


def test_the_two_losses() -> None:
    image, text, scale, t_image, t_text, t_scale = (x.requires_grad_() for x in sides(N, N))
    teacher = (t_image, t_text, t_scale)
    contrastive, distilled = DistillClipLoss()(image, text, scale, *teacher)
    assert torch.equal(contrastive, ClipLoss()(image, text, scale))
    rows = eager_distill_rows(image, text, scale, *teacher) + eager_distill_rows(
        text, image, scale, t_text, t_image, t_scale
    )
    torch.testing.assert_close(distilled, rows.mean() / 2)
    grads = torch.autograd.grad(distilled, teacher, allow_unused=True)
    assert grads == (None, None, None)  # the teacher is a constant
    both = DistillClipLoss()(image, text, scale.reshape(1), *teacher, output_dict=True)
    assert list(both) == ["contrastive_loss", "distill_loss"]
    assert torch.equal(both["distill_loss"], distilled)


def test_bad_input() -> None:
    image, text, scale, t_image, t_text, t_scale = sides(N, N)
    loss = DistillClipLoss()
    with pytest.raises(ValueError, match=r"dist_image_features has shape \(11, 5\), must be \(12, D\)"):
        loss(image, text, scale, t_image[1:], t_text, t_scale)
    with pytest.raises(
        ValueError, match=r"dist_text_features is torch.float64 \(12, 4\), must be torch.float64 \(12, 5"
    ):
        loss(image, text, scale, t_image, t_text[:, 1:], t_scale)
    with pytest.raises(ValueError, match="dist_text_features is on meta, must be on cpu as image_features"):
        loss(image, text, scale, t_image, t_text.to("meta"), t_scale)
    with pytest.raises(ValueError, match=r"dist_logit_scale is 30\.0, must be a tensor of one element"):
        loss(image, text, scale, t_image, t_text, 30.0)


def test_autograd_keeps_its_inputs_only() -> None:
    n = 2000
    tensors = [x.requires_grad_() for x in sides(n, n, torch.float32)]
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        distill_rows(tuple(tensors[:3]), tuple(tensors[3:]))
    assert 0 < sum(kept.values()) <= 4 * n * (2 * D + 2 * TEACHER_D + 1)


MEMORY = """
import resource, torch
from fastclip.losses import DistillClipLoss, SigLipLoss
from fastclip.testing import clip_features

def peak(n):
    image, text, scale = clip_features(n, 4)
    teacher = [x.detach() for x in clip_features(n, 4, seed=1)]
    sum(DistillClipLoss()(image, text, scale, *teacher)).backward()
    SigLipLoss(impl="reference")(image, text, scale, torch.tensor(-10.0)).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

print(peak(1024), peak(8192))
"""


@pytest.mark.long
def test_peak_memory_grows_with_n_not_with_its_square() -> None:
    """From 1024 to 8192 pairs one matrix alone would grow by 252 MB; all that is O(N) here grows by a few."""
    found = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    before, after = map(int, found.stdout.split())
    assert after - before < 64, f"{before} to {after} MB"


def own(x: Tensor, rank: int, world_size: int) -> Tensor:
    n = len(x) // world_size
    return x[rank * n :][:n].clone()


def with_open_clip(rank: int, world_size: int) -> list[tuple[list[Any], list[Any]]]:
    """(ours, theirs) by kind of gathering: both losses and the three gradients of a weighted sum of them."""
    theirs = open_clip_module("open_clip.loss").DistillClipLoss
    tensors = [own(x, rank, world_size) if x.ndim else x for x in sides(N, N)]
    results = []
    for kind in GATHERS:
        pair = []
        for module in (DistillClipLoss, theirs):
            student = [x.clone().requires_grad_() for x in tensors[:3]]
            losses = module(*kind, cache_labels=True, rank=rank, world_size=world_size)(*student, *tensors[3:])
            grads = torch.autograd.grad(losses[0] / 3 + losses[1], student)
            pair.append([x.detach().numpy() for x in (*losses, *grads)])
        results.append((pair[0], pair[1]))
    return results


def with_open_clip_on_ranks() -> list[tuple[list[Any], list[Any]]]:
    return with_open_clip(dist.get_rank(), dist.get_world_size())


@pytest.mark.peer
@pytest.mark.parametrize("world_size", [1, 2])
def test_distill_loss_is_open_clips(world_size: int) -> None:
    open_clip_module("open_clip.loss")  # skips where open_clip is missing
    ranks = [with_open_clip(0, 1)] if world_size == 1 else run_on_ranks(world_size, with_open_clip_on_ranks)
    for kind, results in zip(GATHERS, zip(*ranks, strict=True), strict=True):
        for ours, theirs in results:
            for mine, other in zip(ours[:-1], theirs[:-1], strict=True):
                np.testing.assert_allclose(mine, other, rtol=1e-10, atol=1e-14, err_msg=str(kind))
        ours, theirs = (np.mean([result[way][-1] for result in results]) for way in (0, 1))
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, err_msg=str(kind))
