"""A search index and the model that it was made with, opened together for `fastclip search` and `fastclip serve`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastclip.cli.loading import Source, chosen_checkpoint, load_encoder
from fastclip.errors import UserError

if TYPE_CHECKING:
    from fastclip.evaluation import Encoder
    from fastclip.evaluation.index import Index


def open_index(folder: str, checkpoint: str, tokenizer: str, precision: str) -> tuple[Index, Encoder]:
    """The index in `folder` and an encoder of its model: `checkpoint`, "" for where it lay when the index was made.

    Raises UserError for other weights than those that the index was made with.
    """
    from fastclip.evaluation.index import Index, weights_fingerprint

    if not folder:
        raise UserError("--index must name a folder that fastclip index made")
    index = Index(Path(folder))
    recorded = str(index.about["checkpoint"])
    if not checkpoint and not Path(recorded).exists():
        raise UserError(f"{recorded}, which the index was made with, is not here: give --checkpoint its new place")
    weights = chosen_checkpoint(checkpoint or recorded)
    index.check_model(weights_fingerprint(weights), weights)
    return index, load_encoder(Source(weights, Path()), tokenizer, precision, batch_size=16)
