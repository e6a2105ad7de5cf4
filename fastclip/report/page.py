"""The page: what a run's figures say, in the order in which a reader asks, filled into one template."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastclip.report import words
from fastclip.report.charts import SERIES, SMALL, WIDE, Chart, Curve, block_size, curves_svg, share_tick
from fastclip.report.confusion import confusion_view
from fastclip.report.inputs import Retrieval, Run, ZeroShot
from fastclip.report.suite import suite_charts

if TYPE_CHECKING:
    import jinja2

_HERE = Path(__file__).parent
_ARROWS = {"image_to_text": "Image \u2192 text", "text_to_image": "Text \u2192 image"}

S = TypeVar("S", ZeroShot, Retrieval)
History = dict[str, list[tuple[int, S]]]  # set -> its results by step


@dataclass(frozen=True)
class Tile:
    """One big number and what it is."""

    label: str
    value: str
    details: list[str]
    unit: str = ""
    lead: bool = False


def render(run: Run) -> str:
    """The page's HTML."""
    templates = environment()
    zero_shot: History[ZeroShot] = {}
    retrieval: History[Retrieval] = {}
    for evaluation in run.evaluations:
        for one in evaluation.zero_shot:
            zero_shot.setdefault(one.name, []).append((evaluation.step, one))
        for two in evaluation.retrieval:
            retrieval.setdefault(two.name, []).append((evaluation.step, two))
    lines = len(run.metrics.columns["step"])
    return templates.get_template("page.html").render(
        style=(_HERE / "style.css").read_text("utf-8"),
        run=run,
        model=str(run.config.get("model") or run.name),
        headline=_headline(run, zero_shot, retrieval),
        facts=_facts(run),
        tiles=_tiles(run, zero_shot, retrieval),
        lines=lines,
        block=block_size(lines),
        training=_training_charts(run),
        zero_shot=_latest(zero_shot),
        zero_shot_chart=_zero_shot_chart(zero_shot),
        confusions=[(step, one, confusion_view(one)) for step, one in _latest(zero_shot) if one.confusion],
        retrieval=[(step, one, directions(one)) for step, one in _latest(retrieval)],
        retrieval_charts=_retrieval_charts(retrieval),
        suite=_suite_charts(run, zero_shot),
        ds_config=json.dumps(run.ds_config, indent=2, sort_keys=True) if run.ds_config is not None else "",
    )


def environment() -> jinja2.Environment:
    """The templates with their filters; everything is escaped."""
    import jinja2

    loader = jinja2.FileSystemLoader(_HERE / "templates")
    templates = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters |= {
        name: getattr(words, name) for name in ("percent", "count", "number", "duration", "plural", "setting")
    }
    return templates


def _latest(history: History[S]) -> list[tuple[int, S]]:
    return [results[-1] for results in history.values()]


def _best(results: list[tuple[int, S]], figure: Callable[[S], float]) -> tuple[int, S, list[str]]:
    """The evaluation with the highest figure, the earliest of equals, and how it stands among the others."""
    step, one = max(results, key=lambda result: -1.0 if math.isnan(figure(result[1])) else figure(result[1]))
    if len(results) == 1:
        return step, one, []
    place = f"best of {len(results)} evaluations, step {step:,}"
    last = figure(results[-1][1])
    return step, one, [place if figure(one) == last else f"{place}; last {words.percent(last)}"]


def _headline(run: Run, zero_shot: History[ZeroShot], retrieval: History[Retrieval]) -> str:
    """What follows the model's name: its best figure of each task, or where the training stands."""
    parts = []
    if zero_shot:
        name, results = next(iter(zero_shot.items()))
        parts.append(
            f"{words.percent(_best(results, lambda one: one.top1)[1].top1)} zero\u2011shot top\u20111 on {name}"
        )
    if retrieval:
        name, two = next(iter(retrieval.items()))
        best = _best(two, lambda one: one.image_to_text["R@1"])[1].image_to_text["R@1"]
        parts.append(f"{words.percent(best)} image\u2011to\u2011text R@1 on {name}")
    if parts:
        return f"reaches {' and '.join(parts)}"
    loss = run.metrics.last("loss")
    if not run.metrics.columns["step"]:
        return "has logged no step yet"
    stands = f"a loss of {words.number(loss)} nats" if loss is not None else "no finite loss"
    return f"stands at {stands} after {words.plural(_last_step(run), 'step')}"


