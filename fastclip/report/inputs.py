"""A run folder's files, read once into plain values; what is absent or damaged becomes a note for the reader."""

from __future__ import annotations

import base64
import json
import math
import re
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fastclip.errors import UserError
from fastclip.report.suite import SuiteSet, read_suite

# The numbers of a line of metrics.jsonl that the page shows.
COLUMNS = (
    "step",
    "samples",
    "loss",
    "logit_scale",
    "lr",
    "grad_norm",
    "samples_per_s",
    "data_wait",
    "step_time",
    "elapsed",
    "skipped_steps",
)
PIXELS = 96  # a PNG up to this width is shown with its pixels as they are

_DATA_URI = re.compile(r"data:image/(png|jpeg|gif|webp|bmp);base64,[A-Za-z0-9+/]+={0,2}")

T = TypeVar("T")


@dataclass(frozen=True)
class Metrics:
    """The log's columns, one value a line, NaN where a line has no finite number."""

    columns: dict[str, list[float]]
    skipped_samples: dict[str, int]
    source_samples: dict[str, int]

    def finite(self, name: str) -> list[float]:
        return [value for value in self.columns[name] if math.isfinite(value)]

    def first(self, name: str) -> float | None:
        return next(iter(self.finite(name)), None)

    def last(self, name: str) -> float | None:
        return next(reversed(self.finite(name)), None)

    def median(self, name: str) -> float | None:
        return statistics.median(self.finite(name) or [math.nan]) if self.finite(name) else None


@dataclass(frozen=True)
class ZeroShot:
    """Shares in [0, 1]; `confusion` has rows of the true class and columns of the predicted one, in images."""

    name: str
    images: int
    top1: float
    top5: float | None
    recall: float | None
    classnames: list[str]
    templates: list[str]
    confusion: list[list[int]] | None
    skipped: dict[str, int]


@dataclass(frozen=True)
class Retrieval:
    """Shares in [0, 1] under `R@1`, `R@5`, `R@10`, ranks from 1 under `median_rank`."""

    name: str
    images: int
    texts: int
    image_to_text: dict[str, float]
    text_to_image: dict[str, float]
    skipped: dict[str, int]


@dataclass(frozen=True)
class Evaluation:
    step: int
    data: str
    zero_shot: list[ZeroShot]
    retrieval: list[Retrieval]


@dataclass(frozen=True)
class Entry:
    """An image or a text of the gallery: a query, or a match with its cosine."""

    text: str = ""
    key: str = ""
    image: str | None = None  # a data URI; None if it was none
    pixels: bool = False
    score: float = math.nan
    right: bool = False


@dataclass(frozen=True)
class Query:
    entry: Entry
    matches: list[Entry]


@dataclass(frozen=True)
class Gallery:
    step: int
    text_to_image: list[Query]
    image_to_text: list[Query]


@dataclass(frozen=True)
class Run:
    name: str
    metrics: Metrics
    config: dict[str, Any]
    ds_config: Any
    environment: dict[str, Any]
    evaluations: list[Evaluation]
    gallery: Gallery | None
    suite: list[SuiteSet]
    notes: list[str] = field(default_factory=list)


def read_run(run: str | Path) -> Run:
    """What the folder holds; a file that cannot be read is left out with a note. Errors: `UserError` without a log."""
    folder = Path(run)
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder} has no metrics.jsonl: a report needs a run folder, as fastclip train writes it")
    notes: list[str] = []
    evaluations = [
        _read(path, folder, lambda value: _evaluation(value, notes), notes)
        for path in sorted((folder / "eval").glob("step_*.json"))
    ]
    return Run(
        name=folder.resolve().name,
        metrics=_metrics(folder / "metrics.jsonl", notes),
        config=_read(folder / "config.yaml", folder, _mapping, notes) or {},
        ds_config=_read(folder / "ds_config.json", folder, _mapping, notes),
        environment=_read(folder / "environment.json", folder, _mapping, notes) or {},
        evaluations=sorted((e for e in evaluations if e), key=lambda e: e.step),
        gallery=_read(folder / "eval" / "gallery.json", folder, _gallery, notes),
        suite=_read(folder / "eval" / "suite.json", folder, read_suite, notes) or [],
        notes=notes,
    )


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "replace")


def _read(path: Path, folder: Path, convert: Callable[[Any], T], notes: list[str]) -> T | None:
    import yaml

    if not path.is_file():
        return None
    try:
        value = yaml.safe_load(_text(path)) if path.suffix == ".yaml" else json.loads(_text(path))
        return convert(value)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"[:200]
        notes.append(f"{path.relative_to(folder)} could not be read and is left out ({why}).")
        return None


