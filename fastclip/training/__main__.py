"""`python -m fastclip.training`, `torchrun -m fastclip.training`, `deepspeed --module fastclip.training`."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from fastclip.errors import UserError
from fastclip.training.config import TrainConfig, read_config
from fastclip.training.recipes import RECIPES, get_recipe

USAGE = f"""Train CLIP on image-text pairs.

Starts from a recipe (--recipe {{{",".join(RECIPES)}}}), then a YAML file (--config FILE), then the options below.
Run it as `python -m fastclip.training` or `fastclip train` (one process), `torchrun --nproc_per_node N -m fastclip.training`
or `deepspeed --module fastclip.training` (all GPUs; on a CPU add --num_accelerators N and set DS_ACCELERATOR=cpu)."""


def parse(arguments: Sequence[str]) -> TrainConfig:
    """The config that the command line asks for."""
    import argparse

    import tyro

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    first.add_argument("--config")
    first.add_argument("--local_rank", "--local-rank")  # the launchers add it; the environment says the same
    chosen, rest = first.parse_known_args(list(arguments))
    config = get_recipe(chosen.recipe) if chosen.recipe else TrainConfig()
    if chosen.config:
        config = read_config(chosen.config, config)
    return tyro.cli(TrainConfig, default=config, args=rest, prog="fastclip train", description=USAGE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 a user's mistake (one line on stderr), 1 a fault."""
    try:
        config = parse(sys.argv[1:] if arguments is None else arguments)
        from fastclip.training.loop import train

        train(config)
    except (UserError, ValueError, FileNotFoundError) as error:
        print(f"fastclip train: {error}", file=sys.stderr)
        return 2
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