def _facts(run: Run) -> list[str]:
    """The sentences under the headline: what was trained, on what, for how long, and where the loss went."""
    config, metrics, sentences = run.config, run.metrics, []
    data = config.get("data") or next((e.data for e in reversed(run.evaluations) if e.data), "")
    machine = _machine(run.environment)
    trained = f"Trained{f' on {data}' if data else ''}{f' with {machine}' if machine else ''}"
    if metrics.last("step") is not None:
        trained += f" for {words.duration(metrics.last('elapsed'))}: {words.plural(_last_step(run), 'step')}"
        trained += f", {words.count(metrics.last('samples'))} pairs seen"
    sentences.append(f"{trained}.")
    first, last, chance = metrics.first("loss"), metrics.last("loss"), chance_loss(run)
    if first is not None and last is not None:
        level = f"; {chance[1]}" if chance else ""
        sentences.append(f"Loss {words.number(first)} \u2192 {words.number(last)} nats{level}.")
    return sentences


def _last_step(run: Run) -> int:
    return int(run.metrics.last("step") or 0)


def _machine(environment: dict[str, Any]) -> str:
    """The GPUs, or where there are none the processor."""
    return words.setting(environment.get("gpus") or environment.get("processor") or "")


def _norm_unit(run: Run) -> str:
    """DeepSpeed's Muon replaces the gradient of its matrices before anyone can take the norm."""
    return "L2, Muon's matrices orthogonalised" if run.config.get("optimizer") == "muon" else "L2"


def chance_loss(run: Run) -> tuple[float, str] | None:
    """ln N: the loss of a model that cannot tell the N pairs of a batch apart; with a hard negative text beside each,
    images choose among 2 N texts."""
    batch = run.config.get("global_batch")
    if not isinstance(batch, int) or batch < 2:
        return None
    if run.config.get("hard_negatives"):
        level = (math.log(2 * batch) + math.log(batch)) / 2
        return (
            level,
            f"chance is (ln\u00a0{2 * batch:,}\u00a0+\u00a0ln\u00a0{batch:,})\u00a0/\u00a02\u00a0=\u00a0{level:.2f}",
        )
    return math.log(batch), f"chance is ln\u00a0{batch:,}\u00a0=\u00a0{math.log(batch):.2f}"


def _tiles(run: Run, zero_shot: History[ZeroShot], retrieval: History[Retrieval]) -> list[Tile]:
    tiles, metrics = [], run.metrics
    if zero_shot:
        name, results = next(iter(zero_shot.items()))
        _, one, place = _best(results, lambda one: one.top1)
        classes = words.plural(len(one.classnames), "class")
        details = [f"{name}: {classes}", f"top-5 {words.percent(one.top5)}" if one.top5 is not None else "", *place]
        tiles.append(Tile("Zero-shot top-1", words.percent(one.top1), details, lead=True))
    for direction, label in _ARROWS.items() if retrieval else ():
        name, pairs = next(iter(retrieval.items()))
        _, two, place = _best(pairs, lambda one, key=direction: getattr(one, key)["R@1"])  # type: ignore[misc]
        recalls = getattr(two, direction)
        candidates = f"{two.texts:,} texts" if direction == "image_to_text" else f"{two.images:,} images"
        details = [f"R@5 {words.percent(recalls['R@5'])}", f"{name}: 1 among {candidates}", *place]
        tiles.append(Tile(f"{label} R@1", words.percent(recalls["R@1"]), details, lead=True))
    speed, wait = metrics.median("samples_per_s"), metrics.median("data_wait")
    step_time = metrics.median("step_time")
    tiles += [
        Tile("Throughput", words.count(speed), [f"median; data wait {words.percent(wait)} of the time"], "pairs/s"),
        Tile("Pairs seen", words.count(metrics.last("samples")), [words.plural(_last_step(run), "step")]),
        Tile("Wall-clock", words.duration(metrics.last("elapsed")), [f"{words.number(step_time)} s a step, median"]),
    ]
    return [Tile(t.label, t.value, [d for d in t.details if d], t.unit, t.lead) for t in tiles]


