"""JPEGs decoded where the model trains: the loader's batches, to two levels of 255, whatever is among them.

On the CPU, by simplejpeg in the place of nvJPEG; of that no more is tested than how it is called.
"""

from __future__ import annotations

import io
import json
import logging
import sys
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from data_helpers import image_file, small_tokenizer, take, write_samples
from PIL import Image
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory
from training_helpers import losses, options, small_data

from fastclip.data import DataOptions, Loader
from fastclip.data.augment import ColorAugment, RandomErase
from fastclip.data.decode import jpeg_size
from fastclip.data.device_decode import DeviceDecoder, jpeg_crop
from fastclip.data.files import synthetic_jpeg
from fastclip.data.loader import Batch
from fastclip.data.nvjpeg import nvjpeg_decoder
from fastclip.data.streams import Stream
from fastclip.data.transforms import TrainTransform, crop_box
from fastclip.errors import UserError
from fastclip.training.__main__ import main
from fastclip.training.config import TrainConfig
from fastclip.training.plan import memory

CPU = torch.device("cpu")
SCALE, RATIO = (0.3, 0.9), (0.6, 1.8)
SIZES = [(256, 256), (90, 130), (640, 480), (41, 40)]


def decode(files: list[Tensor], device: torch.device) -> list[Tensor]:
    """As nvJPEG does: all of them, or an error that does not say which."""
    try:
        pixels = [simplejpeg.decode_jpeg(file.numpy(), "RGB") for file in files]
    except ValueError as error:
        raise RuntimeError(f"Error while decoding JPEG images: {error}") from error
    return [torch.from_numpy(image).permute(2, 0, 1).to(device) for image in pixels]


