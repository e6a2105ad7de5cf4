"""`fastclip convert`: a checkpoint of one package in another's form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from fastclip.cli.options import optional, parse


@dataclass(frozen=True)
class Convert:
    """A CLIP checkpoint as another package has it: the same numbers, bit for bit.

    Reads the files of OpenAI (state dict, JIT archive), open_clip, transformers.

    Example: fastclip convert runs/laion exported --to open_clip

    Example: fastclip convert ViT-B-32.pt clip-hf --to hf

    Example: fastclip convert hf-hub:openai/clip-vit-base-patch32 b32.pt --to openai
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE", help_behavior_hint="")]
    """A run, a folder or a file; hf-hub:ORG/NAME; local-dir:PATH."""
    target: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT", help_behavior_hint="")]
    """A folder for weights, configs and tokenizer, or a .safetensors or .pt file for the weights alone."""
    to: Annotated[Literal["open_clip", "hf", "openai"], tyro.conf.arg(metavar="FORM")] = "open_clip"
    """open_clip (which fastclip reads too), hf (transformers) or openai."""
    model: Annotated[str, optional("NAME", "the config beside the weights")] = ""
    """The model's name, for a file without a config beside it ("ViT-B-32-quickgelu")."""


def main(arguments: Sequence[str]) -> None:
    """See `Convert`."""
    options = parse(Convert, "convert", arguments)
    from fastclip.models.convert import convert

    done = convert(options.source, options.target, options.to, options.model or None)
    print(f"{done.parameters:,} parameters ({', '.join(done.dtypes)}) from {options.source}")
    print(f"wrote {', '.join(done.files)} in {done.weights.parent}")
