"""CoCa's towers and decoder: against a decoder written out caption by caption, and against open_clip's."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models_helpers import COCA, TEXT, VIT, assert_same, captions, gradients, images, perturbed
from peers import open_clip_module
from torch import Tensor, nn
from torch.nn import functional as F

from fastclip.losses import caption_loss
from fastclip.models import CLIP, CLIPConfig, DecoderConfig, create_model, load_checkpoint, save_model
from fastclip.models import coca as coca_room
from fastclip.models.layouts import from_native, to_native, why_not
from fastclip.ops.attention import pack_text

LENGTHS = (3, 12, 7, 2, 5)  # of a context of 12: one fills it
CONFIGS = {
    "pooled": COCA,
    "joint": replace(COCA, embed_dim=48, vision=replace(COCA.vision, width=48)),  # one matrix for Q, K and V
    "patches": replace(COCA, embed_dim=24, vision=replace(VIT.vision, width=48)),
    "quickgelu": replace(
        COCA, embed_dim=32, quick_gelu=True, text=replace(COCA.text, width=32, heads=2), decoder=DecoderConfig(32, 2, 3)
    ),
}


def model_of(config: CLIPConfig = COCA) -> CLIP:
    torch.manual_seed(0)
    model = perturbed(CLIP(config))
    assert isinstance(model, CLIP)
    return model


def batch(config: CLIPConfig = COCA) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    image, text = images(config, len(LENGTHS)), captions(config, LENGTHS)
    text[2, 3] = config.text.pad_id  # a token that looks like padding
    return image, text


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V of one sequence, (L, W)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def mlp(block: nn.Module, x: Tensor) -> Tensor:
    return block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x))))


def written_out(decoder: nn.Module, x: Tensor, image: Tensor, targets: Tensor, pad_id: int) -> Tensor:
    """-log p of one caption's targets (L,) from its tokens x (L, W) and image (M, W), summed."""
    causal = torch.ones(len(x), len(x), dtype=torch.bool).tril()
    for block, cross in zip(decoder.resblocks, decoder.cross_attn, strict=True):
        own, other = block.attn, cross.attn
        q, k, v = F.linear(block.ln_1(x), own.in_proj_weight, own.in_proj_bias).chunk(3, -1)
        x = x + own.out_proj(attend(q, k, v, own.heads, causal))
        x = x + mlp(block, x)
        weights, biases = other.in_proj_weight.chunk(3), other.in_proj_bias.chunk(3)
        seen = cross.ln_1_kv(image)
        q = F.linear(cross.ln_1(x), weights[0], biases[0])
        k, v = (F.linear(seen, w, b) for w, b in zip(weights[1:], biases[1:], strict=True))
        x = x + other.out_proj(attend(q, k, v, other.heads, None))
        x = x + mlp(cross, x)
    log_p = (decoder.ln_final(x) @ decoder.text_projection).log_softmax(-1)
    return -sum((log_p[i, t] for i, t in enumerate(targets) if t != pad_id), log_p.new_zeros(()))


