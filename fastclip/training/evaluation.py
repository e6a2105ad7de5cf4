"""Evaluation while training: the same code as `fastclip eval`, through the engine, on every rank."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from fastclip.data import Tokenizer
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
        self.folder = folder if folder.is_dir() else None
        self.model, self.tokenizer, self.engine = model, tokenizer, engine
        self.processes, self.run_folder = processes, run

    def run(self, step: int, final: bool = False) -> None:
        """Writes eval/step_XXXXXXXX.json, and at the end the gallery; says the figures in one line."""
        if self.folder is None:
            return
        from fastclip.evaluation import evaluate_suite

        self.engine.train(False)
        with torch.no_grad():
            results = evaluate_suite(
                self._forward,
                self.tokenizer,
                self.folder,
                image_size=self.model.vision.image_size,
                mean=self.model.image_mean,
                std=self.model.image_std,
                device=self.processes.device,
                dtype=self.engine.dtype,
                rank=self.processes.rank,
                world_size=self.processes.world_size,
                group=self.processes.group,
            )
        self.engine.train(True)
        out = self.run_folder / "eval"
        if self.processes.is_first:
            out.mkdir(exist_ok=True)
            (out / f"step_{step:08d}.json").write_text(json.dumps({"step": step, **results}, indent=1))
            print(f"\nstep {step}: {_summary(results)}", flush=True)

    def _forward(self, image: Tensor | None = None, text: Tensor | None = None) -> dict[str, Tensor]:
        return self.engine.forward(image, text)
