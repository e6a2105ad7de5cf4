"""Suites by name: the task lists of DataComp (38 tasks), CLIP_benchmark and others, run as far as they are on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastclip.errors import UserError
from fastclip.evaluation.clip_suite import clip_suite
from fastclip.evaluation.encoder import Encoder
from fastclip.evaluation.sets import find_sets
from fastclip.evaluation.suite import evaluate_set

_LISTS = Path(__file__).with_name("task_lists.json")


def task_lists() -> dict[str, dict[str, str]]:
    """Suite -> task -> its main metric: a key of the figures, "mean_recall@1" (both ways), or one that the peers
    compute from metadata which their exported files do not hold: top-1 stands for it then, and is named."""
    lists: dict[str, dict[str, str]] = json.loads(_LISTS.read_text())
    return lists


def find_task(root: Path, task: str) -> Path | None:
    """The folder of a task in the places where CLIP_benchmark and DataComp put it."""
    flat = task.replace("/", "-")
    places = (root / task, root / "wds" / task, root / f"wds_{flat}_test", root / f"wds_{flat}", root / flat)
    return next((place for place in places if place.is_dir()), None)


def evaluate_tasks(
    encoder: Encoder, root: str | Path, suite: str, split: str = "test", with_suite: bool = False
) -> dict[str, Any]:
    """{"data", "sets", "tasks": {task: [metric, value]}, "missing": [tasks], "mean"}; the same on every rank.

    "mean" is over the tasks that were run, see "missing" before comparing it. Errors: `UserError` for another suite, or
    one of which nothing is on disk.
    """
    lists = task_lists()
    if suite not in lists:
        raise UserError(f"the suite must be one of {', '.join(lists)}, was {suite!r}")
    folders = {task: find_task(Path(root), task) for task in lists[suite]}
    sets: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    tasks: dict[str, list[Any]] = {}
    for task, folder in folders.items():
        if folder is None:
            continue
        held_out = next(iter(find_sets(folder, encoder.tokenizer, encoder.config.vision.image_size, split).values()))
        sets[task], images, texts = evaluate_set(encoder, held_out)
        tasks[task] = list(main_figure(sets[task], lists[suite][task]))
        if with_suite:
            extra[task] = clip_suite(encoder, folder, held_out, images, texts)
    if not tasks:
        raise UserError(
            f"none of the {len(folders)} tasks of {suite} is in {root}: a task such as {next(iter(folders))} must be a "
            f"folder in CLIP_benchmark's WebDataset layout, under its name or as wds_<name>_test"
        )
    results = {
        "data": str(root),
        "task_list": suite,
        "sets": sets,
        "tasks": tasks,
        "missing": [task for task, folder in folders.items() if folder is None],
        "mean": sum(value for _, value in tasks.values()) / len(tasks),
    }
    return results | {"suite": extra} if with_suite else results


def main_figure(figures: dict[str, Any], metric: str) -> tuple[str, float]:
    """The metric that was asked for, or the one that stands for it, and its value."""
    if figures["task"] == "retrieval":
        return "mean_recall@1", (figures["image_to_text"]["R@1"] + figures["text_to_image"]["R@1"]) / 2
    if figures["task"] == "multi_label":
        return "mean_average_precision", figures["mean_average_precision"]
    if metric == "f1_macro":
        return metric, f1_macro(figures["confusion"])
    return (metric, figures[metric]) if metric in figures else ("top1", figures["top1"])


def f1_macro(confusion: list[list[int]]) -> float:
    """The mean over the classes that occur of 2 right / (images of the class + images taken for it)."""
    predicted = [sum(column) for column in zip(*confusion, strict=True)]
    scores = [2 * row[number] / (sum(row) + predicted[number]) for number, row in enumerate(confusion) if sum(row)]
    return sum(scores) / len(scores)
