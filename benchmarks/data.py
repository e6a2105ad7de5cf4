"""`python -m benchmarks.data`: the data path beside WebDataset's and open_clip's, interleaved, into results/data.csv.

Pairs of 256-pixel JPEGs (24 kB each, made here) in tar shards. A row's milliseconds are those of one sample. The
pipelines run with two workers each, from tars to batches; ours and WebDataset's end in uint8 of 224 pixels, open_clip's
is its own `get_wds_dataset`, which ends in floats. Members and tokenizers run on one core. Before anything is timed,
ours must give the pixels of PIL's own decode, crop and resize, and open_clip's ids.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks import machine, peers, rows
from fastclip.data import DataOptions, Loader, clip_tokenizer, write_shard
from fastclip.data.device_decode import DeviceDecoder
from fastclip.data.files import synthetic_caption, synthetic_jpeg
from fastclip.data.nvjpeg import nvjpeg_decoder
from fastclip.data.sources import TarReader, tar_source
from fastclip.data.streams import Stream
from fastclip.data.transforms import TrainTransform, crop_box

RESULTS = Path(__file__).parent / "results" / "data.csv"
SIZE, TARGET, BATCH, WORKERS = 256, 224, 128, 2
SCALE = (0.9, 1.0)
Rates = dict[str, list[float]]


def write_data(folder: Path, shards: int, samples: int) -> str:
    """Shards of made-up pairs; their pattern."""
    for shard in range(shards):
        numbers = range(shard * samples, (shard + 1) * samples)
        pairs = ((f"{n:08d}", {"jpg": synthetic_jpeg(n % 64), "txt": synthetic_caption(n).encode()}) for n in numbers)
        write_shard(folder / f"{shard:05d}.tar", pairs)
    return f"{folder}/{{00000..{shards - 1:05d}}}.tar"


def ours(pattern: str, fast: bool = False, decoder: DeviceDecoder | None = None) -> Iterator[int]:
    """Sizes of batches of our loader."""
    options = DataOptions(crop_scale=SCALE, fast_decode=fast, decoder=decoder)
    for batch in Loader(pattern, clip_tokenizer(), TARGET, BATCH, workers=WORKERS, options=options).batches():
        assert batch["image"].dtype == torch.uint8
        yield len(batch["image"])


def webdataset(pattern: str) -> Iterator[int]:
    """The same by WebDataset, with torchvision's crop and open_clip's tokenizer, to uint8."""
    import webdataset as wds
    from torchvision import transforms

    from fastclip.data.transforms import RATIO

    simple = open_clip_module("open_clip.tokenizer").SimpleTokenizer()
    crop = transforms.RandomResizedCrop(TARGET, SCALE, RATIO, transforms.InterpolationMode.BICUBIC)
    to_pixels = transforms.Compose([crop, transforms.PILToTensor()])
    data = wds.WebDataset(pattern, shardshuffle=100, resampled=True).shuffle(1000).decode("pilrgb")
    data = data.to_tuple("jpg", "txt").map_tuple(to_pixels, lambda text: simple(text)[0]).batched(BATCH)
    for images, _ in wds.WebLoader(data, batch_size=None, num_workers=WORKERS):
        assert images.dtype == torch.uint8
        yield len(images)


def open_clip(pattern: str) -> Iterator[int]:
    """open_clip's own pipeline, as its trainer builds it."""
    data = open_clip_module("open_clip_train.data")
    image_transform = open_clip_module("open_clip.transform").image_transform
    simple = open_clip_module("open_clip.tokenizer").SimpleTokenizer()
    asked = types.SimpleNamespace(
        train_data=pattern, train_num_samples=1_000_000, dataset_resampled=True, train_data_upsampling_factors=None,
        batch_size=BATCH, world_size=1, workers=WORKERS, seed=0,
    )  # fmt: skip
    expand = data.tar_file_expander  # WebDataset 1.0 also tells where a shard ends, which open_clip 3.3 does not know
    if not hasattr(expand, "without_ends"):
        data.tar_file_expander = _without_ends(expand)
    info = data.get_wds_dataset(asked, image_transform(TARGET, is_train=True), is_train=True, tokenizer=simple)
    for images, _ in info.dataloader:
        yield len(images)


