"""Curves as inline SVG and large confusion matrices as PNG, in colours that follow the page's light or dark scheme.

matplotlib writes fixed colours. The ones used here are stand-ins that `_inline` turns into the page's CSS variables;
text stays text, in the page's font, and holds numbers only, so nothing a user wrote reaches the SVG.
"""

from __future__ import annotations

import base64
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMALL = (344, 176)  # points, which are CSS pixels where the page is widest
WIDE = (736, 452)
POINTS = 240  # of a curve; more lines than that are drawn as block means in a band from lowest to highest
MATRIX_PIXELS = 250
SERIES = 6

_INK, _GRID, _REFERENCE = "#000001", "#000002", "#000003"
_VARIABLES = {_INK: "currentColor", _GRID: "var(--grid)", _REFERENCE: "var(--reference)"}
_VARIABLES |= {f"#00001{n}": f"var(--series-{n + 1})" for n in range(SERIES)}
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)))
_RIGHT, _WRONG = (59, 110, 235), (224, 96, 20)


@dataclass(frozen=True)
class Curve:
    """Points of one line, its colour and its dashes; lines of one chart should differ in both."""

    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dash: int = 0

    @property
    def css(self) -> str:
        """The line's classes, for a legend in the page."""
        return f"series-{self.colour % SERIES + 1} dash-{self.dash % len(_DASHES)}"


@dataclass(frozen=True)
class Chart:
    """A chart and the words around it."""

    title: str
    unit: str
    latest: str
    label: str  # what the curve says, for those who do not see it
    svg: str
    wide_svg: str = ""
    legend: list[tuple[str, str]] = field(default_factory=list)
    axis: str = "step"
    after: str = "last"  # behind the latest value
    key: str = ""  # its name as a file


