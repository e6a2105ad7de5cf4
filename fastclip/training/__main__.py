"""`python -m fastclip.training`, `torchrun -m fastclip.training`, `deepspeed --module fastclip.training`."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from fastclip.errors import UserError
from fastclip.training.config import TrainConfig, read_config, with_values
from fastclip.training.recipes import RECIPES, get_recipe
from fastclip.training.signals import requests_to_end

# tyro joins the lines of a paragraph and leaves the line that comes of it as long as it is.
USAGE = f"""Train CLIP on image-text pairs.

Starts from --recipe {{{",".join(RECIPES)}}}, then --config FILE (YAML),

then the options below; with --resume alone from the resumed run's config.

One process:    fastclip train --recipe demo --data data/demo --out runs/x

From open_clip: --from-open-clip "its command line" instead of --recipe; what it cannot translate it says

All of it here: python -m fastclip.training.launch, with the same options

Several nodes:  deepspeed --module fastclip.training, or torchrun -m with it"""


def parse(arguments: Sequence[str], aloud: bool = True) -> TrainConfig:
    """The config that the command line asks for; what tyro finds wrong it has told already, where `aloud`."""
    import argparse
    import contextlib
    import io

    import tyro

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, prog="fastclip train")
    for option in ("--recipe", "--config", "--resume", "--out", "--from-open-clip"):
        first.add_argument(option)
    first.add_argument("--local_rank", "--local-rank")  # the launchers add it; the environment says the same
    try:
        chosen, rest = first.parse_known_args(list(arguments))
        config = get_recipe(chosen.recipe) if chosen.recipe else TrainConfig()
        resumed_config = _config_of_run(chosen.resume, chosen.out)
        if chosen.from_open_clip:
            from fastclip.training.open_clip import translate

            values, notes = translate(chosen.from_open_clip)
            config = with_values(config, values, "--from-open-clip")
            if aloud:
                print("\n".join(f"--from-open-clip: {note}" for note in notes), flush=True)
        if chosen.config:
            config = read_config(chosen.config, config)
        elif resumed_config and not chosen.recipe:
            config = with_values(read_config(resumed_config, config), {"resume": ""}, "")
        given = {"resume": chosen.resume, "out": chosen.out}
        config = with_values(config, {key: value for key, value in given.items() if value is not None}, "options")
        with contextlib.nullcontext() if aloud else contextlib.redirect_stderr(io.StringIO()):
            return tyro.cli(TrainConfig, default=config, args=rest, prog="fastclip train", description=USAGE)
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError("the options are not understood, nothing was started") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 a user's mistake (told once, by the first rank), 1 a fault, 130 after Ctrl-C."""
    is_first = os.environ.get("RANK", "0") == "0"
    config, mistake, processes = None, None, None
    try:
        with requests_to_end() as request:  # from the first moment: imports and the rendezvous take seconds
            try:
                config = parse(sys.argv[1:] if arguments is None else arguments, aloud=is_first)
            except UserError as error:
                mistake = error
                if "RANK" not in os.environ:  # no other ranks that must hear of it
                    raise
            from fastclip.training.loop import train
            from fastclip.training.processes import start_processes, stop_processes

            processes = start_processes()
            processes.raise_together(mistake)
            assert config is not None
            train(config, processes, request)
    except UserError as error:
        _say(str(error), is_first)
        status = 2
    except KeyboardInterrupt:
        _say("interrupted", is_first)
        status = 130
    except Exception:
        traceback.print_exc()
        return 1  # without waiting for ranks that may be anywhere
    else:
        status = 0
    if processes:
        processes.barrier()  # a launcher ends all ranks as soon as one has left with an error
        stop_processes()
    return status


def _say(message: str, is_first: bool) -> None:
    if is_first:
        print(f"fastclip train: {message}", file=sys.stderr, flush=True)


def _config_of_run(resume: str | None, out: str | None) -> Path | None:
    """The config.yaml of the run that is to go on: of --out for "latest", else of the run or step folder."""
    if not resume:
        return None
    folder = Path(out or "") if resume == "latest" else Path(resume)
    beside = (folder / "config.yaml", folder.parent.parent / "config.yaml")
    return next((path for path in beside if (resume != "latest" or out) and path.is_file()), None)


if __name__ == "__main__":
    sys.exit(main())