def _without_ends(expand: Callable[..., Iterator[dict[str, Any]]]) -> Callable[..., Iterator[dict[str, Any]]]:
    def members(streams: Any, handler: Any) -> Iterator[dict[str, Any]]:
        return (member for member in expand(streams, handler=handler) if "fname" in member)

    members.without_ends = True  # type: ignore[attr-defined]
    return members


def open_clip_module(name: str) -> Any:
    """A module of open_clip beside a torchvision whose operators do not fit the torch that is here."""
    import importlib

    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
    return importlib.import_module(name)


def pipeline_rate(batches: Iterator[int], seconds: float) -> float:
    """Samples a second of a stream that runs already: from its fourth batch on."""
    for _ in islice(batches, 3):
        pass
    start, samples = time.perf_counter(), 0
    for size in batches:
        samples += size
        spent = time.perf_counter() - start
        if spent > seconds:
            return samples / spent
    raise AssertionError("the stream ended")


def members_rate(pattern: str, impl: str) -> float:
    """Samples a second of reading tar members, nothing decoded."""
    start, count = time.perf_counter(), 0
    if impl == "webdataset":
        import webdataset as wds

        for sample in wds.WebDataset(pattern, shardshuffle=False):
            count += len(sample["jpg"]) > 0
    else:
        source = tar_source(pattern)
        reader = TarReader()
        for shard, samples in enumerate(source.counts.tolist()):
            for number in range(samples):
                count += len(reader.read(source.name(shard), number).image) > 0
        reader.close()
    return count / (time.perf_counter() - start)


def tokenizer_rate(tokenize: Callable[[list[str]], Any], texts: list[str]) -> float:
    """Captions a second."""
    start = time.perf_counter()
    for first in range(0, len(texts), BATCH):
        tokenize(texts[first : first + BATCH])
    return len(texts) / (time.perf_counter() - start)


def decode_rate(count: int = 300) -> float:
    """Images a second of PIL on one core: decoded to RGB, nothing else."""
    import io

    from PIL import Image

    start = time.perf_counter()
    for number in range(count):
        Image.open(io.BytesIO(synthetic_jpeg(number % 64))).convert("RGB")
    return count / (time.perf_counter() - start)


