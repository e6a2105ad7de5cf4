"""`fastclip VERB ...`: finds the verb, imports its module only, and turns what goes wrong into an exit status."""

from __future__ import annotations

import difflib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from fastclip._version import __version__

# verb -> (module with `main(arguments) -> int | None`, one line for the help)
VERBS = {
    "train": ("fastclip.training.__main__", "train a model (one process), or resume a run"),
    "plan": ("fastclip.cli.plan", "memory and time of a run, before it is started"),
    "eval": ("fastclip.cli.eval", "zero-shot and retrieval figures of a checkpoint"),
    "search": ("fastclip.cli.search", "the best images for a sentence, or captions for an image"),
    "index": ("fastclip.cli.index", "an index of many images, to search in a moment"),
    "serve": ("fastclip.cli.serve", "a page with a search box for an index, on this machine"),
    "convert": ("fastclip.cli.convert", "a checkpoint in another package's form, bit for bit"),
    "data demo": ("fastclip.cli.data_demo", "write the embedded data set: no download"),
    "data stats": ("fastclip.cli.data_stats", "what is in some shards, and what would be skipped"),
    "data pack": ("fastclip.cli.data_pack", "a folder, CSV, TSV or Parquet as shards"),
    "data check": ("fastclip.cli.data_check", "what is broken in some data, by cause"),
    "data bench": ("fastclip.cli.data_bench", "samples a second, and which stage is the limit"),
    "data tokenizer": ("fastclip.cli.data_tokenizer", "learn a tokenizer from the captions of some data"),
    "build": ("fastclip.cli.build", "compile the C++ kernels for the CPU"),
    "doctor": ("fastclip.cli.doctor", "what is installed, what runs where, what clashes"),
}
OPTIONS = ("--help", "--version")
TRAIN_PACKAGES = {"ftfy", "regex", "tqdm", "numpy", "PIL", "safetensors", "tokenizers", "tyro", "yaml", "deepspeed"}
INTERRUPTED = 130  # what a shell says of a program that Ctrl-C ended
USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)

USAGE = """usage: fastclip VERB [options]

{about}

{verbs}

  fastclip VERB --help   every option of a verb, and an example
  fastclip --version     the version of the package

Exit status: 0 done; 2 a mistake in what was asked, told in one line; 1 a fault.
"""
ABOUT = """Train CLIP models and see what they have learned. From nothing:

  fastclip data demo data/demo
  fastclip train --recipe demo --data data/demo --out runs/demo
  fastclip search "a red circle above a blue square\""""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 a user's mistake (told on stderr), 1 a fault (with its traceback)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a caption may hold what the terminal cannot show
    verb = next((name for length in (2, 1) if (name := " ".join(given[:length])) in VERBS), None)
    if verb is None:
        return _without_verb(given)
    return _run(verb, given[len(verb.split()) :])


def usage(group: str = "") -> str:
    """The page of `fastclip --help`, where a group of verbs has one line, or of the verbs of one group ("data")."""
    if group:
        shown = {verb: line for verb, (_, line) in VERBS.items() if verb.startswith(f"{group} ")}
    else:
        shown = {verb.partition(" ")[0]: line for verb, (_, line) in VERBS.items()}
        for name in shown:
            inside = [verb.removeprefix(f"{name} ") for verb in VERBS if verb.startswith(f"{name} ")]
            shown[name] = ", ".join(inside) + f" (see {name} --help)" if inside else shown[name]
    lines = "\n".join(f"  {verb:<14} {line}" for verb, line in shown.items())
    return USAGE.format(about=f"Verbs of `fastclip {group}`:" if group else ABOUT, verbs=lines)


def _without_verb(given: list[str]) -> int:
    first = given[0] if given else ""
    if first == "--version":
        print(f"fastclip {__version__}")
        return 0
    is_group = any(verb.startswith(f"{first} ") for verb in VERBS)
    wants_help = {"-h", "--help"} & set(given[: 1 + is_group])
    if wants_help or len(given) <= is_group:
        print(usage(first if is_group else ""), end="", file=sys.stdout if wants_help else sys.stderr)
        return 0 if wants_help else 2
    asked = " ".join(given[: 1 + is_group])
    near = difflib.get_close_matches(asked, (*VERBS, *OPTIONS), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    kind = "option" if first.startswith("-") else "verb"
    print(f"fastclip: unknown {kind} {asked!r}{hint} (fastclip --help lists the verbs)", file=sys.stderr)
    return 2


def _run(verb: str, arguments: list[str]) -> int:
    """The verb's exit status."""
    try:
        status = import_module(VERBS[verb][0]).main(arguments) or 0
        sys.stdout.flush()
        return status
    except SystemExit as stop:  # tyro: 0 behind a help page, 2 behind its own message
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BrokenPipeError:  # `| head` has seen enough; without this Python complains once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except USER_ERRORS as error:
        print(f"fastclip {verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"fastclip {verb}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        package = error.name.partition(".")[0] if isinstance(error, ModuleNotFoundError) and error.name else ""
        if package in TRAIN_PACKAGES:
            print(f"fastclip {verb}: needs {package}: pip install 'fastclip-kernels[train]'", file=sys.stderr)
            return 2
        traceback.print_exc()
        return 1