class Decode:
    """The same, remembering how many files it was given at once."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def __call__(self, files: list[Tensor], device: torch.device) -> list[Tensor]:
        self.counts.append(len(files))
        return decode(files, device)


def saved(image: Image.Image, form: str = "JPEG", **choices: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **choices)
    return out.getvalue()


def photo(number: int, width: int = 256, height: int = 256) -> Image.Image:
    return Image.open(io.BytesIO(synthetic_jpeg(number, 256))).convert("RGB").resize((width, height))


def without_tables(jpeg: bytes) -> bytes:
    """A JPEG whose header is whole, which no decoder decodes: its quantisation tables are gone."""
    while (start := jpeg.find(b"\xff\xdb")) >= 0:
        jpeg = jpeg[:start] + jpeg[start + 2 + int.from_bytes(jpeg[start + 2 : start + 4], "big") :]
    return jpeg


def scratched(jpeg: bytes) -> bytes:
    """A JPEG with a marker amid its pixels, which PIL reads and simplejpeg does not."""
    middle = len(jpeg) * 3 // 4
    return jpeg[:middle] + b"\xff\xd3" + jpeg[middle:]


JPEG = synthetic_jpeg(1, 64)
KINDS: dict[str, Callable[[], bytes]] = {
    "PNG": lambda: image_file(1, (64, 48)),
    "WebP": lambda: image_file(1, (64, 48), form="WEBP"),
    "CMYK": lambda: saved(photo(1, 64, 48).convert("CMYK")),
    "cut off": lambda: JPEG[:-40],
    "damaged header": lambda: JPEG.replace(b"\xff\xc0", b"\0\0"),
    "something behind": lambda: JPEG + b"camera",
    "nothing": lambda: b"",
}


def jpegs(folder: Path, count: int = 33, **others: bytes) -> Path:
    """Shards of JPEGs of several sizes, colour, grey and progressive; `others` by "s<number>"."""
    choices: list[dict[str, Any]] = [{}, {"subsampling": 0}, {"progressive": True, "quality": 80}, {"quality": 95}]
    files = {}
    for number in range(count):
        image = photo(number, *SIZES[number % len(SIZES)])
        image = image.convert("L") if number % 5 == 4 else image
        files[f"s{number}"] = saved(image, **choices[number % 3])
    members = {name: {"png": None, "jpg": data} for name, data in (files | others).items()}
    return write_samples(folder, count, **members)


def make(data: Path, decode: Any = decode, **choices: Any) -> Loader:
    """A loader whose decoder is `decode` on the CPU, or the workers where that is None."""
    asked: dict[str, Any] = {"image_size": 48, "global_batch": 6, "workers": 0} | choices
    given = DataOptions(crop_scale=SCALE, crop_ratio=RATIO, decoder=DeviceDecoder(CPU, decode) if decode else None)
    return Loader(data, small_tokenizer(data.parent), **{"options": given} | asked)


def assert_close(found: list[Batch], wanted: list[Batch]) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert sorted(a) == sorted(b)
        assert (a["keys"], a["epoch"]) == (b["keys"], b["epoch"])
        assert torch.equal(a["text"], b["text"])
        assert a["image"].shape == b["image"].shape
        assert a["image"].dtype == torch.uint8
        off = (a["image"].float() - b["image"].float()).abs()
        assert float(off.max()) <= 2
        assert float(off.mean()) < 0.1  # of which the most comes from Pillow 13, which may go down before across


@pytest.mark.parametrize("image_size", [48, 224])
def test_batches_are_the_workers(tmp_path: Path, image_size: int) -> None:
    data = jpegs(tmp_path / "data")
    found = make(data, image_size=image_size, hard_negatives=True)
    wanted = make(data, None, image_size=image_size, hard_negatives=True)
    assert_close(take(found, 8), take(wanted, 8))
    assert found.fingerprint() == wanted.fingerprint()
    assert not found.skipped
    assert found.seen == wanted.seen
    assert "JPEGs decoded on cpu" in found.describe()


def test_boxes_are_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, drawn = jpegs(tmp_path / "data"), []

    def noting(*arguments: Any) -> Any:
        drawn.append(list(crop_box(*arguments)))
        return drawn[-1]

    monkeypatch.setattr("fastclip.data.transforms.crop_box", noting)
    left, own = make(data), make(data, None)
    for step in range(8):
        drawn.clear()
        own[step]
        encoded = left._reader[left.job(step)]["encoded"]
        assert encoded.boxes.tolist() == drawn
        assert encoded.places.tolist() == list(range(6))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_and_a_resume_change_nothing(tmp_path: Path, workers: int) -> None:
    others = {f"s{number}": KINDS[kind]() for number, kind in enumerate(KINDS)}
    data = jpegs(tmp_path / "data", **others)
    wanted = take(make(data, None), 12)
    before = make(data, workers=workers)
    assert_close(take(before, 3), wanted[:3])
    state = json.loads(json.dumps(before.state_dict(3)))
    after = make(data, workers=workers)
    assert_close(take(after, 9, after.load_state_dict(state)), wanted[3:])
    whole = make(data)
    take(whole, 12)
    assert after.skipped == whole.skipped
    without = make(data, None)  # a run may be taken up with and without the option
    assert_close(take(without, 9, without.load_state_dict(state)), wanted[3:])


def test_ranks_see_the_same_global_batches(tmp_path: Path) -> None:
    data = jpegs(tmp_path / "data", s3=KINDS["PNG"](), s4=KINDS["cut off"]())
    ranks = [take(make(data, rank=rank, world_size=2), 5) for rank in range(2)]
    for step, whole in enumerate(take(make(data), 5)):
        assert [key for rank in ranks for key in rank[step]["keys"]] == whole["keys"]
        assert torch.equal(torch.cat([rank[step]["image"] for rank in ranks]), whole["image"])


def test_a_mixed_batch(tmp_path: Path) -> None:
    others = {f"s{number}": KINDS[kind]() for number, kind in enumerate(KINDS)}
    data = jpegs(tmp_path / "data", 24, **others)
    left, own = make(data, global_batch=12), make(data, None, global_batch=12)
    for step in range(2):
        batch = left._reader[left.job(step)]
        by_workers = [key in ("0000", "0001", "0002", "0005") for key in batch["keys"]]
        assert batch["image"].untyped_storage().nbytes() == batch["image"].numel()
        assert 0 < sum(by_workers) == len(batch["image"]) == 12 - len(batch["encoded"].places)
    assert_close(take(left, 2), take(own, 2))
    assert left.skipped == own.skipped
    assert set(left.skipped) == {"unreadable_image", "empty_image"}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_plain_jpeg_is_the_workers(kind: str) -> None:
    stream = Stream("kind")
    state = stream.state
    assert jpeg_crop(KINDS[kind](), TrainTransform(48, SCALE), stream) is None
    assert stream.state == state


def test_without_a_crop_to_draw_all_is_the_workers(tmp_path: Path) -> None:
    data, decoder = jpegs(tmp_path / "data"), Decode()
    loader, own = (make(data, way, crop_scale=(1, 1)) for way in (decoder, None))
    for found, wanted in zip(take(loader, 5), take(own, 5), strict=True):
        assert torch.equal(found["image"], wanted["image"])
    assert not decoder.counts


def test_a_header_that_promises_too_much_is_not_handed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastclip.data.decode.MAX_PIXELS", 100_000)
    data, decoder = jpegs(tmp_path / "data"), Decode()
    loader, own = make(data, decoder), make(data, None)
    assert_close(take(loader, 5), take(own, 5))
    assert loader.skipped == own.skipped
    assert loader.skipped["too_many_pixels"] == 8


def test_a_jpeg_that_the_device_refuses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad, odd = without_tables(saved(photo(3))), scratched(saved(photo(4)))
    assert jpeg_size(bad) == jpeg_size(odd) == (256, 256)
    data, decoder = jpegs(tmp_path / "data", 16, s3=bad, s4=odd), Decode()
    loader, whole = make(data, decoder, global_batch=16), make(jpegs(tmp_path / "whole", 16), None, global_batch=16)
    with caplog.at_level(logging.WARNING, "fastclip.data"):
        (found,) = take(loader, 1)
    (wanted,) = take(whole, 1)
    assert found["keys"] == wanted["keys"]
    assert torch.equal(found["text"], wanted["text"])
    for key, ours, theirs in zip(found["keys"], found["image"], wanted["image"], strict=True):
        if key == "0003":
            assert (ours == 128).all()
        elif key == "0004":  # to the last bit, as a worker decodes it
            stream = Stream(0, 0, key)
            stream.below(3)  # the caption
            assert np.array_equal(ours.numpy(), TrainTransform(48, SCALE, RATIO)(odd, stream))
        else:
            assert int((ours.int() - theirs.int()).abs().max()) <= 2
    assert loader.skipped == Counter(grayed_image=1, cpu_decoded_image=1)
    assert decoder.counts[0] == 16
    assert len(decoder.counts) <= 1 + 2 * 2 * 4  # halves of halves, not one by one
    cpu, gray = sorted(caplog.messages)
    assert cpu.startswith("cpu decoded image: '0004' (Error while decoding JPEG images: ")
    assert gray.startswith("grayed image: '0003' (image: cannot be decoded (")


@pytest.mark.parametrize("fault", [lambda pixels: pixels[:1], lambda pixels: pixels[:, 1:]])
def test_pixels_of_another_size_are_not_believed(tmp_path: Path, fault: Callable[[Tensor], Tensor]) -> None:
    data = jpegs(tmp_path / "data")
    loader = make(data, lambda files, device: [fault(pixels) for pixels in decode(files, device)])
    for found, wanted in zip(take(loader, 5), take(make(data, None), 5), strict=True):
        assert torch.equal(found["image"], wanted["image"])
    assert loader.skipped == Counter(cpu_decoded_image=30)


def test_gray_images_are_broken_ones(tmp_path: Path) -> None:
    bad = {f"s{number}": without_tables(saved(photo(number))) for number in range(0, 32, 4)}
    data = jpegs(tmp_path / "data", 32, **bad)
    given = DataOptions(crop_scale=SCALE, crop_ratio=RATIO, decoder=DeviceDecoder(CPU, decode))
    with pytest.raises(ValueError, match=r"grayed image: '00\d\d' .*strict run"):
        take(make(data, options=replace(given, strict=True), global_batch=16), 2)
    few = make(data, options=replace(given, max_broken=0.2), global_batch=16)
    with pytest.raises(ValueError, match=r"of 1008 samples are broken, more than the share of 0.2 .*grayed image"):
        take(few, 63)
    odd = jpegs(tmp_path / "odd", 8, s1=scratched(saved(photo(1))))
    used = make(odd, options=replace(given, strict=True), global_batch=8)
    take(used, 1)
    assert used.skipped == Counter(cpu_decoded_image=1)


def test_few_pixels_are_decoded_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, decoder = jpegs(tmp_path / "data", 32), Decode()
    wanted = take(make(data, global_batch=32), 1)
    monkeypatch.setattr("fastclip.data.device_decode.GROUP_PIXELS", 300_000)  # less than the largest
    found = take(make(data, decoder, global_batch=32), 1)
    assert torch.equal(found[0]["image"], wanted[0]["image"])
    assert sum(decoder.counts) == 32
    assert 8 <= len(decoder.counts) < 24


def test_pinning_a_batch_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As DataLoader does where there is a GPU, but for the memory that a tensor is copied to."""
    monkeypatch.setattr(Tensor, "pin_memory", lambda self, *device: self.clone())
    loader = make(jpegs(tmp_path / "data", s1=b"", s2=b"noise", s3=KINDS["PNG"]()))
    for step in range(5):
        pinned, plain = (loader._reader[loader.job(step)] for _ in range(2))
        pinned = pin_memory(pinned)
        assert [pinned[name] for name in ("skipped", "replaced")] == [plain["skipped"], plain["replaced"]]
        assert pinned["examples"].keys() == plain["examples"].keys()
        assert torch.equal(loader._decoded(pinned)["image"], loader._decoded(plain)["image"])
    assert sum((Counter(loader[step]["skipped"]) for step in range(5)), Counter()).total() > 1


