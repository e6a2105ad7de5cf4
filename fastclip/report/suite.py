"""What the CLIP paper measures beyond accuracy, as charts: linear probe, corruptions, calibration, the two clouds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastclip.report import words
from fastclip.report.charts import Chart, Curve, curves_svg, points_svg, share_tick, short

_SHOTS: dict[float, str] = {1: "1", 2: "2", 4: "4", 8: "8", 16: "16"}
_SCALES: dict[float, str] = {1: "1", 10: "10", 100: "100", 1000: "1000"}


@dataclass(frozen=True)
class SuiteSet:
    """One set's figures from `eval/suite.json`; an empty part was not measured. Shares in [0, 1]."""

    name: str
    probe: dict[str, float] = field(default_factory=dict)  # top1, C, train_images
    few_shot: list[tuple[float, float]] = field(default_factory=list)  # images a class, top-1
    corruptions: dict[str, list[float]] = field(default_factory=dict)  # top-1 at severity 1 to 5
    calibration: dict[str, float] = field(default_factory=dict)  # logit_scale, ece, best_scale, entropy
    bins: list[tuple[float, float, float]] = field(default_factory=list)  # images, confidence, accuracy
    scales: list[tuple[float, float, float]] = field(default_factory=list)  # scale, ECE, entropy
    clouds: dict[str, float] = field(default_factory=dict)  # gap, alignment, uniformity of both, explained
    image_points: list[tuple[float, float]] = field(default_factory=list)
    text_points: list[tuple[float, float]] = field(default_factory=list)


def read_suite(value: Mapping[str, Any]) -> list[SuiteSet]:
    """The sets of a suite.json. Errors: those of float() and of missing keys."""
    return [_one(str(name), one) for name, one in value["sets"].items()]


def _one(name: str, one: Mapping[str, Any]) -> SuiteSet:
    parts: dict[str, Any] = {}
    if probe := one.get("linear_probe"):
        parts["probe"] = {key: float(probe[key]) for key in ("top1", "C", "train_images")}
        parts["few_shot"] = [(float(row[0]), float(row[1])) for row in probe["few_shot"]]
    if curves := one.get("corruptions"):
        parts["corruptions"] = {str(kind): [float(share) for share in shares] for kind, shares in curves.items()}
    if found := one.get("calibration"):
        parts["calibration"] = {key: float(found[key]) for key in ("logit_scale", "ece", "best_scale", "entropy")}
        parts["bins"] = [(float(n), float(c), float(a)) for n, c, a in found["bins"]]
        parts["scales"] = [(float(row[0]), float(row[1]), float(row[3])) for row in found["scales"]]
    if found := one.get("clouds"):
        parts["clouds"] = {key: float(found[key]) for key in ("gap", "alignment", "explained")}
        parts["clouds"] |= {f"uniformity_{side}": float(found["uniformity"][side]) for side in ("images", "texts")}
        for side in ("image", "text"):
            parts[f"{side}_points"] = [(float(x), float(y)) for x, y in found["picture"][f"{side}s"]]
    return SuiteSet(name, **parts)


def suite_charts(one: SuiteSet, key: str, top1: float | None = None) -> list[Chart]:
    """The charts of a set; `key` keeps their ids apart, `top1` is its zero-shot accuracy."""
    charts = [
        _probe_chart(one, f"{key}-probe", top1),
        _corruption_chart(one, f"{key}-corruptions", top1),
        _reliability_chart(one, f"{key}-reliability"),
        *_scale_charts(one, f"{key}-scales"),
        _clouds_chart(one, f"{key}-clouds"),
    ]
    return [chart for chart in charts if chart]


def _probe_chart(one: SuiteSet, key: str, top1: float | None) -> Chart | None:
    if not one.few_shot:
        return None
    curve = Curve([shots for shots, _ in one.few_shot], [share for _, share in one.few_shot])
    reference = (top1, f"zero-shot {words.percent(top1)}") if top1 is not None else None
    full = f"{words.percent(one.probe['top1'])} with all {words.count(one.probe['train_images'])}"
    said = ", ".join(f"{shots:g}: {words.percent(share)}" for shots, share in one.few_shot)
    return Chart(
        title=f"Linear probe, {one.name}",
        unit="top-1",
        latest=full,
        after="",
        label=f"Top-1 of a linear probe on {one.name} by images a class, {said}; {full} images.",
        svg=curves_svg(
            key, [curve], form=share_tick, ceiling=1.0, marks=True, reference=reference, xticks=_SHOTS, xlog=True
        ),
        axis="images a class, log scale",
        key=key,
    )


