"""Pixels of odd images: open_clip's and torchvision's, to the last bit; and what --fast-decode changes."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peers import open_clip_module
from PIL import Image

from fastclip.data.augment import ColorAugment, RandomErase, adjusted
from fastclip.data.decode import decode_image
from fastclip.data.files import synthetic_jpeg
from fastclip.data.streams import Stream
from fastclip.data.transforms import Preprocess, TrainTransform, crop_box, crop_pixels, eval_pixels

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = [(64, 48), (33, 100), (20, 24), (24, 24)]


def photo(width: int = 64, height: int = 48) -> Image.Image:
    return Image.open(io.BytesIO(synthetic_jpeg(3, 100))).convert("RGB").resize((width, height))


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(photo(), "JPEG", exif=exif)


def sixteen_bit() -> bytes:
    ramp = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)
    return saved(Image.fromarray(ramp), "PNG")


def with_alpha(mode: str) -> Image.Image:
    image = photo().convert(mode)
    image.putalpha(Image.fromarray((np.arange(48 * 64).reshape(48, 64) % 256).astype(np.uint8)))
    return image


FRAMES = [photo(), Image.new("RGB", (64, 48), (9, 8, 7))]
ODD: dict[str, Callable[[], bytes]] = {
    "JPEG": lambda: saved(photo(), "JPEG"),
    "4:4:4": lambda: saved(photo(), "JPEG", subsampling=0),
    "4:2:2": lambda: saved(photo(), "JPEG", subsampling=1),
    "quality 5": lambda: saved(photo(), "JPEG", quality=5),
    "progressive": lambda: saved(photo(), "JPEG", progressive=True),
    "rotated": rotated,
    "grey JPEG": lambda: saved(photo().convert("L"), "JPEG"),
    "CMYK": lambda: saved(photo().convert("CMYK"), "JPEG"),
    "odd size": lambda: saved(photo(65, 47), "JPEG"),
    "one pixel": lambda: saved(photo(1, 1), "JPEG"),
    "grey": lambda: saved(photo().convert("L"), "PNG"),
    "black and white": lambda: saved(photo().convert("1"), "PNG"),
    "palette": lambda: saved(photo().convert("P"), "PNG"),
    "palette with transparency": lambda: saved(photo().convert("P"), "PNG", transparency=0),
    "alpha": lambda: saved(with_alpha("RGBA"), "PNG"),
    "grey with alpha": lambda: saved(with_alpha("LA"), "PNG"),
    "16 bits": sixteen_bit,
    "WebP": lambda: saved(photo(), "WEBP"),
    "WebP with alpha": lambda: saved(with_alpha("RGBA"), "WEBP", lossless=True),
    "animated WebP": lambda: saved(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:], lossless=True),
    "animated GIF": lambda: saved(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
    "animated PNG": lambda: saved(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]),
    "BMP": lambda: saved(photo(), "BMP"),
}


@pytest.mark.parametrize("kind", ODD)
def test_decoding_is_pils(kind: str) -> None:
    data = ODD[kind]()
    with Image.open(io.BytesIO(data)) as image:
        wanted = np.asarray(image.convert("RGB"))
    assert np.array_equal(np.asarray(decode_image(data)), wanted)


@pytest.mark.parametrize("kind", ["JPEG", "grey JPEG", "progressive", "4:2:2", "odd size"])
def test_jpegs_take_the_fast_way(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ODD[kind]()
    monkeypatch.setattr(Image, "open", None)
    assert decode_image(data).mode == "RGB"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(4))
def test_a_crop_is_cut_before_it_is_resized(size: tuple[int, int], seed: int) -> None:
    image = photo(*size)
    box = crop_box(*size, (0.2, 0.9), Stream("box", seed))
    wanted = image.crop(box).resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(crop_pixels(image, box, 16)), np.asarray(wanted))
    transform = TrainTransform(16, (0.2, 0.9))
    data = saved(image, "PNG")
    assert np.array_equal(transform(data, Stream("box", seed)), np.asarray(wanted).transpose(2, 0, 1))


@pytest.mark.peer
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_evaluation_is_open_clips(kind: str, mode: Any) -> None:
    """As its users call it, on the opened file, and as its trainer does, behind WebDataset's "pilrgb"."""
    transform = open_clip_module("open_clip.transform").image_transform
    theirs = transform(24, is_train=False, mean=MEAN, std=STD, resize_mode=mode)
    ours = Preprocess(24, MEAN, STD, resize_mode=mode)
    data = ODD[kind]()
    image = Image.open(io.BytesIO(data))
    for opened in (image, image.convert("RGB")):
        torch.testing.assert_close(ours(opened), theirs(opened), rtol=0, atol=1e-6)
    pixels = torch.from_numpy(eval_pixels(decode_image(data), 24, resize_mode=mode).copy())
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    torch.testing.assert_close((pixels / 255 - mean) / std, theirs(image.convert("RGB")), rtol=0, atol=1e-6)


@pytest.mark.peer
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_every_resize_is_open_clips(size: tuple[int, int], interpolation: Any, mode: Any) -> None:
    transform = open_clip_module("open_clip.transform").image_transform
    options = {"interpolation": interpolation, "resize_mode": mode, "fill_color": 77}
    theirs = transform(24, is_train=False, mean=MEAN, std=STD, **options)
    image = photo(*size)
    torch.testing.assert_close(Preprocess(24, MEAN, STD, **options)(image), theirs(image), rtol=0, atol=1e-6)


