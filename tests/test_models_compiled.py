"""`compile_blocks`: the same gradient and names, few graphs, and a run like the one without."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from contrastive_loss_helpers import run_on_ranks
from torch import Tensor, nn
from torch._dynamo.utils import counters
from training_helpers import debug_model, global_batches, losses, options, small_data, this_rank

from fastclip.data import normalize_image
from fastclip.errors import UserError
from fastclip.models import CLIP, create_model, get_config
from fastclip.models.compiled import compile_blocks
from fastclip.ops.attention import pack_text
from fastclip.training.__main__ import parse
from fastclip.training.config import TrainConfig
from fastclip.training.loop import train

SIZES = (16, 16, 5, 9)


@pytest.fixture(autouse=True)
def traced_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All of torch.compile but the writing of C++, which takes a CPU a minute and more."""
    monkeypatch.setattr(nn.Module, "compile", with_options(backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def with_options(**options: str) -> object:
    compile_it = nn.Module.compile
    return lambda module: compile_it(module, **options)


def gradient(model: CLIP, size: int) -> Tensor:
    """As gradient caching has it: forward without a graph, then with one."""
    config = get_config("debug")
    (image, text) = global_batches(1, size)[0]
    pixels, packed = normalize_image(image, config.image_mean, config.image_std), pack_text(text)
    with torch.no_grad():
        first = model(pixels, packed, output_dict=True)["text_features"]
    out = model(pixels, packed, output_dict=True)
    torch.testing.assert_close(out["text_features"], first)
    (out["image_features"] * out["text_features"]).sum().backward()
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return flat


@pytest.mark.long
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_the_same_gradient_and_few_graphs(recompute: str) -> None:
    model = debug_model()
    model.set_recompute(recompute)
    names, eager = list(model.state_dict()), [gradient(model, size) for size in SIZES]
    assert compile_blocks(model) == 4
    assert list(model.state_dict()) == names
    found = []
    for size, truth in zip(SIZES, eager, strict=True):
        error = (gradient(model, size) - truth).norm() / truth.norm()
        assert error < 1e-5
        found.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"]
    assert 0 < found[0] == found[1]  # of the same lengths
    assert found[-1] < 2.5 * found[0]  # of others with a number that varies; a graph each would be 3 times as many


def test_what_has_no_blocks_says_so() -> None:
    model = create_model("debug")
    model.visual = model.transformer = nn.Identity()
    with pytest.raises(ValueError, match="this model has none"):
        compile_blocks(model)


def runs(data: Path, folder: Path) -> int:
    """Three runs, the last two compiled; the number of graphs."""
    nn.Module.compile = with_options(backend="eager")  # type: ignore[assignment, method-assign]
    for engine, is_compiled in (("torch", False), ("torch", True), ("deepspeed", True)):
        out, more = folder / f"{engine}-{is_compiled}", ["--compile"] * is_compiled
        train(parse([*options(data, out, engine=engine, zero_stage=2, steps=4, workers=0), *more]), this_rank())
    return counters["stats"]["unique_graphs"]


@pytest.mark.long
def test_a_run_has_the_same_curve(tmp_path: Path) -> None:
    (graphs,) = run_on_ranks(1, runs, small_data(tmp_path / "data"), tmp_path)
    assert graphs > 0
    for name in ("torch-True", "deepspeed-True"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "torch-False"), rel=1e-5)


def test_with_zero_3_it_is_refused() -> None:
    with pytest.raises(UserError, match="compile needs whole weights, which zero_stage 3 gathers as they are used"):
        TrainConfig(compile=True, zero_stage=3)
    TrainConfig(compile=True, zero_stage=3, engine="torch")
