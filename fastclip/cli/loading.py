"""The model and the held-out data that `fastclip eval` and `fastclip search` work on, and where they are by default."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastclip.errors import UserError

if TYPE_CHECKING:
    from fastclip.data import Tokenizer
    from fastclip.evaluation import Encoder

RUNS = Path("runs")
CONFIG = "config.yaml"


@dataclass(frozen=True)
class Source:
    """What a verb works on, resolved: the step folder or file of weights, and the folder of held-out sets."""

    checkpoint: Path
    data: Path


def find_source(checkpoint: str, data: str) -> Source:
    """`checkpoint` (a run, a step folder, a file; "": the newest run) and `data` ("": what its run was evaluated on).

    Raises UserError where there is none, naming what to do.
    """
    resolved = chosen_checkpoint(checkpoint)
    return Source(resolved, Path(data) if data else _data_of(resolved))


def chosen_checkpoint(checkpoint: str) -> Path:
    """The step folder or file of weights that `checkpoint` means; "" is the newest run's latest step."""
    from fastclip.models import resolve_checkpoint

    chosen = Path(checkpoint) if checkpoint else newest_run()
    try:
        return chosen if chosen.is_file() else resolve_checkpoint(chosen)
    except FileNotFoundError as error:
        raise UserError(f"{error}; `make demo` trains a run into runs/demo") from None


def newest_run(runs: Path = RUNS) -> Path:
    """The run whose `latest` was written last."""
    from fastclip.models.checkpoint import LATEST

    written = [(path.stat().st_mtime_ns, path.parent) for path in runs.glob(f"*/{LATEST}")]
    if not written:
        raise UserError(f"there is no run in {runs}/: `make demo` trains one, or give --checkpoint a run or a file")
    return max(written)[1]


def load_encoder(source: Source, tokenizer: str, precision: str, batch_size: int, model: str = "") -> Encoder:
    """An Encoder of the checkpoint, on the GPU where there is one.

    tokenizer: path or name; "" is tokenizer.json beside the weights, else CLIP's BPE where the vocabulary is CLIP's.
    """
    import torch

    from fastclip.evaluation import Encoder
    from fastclip.models import load_checkpoint

    if batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, was {batch_size}")
    loaded = load_checkpoint(source.checkpoint, model=model or None)
    return Encoder.of_model(
        loaded.model,
        _tokenizer(tokenizer, loaded.folder, loaded.config.text.vocab_size, loaded.config.text.context_length),
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        batch_size=batch_size,
    )


def _tokenizer(asked: str, folder: Path, vocab_size: int, context_length: int) -> Tokenizer:
    from fastclip.data import get_tokenizer
    from fastclip.data.tokenizer import CLIP_VOCAB_SIZE

    beside = folder / "tokenizer.json"
    name = asked or (str(beside) if beside.is_file() else "clip" if vocab_size == CLIP_VOCAB_SIZE else "")
    if not name:
        raise UserError(f"there is no tokenizer.json in {folder}: give --tokenizer the file the model was trained with")
    tokenizer = get_tokenizer(name, context_length)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"tokenizer {name} has {tokenizer.vocab_size} tokens, the model knows {vocab_size} only")
    return tokenizer


def _data_of(checkpoint: Path) -> Path:
    """The folder of held-out sets that the config of the checkpoint's run names."""
    from fastclip.training.config import TrainConfig, read_config

    folders = [checkpoint, *list(checkpoint.parents)[:3]]  # a file, its step, checkpoints/, the run
    run = next((folder for folder in folders if (folder / CONFIG).is_file()), None)
    if run is None:
        raise UserError(f"{checkpoint} is not part of a run, so its data is unknown: give --data a folder")
    config = read_config(run / CONFIG, TrainConfig())
    named = config.val or config.data
    folder = Path(named) if Path(named).is_dir() else Path(named).parent  # training data may be a pattern of files
    if not named or not folder.is_dir():
        raise UserError(f"{run / CONFIG} names the data {named!r}, which is not here: give --data a folder")
    return folder
