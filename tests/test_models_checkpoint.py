"""Model files: what is written comes back, what does not fit says exactly how, and nothing is loaded half-way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models_helpers import RESNET, VIT, captions, images, perturbed
from safetensors.torch import load_file, save_file

from fastclip.models import CLIP, CLIPConfig, create_model, load_checkpoint, resolve_checkpoint, save_model
from fastclip.models.checkpoint import load_weights


def saved_step(folder: Path, config: CLIPConfig = VIT) -> CLIP:
    model = perturbed(CLIP(config)).eval()
    save_model(folder, model, config)
    return model


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_a_saved_model_comes_back(tmp_path: Path, config: CLIPConfig) -> None:
    model = perturbed(CLIP(config)).eval()
    tokenizer = tmp_path / "any.json"
    tokenizer.write_text("{}")
    save_model(tmp_path / "step", model, config, {"tokenizer.json": tokenizer})
    loaded = load_checkpoint(tmp_path / "step")
    assert loaded.config == config
    assert loaded.folder == tmp_path / "step"
    assert not loaded.model.training
    assert (loaded.folder / "tokenizer.json").read_text() == "{}"
    image, text = images(config), captions(config)
    for ours, truth in zip(loaded.model(image, text), model(image, text), strict=True):
        assert torch.equal(ours, truth)
    assert all(p.requires_grad for p in loaded.model.parameters())
    half = load_checkpoint(tmp_path / "step", dtype=torch.bfloat16).model
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_files_hold_open_clips_names_and_a_scalar_scale(tmp_path: Path) -> None:
    model = saved_step(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert state["logit_scale"].shape == ()
    assert state.keys() == model.state_dict().keys()
    written = json.loads((tmp_path / "open_clip_config.json").read_text())
    assert written["model_cfg"]["vision_cfg"]["patch_size"] == 8
    assert written["preprocess_cfg"]["mean"] == list(VIT.image_mean)


def test_a_state_dict_with_the_scale_as_it_is_in_memory_can_be_saved(tmp_path: Path) -> None:
    model = CLIP(VIT)
    flat = torch.nn.utils.parameters_to_vector(model.parameters()).detach()  # one buffer, as DeepSpeed holds masters
    parts = flat.split([p.numel() for p in model.parameters()])
    masters = {name: part.view(p.shape) for part, (name, p) in zip(parts, model.named_parameters(), strict=True)}
    save_model(tmp_path, masters, VIT)
    assert load_file(tmp_path / "model.safetensors")["logit_scale"].shape == ()
    loaded = load_checkpoint(tmp_path).model
    assert all(torch.equal(p, masters[name]) for name, p in loaded.named_parameters())
    assert loaded.logit_scale.shape == (1,)


def test_a_compiled_model_is_saved_under_its_own_names(tmp_path: Path) -> None:
    model = CLIP(VIT)
    save_model(tmp_path, torch.compile(model), VIT)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


def test_a_run_means_the_step_that_latest_names_or_its_last(tmp_path: Path) -> None:
    steps = tmp_path / "checkpoints"
    for step in (9, 10):
        saved_step(steps / f"step_{step:08d}")
    (steps / "step_00000011").mkdir()  # without weights: not a checkpoint
    (steps / "step_00000012.tmp").mkdir()
    (steps / "step_00000012.tmp" / "model.safetensors").touch()
    assert resolve_checkpoint(tmp_path) == steps / "step_00000010"
    for pointer in (steps / "latest", tmp_path / "latest"):
        pointer.write_text("step_00000009\n")
        assert resolve_checkpoint(tmp_path) == steps / "step_00000009"
        pointer.write_text("step_00000011")
        assert resolve_checkpoint(tmp_path) == steps / "step_00000010"
        pointer.unlink()
    assert resolve_checkpoint(steps) == steps / "step_00000010"
    assert resolve_checkpoint(steps / "step_00000009") == steps / "step_00000009"
    weights = steps / "step_00000009" / "model.safetensors"
    assert resolve_checkpoint(weights) == steps / "step_00000009"
    assert load_checkpoint(weights).config == VIT


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_lone_file_needs_the_name_of_its_model(tmp_path: Path, suffix: str) -> None:
    model = perturbed(create_model("debug")).eval()
    path = tmp_path / f"weights{suffix}"
    (torch.save if suffix == ".pt" else save_file)(model.state_dict(), path)
    with pytest.raises(ValueError, match="model must be named: there is no open_clip_config"):
        load_checkpoint(path)
    for loaded in (load_checkpoint(path, model="debug").model, create_model("debug", checkpoint=path).eval()):
        text = captions(model.config)
        assert torch.equal(loaded.encode_text(text), model.encode_text(text))


@pytest.mark.filterwarnings("ignore:.*looks trained with QuickGELU")  # OpenAI's marks, in a model of GELU
def test_checkpoints_of_openai_ddp_compile_and_custom_text_are_recognised(tmp_path: Path) -> None:
    model = CLIP(VIT)
    state = model.state_dict()
    text = ("positional_embedding", "text_projection", "token_embedding", "transformer", "ln_final")
    variants = [
        {
            **state,
            "input_resolution": torch.tensor(24),
            "context_length": torch.tensor(12),
            "vocab_size": torch.tensor(50),
        },
        {"state_dict": {f"module._orig_mod.{name}": value for name, value in state.items()}, "epoch": 3},
        {f"text.{name}" if name.startswith(text) else name: value for name, value in state.items()},
        {**state, "logit_scale": state["logit_scale"].reshape(1), "attn_mask": torch.zeros(12, 12)},
        {name: value.half() for name, value in state.items()},
    ]
    for variant in variants:
        torch.save(variant, tmp_path / "weights.pt")
        loaded = load_checkpoint(tmp_path / "weights.pt", model=VIT).model.state_dict()
        for name, value in state.items():
            assert loaded[name].dtype == torch.float32
            torch.testing.assert_close(loaded[name], value, rtol=1e-3, atol=1e-6)


def test_what_differs_is_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    state = CLIP(VIT).state_dict()
    del state["ln_final.bias"], state["visual.proj"]
    state["visual.prov"] = torch.zeros(2)
    state["text_projection"] = torch.zeros(48, 25)
    torch.save(state, tmp_path / "weights.pt")
    model = CLIP(VIT)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_weights(model, tmp_path / "weights.pt")
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'weights.pt'} does not fit the model:",
        "  missing (2): ln_final.bias, visual.proj",
        "  unexpected (1): visual.prov",
        "  wrong shape (1): text_projection is (48, 25), must be (48, 24)",
    ]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    saved_step(tmp_path)
    deeper = replace(VIT, text=replace(VIT.text, layers=3))
    with pytest.raises(ValueError, match=r"missing \(12\): transformer.resblocks.2.ln_1.weight") as caught:
        create_model(deeper, checkpoint=tmp_path)
    assert "unexpected" not in str(caught.value)
    assert "wrong shape" not in str(caught.value)
    shallower = replace(VIT, text=replace(VIT.text, layers=1))
    with pytest.raises(ValueError, match=r"unexpected \(12\): transformer.resblocks.1"):
        create_model(shallower, checkpoint=tmp_path)


def test_unreadable_files_say_so(tmp_path: Path) -> None:
    saved_step(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read as a file of weights"):
        load_checkpoint(tmp_path)
    (tmp_path / "broken.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"broken\.pt cannot be read as a file of weights"):
        load_checkpoint(tmp_path / "broken.pt", model="debug")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt holds a list, not a state dict"):
        load_checkpoint(tmp_path / "list.pt", model="debug")
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"embed_dimension": 3}}')
    with pytest.raises(ValueError, match="is not a model config: unknown key 'embed_dimension'"):
        load_checkpoint(tmp_path)


def test_nothing_to_load_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="it does not exist"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="it holds neither"):
        load_checkpoint(tmp_path)
