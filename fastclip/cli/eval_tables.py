"""The figures of `fastclip eval` as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastclip.cli.text import table

RECALLS = ("R@1", "R@5", "R@10")
Row = tuple[object, ...]


def tables(results: Mapping[str, Any]) -> str:
    """One table a task, what was skipped, and what a suite adds."""
    sets = results["sets"]
    parts = [_zero_shot(sets), _multi_label(sets), _retrieval(sets)]
    for name, figures in sets.items():
        if figures["skipped"]:
            parts.append(f"{name}: skipped {', '.join(f'{cause} {n:,}' for cause, n in figures['skipped'].items())}")
    parts += [_suite(results.get("suite", {})), _clouds(results.get("suite", {})), _path(results), _tasks(results)]
    parts += [_robustness(results), _bias(results)]
    return "\n\n".join(part for part in parts if part)


def _zero_shot(sets: Mapping[str, Any]) -> str:
    rows: list[Row] = [("zero-shot", "images", "classes", "top-1", "top-5", "mean per class")]
    for name, figures in sets.items():
        if figures["task"] == "zero_shot":
            shares = (_percent(figures[key]) for key in ("top1", "top5", "mean_per_class_recall"))
            rows.append((name, f"{figures['images']:,}", len(figures["classnames"]), *shares))
    return table(rows) if len(rows) > 1 else ""


def _multi_label(sets: Mapping[str, Any]) -> str:
    rows: list[Row] = [("several labels", "images", "classes", "mAP")]
    for name, figures in sets.items():
        if figures["task"] == "multi_label":
            mean = _percent(figures["mean_average_precision"])
            rows.append((name, f"{figures['images']:,}", len(figures["classnames"]), mean))
    return table(rows) if len(rows) > 1 else ""


def _retrieval(sets: Mapping[str, Any]) -> str:
    rows: list[Row] = [("retrieval", "", "queries", *RECALLS, "median rank")]
    for name, figures in sets.items():
        if figures["task"] == "retrieval":
            for way, queries in (("image_to_text", "images"), ("text_to_image", "texts")):
                recalls = (_percent(figures[way][key]) for key in RECALLS)
                rank = f"{figures[way]['median_rank']:g}"
                rows.append((name, way.replace("_", " "), f"{figures[queries]:,}", *recalls, rank))
    return table(rows, left=(0, 1)) if len(rows) > 1 else ""


def _suite(suite: Mapping[str, Any]) -> str:
    parts = []
    for name, one in suite.items():
        if probe := one.get("linear_probe"):
            shots = [f"{row[0]} shot" for row in probe["few_shot"]]
            shares = [_percent(row[1]) for row in probe["few_shot"]]
            head: Row = ("linear probe", "images", "C", "top-1", *shots)
            row: Row = (name, f"{probe['train_images']:,}", f"{probe['C']:.3g}", _percent(probe["top1"]), *shares)
            parts.append(table([head, row]))
        if curves := one.get("corruptions"):
            rows: list[Row] = [(f"corruptions of {name}", *(f"severity {n}" for n in range(1, 6)), "mean")]
            rows += [
                (kind, *map(_percent, shares), _percent(sum(shares) / len(shares))) for kind, shares in curves.items()
            ]
            parts.append(table(rows))
        if found := one.get("calibration"):
            head = ("calibration", "logit scale", "confidence", "ECE", "entropy", "NLL", "best scale")
            shown = (f"{found[key]:.3f}" for key in ("entropy", "nll"))
            row = (name, f"{found['logit_scale']:.3g}", _percent(found["confidence"]), _percent(found["ece"]))
            parts.append(table([head, (*row, *shown, f"{found['best_scale']:.3g}")]))
    return "\n\n".join(parts)


def _clouds(suite: Mapping[str, Any]) -> str:
    rows: list[Row] = [("geometry", "modality gap", "alignment", "uniformity of images", "of texts")]
    for name, one in suite.items():
        if found := one.get("clouds"):
            uniformity = (found["uniformity"]["images"], found["uniformity"]["texts"])
            rows.append((name, *(f"{value:.3f}" for value in (found["gap"], found["alignment"], *uniformity))))
    return table(rows) if len(rows) > 1 else ""


def _path(results: Mapping[str, Any]) -> str:
    steps = results.get("path", [])
    if not steps:
        return ""
    names = [name for name, one in results["sets"].items() if one["task"] != "multi_label"]
    rows: list[Row] = [("between checkpoints", *names)]
    for step in steps:
        figures = (step["sets"][name] for name in names)
        shares = (one["top1"] if one["task"] == "zero_shot" else one["text_to_image"]["R@1"] for one in figures)
        rows.append((f"{step['alpha']:g}", *map(_percent, shares)))
    return table(rows)


def _tasks(results: Mapping[str, Any]) -> str:
    if "tasks" not in results:
        return ""
    rows: list[Row] = [(results["task_list"], "metric", "")]
    rows += [(task, metric, _percent(value)) for task, (metric, value) in results["tasks"].items()]
    count = len(results["tasks"])
    rows.append((f"mean of {count} of {count + len(results['missing'])}", "", _percent(results["mean"])))
    missing = f"\n\nNot on disk: {', '.join(results['missing'])}" if results["missing"] else ""
    return table(rows, left=(0, 1)) + missing


def _robustness(results: Mapping[str, Any]) -> str:
    if "robustness" not in results:
        return ""
    found = results["robustness"]
    rows: list[Row] = [(f"shift from {found['reference']}", "top-1", "expected", "effective robustness")]
    for name, one in found["shifts"].items():
        effect = f"{100 * one['effective_robustness']:+.1f} points"
        rows.append((name, _percent(one["shift"]), _percent(one["expected"]), effect))
    return table(rows)


def _bias(results: Mapping[str, Any]) -> str:
    if "bias" not in results:
        return ""
    found = results["bias"]
    rows: list[Row] = [("mean cosine", "members", *found["prompts"])]
    for group, cosines in found["mean_cosine"].items():
        rows.append((group, found["members"][group], *(f"{cosines[prompt]:.3f}" for prompt in found["prompts"])))
    rows.append(("effect size", "", *("" for _ in found["prompts"])))
    for pair, sizes in found["effect_size"].items():
        rows.append((pair, "", *(f"{sizes[prompt]:+.2f}" for prompt in found["prompts"])))
    return table(rows)


def _percent(share: float) -> str:
    return f"{share:.1%}"
