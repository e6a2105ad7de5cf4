"""`fastclip eval`: the figures of a checkpoint on every held-out set of a folder."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastclip.cli.loading import find_source, load_encoder
from fastclip.cli.options import Checkpoint, Data, Precision, TokenizerPath, optional, parse
from fastclip.cli.text import table
from fastclip.errors import UserError

RECALLS = ("R@1", "R@5", "R@10")


@dataclass(frozen=True)
class Eval:
    """Zero-shot and retrieval figures of a checkpoint on held-out data.

    Sets with class names are classified zero-shot, the others retrieved by caption.

    Example: fastclip eval --checkpoint runs/demo --data data/demo --out demo.json
    """

    checkpoint: Checkpoint = ""
    """A run (its latest step), a step folder or a file of weights."""
    data: Data = ""
    """Folder with held-out shards, <name>_test-*.tar."""
    out: Annotated[str, optional("FILE", "none is written")] = ""
    """JSON file for the figures, the confusion matrix included."""
    batch_size: int = 256
    """Images or texts in one forward."""
    precision: Precision = "fp32"
    """Of the model's computation."""
    tokenizer: TokenizerPath = ""
    """A tokenizers JSON, its folder, or a model name."""
    model: Annotated[str, optional("NAME", "open_clip_config.json beside the weights")] = ""
    """Architecture of a file of weights that comes without a config."""


def main(arguments: Sequence[str]) -> None:
    """See `Eval`."""
    options = parse(Eval, "eval", arguments)
    out = Path(options.out) if options.out else None
    if out is not None:
        if out.is_dir():
            raise UserError(f"--out must be a file, {out} is a folder")
        out.parent.mkdir(parents=True, exist_ok=True)
    source = find_source(options.checkpoint, options.data)
    encoder = load_encoder(source, options.tokenizer, options.precision, options.batch_size, options.model)
    from fastclip.evaluation import evaluate_folder

    print(f"{source.checkpoint} on {source.data} ({options.precision}, {encoder.device})", flush=True)
    start = time.monotonic()
    results = evaluate_folder(encoder, source.data)
    print(f"\n{tables(results['sets'])}\n\n{time.monotonic() - start:.1f} s")
    if out is not None:
        results = {"checkpoint": str(source.checkpoint), "precision": options.precision, **results}
        out.write_text(json.dumps(results, indent=1) + "\n")
        print(f"Written: {out}")


def tables(sets: dict[str, Any]) -> str:
    """The sets' figures as one table a task, and what was skipped."""
    parts = []
    zero_shot = {name: figures for name, figures in sets.items() if figures["task"] == "zero_shot"}
    if zero_shot:
        rows: list[tuple[object, ...]] = [("zero-shot", "images", "classes", "top-1", "top-5", "mean per class")]
        for name, figures in zero_shot.items():
            shares = (_percent(figures[key]) for key in ("top1", "top5", "mean_per_class_recall"))
            rows.append((name, f"{figures['images']:,}", len(figures["classnames"]), *shares))
        parts.append(table(rows))
    retrieval = {name: figures for name, figures in sets.items() if figures["task"] == "retrieval"}
    if retrieval:
        rows = [("retrieval", "", "queries", *RECALLS, "median rank")]
        for name, figures in retrieval.items():
            for way, queries in (("image_to_text", "images"), ("text_to_image", "texts")):
                recalls = (_percent(figures[way][key]) for key in RECALLS)
                rank = f"{figures[way]['median_rank']:g}"
                rows.append((name, way.replace("_", " "), f"{figures[queries]:,}", *recalls, rank))
        parts.append(table(rows, left=(0, 1)))
    for name, figures in sets.items():
        if figures["skipped"]:
            parts.append(f"{name}: skipped {', '.join(f'{cause} {n:,}' for cause, n in figures['skipped'].items())}")
    return "\n\n".join(parts)


def _percent(share: float) -> str:
    return f"{share:.1%}"
