"""Checkpoints of other packages, in and out: the same bytes back, and the mistakes a file can hold."""

from __future__ import annotations

import io
import json
import pickle
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models_helpers import (
    CLIPA,
    EOS,
    RESNET,
    SIGLIP,
    VIT,
    captions,
    hf_model,
    images,
    open_clip_model,
    perturbed,
)
from peers import open_clip_module
from safetensors.torch import load_file, save_file

from fastclip.cli.main import main
from fastclip.models import CLIP, CLIPConfig, create_model, load_checkpoint, save_model
from fastclip.models.convert import convert
from fastclip.models.hf_config import from_hf, to_hf, to_hf_preprocessor
from fastclip.models.layouts import LAYOUTS, from_native, to_native, why_not
from fastclip.models.torchscript import is_torchscript, read_torchscript

OPENAI = CLIPConfig(
    embed_dim=24,
    vision=replace(VIT.vision, width=64, head_width=64),
    text=replace(VIT.text, width=64, heads=1),
    quick_gelu=True,
)
OPENAI_RESNET = replace(OPENAI, vision=replace(RESNET.vision, head_width=64))
FITTING = {  # layout -> models it can hold
    "open_clip": {"vit": VIT, "resnet": RESNET, "eos": EOS, "clipa": CLIPA, "siglip": SIGLIP},
    "openai": {"vit": OPENAI, "resnet": OPENAI_RESNET},
    "hf": {"vit": VIT, "eos": EOS, "siglip": SIGLIP},
}
PAIRS = [(layout, name) for layout, models in FITTING.items() for name in models]


def outputs(model: CLIP, config: CLIPConfig) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(5)
    return model.eval()(images(config), captions(config))


def assert_equal(first: tuple[torch.Tensor, ...], second: tuple[torch.Tensor, ...]) -> None:
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(("layout", "name"), PAIRS)
def test_a_layout_and_back_is_the_same_model_to_the_byte(tmp_path: Path, layout: str, name: str) -> None:
    config = FITTING[layout][name]
    model = perturbed(CLIP(config)).half()
    save_model(tmp_path / "ours", model, config)
    there = convert(tmp_path / "ours", tmp_path / "theirs", layout)
    assert there.parameters == sum(p.numel() for p in model.parameters())
    assert there.dtypes == ("float16",)
    back = convert(there.weights, tmp_path / "back", "open_clip", None if layout != "openai" else config)
    ours = (tmp_path / "ours" / "model.safetensors").read_bytes()
    assert back.weights.read_bytes() == ours
    assert back.config == config
    again = convert(tmp_path / "back", tmp_path / "again", layout)
    if layout != "openai":  # a zip file names the folder it was written as
        assert again.weights.read_bytes() == there.weights.read_bytes()
    assert_equal(outputs(load_checkpoint(there.weights).model, config), outputs(model.float(), config))


@pytest.mark.parametrize("config", [OPENAI, OPENAI_RESNET], ids=["vit", "resnet"])
def test_an_openai_state_dict_says_what_it_is(tmp_path: Path, config: CLIPConfig) -> None:
    model = perturbed(CLIP(config)).eval()
    save_model(tmp_path / "ours", model, config)
    written = convert(tmp_path / "ours", tmp_path / "openai.pt", "openai").weights
    assert written == tmp_path / "openai.pt"
    assert set(torch.load(written)) - model.state_dict().keys() == {"input_resolution", "context_length", "vocab_size"}
    loaded = load_checkpoint(written)
    assert loaded.config == config
    assert_equal(outputs(loaded.model, config), outputs(model, config))
    broken = torch.load(written)
    del broken["token_embedding.weight"]
    torch.save(broken, tmp_path / "broken.pt")
    with pytest.raises(ValueError, match=r"marks of OpenAI's CLIP, but no 'token_embedding\.weight'"):
        load_checkpoint(tmp_path / "broken.pt")


