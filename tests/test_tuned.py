"""What a GPU has measured decides what "auto" takes there."""

import json
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import rows, table, tune
from fastclip.losses import small
from fastclip.ops import _cuda, _dispatch, _tuned, activation, contrastive_loss, layer_norm
from fastclip.ops.attention import implementations

GPU = "NVIDIA X"


def row(op: str, impl: str, ms: float | None, took: str = "", **sizes: int) -> rows.Row:
    named = {"op": op, "impl": impl, "device": "cuda", "dtype": "bfloat16", "phase": "both", "p50_ms": ms}
    version = f"fastclip 0.1 {took or impl}"
    return rows.make_row(**named, shape_json=json.dumps(sizes), machine=f"{GPU}, sm 1 MHz", peer_version=version)


def tuned(monkeypatch: pytest.MonkeyPatch, *measured: rows.Row) -> None:
    monkeypatch.setattr(_tuned, "TABLE", _tuned.by_input(tune.choices(measured)))
    monkeypatch.setattr(_tuned, "gpu_name", lambda: GPU)
    monkeypatch.setattr(_dispatch, "has_package", lambda name: True)
    monkeypatch.setattr(_cuda, "why_not", lambda device: None)


def taken(explain: Any, *arguments: Any, **options: Any) -> _dispatch.Verdict:
    return next(v for v in explain("cuda", torch.bfloat16, *arguments, **options) if v.chosen)


def test_the_committed_choices_are_those_of_the_committed_rows() -> None:
    assert _tuned.FILE.read_text() == tune.to_json(tune.choices(rows.read(table.GPU)))
    assert _tuned.TABLE


def test_a_choice_reaches_half_way_to_its_neighbours() -> None:
    pairs = [(n, impl, ms) for n in (100, 400) for impl, ms in (("cuda", 1.0), ("triton", 2.0))]
    found = tune.choices([row("sigmoid_loss", impl, ms, n=n, d=512) for n, impl, ms in pairs])
    assert [(choice.least, choice.most) for choice in found] == [(84, 200), (201, 480)]
    assert {choice.order for choice in found} == {("cuda", "triton")}
    assert found[0].because == "measured at 100: cuda 1 ms, triton 2 ms"


def test_what_is_no_choice() -> None:
    alone = row("sigmoid_loss", "cuda", 1.0, n=64, d=512)
    others = [row("sigmoid_loss", "eager", 0.5, n=64, d=512), row("sigmoid_loss", "dense", None, n=64, d=512)]
    assert tune.choices([alone, *others, row("no_op", "cuda", 1.0, n=1)]) == []


def test_auto_counts_as_what_it_took_and_the_library_as_its_best() -> None:
    shape = {"n": 50, "d": 64, "h": 8, "b": 2}
    impls = (("auto", 2.0, "triton"), ("sdpa_flash", 1.5, ""), ("sdpa_cudnn", 1.0, ""), ("sdpa_efficient", 3.0, ""))
    (choice,) = tune.choices([row("causal_attention", impl, ms, took, **shape) for impl, ms, took in impls])
    assert choice.order == ("sdpa", "triton")
    assert choice.because == "measured at 50: sdpa 1 ms, triton 2 ms"


def test_a_loss_takes_what_was_faster_there(monkeypatch: pytest.MonkeyPatch) -> None:
    times = (("dense", 1.0), ("cuda", 2.0))
    tuned(monkeypatch, *(row("contrastive_loss", impl, ms, n=256, d=512) for impl, ms in times))
    assert taken(contrastive_loss.explain, 256) == ("dense", True, "measured at 256: dense 1 ms, cuda 2 ms")
    assert taken(contrastive_loss.explain, 128, 512).impl == "dense"  # as many logits
    assert taken(contrastive_loss.explain, 256, d=1024) == ("cuda", True, "not measured on this GPU")
    assert taken(contrastive_loss.explain, 4096).impl == "cuda"
    monkeypatch.setattr(small, "LAUNCHES", 8192)
    with FakeTensorMode():
        features = torch.empty(256, 512, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    assert not small.is_made_at_once(features, features, features, "auto", contrastive_loss.measured)
    assert small.is_made_at_once(features, features, features, "cuda", contrastive_loss.measured)


def test_the_block_ops_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tuned, "gpu_name", lambda: GPU)
    assert taken(layer_norm.explain) == ("reference", True, "not measured on this GPU")
    shape = {"n": 197 * 1024, "d": 768}
    norms = [row("layer_norm", "eager", 3.0, **shape), row("layer_norm", "triton", 1.0, **shape)]
    tuned(monkeypatch, *norms, row("gelu", "eager", 1.0, **shape), row("gelu", "triton", 0.5, **shape))
    assert taken(layer_norm.explain).impl == taken(activation.explain, "gelu").impl == "triton"
    assert taken(layer_norm.explain, has_residual=False).impl == "reference"


def test_without_the_package_the_next_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"n": 50, "d": 64, "h": 8, "b": 2}
    times = (("xformers", 1.0), ("triton", 2.0), ("sdpa", 3.0))
    tuned(monkeypatch, *(row("attention", impl, ms, **shape) for impl, ms in times))
    assert taken(implementations.explain, 50).impl == "xformers"
    monkeypatch.setattr(_dispatch, "has_package", lambda name: name == "triton")
    assert taken(implementations.explain, 50).impl == "triton"


def test_torch_compile_takes_the_choice_for_a_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"n": 500, "d": 64, "h": 8, "b": 2}
    tuned(monkeypatch, row("attention", "triton", 1.0, **shape), row("attention", "sdpa", 2.0, **shape))

    def tokens(x: torch.Tensor) -> torch.Tensor:
        order = implementations.order("cuda", torch.bfloat16, x.shape[0], 64, False)
        return x * (1 if order[0] == "triton" else -1)

    compiled = torch.compile(tokens, fullgraph=True, backend="eager", dynamic=True)
    assert compiled(torch.ones(510)).sum() == 510
    assert compiled(torch.ones(900)).sum() == -900
