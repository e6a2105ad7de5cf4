"""`fastclip eval`: the figures of a checkpoint on every held-out set of a folder, or on a named list of tasks."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastclip._version import __version__
from fastclip.cli.eval_tables import tables
from fastclip.cli.loading import find_source, load_encoder
from fastclip.cli.options import Checkpoint, Data, Precision, TokenizerPath, optional, parse
from fastclip.errors import UserError

CLIP_SUITE = "clip"


@dataclass(frozen=True)
class Eval:
    """Zero-shot and retrieval figures of a checkpoint on held-out data.

    Sets with class names are classified zero-shot, the others retrieved by caption.

    Example: fastclip eval --checkpoint runs/demo --data data/demo --out demo.json

    Example: fastclip eval --checkpoint runs/demo --suite clip --out clip
    """

    checkpoint: Checkpoint = ""
    """A run (its latest step), a step folder or a file of weights."""
    data: Data = ""
    """Folder with held-out sets: shards <name>_test-*.tar, CLIP_benchmark's, Karpathy's or class folders."""
    suite: Annotated[str, optional("NAME", "none")] = ""
    """clip: linear probe, corruptions, calibration and geometry of every set of --data.
    datacomp, clip_benchmark, imagenet_robustness, retrieval: those tasks, as far as --data holds them."""
    split: str = "test"
    """Of the layouts that have several."""
    out: Annotated[str, optional("PATH", "none is written")] = ""
    """JSON file for the figures, the confusion matrix included; with --suite a folder for them and a page."""
    interpolate: Annotated[str, optional("CHECKPOINT", "none")] = ""
    """WiSE-FT: evaluate along the line from --checkpoint to these weights, in steps of a tenth."""
    bias: Annotated[str, optional("FILE", "none")] = ""
    """JSON {"prompts": [...], "groups": {name: [texts]}}, or {"prompts": [...], "set": name} with a set's classes."""
    baseline: Annotated[str, optional("FILE", "none")] = ""
    """JSON {"reference": set, "shifts": {set: [[accuracy on the reference, under the shift]...]}} of other models."""
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
        if options.suite and out.is_file():
            raise UserError(f"--out must be a folder with --suite, {out} is a file")
        if not options.suite and out.is_dir():
            raise UserError(f"--out must be a file, {out} is a folder")
        out.parent.mkdir(parents=True, exist_ok=True)
    source = find_source(options.checkpoint, options.data)
    encoder = load_encoder(source, options.tokenizer, options.precision, options.batch_size, options.model)
    print(f"{source.checkpoint} on {source.data} ({options.precision}, {encoder.device})", flush=True)
    start = time.monotonic()
    about = {"checkpoint": str(source.checkpoint), "precision": options.precision, "package": __version__}
    results = about | _evaluated(options, encoder, source.data)
    print(f"\n{tables(results)}\n\n{time.monotonic() - start:.1f} s")
    if out is None:
        return
    if options.suite:
        from fastclip.report.eval_page import write_evaluation

        print(f"Written: {write_evaluation(out, results)}")
    else:
        out.write_text(json.dumps(results, indent=1) + "\n")
        print(f"Written: {out}")


def _evaluated(options: Eval, encoder: Any, data: Path) -> dict[str, Any]:
    from fastclip.evaluation import evaluate_folder

    if options.suite and options.suite != CLIP_SUITE:
        from fastclip.evaluation.task_lists import evaluate_tasks, task_lists

        if options.suite not in task_lists():
            raise UserError(f"--suite must be {CLIP_SUITE} or one of {', '.join(task_lists())}, was {options.suite!r}")
        results = evaluate_tasks(encoder, data, options.suite, options.split)
    else:
        results = evaluate_folder(encoder, data, split=options.split, with_suite=bool(options.suite))
    if options.interpolate:
        from fastclip.evaluation.interpolation import along_the_path
        from fastclip.models import load_checkpoint

        second = load_checkpoint(options.interpolate, model=options.model or None).model
        results["path"] = along_the_path(encoder.model, second.state_dict(), encoder, str(data))
    if options.bias:
        from fastclip.evaluation.probes import bias_probe

        results["bias"] = bias_probe(encoder, Path(options.bias), data, options.split)
    if options.baseline:
        from fastclip.evaluation.probes import robustness_table

        results["robustness"] = robustness_table(results["sets"], Path(options.baseline))
    return results
