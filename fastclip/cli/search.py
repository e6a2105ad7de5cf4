"""`fastclip search`: pictures for a sentence, or captions for a picture, among held-out data."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastclip.cli.loading import find_source, load_encoder
from fastclip.cli.options import Checkpoint, Data, Precision, TokenizerPath, optional, parse
from fastclip.cli.text import printable, table
from fastclip.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

_FILE_TYPES = {b"\x89PNG": "png", b"\xff\xd8": "jpg", b"RIFF": "webp", b"BM": "bmp"}


@dataclass(frozen=True)
class Search:
    """The best images for a sentence, or the best captions for an image.

    Looks through every held-out set of a folder, or through an index.

    Example: fastclip search "a red circle above a blue square" --save found

    Example: fastclip search --image found/01_scenes_test-000123.png

    Example: fastclip search "a red circle" --index runs/demo/index --html f.html
    """

    sentence: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[SENTENCE]", help_behavior_hint="")
    ] = ()
    """What the images should show."""
    image: Annotated[str, optional("FILE", "search by sentence")] = ""
    """A PNG, JPEG, WebP or BMP file to find captions for, instead of a sentence."""
    index: Annotated[str, optional("DIR", "none, the held-out sets are looked through")] = ""
    """An index that fastclip index made."""
    where: tuple[str, ...] = ()
    """With --index: only images with this metadata, field=value or field!=value, all of them."""
    similar: bool = False
    """With --index and --image: similar images instead of captions."""
    html: Annotated[str, optional("FILE", "none is written")] = ""
    """A page of the found images."""
    checkpoint: Checkpoint = ""
    """A run (its latest step), a step folder or a file of weights."""
    data: Data = ""
    """Folder with held-out shards, <name>_test-*.tar."""
    top: int = 5
    """How many to show."""
    save: Annotated[str, optional("DIR", "none is saved")] = ""
    """Folder to write the found images into, as 01_<key>.png and so on."""
    batch_size: int = 256
    """Images or texts in one forward."""
    precision: Precision = "fp32"
    """Of the model's computation."""
    tokenizer: TokenizerPath = ""
    """A tokenizers JSON, its folder, or a model name."""


def main(arguments: Sequence[str]) -> None:
    """See `Search`."""
    options = parse(Search, "search", arguments)
    sentence = " ".join(options.sentence)
    image = _checked(options, sentence)
    if options.index:
        from fastclip.cli.search_index import search_index

        return search_index(options, sentence, image)
    source = find_source(options.checkpoint, options.data)
    encoder = load_encoder(source, options.tokenizer, options.precision, options.batch_size)
    from fastclip.evaluation import eval_sets
    from fastclip.evaluation.search import best_captions, best_images

    sets = eval_sets(source.data, encoder.tokenizer, encoder.config.vision.image_size)
    counts = ", ".join(f"{name} {len(eval_set):,}" for name, eval_set in sets.items())
    print(f"{source.checkpoint} on {source.data} ({counts} images)\n", flush=True)
    if image is not None:
        captions = best_captions(encoder, image, sets, options.top)
        lines = [(n, f"{found.score:.3f}", printable(found.caption)) for n, found in enumerate(captions, 1)]
        print(table([("rank", "score", f"caption for {options.image}"), *lines], left=(2,)))
        return
    warn_if_cut(encoder, sentence)
    images = best_images(encoder, sentence, sets, options.top)
    rows = [
        (n, f"{found.score:.3f}", printable(found.key), printable(found.caption)) for n, found in enumerate(images, 1)
    ]
    print(table([("rank", "score", "key", "its first caption"), *rows], left=(2, 3)))
    keep(options, sentence, [(found.score, found.key, found.caption, found.file) for found in images])


def keep(options: Search, asked: str, found: Sequence[tuple[float, str, str, bytes]]) -> None:
    """What --save and --html ask for, of (score, key, caption, file) best first."""
    if options.save:
        folder = Path(options.save)
        folder.mkdir(parents=True, exist_ok=True)
        for rank, (_, key, _, file) in enumerate(found, 1):
            (folder / _file_name(rank, key, file)).write_bytes(file)
        print(f"\nSaved {len(found)} images in {folder}")
    if options.html:
        from fastclip.evaluation.gallery import data_uri
        from fastclip.report.search_page import Result, SearchPage, render_search

        results = [Result(data_uri(file), score, key, caption) for score, key, caption, file in found]
        page = render_search(SearchPage(title="FastCLIP search", results=results, asked=asked))
        Path(options.html).write_bytes(page.encode("utf-8", "replace"))
        print(f"\nWritten: {options.html}")


def _checked(options: Search, sentence: str) -> Image | None:
    """The picture to search with, if there is one. Raises UserError unless exactly one thing is asked."""
    if options.top < 1:
        raise UserError(f"--top must be at least 1, was {options.top}")
    if options.save and Path(options.save).is_file():
        raise UserError(f"--save must be a folder, {options.save} is a file")
    if not options.index and (options.where or options.similar):
        raise UserError("--where and --similar need an --index")
    if options.html and Path(options.html).is_dir():
        raise UserError(f"--html must be a file, {options.html} is a folder")
    if not options.image:
        if not sentence.strip():
            raise UserError('there is nothing to search for: give a sentence such as "a red circle", or --image FILE')
        return None
    if sentence.strip():
        raise UserError("give a sentence or --image, not both")
    if (options.save or options.html) and not options.similar:
        raise UserError("--save and --html are for found images, but --image finds captions: leave one out")
    from fastclip.data.transforms import decode_image

    path = Path(options.image)
    if not path.is_file():
        raise UserError(f"--image {path}: there is no such file")
    try:
        return decode_image(path.read_bytes())
    except ValueError:
        raise UserError(f"--image {path} must be a PNG, JPEG, WebP or BMP file that can be decoded") from None


def warn_if_cut(encoder: Any, sentence: str) -> None:
    """Says on stderr that the model does not read the whole sentence, where that is so."""
    tokens, most = len(encoder.tokenizer.encode(sentence)), encoder.config.text.context_length - 2
    if tokens > most:
        print(f"The sentence has {tokens} tokens, the model reads the first {most}.", file=sys.stderr)


def _file_name(rank: int, key: str, content: bytes) -> str:
    """`01_key.png`: a key may hold folders and anything else."""
    kind = next((name for start, name in _FILE_TYPES.items() if content.startswith(start)), "bin")
    return f"{rank:02d}_{re.sub(r'[^A-Za-z0-9_.-]', '_', key)[:100]}.{kind}"
