"""The page of `fastclip eval --suite`: its tables, and the charts of what the CLIP paper measures beyond accuracy."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastclip.report.charts import Chart, Curve, curves_svg, share_tick, standalone_svg
from fastclip.report.inputs import ZeroShot, read_sets
from fastclip.report.page import directions, environment
from fastclip.report.suite import read_suite, suite_charts

_OPTIONAL: dict[str, Any] = {"tasks": {}, "missing": [], "robustness": None, "bias": None}


def write_evaluation(folder: str | Path, results: Mapping[str, Any]) -> Path:
    """Writes results.json, index.html and a chart-*.svg for each chart into `folder`; returns the page's path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    zero_shot, retrieval, _ = read_sets(results["sets"])
    charts = evaluation_charts(results, zero_shot)
    for chart in charts:
        title = html.escape(f"{chart.title}: {chart.latest}" if chart.latest else chart.title)
        svg = standalone_svg(
            chart.svg, title, f"{chart.unit}; {chart.axis}", [(css, html.escape(name)) for css, name in chart.legend]
        )
        (folder / f"chart-{chart.key}.svg").write_text(svg)
    page = (
        environment()
        .get_template("evaluation.html")
        .render(
            style=(Path(__file__).parent / "style.css").read_text("utf-8"),
            results=_OPTIONAL | dict(results),
            zero_shot=zero_shot,
            multi_label=[(name, one) for name, one in results["sets"].items() if one["task"] == "multi_label"],
            retrieval=[(one, directions(one)) for one in retrieval],
            charts=charts,
        )
    )
    path = folder / "index.html"
    path.write_bytes(page.encode("utf-8", "replace"))
    return path


def evaluation_charts(results: Mapping[str, Any], zero_shot: list[ZeroShot]) -> list[Chart]:
    """The charts of all sets, and the path between two checkpoints where it was evaluated."""
    tops = {one.name: one.top1 for one in zero_shot}
    suite = read_suite({"sets": results.get("suite", {})})
    charts = [chart for place, one in enumerate(suite) for chart in suite_charts(one, f"{place}", tops.get(one.name))]
    path = results.get("path", [])
    curves: dict[str, Curve] = {}
    for name, one in results["sets"].items() if path else ():
        figure, words = ("top1", "top-1") if one["task"] == "zero_shot" else ("R@1", "text to image R@1")
        if one["task"] == "multi_label":
            continue
        values = [step["sets"][name] if figure == "top1" else step["sets"][name]["text_to_image"] for step in path]
        colour = len(curves)
        curves[f"{name} {words}"] = Curve([step["alpha"] for step in path], [v[figure] for v in values], colour, colour)
    if curves:
        ticks = {n / 4: f"{n / 4:g}" for n in range(5)}
        charts.append(
            Chart(
                title="Between two checkpoints",
                unit="WiSE-FT",
                latest="",
                label="Figures along the line between two checkpoints' weights.",
                svg=curves_svg("path", list(curves.values()), form=share_tick, ceiling=1.0, marks=True, xticks=ticks),
                legend=[(curve.css, name) for name, curve in curves.items()],
                axis="share of the second checkpoint",
                key="path",
            )
        )
    return charts
