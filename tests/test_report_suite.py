"""The charts beyond accuracy, in a run's page and in that of `fastclip eval --suite`, and what damaged figures do."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import LOW_CONTRAST, Browser, start_browser
from test_report import HOSTILE, evaluation, make_run, retrieval, zero_shot

from fastclip.report import write_report
from fastclip.report.eval_page import write_evaluation


def suite(name: str = "digits_test") -> dict[str, Any]:
    bins = [[10 * (n > 8), n / 15 + 0.03, n / 15] for n in range(15)]
    points = [[n / 10 - 1, (n * 7 % 11) / 10 - 0.5] for n in range(20)]
    return {
        name: {
            "linear_probe": {
                "top1": 0.991,
                "C": 3.16,
                "train_images": 1437,
                "few_shot": [[1, 0.5, 0.4, 0.6], [2, 0.7, 0.6, 0.8], [4, 0.9, 0.8, 1.0]],
            },
            "corruptions": {kind: [0.9 - 0.1 * n for n in range(5)] for kind in ("noise", "blur")},
            "calibration": {
                "logit_scale": 15.5,
                "ece": 0.018,
                "best_scale": 23.7,
                "entropy": 0.2,
                "bins": bins,
                "scales": [[s, 0.1, 1.0, 2.0 - s / 1000] for s in (1, 10, 100, 1000)],
            },
        },
        "scenes_test": {
            "clouds": {
                "gap": 0.07,
                "alignment": 0.14,
                "explained": 0.2,
                "uniformity": {"images": -3.4, "texts": -3.5},
                "picture": {"images": points, "texts": points[::-1]},
            }
        },
    }


def written(folder: Path, found: Any) -> Path:
    sets = {"digits_test": zero_shot(), "scenes_test": retrieval(), HOSTILE[0]: zero_shot()}
    run = make_run(folder, lines=[], evaluations=[evaluation(10, sets)], texts=["a"])
    (run / "eval" / "suite.json").write_text(json.dumps(found))
    return write_report(run)


def test_a_runs_page_shows_them(tmp_path: Path) -> None:
    page = written(tmp_path, {"step": 10, "sets": suite()}).read_text()
    for title in ("Linear probe, ", "Corruptions, ", "Reliability, ", "ECE over scale, ", "Entropy over scale, "):
        assert f"<bdi>{title}digits_test</bdi>" in page
    assert "<bdi>Features, scenes_test</bdi>" in page
    assert "99.1% with all 1,437" in page
    assert "ECE 1.8%" in page
    assert "zero-shot 97.7%" in page


@pytest.mark.parametrize("found", [{"step": 1}, {"sets": {"a": {"linear_probe": {"top1": "x"}}}}, [], {"sets": 3}])
def test_damaged_figures_become_a_note(tmp_path: Path, found: Any) -> None:
    page = written(tmp_path, found).read_text()
    assert "eval/suite.json could not be read and is left out" in page
    assert "There are no figures here" in page


def results() -> dict[str, Any]:
    sets = {"digits_test": zero_shot(), "scenes_test": retrieval(), HOSTILE[0]: zero_shot(0.4)}
    several = {
        "task": "multi_label",
        "images": 5,
        "classnames": ["a", "b"],
        "mean_average_precision": 0.5,
        "skipped": {},
    }
    return {
        "checkpoint": "runs/demo",
        "data": "data/demo",
        "precision": "fp32",
        "package": "0.1",
        "sets": sets | {"voc": several},
        "suite": suite() | suite(HOSTILE[0]),
        "path": [{"alpha": n / 2, "sets": sets} for n in range(3)],
        "tasks": {"cars": ["top1", 0.5]},
        "missing": ["pets"],
        "task_list": "datacomp",
        "mean": 0.5,
        "robustness": {
            "reference": "a",
            "shifts": {"b": {"reference": 0.5, "shift": 0.6, "expected": 0.5, "effective_robustness": 0.1}},
        },
        "bias": {
            "prompts": [HOSTILE[1]],
            "members": {"red": 2},
            "mean_cosine": {"red": {HOSTILE[1]: 0.1}},
            "nearest": {"red": {HOSTILE[1]: 1.0}},
            "effect_size": {},
        },
    }


def test_an_evaluations_page_and_charts(tmp_path: Path) -> None:
    path = write_evaluation(tmp_path / "out", results())
    page = path.read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "+10.0 points" in page
    assert "Not on disk: pets." in page
    assert "1 of 2 tasks of datacomp, mean 50.0%" in page
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results()
    charts = sorted((tmp_path / "out").glob("chart-*.svg"))
    assert len(charts) == 12
    for chart in charts:
        root = ElementTree.fromstring(chart.read_text())
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert not re.findall(r"#0000\d\d", chart.read_text())
    assert write_evaluation(tmp_path / "again", results()).read_bytes() == path.read_bytes()


def test_a_page_of_what_every_evaluation_has(tmp_path: Path) -> None:
    always = ("checkpoint", "data", "precision", "package", "sets")
    page = write_evaluation(tmp_path, {name: value for name, value in results().items() if name in always}).read_text()
    assert "Zero-shot classification" in page
    assert "Effective robustness" not in page
    assert "Not on disk" not in page
    assert not list(tmp_path.glob("chart-*.svg"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = start_browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_pages(browser: Browser, tmp_path: Path, width: int, scheme: str) -> None:
    for page in (write_evaluation(tmp_path / "out", results()), written(tmp_path, {"step": 1, "sets": suite()})):
        browser.open(page, width, scheme=scheme)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert browser.evaluate(LOW_CONTRAST) == []
        assert browser.evaluate("document.querySelectorAll('#beyond .chart').length") in (6, 12)
        assert not [event for event in browser.events if event["method"] == "Log.entryAdded"]
    browser.open((tmp_path / "out" / "chart-0-corruptions.svg"), width, scheme=scheme)
    assert browser.evaluate("document.documentElement.tagName") == "svg"