def _corruption_chart(one: SuiteSet, key: str, top1: float | None) -> Chart | None:
    if not one.corruptions:
        return None
    clean = [] if top1 is None else [top1]
    curves = {
        kind: Curve(range(1 - len(clean), 1 + len(shares)), [*clean, *shares], place, place)
        for place, (kind, shares) in enumerate(one.corruptions.items())
    }
    everything = [share for shares in one.corruptions.values() for share in shares]
    mean = f"{words.percent(sum(everything) / len(everything))} mean"
    said = ", ".join(f"{kind} {words.percent(shares[-1])}" for kind, shares in one.corruptions.items())
    return Chart(
        title=f"Corruptions, {one.name}",
        unit="zero-shot top-1",
        latest=mean,
        after="",
        label=f"Zero-shot top-1 on {one.name} over severities; at the strongest {said}; {mean} over all.",
        svg=curves_svg(
            key, list(curves.values()), form=share_tick, ceiling=1.0, marks=True, xticks={n: f"{n}" for n in range(6)}
        ),
        legend=[(curve.css, kind) for kind, curve in curves.items()],
        axis="severity, 0 is clean",
        key=key,
    )


def _reliability_chart(one: SuiteSet, key: str) -> Chart | None:
    full = [(confidence, accuracy) for images, confidence, accuracy in one.bins if images]
    if not full:
        return None
    curves = [Curve([0, 1], [0, 1], 5, 1), Curve([c for c, _ in full], [a for _, a in full], 0, 0)]
    ece = words.percent(one.calibration["ece"])
    scale = words.number(one.calibration["logit_scale"])
    return Chart(
        title=f"Reliability, {one.name}",
        unit="accuracy",
        latest=f"ECE {ece}",
        after="",
        label=f"Accuracy by confidence on {one.name} at logit scale {scale}: expected calibration error {ece}.",
        svg=curves_svg(
            key, curves, form=share_tick, ceiling=1.0, marks=True, xticks={n / 4: share_tick(n / 4) for n in range(5)}
        ),
        legend=[(curves[1].css, f"the model at logit scale {scale}"), (curves[0].css, "calibrated")],
        axis="confidence",
        key=key,
    )


def _scale_charts(one: SuiteSet, key: str) -> list[Chart]:
    if not one.scales:
        return []
    x = [scale for scale, _, _ in one.scales]
    own, best = (words.number(one.calibration[name]) for name in ("logit_scale", "best_scale"))
    shown = (("ECE", 1, "share", share_tick), ("Entropy", 2, "nats", short))
    return [
        Chart(
            title=f"{title} over scale, {one.name}",
            unit=unit,
            latest=f"scale {own}",
            after="",
            label=f"{title} ({unit}) on {one.name} over logit scales; the model's is {own}, the likeliest {best}.",
            svg=curves_svg(
                f"{key}-{place}", [Curve(x, [row[place] for row in one.scales])], form=form, xticks=_SCALES, xlog=True
            ),
            axis=f"logit scale; by likelihood the best is {best}",
            key=f"{key}-{title.lower()}",
        )
        for title, place, unit, form in shown
    ]


def _clouds_chart(one: SuiteSet, key: str) -> Chart | None:
    points: Sequence[Sequence[tuple[float, float]]] = (one.image_points, one.text_points)
    if not all(points) or not all(math.isfinite(value) for cloud in points for point in cloud for value in point):
        return None
    say = {name: words.number(value) for name, value in one.clouds.items()}
    return Chart(
        title=f"Features, {one.name}",
        unit=f"{words.percent(one.clouds['explained'])} of the variance",
        latest=f"gap {say['gap']}",
        after="",
        label=f"Image and text features of {one.name} in two directions: modality gap {say['gap']}, alignment "
        f"{say['alignment']}, uniformity {say['uniformity_images']} and {say['uniformity_texts']}.",
        svg=points_svg(key, points),
        legend=[("series-1 dash-0", "images"), ("series-2 dash-0", "texts")],
        axis=f"alignment {say['alignment']}; uniformity {say['uniformity_images']}, {say['uniformity_texts']}",
        key=key,
    )
