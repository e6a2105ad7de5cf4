"""A user's mistake: exit status 2, one message that names what it was, and nothing left behind."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from contrastive_loss_helpers import run_on_ranks
from training_helpers import lines, options, small_data, this_rank

from fastclip.errors import UserError
from fastclip.models import create_model, get_config
from fastclip.models.checkpoint import save_model
from fastclip.training.__main__ import main
from fastclip.training.config import TrainConfig
from fastclip.training.start import prepare


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("small") / "data")


@pytest.fixture(scope="module")
def done(data: Path) -> Path:
    """A run of two steps."""
    out = data.parent / "done"
    assert main(options(data, out, engine="torch", steps=2)) == 0
    return out


@pytest.fixture(scope="module")
def other_weights(data: Path) -> Path:
    """A model whose embedding has another size than the runs'."""
    folder = data.parent / "other"
    config = dataclasses.replace(get_config("debug"), embed_dim=32)
    save_model(folder, create_model(config), config)
    return folder


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "missing data": ({"data": "/nowhere"}, "'/nowhere' does not exist"),
    "no data": ({"data": ""}, "--data is missing"),
    "empty folder": ({"data": "{tmp}"}, "holds no *.tar file"),
    "empty glob": ({"data": "{tmp}/*.tar"}, "no file matches"),
    "model": ({"model": "debgu"}, "unknown model 'debgu'; did you mean 'debug'?"),
    "recipe": ({"recipe": "dmeo"}, "unknown recipe 'dmeo'; did you mean 'demo'?"),
    "option": ({"chunksize": 3}, "--chunk-size"),
    "value": ({"steps": 0}, "steps must be at least 1, was 0"),
    "choice": ({"engine": "jax"}, "invalid choice 'jax'"),
    "config key": ({"config": "{yaml}"}, "unknown key 'chunksize'; did you mean 'chunk_size'?"),
    "batch": ({"global_batch": 65}, "global_batch: was 65; it must be at most 64"),
    "tokenizer": ({"tokenizer": "ViT-B-32"}, "has 49408 tokens, model debug embeds 1024"),
    "val": ({"val": "/nowhere"}, "--val /nowhere is not a folder"),
    "fp16": ({"precision": "fp16"}, "precision fp16 needs loss scaling"),
    "out": ({"out": "{yaml}"}, "is a file"),
    "init": ({"init": "/nowhere"}, "no checkpoint at /nowhere"),
    "init of another model": ({"init": "{other}"}, "does not fit the model"),
    "resume": ({"resume": "/nowhere"}, "no checkpoint at /nowhere"),
    "resume of weights": ({"resume": "{other}"}, "has no manifest.json"),
    "resume another model": (
        {"resume": "{done}", "model": "demo"},
        "another architecture than --model: embed_dim is 64",
    ),
    "resume other data": ({"resume": "{done}", "global_batch": 8}, "global_batch: was 8; it must be 16"),
    "resume in bf16": ({"resume": "{done}", "precision": "bf16"}, "precision = fp32; this run has precision = bf16"),
    "resume with Muon": ({"resume": "{done}", "optimizer": "muon"}, "was written with optimizer = adamw"),
    "DeepSpeed file": ({"engine": "deepspeed", "deepspeed_config": "/nowhere"}, "/nowhere does not exist"),
    "DeepSpeed key": ({"engine": "deepspeed", "deepspeed_config": "{json}"}, "did you mean 'gradient_clipping'?"),
    "loss": ({"loss_impl": "fast"}, "invalid choice 'fast'"),
    "loss that cannot run": ({"loss_impl": "triton"}, "impl='triton' cannot run"),
    "logger that is missing": ({"wandb": "project"}, "--wandb needs the package wandb: pip install wandb"),
    "choice in YAML": ({"config": "{jax}"}, "engine must be one of deepspeed, torch, was 'jax'"),
}