@pytest.mark.peer
def test_boxes_are_torchvisions_in_distribution() -> None:
    open_clip_module()
    from torchvision.transforms import RandomResizedCrop

    image = photo(100, 60)
    theirs = [RandomResizedCrop.get_params(image, [0.1, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    ours = [crop_box(100, 60, (0.1, 1.0), Stream("box", n)) for n in range(4000)]
    their_mean = np.mean([(left, top, width, height) for top, left, height, width in theirs], axis=0)
    our_mean = np.mean([(x, y, right - x, bottom - y) for x, y, right, bottom in ours], axis=0)
    np.testing.assert_allclose(our_mean, their_mean, atol=1.5)


@pytest.mark.peer
@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("factor", [-0.4, 0.0, 0.03, 0.3, 0.5, 1.0, 1.7])
def test_color_adjustments_are_torchvisions(which: int, factor: float) -> None:
    open_clip_module()
    from torchvision.transforms import functional

    if (which == 3 and abs(factor) > 0.5) or (which < 3 and factor < 0):
        return
    names = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")
    wanted = getattr(functional, names[which])(photo(), factor)
    assert np.array_equal(np.asarray(adjusted(photo(), which, factor)), np.asarray(wanted))


def test_color_is_drawn_as_often_as_asked() -> None:
    pixels = np.asarray(photo()).transpose(2, 0, 1)
    augment = ColorAugment((0.3, 0.3, 0.3, 0.1), 0.8, 0.2)
    found = [augment(pixels, Stream("color", n)) for n in range(400)]
    same = sum(np.array_equal(image, pixels) for image in found)
    gray = sum(bool((image[0] == image[1]).all() and (image[1] == image[2]).all()) for image in found)
    assert abs(same - 0.16 * 400) < 30
    assert abs(gray - 0.2 * 400) < 30
    assert np.array_equal(found[7], augment(pixels, Stream("color", 7)))
    plain = Stream("color", 1)
    state = plain.state
    assert ColorAugment()(pixels, plain) is pixels
    assert plain.state == state
    with pytest.raises(ValueError, match=r"gray_prob: must be in \[0, 1\], was 2"):
        ColorAugment(gray_prob=2)
    with pytest.raises(ValueError, match=r"hue at most 0.5"):
        ColorAugment((0, 0, 0, 0.6))


def test_rectangles_of_noise_are_put_in_as_often_as_asked() -> None:
    pixels = np.full((3, 64, 48), 255, np.uint8)
    erase = RandomErase(0.6, 2, (0.2, 0.4, 0.6), (0.1, 0.2, 0.05))
    found = [erase(pixels, Stream("erase", n)) for n in range(400)]
    changed = [(image != pixels).any(0) for image in found if image is not pixels]
    assert abs(len(changed) - 0.6 * 400) < 40
    assert all(0.01 < spots.mean() < 0.4 for spots in changed)
    tops = [np.flatnonzero(spots.any(1)).min() for spots in changed]
    assert min(tops) == 0
    assert max(tops) > 40
    noise = np.concatenate(
        [image[:, spots] for image, spots in zip((i for i in found if i is not pixels), changed, strict=True)], 1
    )
    np.testing.assert_allclose(noise.mean(1) / 255, (0.2, 0.4, 0.6), atol=0.01)
    np.testing.assert_allclose(noise.std(1) / 255, (0.1, 0.2, 0.05), atol=0.02)
    assert np.array_equal(found[7], erase(pixels, Stream("erase", 7)))
    assert (pixels == 255).all()
    plain = Stream("erase", 1)
    state = plain.state
    assert RandomErase()(pixels, plain) is pixels
    assert plain.state == state
    for changes, message in (
        ({"prob": 2.0}, r"erase_prob: must be in \[0, 1\], was 2"),
        ({"count": 0}, "erase_count: must"),
    ):
        with pytest.raises(ValueError, match=message):
            RandomErase(**changes)


@pytest.mark.parametrize("size", [(256, 256), (640, 480), (1500, 1000), (90, 130)])
def test_fast_decoding_sees_nearly_the_same(size: tuple[int, int]) -> None:
    data = saved(Image.open(io.BytesIO(synthetic_jpeg(2, 1500))).convert("RGB").resize(size), "JPEG", quality=95)
    for seed in range(3):
        exact = TrainTransform(112, (0.4, 1.0))(data, Stream("fast", seed)).astype(int)
        fast = TrainTransform(112, (0.4, 1.0), fast=True)(data, Stream("fast", seed)).astype(int)
        assert fast.shape == exact.shape
        assert np.abs(fast - exact).mean() < 3


def test_fast_decoding_without_a_reduced_scale_is_off_by_two_levels_at_most() -> None:
    fast, exact = TrainTransform(224, (0.85, 0.95), fast=True), TrainTransform(224, (0.85, 0.95))
    for number in range(8):
        data = synthetic_jpeg(number)
        off = np.abs(fast(data, Stream("f", number)).astype(int) - exact(data, Stream("f", number)))
        assert off.max() <= 2
        assert off.mean() < 0.3


@pytest.mark.parametrize("kind", ["CMYK", "palette", "WebP", "16 bits"])
def test_fast_decoding_leaves_other_images_alone(kind: str) -> None:
    data = ODD[kind]()
    fast, exact = (TrainTransform(16, (0.4, 1.0), fast=is_fast)(data, Stream("f")) for is_fast in (True, False))
    assert np.array_equal(fast, exact)
