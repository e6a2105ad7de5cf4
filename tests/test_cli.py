"""The `fastclip` command as people run it: help, exit statuses, what is printed, and every mistake in one line."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import Run, runner
from data_helpers import image_file, sample, write_samples
from PIL import Image

from fastclip.cli import build, loading
from fastclip.cli.main import USER_ERRORS, VERBS
from fastclip.cli.text import megabytes, printable, table
from fastclip.data import ShardIndex, train_tokenizer, write_shard
from fastclip.data.demo.captions import NUMBER_WORDS, ZERO_SHOT_TEMPLATES
from fastclip.data.demo.samples import Part
from fastclip.data.loader import captions_of
from fastclip.models import create_model, get_config, save_model
from fastclip.ops import _cuda, _extension

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the beginning of each part of the embedded data set, and an untrained run on it."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "data").mkdir()
    captions = []
    for name, count in {"train": 20, "digits_test": 40, "scenes_test": 60}.items():
        samples = [Part(name, seed=0, scenes=20).sample(number) for number in range(count)]
        write_shard(folder / f"data/{name}-00000.tar", samples)
        captions += [caption for _, files in samples for caption in json.loads(files["json"])["captions"]]
    train_tokenizer(captions, folder / "data/tokenizer.json", 1024, context_length=32)
    classes = {"classnames": NUMBER_WORDS, "templates": ZERO_SHOT_TEMPLATES}
    (folder / "data/digits_test.classes.json").write_text(json.dumps(classes))
    torch.manual_seed(0)
    step = folder / "runs/x/checkpoints/step_00000007"
    tokenizer = folder / "data/tokenizer.json"
    config = get_config("debug")
    save_model(step, create_model(config), config, {"tokenizer.json": tokenizer})
    (folder / "runs/x/latest").write_text("step_00000007\n")
    (folder / "runs/x/config.yaml").write_text("data: data\nmodel: debug\n")
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(capsys)


def fails(outcome: tuple[int, str, str], *words: str) -> None:
    """Status 2, nothing but one line on stderr, which has `words`."""
    status, _, err = outcome
    assert status == 2
    assert len(err.splitlines()) == 1, err
    for word in words:
        assert word in err, err


def command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    program = "import sys; from fastclip.cli.main import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, **options)


# The command


def test_help_is_one_fast_screen() -> None:
    start = time.monotonic()
    done = command("--help")
    assert time.monotonic() - start < 1.5
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    for verb in VERBS:
        group, _, member = verb.partition(" ")
        line = next(line for line in lines if line.startswith(f"  {group} "))
        assert not member or f" {member}" in line


def test_the_command_imports_what_its_verb_needs_only() -> None:
    program = (
        "import sys; from fastclip.cli.main import main; status = main(sys.argv[1:]); "
        "heavy = {'torch', 'numpy', 'deepspeed'} & set(sys.modules); assert not heavy, heavy; sys.exit(status)"
    )
    for arguments in (["--version"], *([*verb.split(), "--help"] for verb in VERBS)):
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_version_is_that_of_the_package(run: Run) -> None:
    from fastclip import __version__

    assert run("--version") == (0, f"fastclip {__version__}\n", "")


def test_the_entry_point_is_this_main() -> None:
    assert 'fastclip = "fastclip.cli.main:main"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "train"])
def test_help_of_a_verb_says_every_option_and_an_example(run: Run, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = run(*verb.split(), "--help")
    assert status == 0
    assert f"Example: fastclip {verb}" in out
    assert max(map(len, out.splitlines())) <= 80
    kind = getattr(import_module(VERBS[verb][0]), verb.split()[-1].capitalize())
    named = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(kind)}
    options = dict(re.findall(r"^. (--[a-z-]+)(.*?)(?=^. --|^.---|\Z)", out, flags=re.M | re.S))
    without_a_name = {"--sentence", "--directory", "--shards", "--source", "--target"}  # on the command line
    assert set(options) == named - without_a_name
    for name, text in options.items():
        assert "(default:" in text, name


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["serch"], "'search'"),
        (["data", "stat"], "'data stats'"),
        (["stats"], "'data stats'"),
        (["--verson"], "'--version'"),
        (["docter", "--json"], "'doctor'"),
    ],
)
def test_an_unknown_verb_names_the_nearest(run: Run, arguments: list[str], near: str) -> None:
    fails(run(*arguments), "unknown", f"did you mean {near}?")


def test_a_verb_like_no_other(run: Run) -> None:
    status, _, err = run("zzzzzz")
    assert (status, err) == (2, "fastclip: unknown verb 'zzzzzz' (fastclip --help lists the verbs)\n")


def test_without_a_verb_the_help_is_an_error(run: Run) -> None:
    status, out, err = run()
    assert (status, out) == (2, "")
    assert err.startswith("usage: fastclip VERB")
    status, out, err = run("data")
    assert (status, out) == (2, "")
    assert "data stats" in err
    assert "search" not in err
    status, out, err = run("data", "--help")
    assert (status, err) == (0, "")
    assert "data stats" in out


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["search", "x", "--tpo", "3"], "--top INT"),
        (["eval", "--checkpiont", "x"], "--checkpoint PATH"),
        (["data", "stats", "x", "--jsn"], "--json"),
        (["train", "--stepz", "3"], "--steps INT"),
    ],
)
def test_an_unknown_option_names_the_nearest(run: Run, arguments: list[str], near: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert near in err


@pytest.mark.parametrize(
    "arguments", [["search", "x", "--top", "five"], ["eval", "--precision", "fp8"], ["eval", "--data"], ["build", "it"]]
)
def test_a_value_that_is_none(run: Run, arguments: list[str]) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert "Traceback" not in err


def test_train_is_the_module(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import fastclip.training.__main__ as training

    given = []
    monkeypatch.setattr(training, "main", lambda arguments: given.append(arguments) or 7)
    assert run("train", "--recipe", "demo", "--steps", 3) == (7, "", "")
    assert given == [["--recipe", "demo", "--steps", "3"]]


def test_train_tells_a_mistake(run: Run) -> None:
    fails(run("train", "--recipe", "dmo"), "did you mean 'demo'?")


@pytest.mark.parametrize("error", [RuntimeError("it broke"), KeyError("it broke"), OSError("it broke")])
def test_a_fault_shows_its_traceback(run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken(arguments: list[str]) -> None:
        raise error

    monkeypatch.setattr(build, "main", broken)
    status, _, err = run("build")
    assert status == 1
    assert "Traceback" in err
    assert "it broke" in err


@pytest.mark.parametrize("kind", USER_ERRORS)
def test_a_mistake_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    def mistaken(arguments: list[str]) -> None:
        raise kind("x must be y")

    monkeypatch.setattr(build, "main", mistaken)
    assert run("build") == (2, "", "fastclip build: x must be y\n")


def test_a_missing_package_says_how_to_get_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def bare(arguments: list[str]) -> None:
        raise ModuleNotFoundError("No module named 'yaml'", name="yaml")

    monkeypatch.setattr(build, "main", bare)
    fails(run("build"), "needs yaml", "pip install 'fastclip-kernels[train]'")


def test_ctrl_c_is_no_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(arguments: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "main", stopped)
    assert run("build") == (130, "", "fastclip build: interrupted\n")


def test_a_reader_that_goes_away_is_no_traceback(place: Path) -> None:
    program = "import sys; from fastclip.cli.main import main; sys.exit(main())"
    arguments = [sys.executable, "-c", program, "data", "stats", str(place / "data"), "--json"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=buffered)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(60) == 1
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()


# data


def test_data_demo_writes_once(run: Run, tmp_path: Path) -> None:
    arguments = ("data", "demo", tmp_path / "d", "--scenes", 3, "--workers", 1)
    status, out, _ = run(*arguments)
    assert status == 0
    assert "digits_test 360, scenes_test 1,000: written in" in out
    assert (tmp_path / "d/manifest.json").is_file()
    status, out, _ = run(*arguments)
    assert status == 0
    assert "was there already" in out
    status, out, _ = run(*arguments, "--seed", 1)
    assert "written in" in out


def test_data_demo_mistakes(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    fails(run("data", "demo", tmp_path / "file"), "must be a directory")
    fails(run("data", "demo", tmp_path, "--scenes", 0), "scenes", "at least 1, was 0")
    status, _, err = run("data", "demo")
    assert status == 2
    assert "DIR" in err


def test_data_stats_for_people(run: Run, here: Path) -> None:
    status, out, _ = run("data", "stats", "data")
    assert status == 0
    blocks = {block.split(":")[0]: block for block in out.split("\n\n")}
    assert list(blocks) == ["digits_test", "scenes_test", "train"]
    assert blocks["digits_test"].startswith("digits_test: 40 samples, 1 shard, ")
    assert "  images    PNG; 64 x 64; 0 unreadable (of 40 read)\n" in blocks["digits_test"]
    assert "160, 4 an image" in blocks["digits_test"]
    assert " of 32; 0 captions are cut\n" in blocks["digits_test"]
    assert max(map(len, out.splitlines())) <= 80


def test_data_stats_for_machines(run: Run, tmp_path: Path, place: Path) -> None:
    """Every figure, on shards whose content is known, damage included."""
    long = {"json": json.dumps({"captions": ["red " * 40, "red " * 31, "red " * 30]}).encode()}
    broken = {
        "s1": {"png": image_file(1, (20, 10), form="JPEG")},
        "s2": {"png": b"no image"},
        "s3": {"txt": None, "json": b"{}"},
        "s4": {"txt": b"  ", "json": b"{}"},
        "s5": {"png": None},
        "s6": long,
    }
    write_samples(tmp_path / "d", 9, shards=2, **broken)
    write_shard(tmp_path / "d/00000.tar", [sample(0)])
    tokenizer = place / "data/tokenizer.json"
    status, out, _ = run("data", "stats", tmp_path / "d", "--json", "--tokenizer", tokenizer)
    assert status == 0
    report = json.loads(out)
    assert report["tokenizer"] == str(tokenizer)
    assert report["sets"]["shards"]["samples"] == 1
    train = report["sets"]["train"]
    assert (train["samples"], train["usable"], train["shards"]) == (8, 6, 2)
    assert train["bytes"] == sum(path.stat().st_size for path in (tmp_path / "d").glob("train-*.tar"))
    assert train["skipped"] == {"missing_image": 1, "missing_caption": 1, "empty_caption": 1}
    assert train["images"]["unreadable"] == 1
    assert train["images"]["formats"] == {"PNG": 6, "JPEG": 1}
    assert train["images"]["sizes"] == {"8 x 8": 6, "20 x 10": 1}
    assert train["captions"]["per_image"] == {"3": 6}
    assert train["captions"]["count"] == train["captions"]["distinct"] == 18
    assert train["tokens"]["context_length"] == 32
    assert train["tokens"]["cut"] == 2  # 42 and 33 tokens; 32 fit
    assert train["tokens"]["max"] == 42


def test_data_stats_quantiles_and_duplicates(run: Run, tmp_path: Path, place: Path) -> None:
    shard = [sample(n, json=None, txt=b"red" if n < 19 else b"red red red") for n in range(20)]
    write_shard(tmp_path / "x-0.tar", shard)
    _, out, _ = run("data", "stats", tmp_path / "x-0.tar", "--json", "--tokenizer", place / "data")
    figures = json.loads(out)["sets"]["x"]
    assert figures["tokens"] == {"p50": 3, "p95": 3, "max": 5, "context_length": 32, "cut": 0}
    assert figures["captions"]["distinct"] == 2
    assert figures["captions"]["most_common"] == [["red", 19]]
    status, out, _ = run("data", "stats", tmp_path / "x-0.tar")
    assert status == 0
    assert "90.0% repeat another" in out
    assert "give --tokenizer" in out


def test_data_stats_mistakes(run: Run, tmp_path: Path) -> None:
    fails(run("data", "stats"), "SHARDS is empty")
    fails(run("data", "stats", tmp_path / "none"), "does not exist")
    fails(run("data", "stats", tmp_path), "holds no *.tar file")
    (tmp_path / "x-0.tar").write_bytes(b"no tar")
    fails(run("data", "stats", tmp_path), "no sample")
    write_shard(tmp_path / "x-0.tar", [sample(0)])
    fails(run("data", "stats", tmp_path, "--tokenizer", tmp_path / "t.json"), "t.json does not exist")


# eval


def test_eval_prints_and_writes_the_figures(run: Run, here: Path, tmp_path: Path) -> None:
    out_file = tmp_path / "deep/figures.json"
    status, out, err = run("eval", "--checkpoint", "runs/x", "--data", "data", "--out", out_file)
    assert (status, err) == (0, "")
    figures = json.loads(out_file.read_text())
    assert figures["checkpoint"] == "runs/x/checkpoints/step_00000007"
    digits, scenes = figures["sets"]["digits_test"], figures["sets"]["scenes_test"]
    row = next(line for line in out.splitlines() if line.startswith("digits_test"))
    shares = [f"{digits[key]:.1%}" for key in ("top1", "top5", "mean_per_class_recall")]
    assert row.split() == ["digits_test", "40", "10", *shares]
    rows = [line.split() for line in out.splitlines() if line.startswith("scenes_test")]
    for row, way in zip(rows, ("image_to_text", "text_to_image"), strict=True):
        wanted = [f"{scenes[way][key]:.1%}" for key in ("R@1", "R@5", "R@10")]
        assert row == ["scenes_test", *way.split("_"), "60", *wanted, f"{scenes[way]['median_rank']:g}"]
    assert max(map(len, out.splitlines()[1:-1])) <= 80
    assert not (here / "runs/x/eval").exists()


def test_eval_is_of_the_newest_run_on_its_data_by_default(run: Run, here: Path, tmp_path: Path) -> None:
    _, asked, _ = run("eval", "--checkpoint", "runs/x/checkpoints/step_00000007/model.safetensors", "--data", "data")
    status, default, _ = run("eval")
    assert status == 0
    assert default.splitlines()[0] == "runs/x/checkpoints/step_00000007 on data (fp32, cpu)"
    assert default.splitlines()[2:8] == asked.splitlines()[2:8]
    encoder = loading.load_encoder(loading.find_source("", ""), "", "bf16", 3)
    assert (encoder.dtype, encoder.batch_size) == (torch.bfloat16, 3)


def test_the_newest_run_is_the_one_written_last(tmp_path: Path) -> None:
    for age, name in enumerate(("b", "c", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "latest").touch()
        os.utime(tmp_path / name / "latest", (1000 - age, 1000 - age))
    assert loading.newest_run(tmp_path) == tmp_path / "b"


def test_the_data_of_a_run(here: Path, tmp_path: Path) -> None:
    step = tmp_path / "checkpoints/step_00000001"
    step.mkdir(parents=True)
    (step / "model.safetensors").touch()
    for text, folder in (
        ("val: data", "data"),
        ("data: data/train-*.tar", "data"),
        ("{data: nowhere, val: data}", "data"),
    ):
        (tmp_path / "config.yaml").write_text(text)
        for checkpoint in (tmp_path, step, step / "model.safetensors"):
            assert loading.find_source(str(checkpoint), "").data == Path(folder)
            assert loading.find_source(str(checkpoint), "other").data == Path("other")


def test_a_tokenizer_that_is_asked_for_wins(here: Path, tmp_path: Path) -> None:
    source = loading.find_source("runs/x", "data")
    assert loading.load_encoder(source, "", "fp32", 3).tokenizer.context_length == 32
    with pytest.raises(FileNotFoundError, match=r"other\.json"):
        loading.load_encoder(source, str(tmp_path / "other.json"), "fp32", 3)


def test_a_tokenizer_with_more_tokens_than_the_model_knows(run: Run, here: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(
        get_config("debug"), text=dataclasses.replace(get_config("debug").text, vocab_size=520)
    )
    save_model(tmp_path, create_model(config), config, {"tokenizer.json": "data/tokenizer.json"})
    fails(run("eval", "--checkpoint", tmp_path, "--data", "data"), "tokens, the model knows 520 only")


def test_eval_mistakes(run: Run, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails(run("eval", "--checkpoint", "runs/none"), "no checkpoint at runs/none", "`make demo` trains")
    fails(run("eval", "--checkpoint", "data"), "no checkpoint in data")
    fails(run("eval", "--checkpoint", "data/tokenizer.json"), "not part of a run", "give --data")
    fails(run("eval", "--checkpoint", "data/tokenizer.json", "--data", "data"), "model must be named")
    fails(
        run("eval", "--checkpoint", "data/tokenizer.json", "--data", "data", "--model", "debugg"),
        "did you mean 'debug'?",
    )
    fails(run("eval", "--checkpoint", "data/tokenizer.json", "--data", "data", "--model", "debug"), "cannot be read as")
    fails(run("eval", "--data", "nowhere"), "nowhere")
    fails(run("eval", "--data", "runs"), "no held-out data in runs")
    fails(run("eval", "--out", tmp_path), "--out must be a file")
    fails(run("eval", "--batch-size", 0), "--batch-size must be at least 1, was 0")
    monkeypatch.chdir(tmp_path)
    fails(run("eval"), "there is no run in runs/", "`make demo` trains one", "--checkpoint")


def test_a_run_whose_data_is_gone(run: Run, here: Path, tmp_path: Path) -> None:
    config = get_config("debug")
    step = tmp_path / "checkpoints/step_00000001"
    save_model(step, create_model(config), config)
    (tmp_path / "config.yaml").write_text("data: gone/shards\n")
    fails(run("eval", "--checkpoint", tmp_path), "'gone/shards'", "give --data")
    fails(run("eval", "--checkpoint", tmp_path, "--data", "data"), "no tokenizer.json in", "give --tokenizer")
    assert run("eval", "--checkpoint", tmp_path, "--data", "data", "--tokenizer", "data")[0] == 0


# search


def test_search_finds_and_saves_images(run: Run, here: Path, tmp_path: Path) -> None:
    saved = tmp_path / "found"
    arguments = ("search", "a red circle above a blue square", "--checkpoint", "runs/x", "--data", "data")
    status, out, err = run(*arguments, "--top", 3, "--save", saved)
    assert (status, err) == (0, "")
    assert "(digits_test 40, scenes_test 60 images)" in out
    rows = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines() if re.match(r" +\d ", line)]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    scores = [float(row[1]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    files = sorted(saved.iterdir())
    assert [file.name for file in files] == [f"0{rank}_{row[2]}.png" for rank, row in enumerate(rows, 1)]
    index = ShardIndex(["data/digits_test-00000.tar", "data/scenes_test-00000.tar"])
    samples = {index.key(number): index.read(number) for number in range(len(index))}
    for file, row in zip(files, rows, strict=True):
        assert file.read_bytes() == samples[row[2]].image
        assert row[3] == captions_of(samples[row[2]])[0]
    assert run("search", *arguments[1].split())[1].splitlines()[2:6] == out.splitlines()[2:6]  # words without quotes


def test_search_by_image_finds_captions(run: Run, here: Path, tmp_path: Path) -> None:
    Image.new("RGB", (90, 70), "red").save(tmp_path / "red.jpg")
    status, out, _ = run("search", "--image", tmp_path / "red.jpg", "--top", 4)
    assert status == 0
    assert "caption for" in out
    assert len([line for line in out.splitlines() if re.match(r" +\d ", line)]) == 4


def test_search_says_when_a_sentence_is_cut(run: Run, here: Path) -> None:
    status, _, err = run("search", "red " * 40)
    assert status == 0
    assert err == "The sentence has 40 tokens, the model reads the first 30.\n"


def test_search_mistakes(run: Run, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no.png").write_bytes(b"no image")
    fails(run("search"), "give a sentence")
    fails(run("search", " "), "give a sentence")
    fails(run("search", "x", "--image", tmp_path / "no.png"), "not both")
    fails(run("search", "--image", tmp_path / "none.png"), "there is no such file")
    fails(run("search", "--image", tmp_path / "no.png"), "must be a PNG, JPEG, WebP or BMP file")
    fails(run("search", "--image", tmp_path / "no.png", "--save", tmp_path), "leave one out")
    fails(run("search", "x", "--save", tmp_path / "no.png"), "--save must be a folder")
    fails(run("search", "x", "--top", 0), "--top must be at least 1")
    fails(run("search", "x", "--checkpoint", "runs/none"), "`make demo` trains")
    fails(run("search", "x", "--data", tmp_path), "no held-out data")
    monkeypatch.chdir(tmp_path)
    fails(run("search", "x"), "there is no run in runs/", "`make demo` trains one")


def test_names_of_saved_files_stay_in_their_folder() -> None:
    from fastclip.cli.search import _file_name

    assert _file_name(3, "../a b/\u00e9", image_file(0)) == "03_.._a_b__.png"
    assert _file_name(12, "k", image_file(0, form="JPEG")) == "12_k.jpg"
    assert _file_name(1, "k", image_file(0, form="WEBP")) == "01_k.webp"
    assert _file_name(1, "k", b"?") == "01_k.bin"


# build


def test_build_says_where_and_how_long(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "missing", lambda: None)
    monkeypatch.setattr(_extension, "build", lambda: [Path("some/_C.so")])
    monkeypatch.setattr(_extension, "load", lambda: None)
    monkeypatch.setattr(_cuda, "missing", lambda: None)
    monkeypatch.setattr(_cuda, "build", lambda: "")
    monkeypatch.setattr(_cuda, "load", lambda: object())
    status, out, _ = run("build")
    assert status == 0
    assert re.search(r"Built some/_C.so in \d+ s", out)
    assert re.search(r"Built \S*/_cuda_sm90.so in \d+ s", out)
    monkeypatch.setattr(_cuda, "load", lambda: "it is for another machine")
    assert run("build")[0] == 1
    monkeypatch.setattr(_cuda, "missing", lambda: "there is no nvcc")
    status, out, _ = run("build")
    assert status == 0
    assert out.endswith("The GPU kernels are left out: there is no nvcc\n")
    monkeypatch.setattr(_extension, "load", lambda: "it is for another machine")
    assert run("build")[0] == 1


def test_build_without_a_compiler(tmp_path: Path) -> None:
    done = command("build", env={**os.environ, "PATH": str(tmp_path)})
    assert done.returncode == 2
    assert done.stderr.startswith("fastclip build: the kernels cannot be built: there is no C++ compiler")
    assert done.stdout == ""


# text


def test_tables_and_words(monkeypatch: pytest.MonkeyPatch) -> None:
    assert table([("a", "bb"), ("ccc", 1)], indent=" ") == " a    bb\n ccc   1"
    assert printable("a\n\x1b[31m b\ud800") == "a ?[31m b?"
    assert [megabytes(size) for size in (999, 2_500_000, 3e9)] == ["1.0 kB", "2.5 MB", "3.0 GB"]
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "12")
    assert table([("a", "bb cc dd ee ff"), ("g", "h")], left=(0, 1)) == "a  bb cc dd\n   ee ff\ng  h"
