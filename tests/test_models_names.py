"""open_clip's calls: names, `local-dir:` and `hf-hub:`, transforms and tokenizers that travel with the weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from models_helpers import RESNET, SIGLIP, VIT, images, open_clip_model, perturbed
from peers import open_clip_module, transformers_module
from PIL import Image

from fastclip import create_model_and_transforms, get_tokenizer
from fastclip.data.tokenizer import train_tokenizer
from fastclip.models import CLIP, create_model, load_checkpoint, save_model
from fastclip.models.positions import resize_positions


def folder_with(tmp_path: Path, config=VIT) -> tuple[CLIP, Path]:
    model = perturbed(CLIP(config)).eval()
    save_model(tmp_path / "model", model, config)
    return model, tmp_path / "model"


def test_a_local_folder_is_a_name(tmp_path: Path) -> None:
    model, folder = folder_with(tmp_path)
    for loaded in (create_model(f"local-dir:{folder}"), load_checkpoint(f"local-dir:{folder}").model):
        assert loaded.config == VIT
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, model.state_dict()[name])
    with pytest.raises(FileNotFoundError, match=r"no model at .*nowhere: it does not exist"):
        create_model(f"local-dir:{tmp_path / 'nowhere'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds neither"):
        create_model(f"local-dir:{tmp_path / 'empty'}")


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_open_clips_names_of_files_are_found(tmp_path: Path, name: str) -> None:
    model, folder = folder_with(tmp_path)
    (folder / "model.safetensors").unlink()
    if name.endswith(".bin"):
        torch.save(model.state_dict(), folder / name)
    else:
        from safetensors.torch import save_file

        save_file(model.state_dict(), folder / name)
    assert create_model(f"local-dir:{folder}").config == VIT


def test_weights_in_parts_are_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model, folder = folder_with(tmp_path)
    (folder / "model.safetensors").unlink()
    state = model.state_dict()
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for part, own in parts.items():
        save_file({name: state[name] for name in own}, folder / part)
    weight_map = {name: part for part, own in parts.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    loaded = create_model(f"local-dir:{folder}")
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


HUB = """
import sys, torch
from fastclip.models import create_model
from fastclip.errors import UserError
try:
    model = create_model(sys.argv[1])
    print(model.config.vision.image_size, sum(p.sum() for p in model.parameters()).item())
except (OSError, ValueError) as error:
    print(type(error).__name__, error)