@pytest.mark.parametrize(
    "choice",
    [
        {"color": ColorAugment((0.1, 0, 0, 0), 0.5)},
        {"color": ColorAugment(gray_prob=0.5)},
        {"erase": RandomErase(0.5)},
        {"fast_decode": True},
    ],
)
def test_what_workers_do_to_pixels_is_refused(choice: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"gpu_decode: jitter, greys, erasing and fast_decode are .* False, were color"
    ):
        DataOptions(decoder=DeviceDecoder(CPU, decode), **choice)


def fake_torchvision(monkeypatch: pytest.MonkeyPatch, decode_jpeg: Any) -> None:
    """A torchvision whose decoder is `decode_jpeg`."""
    package, io_module = types.ModuleType("torchvision"), types.ModuleType("torchvision.io")
    io_module.decode_jpeg, io_module.ImageReadMode = decode_jpeg, types.SimpleNamespace(RGB="RGB")  # type: ignore
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.io", io_module)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The devices whose current stream was waited for."""
    found: list[torch.device] = []
    stream = lambda device: types.SimpleNamespace(synchronize=lambda: found.append(device))  # noqa: E731
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    return found


def test_a_run_without_a_gpu_is_refused() -> None:
    with pytest.raises(UserError, match="gpu_decode: needs a CUDA device, was cpu: leave it out"):
        nvjpeg_decoder(CPU)


