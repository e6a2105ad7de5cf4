"""The same figures on any number of ranks, to the bit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from contrastive_loss_helpers import run_on_ranks
from torch.nn import functional as F

from fastclip.data import get_tokenizer
from fastclip.data.demo import write_demo
from fastclip.evaluation import Encoder, evaluate_folder
from fastclip.evaluation.retrieval import ranks
from fastclip.models import create_model


def evaluated(folder: Path, group: dist.ProcessGroup | None = None) -> Any:
    """The figures of a folder, and ranks of pairs over many small tiles."""
    torch.manual_seed(0)
    plain = Encoder.of_model(create_model("debug"), get_tokenizer(folder), batch_size=96)
    encoder = Encoder(plain.forward, plain.config, plain.tokenizer, group=group, batch_size=96)
    figures = evaluate_folder(encoder, folder, with_gallery=True)
    tiles = sys.modules["fastclip.evaluation.retrieval"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "_IMAGES", 8)
        patch.setattr(tiles, "_TEXTS", 16)
        images = F.normalize(torch.randn(41, 6, generator=torch.Generator().manual_seed(0)), dim=1)
        owners = torch.arange(53) % 41
        texts = images.roll(1, 1)[owners]
        return figures, [found.tolist() for found in ranks(images, texts, owners, group)]


def on_ranks(folder: Path) -> Any:
    return evaluated(folder, dist.group.WORLD)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.long)])
def test_figures_do_not_depend_on_the_number_of_ranks(tmp_path: Path, world_size: int) -> None:
    torch.set_num_threads(1)
    write_demo(tmp_path, scenes=50, workers=1)
    alone = evaluated(tmp_path)
    for found in run_on_ranks(world_size, on_ranks, tmp_path):
        assert found == alone
