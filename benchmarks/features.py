"""Features of image files and captions per second, beside open_clip's with the same weights, in one interleaved run.

    python -m benchmarks.features --model ViT-B-32 --pairs 32 --rounds 7

Both begin with JPEG files and sentences and end with features: decoding, resizing, tokenizing, both towers, fp32. The
features are compared first. One line of JSON; a ratio above 1 says that fastclip is faster.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastclip.data import get_tokenizer
from fastclip.evaluation import Encoder
from fastclip.evaluation.sets import ImageFiles
from fastclip.models import load_checkpoint

CAPTIONS = (
    "a photo of a cat asleep on a windowsill",
    "two people walk a dog along the beach at sunset",
    "a red bus",
    "an old wooden table with a bowl of fruit and a newspaper on it",
)
SIZE = (320, 280)
BOUND = 1e-4  # between the features of the two


def photo(number: int) -> bytes:
    """A JPEG file of smooth colours."""
    from PIL import Image

    small = np.random.default_rng(number).integers(0, 256, (9, 10, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize(SIZE, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def peer(name: str) -> tuple[Any, Any, Any]:
    """open_clip's model of that architecture with random weights, its transform and its tokenizer."""
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
    import open_clip

    torch.manual_seed(0)
    model, _, transform = open_clip.create_model_and_transforms(name)
    return model.eval(), transform, open_clip.get_tokenizer(name)


def main() -> None:
    """Prints the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    files = [photo(number) for number in range(options.pairs)]
    captions = [CAPTIONS[number % len(CAPTIONS)] for number in range(options.pairs)]
    model, transform, tokenizer = peer(options.model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pt"
        torch.save(model.state_dict(), path)
        own = load_checkpoint(path, model=options.model).model
    encoder = Encoder.of_model(own, get_tokenizer("clip", own.config.text.context_length), batch_size=options.pairs)
    source = ImageFiles([str(n) for n in range(options.pairs)], lambda n: files[n], own.config.vision.image_size)

    @torch.no_grad()
    def their_images() -> Tensor:
        from PIL import Image

        batch = torch.stack([transform(Image.open(io.BytesIO(file))) for file in files])
        return F.normalize(model.encode_image(batch), dim=-1)

    @torch.no_grad()
    def their_texts() -> Tensor:
        return F.normalize(model.encode_text(tokenizer(captions)), dim=-1)

    calls: dict[str, Callable[[], Tensor]] = {
        "images": lambda: encoder.images(source),
        "their_images": their_images,
        "texts": lambda: encoder.texts(captions),
        "their_texts": their_texts,
    }
    first = {name: call() for name, call in calls.items()}
    error = max((first[kind] - first[f"their_{kind}"]).abs().max().item() for kind in ("images", "texts"))
    if error > BOUND:
        raise SystemExit(f"the features differ by {error:.2e}, more than {BOUND}")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    pairs = seconds["images"] + seconds["texts"]
    their_pairs = seconds["their_images"] + seconds["their_texts"]
    row = {"model": options.model, "pairs": options.pairs, "threads": torch.get_num_threads(), "error": error}
    row |= {"pairs_per_s": round(options.pairs / pairs, 2), "images_per_s": round(options.pairs / seconds["images"], 2)}
    row |= {"ratio_pairs": round(their_pairs / pairs, 3)}
    row |= {"ratio_images": round(seconds["their_images"] / seconds["images"], 3)}
    print(json.dumps(row | {"ratio_texts": round(seconds["their_texts"] / seconds["texts"], 3)}))


if __name__ == "__main__":
    main()
