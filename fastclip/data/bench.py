"""Samples a second of each stage of the data path on one core, and of the whole loader."""

import time
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

from fastclip.data.captions import captions_of
from fastclip.data.decode import decode_image
from fastclip.data.faults import BrokenSample
from fastclip.data.loader import Loader
from fastclip.data.scan import Sample
from fastclip.data.streams import Stream
from fastclip.data.tokenizer import Tokenizer
from fastclip.data.transforms import train_pixels

SAMPLES = 1000  # read once, then each stage has its share of the time


def stage_rates(loader: Loader, tokenizer: Tokenizer, seconds: float = 2.0) -> dict[str, float]:
    """Samples a second of one core: "read", "decode", "crop and resize", "tokenize"; each for `seconds`."""
    samples: list[Sample] = []

    def read(place: tuple[int, str, int]) -> None:
        source, name, number = place
        try:
            sample = loader.sources[source].reader.read(name, number)
            captions_of(sample)
            decode_image(sample.image)
        except (BrokenSample, ValueError, OSError):
            return
        samples.append(sample)

    places = list(islice(loader.places_of(0), SAMPLES))
    for place in places:
        read(place)
    if not samples:
        raise ValueError(f"data: none of the first {len(places)} samples can be used")
    images = [decode_image(sample.image) for sample in samples[:100]]
    captions = [captions_of(sample)[0] for sample in samples]
    scale, size = loader.options.crop_scale, loader.image_size
    pairs = [(image, Stream("bench", number)) for number, image in enumerate(images)]
    stages: dict[str, tuple[Callable[[Any], Any], list[Any], int]] = {
        "read": (lambda place: loader.sources[place[0]].reader.read(place[1], place[2]), places, 1),
        "decode": (lambda sample: decode_image(sample.image), samples, 1),
        "crop and resize": (lambda pair: train_pixels(pair[0], size, scale, pair[1]), pairs, 1),
        "tokenize": (tokenizer.batch, [captions], len(captions)),
    }
    return {name: _rate(action, items, seconds) * each for name, (action, items, each) in stages.items()}


def loader_rate(loader: Loader, seconds: float = 5.0) -> float:
    """Samples a second of all workers, from the third batch of each on."""
    batches = loader.batches()
    try:
        for _ in islice(batches, 2 * max(loader.workers, 1)):
            pass
        return _rate(lambda batch: None, batches, seconds) * (loader.global_batch // loader.world_size)
    finally:
        batches.close()


def _rate(action: Callable[[Any], Any], items: Iterable[Any], seconds: float) -> float:
    """Calls a second over `items`, which are gone through again where they end."""
    start, count = time.perf_counter(), 0
    while True:
        for item in items:
            action(item)
            count += 1
            spent = time.perf_counter() - start
            if spent > seconds:
                return count / spent
