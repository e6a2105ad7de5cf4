"""What is known to clash or to surprise, judged from the facts of `machine.inspect_machine`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from fastclip.errors import UserError

DEEPSPEED = "0.19.8"
TRANSFORMERS = "5"  # the drop-in needs its outputs
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}


class Note(NamedTuple):
    """`level`: "clash" for what will fail or be wrong, "note" for what is good to know."""

    level: str
    about: str
    text: str


def clashes(facts: dict[str, Any]) -> list[Note]:
    """Every clash and note that the facts give rise to, the clashes first."""
    found = [*_torch(facts), *_deepspeed(facts), *_triton(facts), *_optional(facts)]
    return sorted(found, key=lambda note: note.level != "clash")


def _torch(facts: dict[str, Any]) -> Iterator[Note]:
    torch, broken = _installed(facts, "torch"), dict(facts["broken"])
    for package, need in facts["needs_torch"].items():
        if torch and not _fits(torch, need):
            error = broken.pop(package, None)
            text = f"{package} was built for {need}, this is torch {torch}"
            text += f" (importing it says: {error})" if error else ""
            yield Note("clash", package, f"{text}: install the {package} of this torch, or remove it")
    for package, error in broken.items():
        yield Note("clash", package, f"{package} is installed but cannot be imported: {error}")
    if facts["kernels"]:
        level = "clash" if "built for" in facts["kernels"] else "note"
        yield Note(level, "kernels", f"training on the CPU is slower: {facts['kernels']}")
    if facts["gpu_kernels"] and any(gpu["capability"] == "90" for gpu in facts["gpus"]):
        yield Note("note", "kernels", f"the losses on this GPU take Triton's kernels: {facts['gpu_kernels']}")
    if not facts["compiler"]:
        yield Note("note", "compiler", "there is no C++ compiler: `fastclip build` and DeepSpeed on the CPU need g++")


def _deepspeed(facts: dict[str, Any]) -> Iterator[Note]:
    version = _installed(facts, "deepspeed")
    if version is None:
        yield Note("note", "deepspeed", "deepspeed is not installed: train with --engine torch, without ZeRO")
        return
    if _numbers(version) < _numbers(DEEPSPEED):
        text = f"deepspeed {version} is older than {DEEPSPEED}, which training is tested with"
        yield Note("clash", "deepspeed", f"{text}: pip install 'deepspeed>={DEEPSPEED}'")
    yield Note(
        "note",
        "deepspeed",
        "DeepSpeed clips gradients to norm 1.0 where its JSON leaves gradient_clipping out; `fastclip train` always "
        "writes it (--grad-clip, 0 by default), a JSON of your own should too",
    )


def deepspeed_settings(path: str) -> Iterator[Note]:
    """What a DeepSpeed JSON of the user's would do to `fastclip train`; told, not raised."""
    from fastclip.training.config import TrainConfig
    from fastclip.training.deepspeed_config import resolve_deepspeed

    try:
        _, _, changed = resolve_deepspeed(TrainConfig(deepspeed_config=path), world_size=1)
    except UserError as error:
        yield Note("clash", "deepspeed", str(error))
        return
    yield Note(
        "note", "deepspeed", f"{path} is taken; over the generated JSON it sets {'; '.join(changed) or 'nothing'}"
    )


def _triton(facts: dict[str, Any]) -> Iterator[Note]:
    wanted, found = facts["torch_wants_triton"], _installed(facts, "triton")
    if wanted and found and not _fits(found, wanted):
        text = f"torch {_installed(facts, 'torch')} was built with {wanted}, this is triton {found}"
        yield Note("clash", "triton", f"{text}: pip install '{wanted}'")
    if found and _numbers(found) < (3, 7) and _numbers(_installed(facts, "numpy") or "0") >= (2, 4):
        text = f"the interpreter of triton {found} breaks with numpy {_installed(facts, 'numpy')}"
        yield Note("note", "triton", f"{text} in loops with run-time bounds: tests without a GPU need numpy below 2.4")
    if facts["gpus"]:
        if _installed(facts, "triton") is None:
            yield Note("clash", "triton", "there is a GPU but no triton: the fused GPU kernels cannot run")
    elif _installed(facts, "triton"):
        yield Note(
            "note",
            "triton",
            "without a GPU Triton kernels run in the interpreter only (TRITON_INTERPRET=1): to test, not to train; "
            "fp32 and fp16 are right there, bf16 products are not",
        )


def _optional(facts: dict[str, Any]) -> Iterator[Note]:
    if facts["apex_is_nvidias"] is False:
        text = "the installed `apex` is another project of that name from PyPI, not NVIDIA's"
        yield Note("clash", "apex", f"{text}, which is built from github.com/NVIDIA/apex: pip uninstall apex")
    transformers = _installed(facts, "transformers")
    if transformers and _numbers(transformers) < _numbers(TRANSFORMERS):
        text = f"transformers {transformers} is older than {TRANSFORMERS}.0, which transformers_losses() needs"
        yield Note("note", "transformers", f"{text}: pip install 'transformers>={TRANSFORMERS}'")
    if facts["apex_is_nvidias"]:
        yield Note(
            "note", "apex", 'NVIDIA\'s apex is here: layer_norm(impl="apex") takes its kernel; no test of ours runs it'
        )
    if _installed(facts, "xformers") and not facts["gpus"]:
        yield Note("note", "xformers", "xformers has no attention operator for the CPU: it is of no use here")


def _installed(facts: dict[str, Any], package: str) -> str | None:
    return facts["packages"].get(package, (None, ""))[0]


def _numbers(version: str) -> tuple[int, ...]:
    """2.13.0+cpu -> (2, 13, 0)."""
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])


def _fits(version: str, need: str) -> bool:
    """Whether `version` meets every plain comparison of `need` ("torch>=2.10,<3"); others are taken as met."""
    for sign, wanted in re.findall(r"(==|>=|<=|<|>)([\d.]+)", need):
        numbers = _numbers(wanted)
        if not _COMPARE[sign](_numbers(version)[: len(numbers)], numbers):
            return False
    return True
