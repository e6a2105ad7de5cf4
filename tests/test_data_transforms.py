"""Transforms: what open_clip's do, with draws that belong to a key."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from data_helpers import image_file
from peers import open_clip_module
from PIL import Image

from fastclip.data.streams import Stream
from fastclip.data.transforms import (
    Preprocess,
    crop_box,
    decode_image,
    eval_pixels,
    normalize_image,
    train_pixels,
)

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def picture(width: int, height: int) -> Image.Image:
    return decode_image(image_file(width * 1000 + height, (width, height)))


@pytest.mark.parametrize(
    ("mode", "form"), [("RGB", "JPEG"), ("L", "PNG"), ("P", "PNG"), ("RGBA", "WEBP"), ("1", "BMP")]
)
def test_every_kind_of_image_becomes_rgb(mode: str, form: str) -> None:
    image = decode_image(image_file(1, (12, 10), mode, form))
    assert (image.mode, image.size) == ("RGB", (12, 10))


@pytest.mark.parametrize("data", [b"", b"not an image", image_file(1)[:60], image_file(1)[:-40]])
def test_what_is_no_image_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode_image(data)


def test_a_header_that_promises_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastclip.data.decode.MAX_PIXELS", 63)
    with pytest.raises(ValueError, match="8 x 8 is more than 63 pixels"):
        decode_image(image_file(1))


@pytest.mark.parametrize("form", ["EPS", "TIFF", "PDF", "ICO"])
def test_formats_beyond_the_four_are_not_opened(form: str) -> None:
    out = io.BytesIO()
    Image.new("RGB", (16, 16)).save(out, form)
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode_image(out.getvalue())


def test_an_image_of_the_right_size_is_left_alone() -> None:
    image = picture(16, 16)
    pixels = np.asarray(image).transpose(2, 0, 1)
    assert np.array_equal(eval_pixels(image, 16), pixels)
    assert np.array_equal(train_pixels(image, 16, (1, 1), Stream(0)), pixels)


def test_without_a_crop_training_sees_what_evaluation_sees() -> None:
    image = picture(40, 24)
    assert np.array_equal(train_pixels(image, 16, (1, 1), Stream(0)), eval_pixels(image, 16))


def test_random_crops_stay_inside_and_keep_the_asked_area() -> None:
    for number in range(300):
        left, top, right, bottom = crop_box(64, 48, (0.3, 0.6), Stream("crop", number))
        assert 0 <= left < right <= 64
        assert 0 <= top < bottom <= 48
        assert 0.28 <= (right - left) * (bottom - top) / (64 * 48) <= 0.62
        assert 0.7 <= (right - left) / (bottom - top) <= 1.4
    # too long for any allowed ratio at this scale: the largest centred crop
    assert crop_box(100, 10, (1, 1), Stream(0)) == (43, 0, 56, 10)


def test_a_crop_belongs_to_its_stream() -> None:
    image = picture(40, 40)
    first, again, other = (train_pixels(image, 16, (0.2, 0.8), Stream("s", n)) for n in (1, 1, 2))
    assert first.shape == (3, 16, 16)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_normalize_image_is_its_formula() -> None:
    images = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    wanted = (images.double() / 255 - mean) / std
    torch.testing.assert_close(normalize_image(images, MEAN, STD).double(), wanted, rtol=0, atol=1e-6)
    half = normalize_image(images, MEAN, STD, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, wanted.bfloat16(), rtol=2**-8, atol=0)


def test_preprocess_draws_its_crop_from_torch() -> None:
    image = picture(40, 30)
    train = Preprocess(16, MEAN, STD, crop_scale=(0.3, 0.9))
    torch.manual_seed(1)
    first, other = train(image), train(image)
    torch.manual_seed(1)
    assert torch.equal(train(image), first)
    assert not torch.equal(first, other)


@pytest.mark.peer
@pytest.mark.parametrize("size", [(24, 24), (50, 31), (31, 50), (17, 90), (20, 24)])
def test_evaluation_transform_is_open_clips(size: tuple[int, int]) -> None:
    theirs = open_clip_module("open_clip.transform").image_transform(24, is_train=False, mean=MEAN, std=STD)
    image = picture(*size)
    ours = Preprocess(24, MEAN, STD)(image)
    torch.testing.assert_close(ours, theirs(image), rtol=0, atol=1e-6)