"""


@pytest.mark.peer
def test_the_hub_is_its_local_cache_where_it_cannot_be_reached(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    model, folder = folder_with(tmp_path)
    cache = tmp_path / "hub" / "models--laion--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    (cache / "snapshots").mkdir()
    folder.rename(cache / "snapshots" / ("0" * 40))
    settings = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}

    def said(name: str) -> str:
        done = subprocess.run([sys.executable, "-c", HUB, name], env=settings, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    size, total = said("hf-hub:laion/tiny").split()
    assert int(size) == 24
    assert float(total) == pytest.approx(sum(p.sum().item() for p in model.parameters()), rel=1e-4)
    other = said("hf-hub:laion/none")
    assert other.startswith("FileNotFoundError hf-hub:laion/none is neither in the local Hugging Face cache nor can it")


def test_transforms_are_the_models(tmp_path: Path) -> None:
    config = replace(SIGLIP, interpolation="bilinear")
    _, folder = folder_with(tmp_path, config)
    model, train, evaluate = create_model_and_transforms(f"local-dir:{folder}")
    assert model.config == config
    assert (evaluate.mean, evaluate.resize_mode, evaluate.interpolation) == ((0.5,) * 3, "squash", "bilinear")
    picture = Image.linear_gradient("L").convert("RGB").resize((80, 40))
    assert evaluate(picture).shape == train(picture).shape == (3, 26, 26)
    squashed = torch.tensor(np.array(picture.resize((26, 26), Image.Resampling.BILINEAR))).float()
    expected = (squashed.permute(2, 0, 1) / 255 - 0.5) / 0.5
    torch.testing.assert_close(evaluate(picture), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [VIT, SIGLIP, RESNET], ids=["vit", "siglip", "resnet"])
def test_positions_are_interpolated_when_asked(tmp_path: Path, config) -> None:
    model, folder = folder_with(tmp_path, config)
    size = config.vision.image_size + (8 if config is not RESNET else 32)
    larger = create_model(f"local-dir:{folder}", force_image_size=size, force_context_length=16)
    assert (larger.config.vision.image_size, larger.context_length) == (size, 16)
    image = torch.randn(2, 3, size, size)
    assert larger.eval()(image, torch.randint(1, 50, (2, 16)))[0].shape == (2, config.embed_dim)
    assert torch.equal(larger.positional_embedding[0], model.positional_embedding[0])
    same = create_model(f"local-dir:{folder}", force_image_size=config.vision.image_size)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in same.state_dict().items())
    bigger = replace(config, vision=replace(config.vision, image_size=size))
    with pytest.raises(ValueError, match=r"(?s)wrong shape \(1\): visual.*positional_embedding.*say force_image_size"):
        create_model(bigger, checkpoint=folder)


@pytest.mark.peer
@pytest.mark.parametrize(("size", "context"), [(40, 20), (16, 8)])
def test_positions_are_open_clips(size: int, context: int) -> None:
    peer = open_clip_module("open_clip.model")
    state = open_clip_model(VIT).state_dict()
    other = replace(VIT, vision=replace(VIT.vision, image_size=size), text=replace(VIT.text, context_length=context))
    theirs, wanted = dict(state), open_clip_model(other)
    peer.resize_pos_embed(theirs, wanted)
    peer.resize_text_pos_embed(theirs, wanted)
    ours = resize_positions(state, {name: tuple(value.shape) for name, value in wanted.state_dict().items()})
    for name in ("visual.positional_embedding", "positional_embedding"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6)


def test_a_tokenizer_travels_with_its_weights(tmp_path: Path) -> None:
    config = replace(VIT, text=replace(VIT.text, vocab_size=600))
    _, folder = folder_with(tmp_path, config)
    with pytest.raises(FileNotFoundError, match="a vocabulary of 600 is not CLIP's: give the path of its tokenizer"):
        get_tokenizer(f"local-dir:{folder}")
    train_tokenizer(["a red circle", "a blue square"], folder / "tokenizer.json", vocab_size=600, context_length=30)
    tokenizer = get_tokenizer(f"local-dir:{folder}")
    assert tokenizer(["a red circle"]).shape == (1, 12)  # the model's context, not the tokenizer's
    assert get_tokenizer(f"local-dir:{folder}", 20)("a").shape == (1, 20)
    assert get_tokenizer(folder)("a").shape == (1, 30)
    with pytest.raises(ValueError, match="neither a file nor one of"):
        get_tokenizer("ViT-B-99")


@pytest.mark.peer
@pytest.mark.parametrize("name", ["RN50x16", "ViT-H-14-quickgelu", "ViT-bigG-14"])
def test_every_clip_model_has_clips_tokenizer(name: str) -> None:
    tokenizer = get_tokenizer(name)
    theirs = open_clip_module().get_tokenizer(name)
    texts = ["A photo of a cat.", "two   dogs &amp; a bird", "word " * 100]
    assert torch.equal(tokenizer(texts), theirs(texts))


@pytest.mark.peer
def test_a_model_with_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    """As SigLIP's: from the folder of the model, and a clear word where it is not there."""
    peer = transformers_module()
    own_text = replace(SIGLIP.text, hf_tokenizer_name="timm/none", tokenizer_kwargs={"clean": "canonicalize"})
    _, folder = folder_with(tmp_path, replace(SIGLIP, text=own_text))
    words = ["<pad>", "</s>", "a", "photo", "of", "cat"]
    from tokenizers import Tokenizer, models, pre_tokenizers

    rust = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    rust.pre_tokenizer = pre_tokenizers.Whitespace()
    own = peer.PreTrainedTokenizerFast(tokenizer_object=rust, pad_token="<pad>", eos_token="</s>")
    own.save_pretrained(folder)
    ids = get_tokenizer(f"local-dir:{folder}")(["A photo of a_CAT!", "cat"])
    assert ids.shape == (2, 12)
    assert ids[0, :5].tolist() == [2, 3, 4, 2, 5]
    assert ids[1].tolist() == [5] + [0] * 11


def test_images_and_captions_that_do_not_fit() -> None:
    model = CLIP(VIT)
    with pytest.raises(ValueError, match=r"image must be normalised floats of shape \(B, 3, 24, 24\)"):
        model.encode_image(images(VIT)[:, :, :20])
    with pytest.raises(ValueError, match=r"shape \(B, L\) with L from 1 to 12, was torch.int64 \(1, 13\)"):
        model.encode_text(torch.ones(1, 13, dtype=torch.long))