def thin(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """At most `POINTS` blocks of equally many lines: mean x, then mean, lowest and highest finite y (NaN if none)."""
    import numpy as np

    block = block_size(len(x))
    pad = -len(x) % block
    xs, ys = (np.pad(np.asarray(v, dtype=float), (0, pad), constant_values=np.nan).reshape(-1, block) for v in (x, y))
    with warnings.catch_warnings():  # a block without a finite value is NaN, which is what it should be
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(xs, 1), np.nanmean(ys, 1), np.nanmin(ys, 1), np.nanmax(ys, 1)


def block_size(lines: int) -> int:
    """Log lines that one point of a curve stands for."""
    return max(1, -(-lines // POINTS))


def curves_svg(
    name: str,
    curves: Sequence[Curve],
    *,
    size: tuple[int, int] = SMALL,
    form: Callable[[float], str] | None = None,
    reference: tuple[float, str] | None = None,
    log: bool = False,
    ceiling: float | None = None,
    marks: bool = False,
    xticks: Mapping[float, str] | None = None,
    xlog: bool = False,
) -> str:
    """An `<svg>` of lines over steps; `name` keeps its ids apart from other charts'.

    `form` writes the y axis, `reference` is a level and its words, `log` allows a log scale, `ceiling` is the least top
    of the y axis (values from 0), `marks` puts a dot on every point, `xticks` are the x axis's places and words where
    it does not count steps, `xlog` makes it a log scale.
    """
    with _axes(size) as (figure, axes):
        for curve in curves:
            _draw(axes, curve, marks)
        _scale(axes, curves, log, ceiling, reference)
        if xlog:
            axes.set_xscale("log")
        _dress(axes, form or short, xticks)
        if reference:
            _draw_reference(axes, *reference)
        return _inline(figure, name)


def points_svg(name: str, clouds: Sequence[Sequence[tuple[float, float]]], size: tuple[int, int] = SMALL) -> str:
    """An `<svg>` of clouds of points, each in its colour; both axes have one scale."""
    with _axes(size) as (figure, axes):
        for place, points in enumerate(clouds):
            xs, ys = zip(*points, strict=True)
            axes.scatter(xs, ys, s=9, color=f"#00001{place % SERIES}", alpha=0.55, linewidths=0)
        axes.set_aspect("equal", adjustable="datalim")
        axes.margins(0.05)
        _dress(axes, short, {})
        return _inline(figure, name)


@contextmanager
def _axes(size: tuple[int, int]) -> Iterator[tuple[Figure, Axes]]:
    """A figure of `size` points under matplotlib's own settings: a user's matplotlibrc must not change the page."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fastclip", "font.size": 11})
        figure = Figure(figsize=(size[0] / 72, size[1] / 72))
        yield figure, figure.add_axes((42 / size[0], 24 / size[1], 1 - 54 / size[0], 1 - 34 / size[1]))


def _draw(axes: Axes, curve: Curve, marks: bool) -> None:
    import numpy as np

    x, mean, low, high = thin(curve.x, curve.y)
    colour = f"#00001{curve.colour % SERIES}"
    if len(curve.x) > POINTS:
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    dash = _DASHES[curve.dash % len(_DASHES)]
    axes.plot(x, mean, color=colour, linewidth=1.8, linestyle=dash, marker="o" if marks else None, markersize=4)
    known = np.flatnonzero(np.isfinite(mean))
    if len(known) and not marks:
        axes.plot(x[known[-1]], mean[known[-1]], color=colour, marker="o", markersize=5, clip_on=False)


def _scale(
    axes: Axes, curves: Sequence[Curve], log: bool, ceiling: float | None, reference: tuple[float, str] | None
) -> None:
    values = [y for curve in curves for y in curve.y if math.isfinite(y)] or [0.0]
    if log and min(values) > 0 and max(values) > 100 * min(values):
        axes.set_yscale("log")
        return
    top = max([*values, ceiling or 0.0, reference[0] if reference else 0.0])
    low = min(0.0, *values)
    axes.set_ylim(low, low + (top - low) * 1.06 or 1.0)


def _dress(axes: Axes, form: Callable[[float], str], xticks: Mapping[float, str] | None) -> None:
    from matplotlib.ticker import (
        FixedFormatter,
        FixedLocator,
        FuncFormatter,
        LogLocator,
        MaxNLocator,
        NullFormatter,
        NullLocator,
    )

    for side in ("left", "top", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.set_facecolor("none")
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=_GRID, linewidth=1)
    axes.tick_params(length=0, pad=5, labelcolor=_INK)
    axes.margins(x=0.03)
    if xticks is None:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    else:
        axes.xaxis.set_major_locator(FixedLocator(list(xticks)))
        axes.xaxis.set_major_formatter(FixedFormatter(list(xticks.values())))
        axes.xaxis.set_minor_locator(NullLocator())
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5 if axes.figure.bbox.height < 300 else 8, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))


def _draw_reference(axes: Axes, level: float, words: str) -> None:
    axes.axhline(level, color=_REFERENCE, linewidth=1.2, linestyle=(0, (4, 3)))
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate(words, (1, level), xytext=(0, -5), color=_INK, ha="right", va="top", parse_math=False, **place)


def short(value: float) -> str:
    """A tick's number in few letters: 2.5e-4, 0.05, 40, 1.5k, 2M."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{letter}"
    if value and abs(value) < 0.01:
        digits, exponent = f"{value:.1e}".split("e")
        return f"{digits.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4g}"


def share_tick(share: float) -> str:
    """A tick's share: 12.5%."""
    return f"{short(round(100 * share, 6))}%"


def standalone_svg(svg: str, title: str, axis: str, legend: Sequence[tuple[str, str]]) -> str:
    """An inline `<svg>` of this module as a file: with its words, in the light or dark colours of the reader's screen.

    `title`, `axis` and the names of `legend` are escaped already.
    """
    width, height = re.findall(r"\d+", svg.split('viewBox="', 1)[1].split('"', 1)[0])[2:4]
    css = (Path(__file__).parent / "style.css").read_text("utf-8")
    light, dark = (body for body in re.findall(r":root \{(.*?)\}", css, re.DOTALL)[:2])
    style = f"svg{{{light}color:var(--ink);font-family:system-ui,sans-serif}}"
    style += f"@media(prefers-color-scheme:dark){{svg{{{dark}}}}}"
    style += "text{fill:currentColor;font-size:12px}line{stroke:currentColor;stroke-width:2.2}svg svg{overflow:visible}"
    style += "".join(line for line in css.splitlines() if line.startswith((".series-", ".dash-")))
    words = [f'<text x="8" y="18" style="font-weight:640">{title}</text>']
    words.append(f'<text x="{int(width) / 2}" y="{int(height) + 40}" text-anchor="middle">{axis}</text>')
    for row, (css_class, name) in enumerate(legend):
        y = int(height) + 60 + 18 * row
        words.append(f'<g class="{css_class}"><line x1="42" x2="68" y1="{y - 4}" y2="{y - 4}"/></g>')
        words.append(f'<text x="76" y="{y}">{name}</text>')
    whole = int(height) + 52 + 18 * len(legend)
    links = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    head = f'<svg {links} width="{width}" height="{whole}" viewBox="0 0 {width} {whole}"><style>{style}</style>'
    inner = svg.replace("<svg ", f'<svg x="0" y="26" width="{width}" height="{height}" ', 1)
    return f"{head}{''.join(words)}{inner}</svg>\n"


def _inline(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` for the middle of a page: the page's colours and font, ids of its own, no size."""
    buffer = io.StringIO()
    nothing: Any = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    body = buffer.getvalue().split("<svg", 1)[1].split(">", 1)[1]
    width, height = (round(72 * inches) for inches in figure.get_size_inches())
    svg = f'<svg viewBox="0 0 {width} {height}" aria-hidden="true">{body}'
    svg = re.sub(r"<defs>\s*<style.*?</defs>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;]*; ", "", svg)
    used = set(re.findall(r'(?:url\(#|href="#)([\w-]+)', svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(#|href="#)([\w-]+)', rf"\g<1>{name}-\g<2>", svg)
    svg = re.sub(r"#0000\d\d", lambda m: _VARIABLES[m[0]], svg)
    return svg.strip()


def matrix_png(confusion: Sequence[Sequence[int]]) -> tuple[str, int]:
    """A data URI of the matrix's shares per row, and the classes that one pixel spans.

    Opacity is the root of the share, so that a rare mistake is seen too; the diagonal has one colour, mistakes another.
    """
    import numpy as np
    from matplotlib.image import imsave

    counts = np.asarray(confusion, dtype=float)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    span = -(-len(shares) // MATRIX_PIXELS)
    pad = -len(shares) % span
    padded = np.pad(shares, (0, pad))
    side = len(padded) // span
    largest = padded.reshape(side, span, side, span)
    right = np.where(np.eye(len(padded), dtype=bool), padded, 0).reshape(side, span, side, span).max((1, 3))
    largest = largest.max((1, 3))
    image = np.empty((side, side, 4), dtype=np.uint8)
    image[..., :3] = np.where((right >= largest)[..., None], _RIGHT, _WRONG)
    image[..., 3] = np.rint(255 * np.sqrt(largest))
    buffer, nothing = io.BytesIO(), dict[str, Any](Software=None)
    imsave(buffer, image, format="png", metadata=nothing)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}", span