def test_a_torchvision_that_does_not_decode_is_refused(
    monkeypatch: pytest.MonkeyPatch, waits: list[torch.device]
) -> None:
    def without_nvjpeg(*arguments: Any, **choices: Any) -> list[Tensor]:
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support")

    device = torch.device("cuda", 0)
    fake_torchvision(monkeypatch, without_nvjpeg)
    with pytest.raises(UserError, match=r"built for torch .* not compiled with nvJPEG support\): install that"):
        nvjpeg_decoder(device)
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    with pytest.raises(UserError, match=r"gpu_decode: needs a torchvision built for torch .*\(ModuleNotFoundError: "):
        nvjpeg_decoder(device)
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with pytest.raises(UserError, match=r"gpu_decode: needs simplejpeg, .*: pip install simplejpeg"):
        nvjpeg_decoder(device)


def test_nvjpeg_is_called_as_torchvision_wants_it(monkeypatch: pytest.MonkeyPatch, waits: list[torch.device]) -> None:
    seen: list[int] = []

    def decode_jpeg(files: list[Tensor], mode: str, device: torch.device) -> list[Tensor]:
        assert (mode, device) == ("RGB", torch.device("cuda", 0))
        assert all((file.dtype, file.dim(), file.device) == (torch.uint8, 1, CPU) for file in files)
        seen.append(len(files))
        assert len(waits) == len(seen)  # behind the kernels that may still read what it writes to
        return decode(files, CPU)

    fake_torchvision(monkeypatch, decode_jpeg)
    decoder = nvjpeg_decoder(torch.device("cuda", 0))
    assert decoder.device == torch.device("cuda", 0)
    decoder.decode([torch.frombuffer(bytearray(JPEG), dtype=torch.uint8)] * 3, decoder.device)
    assert seen == [1, 3]


@pytest.mark.long
def test_a_run_decodes_on_its_device_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    decoder = Decode()
    monkeypatch.setattr("fastclip.training.start.nvjpeg_decoder", lambda device: DeviceDecoder(device, decoder))
    members = {f"s{n}": {"png": None, "jpg": saved(photo(n, 80, 70))} for n in range(40)}
    data = small_data(tmp_path / "data", 64, **members)
    own, out, again = tmp_path / "own", tmp_path / "out", tmp_path / "again"
    asked: dict[str, Any] = {"engine": "torch", "steps": 2, "save_every": 1}
    assert main(options(data, own, **asked)) == 0
    assert main([*options(data, out, **asked), "--gpu-decode"]) == 0
    assert "JPEGs decoded on " in capfd.readouterr().out
    assert len(decoder.counts) == 3  # the last of which is not trained on
    assert losses(out) == pytest.approx(losses(own), abs=2e-3)
    assert losses(out) != losses(own)
    step = out / "checkpoints" / "step_00000001"
    assert main([*options(data, again, **asked, resume=step), "--gpu-decode"]) == 0
    assert losses(again) == losses(out)[1:]
    assert main([*options(data, tmp_path / "no", erase_prob=0.1), "--gpu-decode"]) == 2
    assert "gpu_decode: jitter, greys, erasing" in capfd.readouterr().err


def test_a_plan_counts_the_pixels_on_the_device() -> None:
    config = TrainConfig(model="debug", global_batch=64, chunk_size=8)
    for engine, stage in (("torch", 0), ("deepspeed", 0), ("deepspeed", 2)):
        plain = replace(config, engine=engine, zero_stage=stage)
        more = memory(replace(plain, gpu_decode=True), 2).total - memory(plain, 2).total
        assert more == pytest.approx(32 * 3 * 64 * 64)