def _metrics(path: Path, notes: list[str]) -> Metrics:
    lines, unreadable = [], 0
    texts = _text(path).split("\n")
    for number, text in enumerate(texts):
        try:
            line = json.loads(text)
            if not math.isfinite(_number(line["step"])):
                raise ValueError
            lines.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            unreadable += bool(text.strip()) and number < len(texts) - 1  # the last one tore when the run was killed
    if unreadable:
        notes.append(f"Lines of metrics.jsonl that could not be read and are left out: {unreadable:,}.")
    columns = {name: [_number(line.get(name)) for line in lines] for name in COLUMNS}
    odd = sum(not math.isfinite(value) for value in columns["loss"])
    if odd:
        notes.append(f"{odd:,} of {len(lines):,} logged losses are not finite: the loss curve has gaps there.")
    last = lines[-1] if lines else {}
    return Metrics(columns, _counts(last.get("skipped_samples")), _counts(last.get("source_samples")))


def _number(value: Any) -> float:
    """A finite float, or NaN for anything else."""
    known = isinstance(value, (int, float)) and abs(value) < 1e300
    return float(value) if known else math.nan


def _share(value: Any) -> float:
    """A number that must be there; NaN may."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"a number was expected, not {value!r}")
    return float(value)


def _counts(value: Any) -> dict[str, int]:
    return {str(key): int(count) for key, count in value.items() if count} if isinstance(value, Mapping) else {}


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"keys and values were expected, not a {type(value).__name__}")
    return {str(key): item for key, item in value.items()}


def _evaluation(value: Any, notes: list[str]) -> Evaluation:
    step = int(value["step"])
    zero_shot, retrieval, others = read_sets(value["sets"])
    for name, task in others.items():
        notes.append(f"Step {step:,}: set {name} has the task {task!r}, which this page does not show.")
    return Evaluation(step, str(value.get("data", "")), zero_shot, retrieval)


def read_sets(sets: Mapping[str, Any]) -> tuple[list[ZeroShot], list[Retrieval], dict[str, Any]]:
    """The sets of an evaluation by their task, and the names and tasks of others. Errors: those of values left out."""
    zero_shot, retrieval, others = [], [], {}
    for name, one in sets.items():
        if one["task"] == "zero_shot":
            zero_shot.append(_zero_shot(name, one))
        elif one["task"] == "retrieval":
            retrieval.append(_retrieval(name, one))
        else:
            others[name] = one["task"]
    return zero_shot, retrieval, others


def _zero_shot(name: str, one: Mapping[str, Any]) -> ZeroShot:
    classnames, confusion = [str(c) for c in one["classnames"]], one.get("confusion")
    if confusion is not None:
        confusion = [[int(count) for count in row] for row in confusion]
        if {len(classnames)} != {len(confusion), *map(len, confusion)}:
            raise ValueError(f"set {name}: the confusion matrix does not have its {len(classnames)} classes")
    return ZeroShot(
        name=name,
        images=int(one["images"]),
        top1=_share(one["top1"]),
        top5=_share(one["top5"]) if one.get("top5") is not None else None,
        recall=_share(one["mean_per_class_recall"]) if one.get("mean_per_class_recall") is not None else None,
        classnames=classnames,
        templates=[str(t) for t in one.get("templates", [])],
        confusion=confusion,
        skipped=_counts(one.get("skipped")),
    )


def _retrieval(name: str, one: Mapping[str, Any]) -> Retrieval:
    return Retrieval(
        name=name,
        images=int(one["images"]),
        texts=int(one["texts"]),
        image_to_text={key: _share(one["image_to_text"][key]) for key in ("R@1", "R@5", "R@10", "median_rank")},
        text_to_image={key: _share(one["text_to_image"][key]) for key in ("R@1", "R@5", "R@10", "median_rank")},
        skipped=_counts(one.get("skipped")),
    )


def _gallery(value: Any) -> Gallery:
    return Gallery(
        step=int(value["step"]),
        text_to_image=[
            Query(_entry(row), [_entry(match) for match in row["images"]]) for row in value.get("text_to_image", [])
        ],
        image_to_text=[
            Query(_entry(row), [_entry(match) for match in row["texts"]]) for row in value.get("image_to_text", [])
        ],
    )


def _entry(value: Mapping[str, Any]) -> Entry:
    uri = str(value.get("image", ""))
    image = uri if _DATA_URI.fullmatch(uri) else None  # any other address would make the page ask the network
    return Entry(
        text=str(value.get("text", "")),
        key=str(value.get("key", "")),
        image=image,
        pixels=image is not None and _png_width(image) <= PIXELS,
        score=_number(value.get("score")),
        right=bool(value.get("right")),
    )


def _png_width(uri: str) -> float:
    """Pixels across, from a PNG's header; other formats count as photos, of any width."""
    head = base64.b64decode(uri.split(",", 1)[1][:32].ljust(32, "A"))
    return int.from_bytes(head[16:20], "big") if head.startswith(b"\x89PNG") else math.inf
