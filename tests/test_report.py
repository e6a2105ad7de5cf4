"""The run's page: what it says of whole, torn and hostile run folders, and that a browser shows it on any screen."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from browser import LOW_CONTRAST, Browser, start_browser
from PIL import Image, ImageDraw

from fastclip.errors import UserError
from fastclip.report import write_report
from fastclip.report.charts import POINTS, thin
from fastclip.report.inputs import read_run
from fastclip.report.page import chance, chance_loss
from fastclip.report.words import duration, number, percent

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
HOSTILE = [
    "<script>alert(1)</script>",
    "\"quoted\" 'and' & <img src=x onerror=alert(2)>",
    "\u0643\u0644\u0628 \u0641\u064a \u0627\u0644\u062d\u062f\u064a\u0642\u0629",  # Arabic, right to left
    "half a pair \ud83d and {{ braces }} $x^2$ {% raw %}",
    "word" * 60,
]


def line(step: int, batch: int = 512, steps: int = 1000, noise: random.Random | None = None, **values: Any) -> dict:
    draw = (noise or random.Random(step)).gauss
    progress = step / steps
    usual = {
        "step": step,
        "epoch": step * batch // 45_455,
        "samples": step * batch,
        "loss": 0.55 + (math.log(batch) - 0.55) * math.exp(-5 * progress) + draw(0, 0.06),
        "logit_scale": 14.3 + 40 * progress**1.3,
        "lr": 1e-3 * min(step / 100, 0.5 + 0.5 * math.cos(math.pi * progress)),
        "grad_norm": abs(0.4 + 6 * math.exp(-14 * progress) + draw(0, 0.08)),
        "samples_per_s": 1551 + draw(0, 60) - 600 * (step == 1),
        "data_wait": abs(draw(0.012, 0.006)),
        "step_time": 0.33,
        "elapsed": 0.33 * step,
        "skipped_steps": 0,
        "skipped_samples": {},
        "source_samples": {},
    }
    return usual | values


def picture(seed: int, size: int = 32) -> str:
    """A data URI of a coloured disc and a square."""
    draw = random.Random(seed)
    image = Image.new("RGB", (size, size), (draw.randrange(200, 256),) * 3)
    shapes = ImageDraw.Draw(image)
    for shape in (shapes.ellipse, shapes.rectangle):
        x, y, half = draw.randrange(6, size - 6), draw.randrange(6, size - 6), draw.randrange(4, 9)
        shape((x - half, y - half, x + half, y + half), fill=tuple(draw.randrange(0, 230) for _ in range(3)))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def zero_shot(top1: float = 0.977, classes: list[str] | None = None, **values: Any) -> dict:
    names = classes or DIGITS
    confusion = [[36 * (i == j) for j in range(len(names))] for i in range(len(names))]
    for true, predicted, count in ((0, 1, 2), (-2, 1, 5)):
        confusion[true][predicted] += count
        confusion[true][true] -= count
    usual = {
        "task": "zero_shot",
        "images": 36 * len(names),
        "top1": top1,
        "top5": 1.0,
        "mean_per_class_recall": 0.9651,
        "classnames": names,
        "templates": ["a handwritten {}", "the digit {}"],
        "confusion": confusion,
        "skipped": {"unreadable_image": 1},
    }
    return usual | values


def retrieval(recall: float = 0.4137, **values: Any) -> dict:
    def side(r: float) -> dict:
        return {"R@1": r, "R@5": min(1.0, 1.9 * r), "R@10": min(1.0, 2.2 * r), "median_rank": 2.0}

    usual = {"task": "retrieval", "images": 1000, "texts": 1000, "skipped": {}}
    return usual | {"image_to_text": side(recall), "text_to_image": side(recall - 0.03)} | values


def evaluation(step: int, sets: dict[str, dict] | None = None) -> dict:
    return {"step": step, "data": "data/demo", "sets": sets or {"digits_test": zero_shot(), "scenes_test": retrieval()}}


def gallery(texts: list[str], step: int = 1000) -> dict:
    matches = [{"key": f"scenes_test-{n:06d}", "score": 0.83 - 0.04 * n, "right": n == 1} for n in range(5)]
    return {
        "step": step,
        "text_to_image": [
            {"text": text, "images": [m | {"image": picture(10 * n + k)} for k, m in enumerate(matches)]}
            for n, text in enumerate(texts)
        ],
        "image_to_text": [
            {
                "key": f"scenes_test-{n:06d}",
                "image": picture(n),
                "texts": [{"text": text, "score": 0.9, "right": n == 0 == k} for k, text in enumerate(texts)],
            }
            for n in range(2)
        ],
    }


CONFIG = {"data": "data/demo", "val": "", "crop_scale": [0.9, 1.0], "model": "ViT-Ti-demo", "global_batch": 512}
CONFIG |= {"chunk_size": 64, "lr": 0.001, "precision": "bf16", "zero_stage": 1, "tensorboard": False}
ENVIRONMENT = {"fastclip": "0.1.0", "commit": "613e59e0aa12", "python": "3.11.2", "torch": "2.13.0", "apex": None}
ENVIRONMENT |= {"processor": "2 x Example CPU", "gpus": ["H100"] * 8, "platform": "Linux-6.1-x86_64"}


def make_run(folder: Path, *, lines: Any = None, evaluations: Any = None, texts: Any = None) -> Path:
    """A run folder as training leaves it; an empty list leaves evaluations or gallery out."""
    run = folder / "demo"
    (run / "eval").mkdir(parents=True)
    usual = [line(step) for step in range(1, 1001)]
    log = "".join(json.dumps(one) + "\n" for one in (usual if lines is None else lines))
    (run / "metrics.jsonl").write_text(log)
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    (run / "ds_config.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    (run / "environment.json").write_text(json.dumps(ENVIRONMENT))
    for one in [evaluation(1000)] if evaluations is None else evaluations:
        (run / "eval" / f"step_{one['step']:08d}.json").write_text(json.dumps(one))
    if texts != []:
        shown = texts or ["a red circle above a blue square", "two green triangles"]
        (run / "eval" / "gallery.json").write_text(json.dumps(gallery(shown)))
    return run


def page_of(run: Path) -> str:
    return write_report(run).read_text("utf-8")


def words_of(page: str) -> str:
    """What a reader sees: tags, style and SVG gone, white space as one blank, hyphens that may break."""
    bare = re.sub(r"<style.*?</style>|<svg.*?</svg>|<[^>]*>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(bare).replace("\u2011", "-").split())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def test_the_page_says_the_figures_first(run: Path) -> None:
    page = page_of(run)
    words = words_of(page)
    headline = words_of(re.search(r"<h1>.*?</h1>", page, re.DOTALL)[0])
    said = "ViT-Ti-demo reaches 97.7% zero-shot top-1 on digits_test and 41.4% image-to-text R@1 on scenes_test"
    assert headline == said
    for figure in (
        "with 8 x H100 for 5 min 30 s: 1,000 steps, 512,000 pairs seen",
        "nats; chance is ln 512 = 6.24",
        "digits_test: 10 classes top-5 100.0%",
        "Image \u2192 text R@1 41.4% R@5 78.6% scenes_test: 1 among 1,000 texts",
        "Text \u2192 image R@1 38.4%",
        "Pairs seen 512,000 1,000 steps",
        "97.7% chance 10.0% 100.0% chance 50.0% 96.5%",
        "360 images, 10 classes, step 1,000; skipped: 1 unreadable image",
        "eight one 5 13.9% zero one 2 5.6% 7 images wrong in all",
        "91.0% chance 1.0%",  # R@10
        "No sample and no step was skipped.",
        "crop_scale [0.9, 1.0]",
        "gpus 8 x H100",
        '"zero_optimization"',
    ):
        assert figure in words, figure
    assert re.search(r"Throughput 1,5\d\d pairs/s median; data wait 1\.\d% of the time", words)
    assert "chance is ln\u00a0512\u00a0=\u00a06.24</text>" in page
    assert chance_loss(read_run(run))[0] == pytest.approx(6.2383, abs=1e-4)
    assert page.count('role="img" aria-label="') == 6
    assert 'aria-label="Loss (nats) over 1,000 steps: 6.' in page


def test_the_page_needs_nothing_else(run: Path) -> None:
    page = page_of(run)
    assert "default-src 'none'" in page
    assert "<script" not in page
    addresses = re.findall(r'(?:src|href|url)\s*[=(]\s*"?([^")\s]+)', page)
    assert {a.split(",")[0][:5] for a in addresses} <= {"data:", *(a[:5] for a in addresses if a.startswith("#"))}
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert {a[1:] for a in addresses if a.startswith("#")} == set(ids)
    assert "#0000" not in re.sub(r"<style.*?</style>", "", page, flags=re.DOTALL), "a stand-in colour is left"


def test_hostile_captions_are_text(tmp_path: Path) -> None:
    sets = {"<b>set</b>": zero_shot(classes=["<i>a</i>", "$b$"], skipped={"<u>": 2}), "{{ 1 }}": retrieval()}
    run = make_run(tmp_path, texts=HOSTILE, evaluations=[evaluation(500, sets), evaluation(1000, sets)])
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"model": "</title><script>alert(3)</script>"}))
    page = page_of(run)
    for tag in ("<script", "<img src=x", "<b>", "<i>", "<u>"):
        assert tag not in page, tag
    for text in HOSTILE[:3]:
        assert text in words_of(page)
    assert "half a pair ? and {{ braces }} $x^2$ {% raw %}" in words_of(page)
    assert "{{ 1 }}" in words_of(page)
    assert 'dir="auto"' in page


def test_images_that_are_no_data_are_not_shown(run: Path) -> None:
    path = run / "eval" / "gallery.json"
    shown = json.loads(path.read_text())
    bad = ["https://example.org/x.png", "data:text/html;base64,AAAA", 'data:image/png;base64,AA"><script>', "", None]
    for match, uri in zip(shown["text_to_image"][0]["images"], bad, strict=True):
        match["image"] = uri
    path.write_text(json.dumps(shown))
    page = page_of(run)
    assert page.count('class="no-image"') == 5
    assert "example.org" not in page
    assert "text/html;base64" not in page


def test_only_small_pngs_show_their_pixels(run: Path) -> None:
    path = run / "eval" / "gallery.json"
    shown = json.loads(path.read_text())
    shown["text_to_image"], shown["image_to_text"] = shown["text_to_image"][:1], []
    shown["text_to_image"][0]["images"][0]["image"] = picture(1, size=200)
    path.write_text(json.dumps(shown))
    assert page_of(run).count('class="pixels"') == 4


def test_right_pairs_are_marked_in_words(run: Path) -> None:
    words = words_of(page_of(run))
    assert words.count("\u2713 true pair") == 1 + 2 + 1  # the legend, one in each text's images, one image's text
    assert "\u2717 the true text is not among these 2" in words


def test_a_torn_last_line_is_ignored(run: Path) -> None:
    whole = page_of(run)
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 1001, "loss": 0.5')
    assert page_of(run) == whole
    with (run / "metrics.jsonl").open("a") as log:
        log.write("\n")
    assert "could not be read and are left out: 1." in page_of(run)


def test_damaged_files_are_named_and_left_out(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[3:5] = ["{", "[1]"]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    (run / "config.yaml").write_text("model: [")
    (run / "environment.json").write_text("[]")
    (run / "eval" / "gallery.json").write_text('{"step": 3}{')
    (run / "eval" / "step_00000500.json").write_text('{"step": 500, "sets": {"x": {"task": "zero_shot"}}}')
    (run / "eval" / "step_00000600.json").write_text(
        json.dumps(evaluation(600, {"a": zero_shot(confusion=[[1]]), "b": retrieval()}))
    )
    (run / "eval" / "step_00000700.json").write_text(json.dumps(evaluation(700, {"c": {"task": "linear_probe"}})))
    words = words_of(page_of(run))
    assert "Lines of metrics.jsonl that could not be read and are left out: 2." in words
    for name in ("config.yaml", "environment.json", "eval/gallery.json", "eval/step_00000500", "eval/step_00000600"):
        assert re.search(rf"{name}\S* could not be read and is left out", words), name
    assert "set c has the task 'linear_probe', which this page does not show" in words
    assert "97.7% zero-shot top-1" in words


def test_a_run_cut_off_early_says_what_is_missing(run: Path) -> None:
    for path in (run / "config.yaml", run / "ds_config.json", run / "environment.json"):
        path.unlink()
    shutil.rmtree(run / "eval")
    (run / "metrics.jsonl").write_text(json.dumps(line(1, loss=6.21)) + "\n")
    page = page_of(run)
    words = words_of(page)
    assert "demo stands at a loss of 6.21 nats after 1 step" in words
    assert words.count("This run has not been evaluated") == 2
    for missing in ("There is no gallery", "There is no config.yaml", "There is no environment.json"):
        assert missing in words
    assert "names no global batch, so the loss of chance is not drawn" in words
    assert page.count("<svg viewBox") == 7


def test_a_run_without_a_line_still_has_a_page(tmp_path: Path) -> None:
    words = words_of(page_of(make_run(tmp_path, lines=[], evaluations=[], texts=[])))
    assert "ViT-Ti-demo has logged no step yet" in words
    assert "metrics.jsonl holds no line" in words
    assert "n/a" in words


def test_losses_that_are_not_finite(tmp_path: Path) -> None:
    lines = [line(step, loss=math.nan if step % 10 == 0 else 2.0) for step in range(1, 101)]
    lines[54] |= {"grad_norm": math.inf, "skipped_steps": 3, "skipped_samples": {"no_caption": 4}}
    lines[-1] |= {"skipped_steps": 3, "skipped_samples": {"no_caption": 4, "unreadable_image": 1200}}
    run = make_run(tmp_path, lines=lines, texts=[])
    page = page_of(run)
    words = words_of(page)
    assert math.isnan(read_run(run).metrics.columns["grad_norm"][54])
    assert "10 of 100 logged losses are not finite" in words
    assert "no caption 4 samples unreadable image 1,200 samples gradient not finite 3 steps" in words
    assert "nan" not in page.lower()


def test_a_mixture_shows_its_sources(tmp_path: Path) -> None:
    lines = [line(step, source_samples={"laion": 3 * step, "web <b>": step}) for step in range(1, 1001)]
    words = words_of(page_of(make_run(tmp_path, lines=lines, texts=[])))
    assert "Source Pairs seen Share laion 3,000 75.0 % web <b> 1,000 25.0 %" in words
    assert "Data by source" not in words_of(page_of(make_run(tmp_path / "one", texts=[])))


def test_a_run_whose_figures_were_never_finite(tmp_path: Path) -> None:
    lines = [line(step, loss=math.nan) for step in range(1, 11)]
    run = make_run(tmp_path, lines=lines, evaluations=[], texts=[])
    assert "stands at no finite loss after 10 steps" in words_of(page_of(run))
    (run / "eval" / "step_00000010.json").write_text(json.dumps(evaluation(10, {"odd": zero_shot(math.nan)})))
    page = page_of(run)
    assert "reaches n/a zero-shot top-1" in words_of(page)
    assert "nan" not in page.lower()


def test_long_runs_are_thinned_in_seconds(tmp_path: Path) -> None:
    noise = random.Random(0)
    lines = [line(step, steps=100_000, noise=noise) for step in range(1, 100_001)]
    lines[70_000]["loss"] = 9.5
    run = make_run(tmp_path, lines=lines)
    started = time.process_time()
    page = page_of(run)
    assert time.process_time() - started < 20
    assert len(page) < 3_000_000
    assert "between 0.3" in page
    assert "and 9.5." in page
    assert "mean of 417 logged lines" in page


def test_thinning_keeps_means_and_extremes() -> None:
    y = [float(i % 7) for i in range(1000)]
    y[123], y[500:505] = 99.0, [math.nan] * 5
    x, mean, low, high = thin(range(1000), y)
    assert len(x) == 200 <= POINTS  # blocks of 5
    assert x[0] == 2
    assert mean[0] == 2
    assert high[24] == 99
    assert low[24] == min(y[120:125])
    assert math.isnan(mean[100])
    assert math.isnan(high[100])


def test_evaluations_over_steps(tmp_path: Path) -> None:
    steps = {200: 0.61, 400: 0.88, 600: 0.97, 800: 0.95}
    evaluations = [
        evaluation(step, {"digits_test": zero_shot(top1), "scenes_test": retrieval(top1 / 2)})
        for step, top1 in steps.items()
    ]
    page = page_of(make_run(tmp_path, evaluations=evaluations))
    words = words_of(page)
    assert "97.0% zero-shot top-1" in words
    assert "best of 4 evaluations, step 600; last 95.0%" in words
    assert 'aria-label="Top-1 over steps, % of images: digits_test 61.0% to 95.0%."' in page
    assert "Image \u2192 text R@1 30.5% to 47.5%" in page
    assert "95.0% chance 10.0%" in words  # the table has the latest
    assert "Evaluated once" not in words


@pytest.mark.parametrize("classes", [21, 1000])
def test_large_confusion_matrices_are_pictures(tmp_path: Path, classes: int) -> None:
    names = [f"class {n}" for n in range(classes)]
    page = page_of(make_run(tmp_path, evaluations=[evaluation(1, {"imagenet": zero_shot(classes=names)})]))
    uri = re.search(r'class="matrix pixels" src="data:image/png;base64,([^"]+)"', page)[1]
    image = Image.open(io.BytesIO(base64.b64decode(uri)))
    span = -(-classes // 250)
    assert image.size == (-(-classes // span),) * 2
    row = (classes - 2) // span
    wrong, right = image.getpixel((1 // span, row)), image.getpixel((row, row))
    assert wrong[3] == round(255 * math.sqrt(5 / 36))
    assert wrong[0] > wrong[2]
    assert right[2] > right[0]
    assert image.getpixel((row // 2, 0))[3] == 0
    words = words_of(page)
    assert f"class {classes - 2} class 1 5 13.9% class 0 class 1 2 5.6%" in words
    assert ("One pixel shows" in words) == (classes > 250)
    assert 'class="confusion"' not in page


def test_chance_of_retrieval() -> None:
    assert chance(5, 1000) == pytest.approx(5 / 1000)
    assert chance(10, 4) == 1
    assert chance(1, 5000, right=5) == pytest.approx(1 / 1000)
    assert chance(2, 4, right=2) == pytest.approx(1 - 1 / 6)
    assert math.isnan(chance(1, 0))


def test_numbers_as_a_person_reads_them() -> None:
    seconds = {0.2: "0 s", 42: "42 s", 330.4: "5 min 30 s", 7205: "2 h", 93_600: "1 d 2 h", None: "n/a"}
    assert {value: duration(value) for value in seconds} == seconds
    values = {6.2383: "6.24", 0.00025: "2.5e-4", 99.99: "100", 1234.5: "1,234", 0: "0", math.nan: "n/a"}
    assert {value: number(value) for value in values} == values
    shares = {0.4137: "41.4%", 0.0002: "<0.1%", 0: "0.0%", 1: "100.0%", math.nan: "n/a"}
    assert {value: percent(value) for value in shares} == shares


def test_same_inputs_same_bytes(run: Path) -> None:
    here = write_report(run).read_bytes()
    code = "import sys; from fastclip.report import write_report; write_report(sys.argv[1])"
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, str(run)], check=True, env=env, timeout=120)
    assert (run / "report.html").read_bytes() == here


@pytest.mark.parametrize("broken", ["fastclip.report.page.render", "os.replace"])
def test_the_old_page_stays_until_the_new_one_is_whole(run: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    (run / "report.html").write_text("old")

    def fail(*args: Any) -> None:
        raise RuntimeError("broken on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(broken, fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            write_report(run)
    assert (run / "report.html").read_text() == "old"
    assert not list(run.glob(".report*"))
    assert "reaches" in page_of(run)


def test_a_folder_without_a_log_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing-here has no metrics\.jsonl"):
        write_report(tmp_path / "nothing-here")


@pytest.mark.parametrize("package", ["jinja2", "matplotlib", "yaml"])
def test_a_missing_extra_is_named(run: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package}: pip install 'fastclip-kernels\[eval\]'"):
        write_report(run)


def test_matplotlib_is_left_as_it_was(run: Path) -> None:
    code = (
        "import sys, matplotlib; from fastclip.report import write_report; "
        "matplotlib.rcParams['font.size'] = 31.0; write_report(sys.argv[1]); "
        "assert matplotlib.rcParams['font.size'] == 31.0; assert matplotlib.rcParams['svg.fonttype'] == 'path'; "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(run)], check=True, timeout=120)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = start_browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything on it, hostile texts too."""
    many = {f"robust_{n}": zero_shot(0.5 + n / 20) for n in range(2)} | {"scenes_test": retrieval()}
    large = {"imagenet": zero_shot(classes=[f"class {n}" for n in range(100)]), "<b>odd</b>": retrieval(0.2)}
    evaluations = [evaluation(step, many | large) for step in (300, 600, 1000)]
    lines = [line(step, skipped_samples={"no_caption": 2}) for step in range(1, 1001)] + [line(1001, loss=math.nan)]
    return write_report(make_run(tmp_path_factory.mktemp("full"), lines=lines, evaluations=evaluations, texts=HOSTILE))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("bare"), lines=[], evaluations=[], texts=[])
    (run / "config.yaml").unlink()
    return write_report(run)


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 800, 1280])
@pytest.mark.parametrize("which", ["full", "bare"])
def test_a_browser_shows_the_page(
    browser: Browser, request: pytest.FixtureRequest, which: str, width: int, scheme: str
) -> None:
    page: Path = request.getfixturevalue(which)
    browser.open(page, width, scheme=scheme)
    assert browser.evaluate("document.querySelector('h1').checkVisibility()")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(LOW_CONTRAST) == []
    broken = "[...document.images].filter(image => !image.complete || !image.naturalWidth).length"
    assert browser.evaluate(broken) == 0
    shown = "[...document.querySelectorAll('.chart [role=img] svg')].filter(svg => svg.checkVisibility())"
    inks = browser.evaluate(f"{shown}.map(svg => getComputedStyle(svg.querySelector('text')).fill)")
    ink = "rgb(22, 24, 29)" if scheme == "light" else "rgb(236, 238, 242)"
    assert inks == [ink] * (9 if which == "full" else 0)
    if which == "full" and width == 390:
        box = "document.querySelector('.scroll:has(.confusion)')"
        assert browser.evaluate(f"{box}.scrollWidth > {box}.clientWidth")
    assert browser.evaluate("document.scripts.length") == 0
    reported = [event["method"] for event in browser.events]
    assert "Page.javascriptDialogOpening" not in reported
    assert "Runtime.consoleAPICalled" not in reported
    assert "Runtime.exceptionThrown" not in reported
    entries = [event["params"]["entry"] for event in browser.events if event["method"] == "Log.entryAdded"]
    assert not entries
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert {url[:5] for url in asked} <= {"file:", "data:"}
