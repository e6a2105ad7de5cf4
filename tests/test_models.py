"""The towers: what is computed, that the short ways equal the long ones, and what a user's mistake says."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from models_helpers import RESNET, VIT, assert_same, captions, gradients, images, perturbed
from torch import Tensor
from torch.nn import functional as F

from fastclip.models import CLIP, CLIPConfig, TextConfig, VisionConfig, create_model
from fastclip.models.transformer import Transformer
from fastclip.models.vision import PatchEmbed
from fastclip.ops.attention import pack_text

STEM = replace(VIT, vision=replace(VIT.vision, conv_stem=(8, 16)))
AVERAGE = replace(VIT, vision=replace(VIT.vision, pool_type="avg"))
FLATTENED = replace(VIT, vision=replace(VIT.vision, pool_type="flatten"))
TOWERS = {"vit": VIT, "stem": STEM, "average": AVERAGE, "flattened": FLATTENED, "resnet": RESNET}


@pytest.mark.parametrize("config", TOWERS.values(), ids=TOWERS)
def test_forward_returns_unit_features_and_the_scale(config: CLIPConfig) -> None:
    model = CLIP(config)
    image, text = images(config), captions(config)
    image_features, text_features, logit_scale = model(image, text)
    assert image_features.shape == text_features.shape == (5, 24)
    for features in (image_features, text_features):
        torch.testing.assert_close(features.norm(dim=1), torch.ones(5))
    assert logit_scale.shape == ()
    assert math.isclose(logit_scale.item(), 1 / 0.07, rel_tol=1e-6)
    torch.testing.assert_close(model.encode_text(text, normalize=True), text_features)
    raw = model.encode_text(text)
    torch.testing.assert_close(raw / raw.norm(dim=1, keepdim=True), text_features)


def test_flattened_tokens_have_a_projection_each() -> None:
    visual = CLIP(FLATTENED).visual
    image = images(FLATTENED)
    tokens = visual.ln_post(visual.transformer(visual.ln_pre(visual._tokens(image))))
    projections = visual.proj.unflatten(0, (9, 32))
    expected = sum(tokens[:, n] @ projections[n] for n in range(9)) / 3
    torch.testing.assert_close(visual(image), expected)
    assert not hasattr(visual, "class_embedding")
    with pytest.raises(ValueError, match='patch_dropout must be 0 with pool_type "flatten"'):
        replace(FLATTENED.vision, patch_dropout=0.5)


def test_an_absent_input_is_none_in_the_tuple_and_left_out_of_the_dict() -> None:
    model = CLIP(VIT)
    image, text = images(VIT), captions(VIT)
    assert model(image)[1] is None
    assert model(text=text)[0] is None
    assert model(image, output_dict=True).keys() == {"image_features", "logit_scale"}
    assert model(text=text, output_dict=True).keys() == {"text_features", "logit_scale"}


@pytest.mark.parametrize("config", [VIT, replace(VIT, quick_gelu=True)], ids=["gelu", "quickgelu"])
def test_packed_text_is_padded_text_in_outputs_and_all_gradients(config: CLIPConfig) -> None:
    model = perturbed(CLIP(config).double())
    text = captions(config)
    packed = model.encode_text(text, normalize=True)
    d_packed = gradients(model, model(None, text)[1:])
    outputs = model.encode_text(pack_text(text), normalize=True)
    model.packed_text = False
    padded = model.encode_text(text, normalize=True)
    torch.testing.assert_close(packed, padded, rtol=1e-12, atol=1e-12)
    assert torch.equal(packed, outputs)
    d_padded = gradients(model, model(None, text)[1:])
    assert d_packed.keys() == {name for name, _ in model.named_parameters() if not name.startswith("visual")}
    assert_same(d_packed, d_padded, 1e-10)


def test_what_lies_behind_the_end_of_text_has_no_effect() -> None:
    text = captions(VIT)
    refilled = torch.where(torch.arange(12) > text.argmax(1)[:, None], 7, text)
    assert not torch.equal(text, refilled)
    for packed_text in (True, False):
        model = CLIP(VIT, packed_text)
        torch.testing.assert_close(model.encode_text(text), model.encode_text(refilled), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_last_block_for_pooled_rows_is_the_last_block_for_all(packed: bool) -> None:
    tower = perturbed(Transformer(32, 2, 2, 4.0).double())
    x = torch.randn(12, 32, dtype=torch.float64)
    if packed:
        cu_seqlens = torch.tensor([0, 3, 4, 12], dtype=torch.int32)
        where, rows = (cu_seqlens, 8, True), cu_seqlens[1:].long() - 1
    else:
        x, where, rows = x.view(3, 4, 32), (), torch.tensor([0, 4, 8])
    pooled = tower(x, *where, pool_rows=rows)
    full = tower(x, *where).flatten(0, -2)[rows]
    torch.testing.assert_close(pooled, full, rtol=1e-12, atol=1e-12)
    assert_same(gradients(tower, (pooled,)), gradients(tower, (full,)), 1e-10)


def test_patch_product_is_a_convolution_in_both_layouts() -> None:
    patches = PatchEmbed(3, 10, 4).double()
    image = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    expected = torch.nn.functional.conv2d(image, patches.weight, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patches(image), expected)
    torch.testing.assert_close(patches(image.contiguous(memory_format=torch.channels_last)), expected)


def test_stem_divides_the_patch() -> None:
    tower = CLIP(STEM).visual
    assert tower.conv1.weight.shape == (32, 16, 2, 2)
    assert tower.positional_embedding.shape == (10, 32)


def test_average_pooling_sees_the_patches_and_not_the_class_token() -> None:
    tower = CLIP(AVERAGE).visual
    tower.transformer = torch.nn.Identity()
    before = tower(images(AVERAGE, 2))
    assert torch.equal(before, before)
    image = images(AVERAGE, 2)
    with torch.no_grad():
        plain = tower(image)
        tower.class_embedding.add_(1.0)
        assert torch.equal(tower(image), plain)
        tower.positional_embedding[3].add_(torch.randn(32))
        assert not torch.equal(tower(image), plain)


def test_patch_dropout_keeps_a_share_in_training_alone() -> None:
    config = replace(VIT, vision=replace(VIT.vision, patch_dropout=0.5))
    tower = CLIP(config).visual
    seen: list[Tensor] = []
    products: list[Tensor] = []
    tower.conv1.register_forward_hook(lambda module, args, out: products.append(out))
    tower.ln_pre.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    image = images(config, 2)
    dropped = tower(image)
    tower.eval()
    torch.testing.assert_close(tower(image), tower(image))
    short, full = seen[0], seen[1]
    assert [product.shape[1] for product in products] == [4, 9, 9]  # what is dropped is not multiplied
    assert short.shape == (2, 1 + 4, 32)  # of 9 patches
    assert full.shape == (2, 1 + 9, 32)
    assert torch.equal(short[:, 0], full[:, 0])
    for kept, patches in zip(short[:, 1:], full[:, 1:], strict=True):
        matches = (kept[:, None] - patches[None]).abs().amax(-1) < 1e-5
        assert matches.sum(1).eq(1).all()  # each kept token is one of the patches,
        assert matches.sum(0).max() == 1  # and none is kept twice
    assert not torch.equal(dropped, tower(image))


def test_scale_is_clamped_in_forward_and_learns_below() -> None:
    model = CLIP(VIT)
    for stored, expected, gradient in ((math.log(50.0), 50.0, 50.0), (math.log(200.0), 100.0, 0.0)):
        with torch.no_grad():
            model.logit_scale.fill_(stored)
        scale = model()[2]
        assert math.isclose(scale.item(), expected, rel_tol=1e-6)
        assert math.isclose(torch.autograd.grad(scale, model.logit_scale)[0].item(), gradient, rel_tol=1e-6)


def test_scale_is_a_vector_in_memory_and_a_scalar_in_files() -> None:
    model = CLIP(VIT)
    assert all(p.dim() > 0 for p in model.parameters())  # DeepSpeed refuses a parameter of no dimension
    state = model.state_dict()
    assert state["logit_scale"].shape == ()
    for value in (torch.tensor(1.5), torch.tensor([1.5])):
        model.load_state_dict({**state, "logit_scale": value})
        assert model.logit_scale.shape == (1,)
        assert model.logit_scale.item() == 1.5
    wrapped = torch.nn.Sequential(model).state_dict()
    assert wrapped["0.logit_scale"].shape == ()
    torch.nn.Sequential(CLIP(VIT)).load_state_dict(wrapped)


@pytest.mark.parametrize("config", TOWERS.values(), ids=TOWERS)
def test_bf16_model_stays_near_fp32_and_its_features_are_normalised_in_fp32(config: CLIPConfig) -> None:
    model = CLIP(config).eval()
    image, text = images(config), captions(config)
    exact = model(image, text)
    rounded = model.bfloat16()(image, text)
    assert rounded[2].dtype == torch.float32
    for features, truth in zip(rounded[:2], exact[:2], strict=True):
        assert features.dtype == torch.bfloat16
        assert ((features.float() * truth).sum(1) > 0.998).all()
        assert (features.float().norm(dim=1) - 1).abs().max() < 2**-9


def test_compiles_into_one_graph_for_any_batch() -> None:
    model = CLIP(VIT)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ((3, 12, 7, 1, 5), (4, 4, 9)):
        image, text = images(VIT, len(lengths)), pack_text(captions(VIT, lengths))
        outputs, expected = compiled(image, text), model(image, text)
        torch.testing.assert_close(outputs, expected)
        assert_same(gradients(model, outputs), gradients(model, expected), 1e-5)


def test_debug_learns_its_batch() -> None:
    model = create_model("debug")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    image, text = images(model.config, 8), captions(model.config, tuple(range(3, 11)))
    for _ in range(30):
        x, y, scale = model(image, text)
        loss = torch.nn.functional.cross_entropy(scale * x @ y.T, torch.arange(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_create_model_hands_its_options_on() -> None:
    model = create_model("debug", dtype=torch.bfloat16, device="meta", packed_text=False)
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, "meta")}
    assert not model.packed_text
    assert create_model(VIT).packed_text
    assert create_model(VIT).config == VIT


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(3)
    first = create_model("debug").state_dict()
    torch.manual_seed(3)
    assert all(torch.equal(value, first[name]) for name, value in create_model("debug").state_dict().items())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: create_model("VIT-B16"), "unknown model 'VIT-B16'; did you mean 'ViT-B-16'?"),
        (lambda: create_model("bert"), "unknown model 'bert'; known are RN101, RN50, RN50x16"),
        (
            lambda: CLIPConfig.from_dict({"embed_dims": 3}),
            "unknown key 'embed_dims' in model_cfg; did you mean 'embed_dim'",
        ),
        (
            lambda: CLIPConfig.from_dict({"vision_cfg": {"layer": 3}}),
            "unknown key 'layer' in vision_cfg; did you mean 'layers'",
        ),
        (lambda: VisionConfig(width=100), r"width must be a multiple of head_width \(64\), was 100"),
        (lambda: VisionConfig(image_size=100, patch_size=16), r"image_size must be a multiple of patch_size \(16\)"),
        (lambda: VisionConfig(pool_type="max"), "pool_type must be .*, was 'max'"),
        (lambda: VisionConfig(patch_dropout=1.0), r"patch_dropout must be in \[0, 1\), was 1.0"),
        (lambda: VisionConfig(patch_size=14, image_size=28, conv_stem=(8, 8)), "patch_size must be a multiple of 4"),
        (lambda: VisionConfig(layers=(1, 2)), "layers of a ModifiedResNet must name its four stages"),
        (lambda: VisionConfig(layers=(1, 1, 1, 1), image_size=100), "image_size of a ModifiedResNet"),
        (lambda: VisionConfig(layers=(1, 1, 1, 1), patch_dropout=0.5), "options of a Vision Transformer"),
        (lambda: TextConfig(width=100, heads=8), r"width must be a multiple of heads \(8\), was 100"),
        (lambda: TextConfig(layers=0), "layers must be positive, was 0"),
        (lambda: CLIPConfig(image_std=(0.1, 0.0, 0.1)), "image_std must be three numbers"),
        (
            lambda: CLIP(VIT)(torch.zeros(2, 3, 32, 32)),
            r"image must be .* \(B, 3, 24, 24\), was torch.float32 \(2, 3, 32, 32\)",
        ),
        (lambda: CLIP(VIT)(torch.zeros(2, 3, 24, 24, dtype=torch.uint8)), "image must be normalised floats"),
        (lambda: CLIP(VIT)(text=torch.zeros(2, 13, dtype=torch.long)), "text must be .* L from 1 to 12, was .*13"),
        (lambda: CLIP(VIT)(text=torch.zeros(2, 12)), "text must be integer token ids"),
    ],
)
def test_mistakes_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_products_take_the_linear_that_is_in_place_when_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 replaces it after the model is made, by one that does not hold gathered weights until the backward."""
    model, calls, linear = CLIP(VIT), [], F.linear
    monkeypatch.setattr(F, "linear", lambda *args: calls.append(args) or linear(*args))
    model(images(VIT), captions(VIT))
    blocks = [*model.visual.transformer.resblocks, *model.transformer.resblocks]
    patches, pooled = 1, 2  # the last block of a tower has one product for the pooled token's q, one for all k and v
    assert len(calls) == patches + 4 * len(blocks) + pooled