def _training_charts(run: Run) -> list[Chart]:
    charts = [
        _metric_chart(run, "loss", "Loss", "nats", reference=chance_loss(run), wide=True),
        _metric_chart(run, "logit_scale", "Logit scale", "exponentiated"),
        _metric_chart(run, "lr", "Learning rate", "of AdamW"),
        _metric_chart(run, "grad_norm", "Gradient norm", _norm_unit(run), log=True),
        _metric_chart(run, "samples_per_s", "Throughput", "pairs/s"),
        _metric_chart(run, "data_wait", "Data wait", "% of time", share=True),
    ]
    return [chart for chart in charts if chart]


def _metric_chart(
    run: Run,
    name: str,
    title: str,
    unit: str,
    *,
    reference: tuple[float, str] | None = None,
    wide: bool = False,
    share: bool = False,
    log: bool = False,
) -> Chart | None:
    steps, values, known = run.metrics.columns["step"], run.metrics.columns[name], run.metrics.finite(name)
    if not known:
        return None
    say = words.percent if share else words.number
    label = f"{title} ({unit}) over {words.plural(_last_step(run), 'step')}: {say(known[0])} at first, "
    label += f"{say(known[-1])} at last, between {say(min(known))} and {say(max(known))}."
    options: dict[str, Any] = {"reference": reference, "log": log}
    options |= {"form": share_tick, "ceiling": 0.1} if share else {}
    curve = [Curve(steps, values)]
    return Chart(
        title=title,
        unit=unit,
        latest=say(known[-1]),
        label=label,
        svg=curves_svg(f"train-{name}", curve, size=SMALL, **options),
        wide_svg=curves_svg(f"train-{name}-wide", curve, size=WIDE, **options) if wide else "",
    )


def _zero_shot_chart(history: History[ZeroShot]) -> Chart | None:
    curves = {
        name: Curve([step for step, _ in results], [one.top1 for _, one in results], place, place + place // SERIES)
        for place, (name, results) in enumerate(history.items())
    }
    return _share_chart("zero-shot", "Top-1 over steps", "% of images", curves)


def _retrieval_charts(history: History[Retrieval]) -> list[Chart]:
    charts = []
    for place, (name, results) in enumerate(history.items()):
        steps = [step for step, _ in results]
        curves = {
            f"{label} {recall}": Curve(steps, [getattr(one, direction)[recall] for _, one in results], colour, dash)
            for colour, (direction, label) in enumerate(_ARROWS.items())
            for dash, recall in ((2 * colour, "R@1"), (2 * colour + 1, "R@5"))
        }
        chart = _share_chart(f"retrieval-{place}", f"{name} over steps", "% of queries", curves)
        charts += [chart] if chart else []
    return charts


def _suite_charts(run: Run, zero_shot: History[ZeroShot]) -> list[Chart]:
    tops = {name: results[-1][1].top1 for name, results in zero_shot.items()}
    return [
        chart
        for place, one in enumerate(run.suite)
        for chart in suite_charts(one, f"suite-{place}", tops.get(one.name))
    ]


def _share_chart(key: str, title: str, unit: str, curves: dict[str, Curve]) -> Chart | None:
    """Shares over steps, one line for each name; None where no line has two points."""
    if max((len(curve.x) for curve in curves.values()), default=0) < 2:
        return None
    said = [f"{name} {words.percent(c.y[0])} to {words.percent(c.y[-1])}" for name, c in curves.items()]
    return Chart(
        title=title,
        unit=unit,
        latest="",
        label=f"{title}, {unit}: {', '.join(said)}.",
        svg=curves_svg(key, list(curves.values()), form=share_tick, ceiling=1.0, marks=True),
        legend=[(curve.css, name) for name, curve in curves.items()],
    )


def directions(one: Retrieval) -> list[dict[str, Any]]:
    """The table's rows: recalls beside what chance finds, the better of the candidates being right by luck."""
    sides = (("image_to_text", one.texts, one.texts // max(one.images, 1)), ("text_to_image", one.images, 1))
    return [
        {
            "label": _ARROWS[direction],
            "candidates": candidates,
            "recalls": [
                (f"R@{k}", getattr(one, direction)[f"R@{k}"], chance(k, candidates, right)) for k in (1, 5, 10)
            ],
            "median_rank": getattr(one, direction)["median_rank"],
        }
        for direction, candidates, right in sides
    ]


def chance(k: int, candidates: int, right: int = 1) -> float:
    """Share of queries with a right one among `k` drawn without looking: k/N for one right one among N candidates."""
    if candidates < 1:
        return math.nan
    k, right = min(k, candidates), max(right, 1)
    return 1 - math.comb(candidates - right, k) / math.comb(candidates, k)