@pytest.mark.peer
def test_an_openai_archive_is_read_without_running_it(tmp_path: Path) -> None:
    theirs = perturbed(open_clip_model(OPENAI)).half().eval()
    for name, value in (("input_resolution", 24), ("context_length", 12), ("vocab_size", 50)):
        theirs.__dict__.pop(name, None)  # open_clip keeps it as a number, OpenAI's archive as a tensor
        theirs.register_buffer(name, torch.tensor(value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive = torch.jit.trace(theirs.float(), (images(OPENAI), captions(OPENAI)), check_trace=False).half()
        archive.save(tmp_path / "ViT.pt")
    assert is_torchscript(tmp_path / "ViT.pt")
    read = read_torchscript(tmp_path / "ViT.pt")
    assert read.keys() >= theirs.state_dict().keys()
    loaded = load_checkpoint(tmp_path / "ViT.pt", dtype=torch.float16)
    assert loaded.config == OPENAI
    for name, value in theirs.half().state_dict().items():
        if name in loaded.model.state_dict():
            assert torch.equal(loaded.model.state_dict()[name], value), name


class Evil:
    def __reduce__(self) -> tuple:
        return (exec, ("raise SystemExit('ran')",))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"logit_scale": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt cannot be read .* it holds exec, which could run code"):
        load_checkpoint(tmp_path / "evil.pt", model=VIT)
    code = io.BytesIO()
    pickle.dump(Evil(), code)
    with zipfile.ZipFile(tmp_path / "evil_archive.pt", "w") as archive:
        archive.writestr("x/constants.pkl", b"")
        archive.writestr("x/data.pkl", code.getvalue())
    with pytest.raises(ValueError, match=r"cannot be read .* it refers to builtins\.exec"):
        load_checkpoint(tmp_path / "evil_archive.pt", model=VIT)


@pytest.mark.peer
@pytest.mark.parametrize("config", [VIT, EOS, SIGLIP], ids=["vit", "eos", "siglip"])
def test_a_folder_of_transformers_is_read_and_written(tmp_path: Path, config: CLIPConfig) -> None:
    theirs = perturbed(hf_model(config))
    theirs.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps(to_hf_preprocessor(config)))
    loaded = load_checkpoint(tmp_path / "hf")
    assert replace(loaded.config, init_logit_scale=config.init_logit_scale) == config
    image, text = images(config), captions(config)
    out = theirs(input_ids=text, pixel_values=image)
    torch.testing.assert_close(loaded.model(image, text)[:2], (out.image_embeds, out.text_embeds), rtol=1e-5, atol=1e-6)

    ours = convert(tmp_path / "hf", tmp_path / "open_clip", "open_clip")
    back = convert(ours.weights, tmp_path / "back", "hf")
    assert back.weights.read_bytes() == (tmp_path / "hf" / "model.safetensors").read_bytes()
    again = type(theirs).from_pretrained(tmp_path / "back").eval()
    once_more = again(input_ids=text, pixel_values=image)
    assert torch.equal(once_more.image_embeds, out.image_embeds)
    assert torch.equal(once_more.text_embeds, out.text_embeds)


@pytest.mark.peer
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("config", [VIT, SIGLIP], ids=["clip", "custom"])
def test_open_clips_files_are_read(tmp_path: Path, suffix: str, config: CLIPConfig) -> None:
    theirs = perturbed(open_clip_model(config)).eval()
    state = theirs.state_dict()
    if suffix == ".pt":
        torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "model.pt")
    else:
        save_file(state, tmp_path / "model.safetensors")
    loaded = load_checkpoint(tmp_path / f"model{suffix}", model=config)
    image, text = images(config), captions(config)
    torch.testing.assert_close(loaded.model(image, text), theirs(image, text), rtol=1e-5, atol=1e-6)
    written = from_native(loaded.model.state_dict(), config)
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], value) for name, value in state.items())


@pytest.mark.peer
@pytest.mark.long
def test_open_clip_reads_our_siglip_at_full_size(tmp_path: Path) -> None:
    """Its towers come in published sizes only."""
    ours = create_model("ViT-B-16-SigLIP").eval()
    save_model(tmp_path, ours, ours.config)
    theirs = open_clip_module().create_model(f"local-dir:{tmp_path}", pretrained=str(tmp_path / "model.safetensors"))
    image = torch.randn(1, 3, 224, 224)
    text = torch.randint(1, 32000, (2, 64))
    torch.testing.assert_close(theirs.eval()(image, text)[:2], ours(image, text)[:2], rtol=1e-4, atol=1e-5)


def test_the_names_of_transformers(tmp_path: Path) -> None:
    state = from_native(CLIP(VIT).state_dict(), VIT, "hf")
    block = "vision_model.encoder.layers.1."
    assert {f"{block}self_attn.{part}_proj.weight" for part in "qkv"} <= state.keys()
    assert state["visual_projection.weight"].shape == (24, 32)
    assert state["text_projection.weight"].shape == (24, 48)
    assert "vision_model.pre_layrnorm.weight" in state
    state = from_native(CLIP(SIGLIP).state_dict(), SIGLIP, "hf")
    assert state["vision_model.head.attention.in_proj_weight"].shape == (96, 32)
    assert {"vision_model.head.probe", "text_model.head.bias", "logit_bias"} <= state.keys()
    assert state["logit_scale"].shape == (1,)


