"""Evaluation while training: the same code as `fastclip eval`, through the engine, on every rank."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastclip.data import Tokenizer
from fastclip.errors import UserError
from fastclip.evaluation import Encoder, evaluate_folder
from fastclip.evaluation.suite import has_eval_sets, has_suite, summary
from fastclip.models import CLIPConfig, save_model
from fastclip.training.config import TrainConfig
from fastclip.training.engine import Engine
from fastclip.training.processes import Processes

ACCURACIES = ("top1", "top5", "mean_per_class_recall", "mean_average_precision")
WAYS = ("image_to_text", "text_to_image")


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
        if config.best and self.folder is None:
            raise UserError(f"best {config.best!r} needs held-out sets: val must be a folder that has some")
        self.engine, self.is_first, self.out = engine, processes.is_first, run / "eval"
        self.best = Best(config.best, engine, model, tokenizer, processes, run / "best") if config.best else None
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
        if self.best:
            self.best.look(step, results["sets"])
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


class Best:
    """The weights of the step with the highest value of one figure so far, in a folder that `--checkpoint` takes.

    Args:
        metric: "SET/FIGURE", such as "digits_test/top1" or "scenes_test/text_to_image/R@1".
        folder: holds the weights, their config and tokenizer, and best.json: {"metric", "value", "step"}.
    """

    def __init__(
        self,
        metric: str,
        engine: Engine,
        model: CLIPConfig,
        tokenizer: Tokenizer,
        processes: Processes,
        folder: Path,
    ) -> None:
        self.metric, self.engine, self.model, self.tokenizer = metric, engine, model, tokenizer
        self.is_first, self.folder = processes.is_first, folder
        self.value = processes.gather(self._kept() if self.is_first else None)[0]

    def look(self, step: int, sets: Mapping[str, Any]) -> None:
        """Keeps the weights if `sets`, the figures of this step, are the best; called on every rank with the same."""
        value = figure(self.metric, sets)
        if self.value is not None and value <= self.value:
            return
        self.value = value
        weights = self.engine.full_state_dict()
        if not self.is_first:
            return
        aside = self.folder.with_name(f".{self.folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        save_model(aside, weights, self.model)
        self.tokenizer.save(aside / "tokenizer.json")
        (aside / "best.json").write_text(json.dumps({"metric": self.metric, "value": value, "step": step}) + "\n")
        shutil.rmtree(self.folder, ignore_errors=True)
        aside.rename(self.folder)

    def _kept(self) -> float | None:
        """The value of the weights in the folder, None if there are none of this metric."""
        try:
            kept = json.loads((self.folder / "best.json").read_text())
            return float(kept["value"]) if kept["metric"] == self.metric else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def figure(metric: str, sets: Mapping[str, Any]) -> float:
    """The figure "SET/FIGURE" of an evaluation. Errors: `UserError` that lists the figures there are."""
    known = {f"{name}/{key}": value for name, one in sets.items() for key, value in _shares(one).items()}
    if metric not in known:
        raise UserError(f"best must be one of {', '.join(known)}, was {metric!r}")
    return known[metric]


def _shares(figures: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a set of which more is better."""
    ways = {f"{way}/{k}": figures[way][k] for way in WAYS if way in figures for k in figures[way] if k.startswith("R@")}
    return {key: figures[key] for key in ACCURACIES if key in figures} | ways
