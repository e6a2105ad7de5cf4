"""What a run is: recipes, YAML, options and DeepSpeed's JSON, in their order; groups of parameters; the schedule."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from training_helpers import debug_model

from fastclip.errors import UserError
from fastclip.training.__main__ import parse
from fastclip.training.config import TrainConfig, read_config, with_values, write_config
from fastclip.training.deepspeed_config import resolve_deepspeed
from fastclip.training.optim import parameter_groups
from fastclip.training.recipes import RECIPES, get_recipe
from fastclip.training.schedule import lr_factor


def yaml_file(directory: Path, text: str) -> Path:
    path = directory / "run.yaml"
    path.write_text(text)
    return path


def test_options_go_over_the_file_over_the_recipe(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "lr: 2e-3\nmuon_lr: 0.03\n")
    config = parse(["--recipe", "demo", "--config", str(path), "--muon-lr", "0.04", "--local_rank=1"])
    demo = get_recipe("demo")
    assert (config.model, config.lr, config.muon_lr) == (demo.model, 2e-3, 0.04)
    assert parse([]) == TrainConfig()
    assert parse(["--betas", "0.8", "0.9", "--tensorboard"]).betas == (0.8, 0.9)


@pytest.mark.parametrize("name", RECIPES)
def test_a_config_survives_its_file(tmp_path: Path, name: str) -> None:
    config = get_recipe(name)
    write_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml", TrainConfig()) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lrr: 1", r"run.yaml: unknown key 'lrr'; did you mean 'lr'\?"),
        ("qqqqqq: 1", "known keys are data, val, "),
        ("steps: 1.5", "steps must be int, was 1.5"),
        ("steps: many", "steps must be int, was 'many'"),
        ("betas: [0.9]", r"betas must be 2 numbers, was \[0.9\]"),
        ("tensorboard: 1", "tensorboard must be bool, was 1"),
        ("- steps", "must hold `key: value` lines, was a list"),
        ("a: [", "is not YAML"),
        ("optimizer: sgd", "optimizer must be one of adamw, lamb, lion, muon, stableadamw, was 'sgd'"),
        ("zero_stage: 4", "zero_stage must be 0, 1, 2 or 3, was 4"),
        ("keep: 0", "keep must be at least 1, was 0"),
        ("{optimizer: muon, grad_clip: 1, zero_stage: 2}", "grad_clip would clip Muon's updates"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_config(yaml_file(tmp_path, text), TrainConfig())


def test_yaml_reads_numbers_as_words() -> None:
    assert with_values(TrainConfig(), {"lr": "1e-3", "steps": "1e3", "out": 7}, "x").lr == 1e-3
    assert with_values(TrainConfig(), {"steps": "1e3"}, "x").steps == 1000


def test_a_resumed_run_starts_from_its_own_config(tmp_path: Path) -> None:
    run = tmp_path / "run"
    step = run / "checkpoints" / "step_00000001"
    step.mkdir(parents=True)
    write_config(TrainConfig(model="debug", lr=0.5, out=str(run), resume="old"), run / "config.yaml")
    for options in (["--resume", str(run)], ["--resume", str(step)], ["--resume", "latest", "--out", str(run)]):
        config = parse([*options, "--steps", "7"])
        assert (config.model, config.lr, config.out, config.resume, config.steps) == (
            "debug",
            0.5,
            str(run),
            options[1],
            7,
        )
    assert parse(["--resume", "latest"]).model == TrainConfig().model
    assert parse(["--recipe", "clip", "--resume", str(run)]).model == get_recipe("clip").model
    assert parse(["--out", str(run)]).lr == TrainConfig().lr


def resolved(tmp_path: Path, content: Any, **options: Any) -> tuple[TrainConfig, dict[str, Any], list[str]]:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return resolve_deepspeed(TrainConfig(deepspeed_config=str(path), precision="bf16", **options), world_size=2)


def test_deepspeeds_json_says_what_would_be_wrong_by_default() -> None:
    config = TrainConfig(global_batch=8, zero_stage=2, precision="fp32")
    same, json_, conflicts = resolve_deepspeed(config, world_size=2)
    assert (same, conflicts) == (config, [])
    assert json_["gradient_clipping"] == 0.0
    assert json_["gradient_accumulation_steps"] == 1
    assert (json_["train_batch_size"], json_["train_micro_batch_size_per_gpu"]) == (8, 4)
    assert json_["zero_optimization"]["stage"] == 2
    assert not json_["bf16"]["enabled"]
    muon, _ = (resolve_deepspeed(TrainConfig(optimizer=o), 1)[1]["zero_optimization"] for o in ("muon", "adamw"))
    assert muon["reduce_scatter"] is False, "Muon needs whole gradients"


def test_a_deepspeed_file_is_merged_and_its_conflicts_are_told(tmp_path: Path) -> None:
    file = {
        "train_batch_size": "auto",
        "gradient_clipping": 1.0,
        "bf16": {"enabled": False},
        "zero_optimization": {"stage": 3, "overlap_comm": True, "offload_optimizer": {"device": "cpu"}},
        "flops_profiler": {"enabled": True},
        "wall_clock_breakdown": False,
    }
    config, merged, conflicts = resolved(tmp_path, file)
    assert (config.zero_stage, config.precision, config.grad_clip) == (3, "fp32", 1.0)
    assert merged["zero_optimization"] == {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "memory_efficient_linear": False,
        "offload_optimizer": {"device": "cpu"},
    }
    assert merged["train_batch_size"] == config.global_batch
    assert merged["flops_profiler"] == {"enabled": True}
    assert sorted(conflicts) == [
        "bf16.enabled: False (was True)",
        "gradient_clipping: 1.0 (was 0.0)",
        "zero_optimization.overlap_comm: True (was False)",
        "zero_optimization.stage: 3 (was 1)",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ([], "must hold a JSON object, was a list"),
        ({"gradient_cliping": 1}, r"unknown key 'gradient_cliping'; did you mean 'gradient_clipping'\?"),
        ({"gradient_accumulation_steps": 4}, "sets gradient_accumulation_steps: .*--chunk-size"),
        ({"train_batch_size": 7}, "sets train_batch_size: .*--global-batch"),
        ({"optimizer": {"type": "Adam"}}, "sets optimizer: .*--optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "sets scheduler: .*--schedule"),
        ({"amp": {"enabled": True}}, "sets amp: .*--precision"),
        ({"bf16": True}, "bf16 must be an object, was True"),
        ({"fp16": {"enabled": True}}, "enables both bf16 and fp16"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "sets torch_autocast to float16"),
        ({"zero_optimization": {"stage": 5}}, "zero_stage must be 0, 1, 2 or 3, was 5"),
    ],
)
def test_a_deepspeed_file_that_is_wrong_for_clip_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolved(tmp_path, content)


def test_what_is_decayed_and_what_muon_takes() -> None:
    model = debug_model()
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer in ("adamw", "muon"):
        groups = parameter_groups(model, TrainConfig(optimizer=optimizer))
        by_name = {names[id(p)]: group for group in groups for p in group["params"]}
        assert by_name.keys() == set(names.values())
        for name, group in by_name.items():
            in_block = "resblocks" in name and name.endswith("weight") and "ln" not in name
            muon = optimizer == "muon" and (in_block or name.endswith("in_proj_weight"))
            assert group["use_muon"] == muon == dict(model.named_parameters())[name].use_muon, name
            plain = "embedding" in name or name.endswith("bias") or "ln_" in name or name == "logit_scale"
            assert group["weight_decay"] == (0.0 if plain or muon else 0.1), name


def test_the_schedule() -> None:
    assert [lr_factor("constant", step, 4, 0.9) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert lr_factor("cosine", 0, 0, 0.0) == 1
    assert lr_factor("cosine", 9, 0, 0.5) == pytest.approx(0.5)
    assert lr_factor("cosine", 9, 0, 1.5) == 0
    assert lr_factor("cosine", 0, 2, 0.25) == pytest.approx((1 + math.cos(math.pi / 4)) / 4)