def test_the_decoder_written_out() -> None:
    model = model_of().double()
    image, text = batch()
    out = model(image, text, output_dict=True)
    tokens = model.visual(image.double(), with_tokens=True)[1]
    embedded = model.text_features_and_tokens(text)[1]
    expected = [
        written_out(model.text_decoder, embedded[i, :-1], tokens[i], text[i, 1:], 0) for i in range(len(LENGTHS))
    ]
    torch.testing.assert_close(out["caption_losses"], torch.stack(expected), rtol=1e-12, atol=0)
    assert out["caption_tokens"].tolist() == [2, 11, 5, 1, 4]
    loss = caption_loss(out["caption_losses"], out["caption_tokens"])
    assert loss.item() == pytest.approx(sum(x.item() for x in expected) / 23)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_and_the_number_of_logits_at_once_change_nothing(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (image, text) = model_of(), batch()
    expected = model(image, text)
    grads = gradients(model, expected)
    monkeypatch.setattr(coca_room, "LOGITS_AT_ONCE", 4 * TEXT.vocab_size)
    model.set_recompute(mode)
    found = model(image, text)
    torch.testing.assert_close(found, expected)
    assert_same(gradients(model, found), grads, 1e-5)


def test_features_are_the_same_with_and_without_captions() -> None:
    for config in CONFIGS.values():
        model, (image, text) = model_of(config), batch(config)
        together = model(image, text)
        torch.testing.assert_close(model(image)[0], together[0])
        torch.testing.assert_close(model(None, text)[1], together[1])
        assert len(model(image)) == 3
        assert len(together) == 5


def test_padding_is_not_seen_but_for_its_first_token() -> None:
    """open_clip's mask: what stands behind the first token of padding is nowhere in the result."""
    model, (image, text) = model_of(), batch()
    with torch.no_grad():
        out = model(image, text)
        model.positional_embedding[9:12] += torch.randn(3, 48)  # of the captions of 3, 7, 2 and 5 tokens the padding's
        moved = model(image, text)
    short = [0, 2, 3, 4]
    for x, y in zip(out, moved, strict=True):
        torch.testing.assert_close(*(x[short], y[short]) if x.dim() else (x, y))
    assert not torch.allclose(out[1][1], moved[1][1])


def test_a_batch_without_anything_to_predict() -> None:
    model = model_of()
    image, text = images(COCA, 2), torch.zeros(2, 12, dtype=torch.long)
    out = model(image, text, output_dict=True)
    assert caption_loss(out["caption_losses"], out["caption_tokens"]).item() == 0
    assert model(image, text[:, :1], output_dict=True)["caption_losses"].tolist() == [0, 0]


def test_files_hold_the_decoder(tmp_path: Path) -> None:
    model = model_of().eval()
    save_model(tmp_path, model, COCA)
    loaded = load_checkpoint(tmp_path)
    assert loaded.config == COCA
    image, text = batch()
    torch.testing.assert_close(loaded.model(image, text), model(image, text), rtol=0, atol=0)
    assert all("CoCa" in str(why_not(COCA, layout)) for layout in ("openai", "hf"))


def test_mistakes() -> None:
    image, text = batch()
    with pytest.raises(ValueError, match="text must have a caption for each of the 5 images, has 4"):
        model_of()(image, text[:4])
    with pytest.raises(ValueError, match="packed: embed_cls puts a class token behind the padding"):
        model_of()(None, pack_text(text))
    with pytest.raises(ValueError, match=r"width of the decoder must be that of text .* \(48, 48\), was 24"):
        replace(COCA, decoder=DecoderConfig(24, 3, 2))
    with pytest.raises(ValueError, match=r"a decoder needs a Vision Transformer .* and a text tower with embed_cls"):
        replace(COCA, text=TEXT)
    with pytest.raises(ValueError, match='pool_type must be "tok" with attentional_pool'):
        replace(COCA.vision, pool_type="avg")
    with pytest.raises(ValueError, match="embed_cls is an option of the causal text tower"):
        replace(COCA.text, no_causal_mask=True)
    with pytest.raises(ValueError, match="force_context_length must be 32"):
        create_model("coca_debug", force_context_length=16)


@pytest.mark.peer
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_features_losses_and_gradients_are_open_clips(config: CLIPConfig, tmp_path: Path) -> None:
    data = config.to_dict()["model_cfg"]
    theirs = open_clip_module("open_clip.coca_model").CoCa(**{k: v for k, v in data.items() if k != "custom_text"})
    torch.nn.init.normal_(theirs.text_decoder.text_projection, std=0.1)  # which they leave as memory happens to be
    perturbed(theirs)
    ours = CLIP(config)
    ours.load_state_dict(to_native(theirs.state_dict(), config))
    shapes = {name: value.shape for name, value in from_native(ours.state_dict(), config).items()}
    assert shapes == {name: value.shape for name, value in theirs.state_dict().items()}

    image, text = batch(config)
    expected = theirs(image, text)
    loss = open_clip_module("open_clip.loss").CoCaLoss(2.0, 0.0)
    wanted = loss(*(expected[k] for k in ("image_features", "text_features", "logits", "labels", "logit_scale")))[1]
    found = ours(image, text, output_dict=True)
    captioned = 2 * caption_loss(found["caption_losses"], found["caption_tokens"])
    torch.testing.assert_close(captioned, wanted, rtol=1e-6, atol=0)
    names = ("image_features", "text_features", "logit_scale")
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    own = gradients(ours, (*(found[name] for name in names), captioned))
    assert_same(own, to_native(gradients(theirs, (*(expected[name] for name in names), wanted)), config), 1e-5)

    save_model(tmp_path, ours, config)
    again = open_clip_module().create_model(f"local-dir:{tmp_path}").eval()
    torch.testing.assert_close(again(image, text)["logits"], theirs.eval()(image, text)["logits"])