# CLIP's own vocabulary, whose 49,408 tokens do not fit, comes with open_clip.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.peer) if name == "tokenizer" else name for name in MISTAKES]
)
def test_a_mistake_is_named_and_leaves_nothing(
    name: str,
    data: Path,
    done: Path,
    other_weights: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fastclip.ops._dispatch.has_package", lambda name: False)  # else it runs in the interpreter
    changed, message = MISTAKES[name]
    files = {
        "tmp": tmp_path,
        "yaml": write(tmp_path / "run.yaml", "chunksize: 3\n"),
        "json": write(tmp_path / "ds.json", {"gradient_cliping": 1.0}),
        "jax": write(tmp_path / "jax.yaml", "engine: jax\n"),
        "done": done,
        "other": other_weights,
    }
    filled = {key: value.format(**files) if isinstance(value, str) else value for key, value in changed.items()}
    out = tmp_path / "out"
    status = main(options(data, out, **{"engine": "torch"} | filled))
    printed = capfd.readouterr()
    said = " ".join((printed.out + printed.err).replace("\u2502", " ").split())
    assert status == 2, said
    assert message in said
    assert said.count(message) == 1
    assert "Traceback" not in said
    assert not out.exists()


def test_an_existing_run_is_not_written_over(data: Path, done: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = (done / "metrics.jsonl").read_bytes()
    assert main(options(data, done, engine="torch")) == 2
    assert "already holds a run: give another --out, or go on with it by --resume latest" in capfd.readouterr().err
    assert (done / "metrics.jsonl").read_bytes() == before


def test_a_refused_resume_changes_nothing(data: Path, done: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*")}
    assert main(options(data, done, engine="torch", resume="latest", precision="bf16")) == 2
    assert {path: path.stat().st_mtime_ns for path in done.rglob("*")} == before


def test_samples_that_cannot_be_used_are_counted_and_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    empty = {"txt": b" ", "json": None}
    long = {"txt": b"red circle on a table " * 30, "json": None}
    broken = {"s1": {"png": b"not an image"}, "s2": empty, "s3": {"txt": None, "json": None}, "s5": long}
    data, out = small_data(tmp_path / "data", count=40, shards=1, **broken), tmp_path / "out"
    assert main(options(data, out, engine="torch", steps=2, workers=2)) == 0
    counted = lines(out)[-1]["skipped_samples"]
    causes = ("empty_caption", "missing_caption", "truncated_caption", "unreadable_image")
    assert sorted(counted) == list(causes)
    shown = ", ".join(f"{counted[cause]} {cause.replace('_', ' ')}" for cause in causes)
    assert f"Samples skipped or changed: {shown}\n" in capfd.readouterr().out


def test_data_without_a_usable_sample(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Known only once it trains: the run folder is there by then, no checkpoint is."""
    broken = {f"s{number}": {"png": b"not an image"} for number in range(40)}
    data, out = small_data(tmp_path / "data", count=40, **broken), tmp_path / "out"
    assert main(options(data, out, engine="torch")) == 2
    said = capfd.readouterr().err
    assert "cannot be used, nor can 33 others" in said
    assert said.count("fastclip train:") == 1
    assert not (out / "checkpoints").exists()


def test_a_fault_is_no_mistake(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("a bug, not a mistake")

    monkeypatch.setattr("fastclip.training.torch_engine.TorchEngine.step", fail)
    assert main(options(data, tmp_path / "out", engine="torch")) == 1
    assert "Traceback" in capfd.readouterr().err


def test_fp8_says_what_it_needs(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*options(data, tmp_path / "run"), "--fp8"]) == 2
    assert "--fp8: fp8 needs " in capfd.readouterr().err  # torchao, or a GPU
    assert not (tmp_path / "run").exists()


def mistake_of_prepare(folders: list[str], out: str) -> str:
    processes = this_rank()
    config = TrainConfig(
        data=folders[processes.rank], out=out, model="debug", engine="torch", global_batch=8, workers=0
    )
    try:
        prepare(config, processes)
    except UserError as mistake:
        return str(mistake)
    return ""


def test_ranks_that_see_other_data_do_not_begin(data: Path, tmp_path: Path) -> None:
    fewer = small_data(tmp_path / "fewer", count=40)
    other_shards = small_data(tmp_path / "other", count=64, shards=2)
    for folder, said in ((fewer, "rank 0 lists 64 pairs, rank 1 40,"), (other_shards, "rank 1 64, or in other shards")):
        for message in run_on_ranks(2, mistake_of_prepare, [str(data), str(folder)], str(tmp_path / "out")):
            assert said in message
    assert run_on_ranks(2, mistake_of_prepare, [str(data)] * 2, str(tmp_path / "out")) == ["", ""]
