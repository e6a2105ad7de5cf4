"""Evaluation while training: the same code as `fastclip eval`, through the engine, on every rank."""

from __future__ import annotations

import json
from pathlib import Path

from fastclip.data import Tokenizer
from fastclip.evaluation import Encoder, evaluate_folder
from fastclip.evaluation.suite import has_eval_sets, has_suite, summary
from fastclip.models import CLIPConfig
from fastclip.training.config import TrainConfig
from fastclip.training.engine import Engine
from fastclip.training.processes import Processes


class Evaluation:
    """The held-out sets of a run, if it has any."""

    def __init__(
        self,
        config: TrainConfig,
        model: CLIPConfig,
        tokenizer: Tokenizer,
        engine: Engine,
        processes: Processes,
        run: Path,
    ) -> None:
        folder = Path(config.val or config.data)
        self.folder = folder if config.val or has_eval_sets(folder) else None
        self.engine, self.is_first, self.out = engine, processes.is_first, run / "eval"
        self.encoder = Encoder(
            engine.forward, model, tokenizer, device=processes.device, dtype=engine.dtype, group=processes.group
        )

    def run(self, step: int, final: bool = False) -> None:
        """Writes eval/step_XXXXXXXX.json, at the end eval/gallery.json and suite.json; says the figures in one line."""
        if self.folder is None:
            return
        self.engine.train(False)
        with_suite = final and has_suite()
        results = {"step": step} | evaluate_folder(self.encoder, self.folder, with_gallery=final, with_suite=with_suite)
        self.engine.train(True)
        if not self.is_first:
            return
        self.out.mkdir(exist_ok=True)
        if final:
            gallery = {"step": step} | results.pop("gallery")
            (self.out / "gallery.json").write_text(json.dumps(gallery))
        if with_suite:
            suite = {"step": step, "sets": results.pop("suite")}
            (self.out / "suite.json").write_text(json.dumps(suite))
        (self.out / f"step_{step:08d}.json").write_text(json.dumps(results, indent=1))
        print(f"\nstep {step}: {summary(results)}", flush=True)