@pytest.mark.parametrize(
    ("layout", "config", "reason"),
    [
        ("hf", RESNET, "transformers has no ModifiedResNet"),
        ("hf", CLIPA, "LayerScale"),
        ("hf", replace(VIT, vision=replace(VIT.vision, conv_stem=(8, 8))), "conv_stem"),
        ("hf", replace(VIT, vision=replace(VIT.vision, pool_type="avg")), "average pooling"),
        ("hf", replace(VIT, vision=replace(VIT.vision, pool_type="flatten")), "every patch token"),
        ("hf", replace(VIT, text=replace(VIT.text, no_causal_mask=True)), "causal"),
        ("hf", replace(SIGLIP, text=replace(SIGLIP.text, proj_bias=False)), "only beside another"),
        ("openai", VIT, "QuickGELU"),
        ("openai", replace(OPENAI, vision=VIT.vision), "64 wide"),
        ("openai", replace(OPENAI, text=replace(OPENAI.text, pool_type="last")), "largest token id"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(layout: str, config: CLIPConfig, reason: str) -> None:
    with pytest.raises(ValueError, match=f"cannot be written for {layout}: .*{reason}"):
        from_native({}, config, layout)


def test_what_every_layout_can_hold() -> None:
    for layout in LAYOUTS:
        assert all(why_not(config, layout) is None for config in FITTING[layout].values())
    with pytest.raises(ValueError, match="layout must be one of open_clip, openai, hf, was 'onnx'"):
        why_not(VIT, "onnx")


def test_configs_of_transformers_survive() -> None:
    for config in (VIT, replace(VIT, quick_gelu=True), EOS, SIGLIP):
        read = from_hf(json.loads(json.dumps(to_hf(config))), to_hf_preprocessor(config))
        assert replace(read, init_logit_scale=config.init_logit_scale) == config
    published = from_hf({"model_type": "clip", "text_config": {"eos_token_id": 2}})  # openai/clip-vit-base-patch32
    assert (published.vision.patch_size, published.text.pool_type, published.quick_gelu) == (32, "argmax", True)
    for width, hidden in ((1408, 6144), (1664, 8192), (1792, 15360), (1152, 4304)):
        tower = {"hidden_size": width, "intermediate_size": hidden, "num_attention_heads": 16}
        vision = from_hf({"model_type": "clip", "vision_config": tower}).vision
        assert int(vision.width * vision.mlp_ratio) == hidden
    with pytest.raises(ValueError, match='model_type must be "clip" or "siglip", was \'bert\''):
        from_hf({"model_type": "bert"})
    with pytest.raises(ValueError, match="hidden_act must be one of"):
        from_hf({"model_type": "clip", "text_config": {"hidden_act": "relu"}})


def test_half_of_a_merged_product_is_told_and_not_merged() -> None:
    state = from_native(CLIP(VIT).state_dict(), VIT, "hf")
    del state["text_model.encoder.layers.0.self_attn.k_proj.bias"]
    native = to_native(state, VIT)
    assert "transformer.resblocks.0.attn.in_proj_bias" not in native
    assert "transformer.resblocks.0.self_attn.q_proj.bias" in native


def test_convert_writes_nothing_where_it_cannot(tmp_path: Path) -> None:
    model = CLIP(VIT)
    save_model(tmp_path / "ours", model, VIT)
    convert(tmp_path / "ours", tmp_path / "hf", "hf")
    with pytest.raises(FileExistsError, match=r"model\.safetensors exists: name another target"):
        convert(tmp_path / "ours", tmp_path / "hf", "hf")
    broken = load_file(tmp_path / "ours" / "model.safetensors")
    del broken["ln_final.bias"]
    save_file(broken, tmp_path / "ours" / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing \(1\): ln_final\.bias"):
        convert(tmp_path / "ours", tmp_path / "other", "hf")
    assert not (tmp_path / "other").exists()


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "ours", CLIP(VIT), VIT)
    (tmp_path / "ours" / "tokenizer.json").write_text("{}")
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "hf"), "--to", "hf"]) == 0
    said = capsys.readouterr().out
    assert "parameters (float32)" in said
    assert "wrote model.safetensors, tokenizer.json, config.json, preprocessor_config.json in" in said
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {
        "model.safetensors", "tokenizer.json", "config.json", "preprocessor_config.json",
    }  # fmt: skip
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "weights.pt"), "--to", "openai"]) == 2
    assert "QuickGELU" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "nowhere"), str(tmp_path / "x")]) == 2


@pytest.mark.parametrize("name", ["openai/clip", "metaclip_400m", "DFN5B"])
def test_quickgelu_weights_in_a_gelu_model_are_warned_about(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    save_model(folder, CLIP(VIT), VIT)
    with pytest.warns(UserWarning, match=r"looks trained with QuickGELU, but the model computes GELU.*-quickgelu"):
        load_checkpoint(folder)
    quick = replace(VIT, quick_gelu=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_checkpoint(folder, model=quick)
        save_model(tmp_path / "plain", CLIP(VIT), VIT)
        load_checkpoint(tmp_path / "plain")
    save_model(tmp_path / "laion2b", CLIP(quick), quick)
    with pytest.warns(UserWarning, match="looks trained with GELU, but the model computes QuickGELU"):
        load_checkpoint(tmp_path / "laion2b")


def test_openais_marks_are_warned_about(tmp_path: Path) -> None:
    save_model(tmp_path / "ours", CLIP(OPENAI), OPENAI)
    written = convert(tmp_path / "ours", tmp_path / "weights.pt", "openai").weights
    with pytest.warns(UserWarning, match="looks trained with QuickGELU"):
        load_checkpoint(written, model=replace(OPENAI, quick_gelu=False))