def gate(texts: Iterable[str]) -> None:
    """Raises where ours is not what the others compute."""
    import io

    from PIL import Image

    transform = TrainTransform(TARGET, SCALE)
    for number in range(64):
        image = Image.open(io.BytesIO(synthetic_jpeg(number))).convert("RGB")
        box = crop_box(SIZE, SIZE, SCALE, Stream("gate", number))
        wanted = np.asarray(image.crop(box).resize((TARGET, TARGET), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        if not np.array_equal(transform(synthetic_jpeg(number), Stream("gate", number)), wanted):
            raise AssertionError(f"image {number} differs from PIL's")
    simple = open_clip_module("open_clip.tokenizer").SimpleTokenizer()
    texts = list(texts)
    if not torch.equal(clip_tokenizer()(texts), simple(texts)):
        raise AssertionError("ids differ from open_clip's")


def device_gate(decoder: DeviceDecoder) -> None:
    """Raises where the device's pixels are not nearly a worker's.

    nvJPEG need not smooth the colours that it enlarges; libjpeg's own two ways are 3.8 of 255 apart on these images.
    """
    options = DataOptions(crop_scale=SCALE)
    loaders = [
        Loader("synthetic:1000", clip_tokenizer(), TARGET, 64, workers=0, options=choices)
        for choices in (options, replace(options, decoder=decoder))
    ]
    wanted, found = (loader[0]["image"].float().cpu() for loader in loaders)
    if (off := float((found - wanted).abs().mean())) > 6 or loaders[1][0]["skipped"]:
        raise AssertionError(f"the device's pixels are {off:.2f} of 255 off, or some are not the device's")


def measure(pattern: str, rounds: int, seconds: float, decoder: DeviceDecoder | None = None) -> dict[str, Rates]:
    """Samples a second by part and implementation, of each round."""
    plain = [synthetic_caption(number) for number in range(2000)]
    odd = [f"{text} caf\u00e9 &amp; \u201cbar\u201d" for text in plain]
    gate(plain[:200] + odd[:200])
    torch.set_num_threads(1)
    mine, simple = clip_tokenizer(), open_clip_module("open_clip.tokenizer").SimpleTokenizer()
    makers: dict[str, Callable[[], Iterator[int]]] = {
        "webdataset": lambda: webdataset(pattern),
        "open_clip": lambda: open_clip(pattern),
        "auto": lambda: ours(pattern),
        "fast_decode": lambda: ours(pattern, fast=True),
    }
    if decoder:
        device_gate(decoder)
        makers["gpu_decode"] = lambda: ours(pattern, decoder=decoder)
    parts: dict[str, dict[str, Callable[[], float]]] = {
        "data_members": {impl: partial(members_rate, pattern, impl) for impl in ("webdataset", "auto")},
        "tokenizer_ascii": {
            "open_clip": lambda: tokenizer_rate(simple, plain),
            "auto": lambda: tokenizer_rate(mine, plain),
        },
        "tokenizer_cleaned": {
            "open_clip": lambda: tokenizer_rate(simple, odd),
            "auto": lambda: tokenizer_rate(mine, odd),
        },
        "data_decode": {"PIL": decode_rate},
    }
    found: dict[str, Rates] = {"data_pipeline": {impl: [] for impl in makers}}
    found |= {part: {impl: [] for impl in impls} for part, impls in parts.items()}
    for _ in range(rounds):
        for part, impls in parts.items():
            for impl, rate in impls.items():
                _note(found, part, impl, rate())
        for impl, make in makers.items():
            stream = make()
            _note(found, "data_pipeline", impl, pipeline_rate(stream, seconds))
            stream.close()  # type: ignore[attr-defined]
    return found


def _note(found: dict[str, Rates], part: str, impl: str, rate: float) -> None:
    found[part][impl].append(rate)
    print(f"{part} {impl}: {rate:,.0f} /s", file=sys.stderr, flush=True)


def to_rows(found: dict[str, Rates]) -> Iterator[rows.Row]:
    """One row for each part and implementation; the baseline is the fastest of the others."""
    versions = {"webdataset": peers.version_of("webdataset"), "open_clip": peers.version_of("open_clip")}
    where = {"torch": torch.__version__, "commit": machine.commit()}
    for part, rates in found.items():
        others = {impl: median(rate) for impl, rate in rates.items() if impl in versions}
        baseline = max(others, key=others.__getitem__, default="")
        shape = json.dumps({"from": SIZE, "to": TARGET, "workers": WORKERS if part == "data_pipeline" else 1})
        for impl, rate in rates.items():
            ratios = [a / b for a, b in zip(rate, rates.get(baseline, rate), strict=True)]
            device = "cuda" if impl == "gpu_decode" else "cpu"
            yield rows.make_row(
                op=part, impl=impl, device=device, dtype="uint8",
                shape_json=shape, machine=machine.machine_name(device),
                phase="forward", p50_ms=1e3 / median(rate), p20_ms=1e3 / max(rate), p80_ms=1e3 / min(rate),
                ratio=median(ratios) if impl not in versions else None, baseline=baseline,
                peer_version=versions.get(impl, "fastclip"), **where,
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one pipeline in one round")
    parser.add_argument("--gpu-decode", action="store_true", help="our pipeline with JPEGs decoded on the GPU too")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    decoder = nvjpeg_decoder(torch.device("cuda" if torch.cuda.is_available() else "cpu")) if asked.gpu_decode else None
    with tempfile.TemporaryDirectory() as folder:
        found = measure(write_data(Path(folder), 8, 400), asked.rounds, asked.seconds, decoder)
    table = list(to_rows(found))
    asked.out.unlink(missing_ok=True)
    rows.append(asked.out, table)
    for row in table:
        rate = 1e3 / float(row["p50_ms"])
        beside = f"{float(row['ratio']):.2f} times {row['baseline']}" if row["ratio"] and row["baseline"] else ""
        print(f"{row['op']:<18} {row['impl']:<12} {rate:>10,.0f} /s  {beside}")


if __name__ == "__main__":
    main()
