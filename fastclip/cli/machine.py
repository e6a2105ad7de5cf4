"""Facts about this machine and environment, as JSON holds them; nothing is judged here (see `clashes`)."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastclip._version import __version__

# distribution -> what it is needed for
PACKAGES = {
    "torch": "everything",
    "numpy": "data",
    "pillow": "data",
    "tokenizers": "data",
    "safetensors": "checkpoints",
    "pyyaml": "training",
    "tyro": "the command line",
    "deepspeed": "training (engine deepspeed)",
    "ninja": "training (DeepSpeed compiles one small op)",
    "jinja2": "the report",
    "matplotlib": "the report",
    "scikit-learn": "evaluation, and the digits of the demo",
    "triton": "GPU kernels",
    "xformers": "optional",
    "flash-attn": "optional",
    "apex": "optional (NVIDIA's, not on PyPI)",
    "open_clip_torch": "optional: CLIP's vocabulary; drop-in",
    "timm": "optional: drop-in",
    "transformers": "optional: drop-in",
    "sentence-transformers": "optional: drop-in",
    "torchvision": "not needed",
}
BUILT_FOR_TORCH = ("torchvision", "torchaudio", "xformers", "flash-attn")  # hold code compiled for one torch
CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "sve", "bf16")
GIB = 1 << 30


def inspect_machine() -> dict[str, Any]:
    """Versions, processor, memory, GPUs, the state of the compiled kernels, and what fails to import."""
    facts: dict[str, Any] = {
        "fastclip": __version__,
        "machine": {"python": platform.python_version(), "platform": platform.platform()},
        "packages": {name: (_version(name), role) for name, role in PACKAGES.items()},
        "cpu": _cpu(),
        "gpus": [],
        "compiler": shutil.which("c++") or shutil.which("g++"),
        "kernels": None,
        "gpu_kernels": None,
        "apex_is_nvidias": _has_module("apex", "normalization"),
        "needs_torch": {name: need for name in BUILT_FOR_TORCH if (need := _need_of(name, "torch"))},
        "torch_wants_triton": _need_of("torch", "triton"),
        "broken": {},
    }
    try:
        import torch
    except (ImportError, OSError) as error:
        absent = "torch cannot be imported"
        return facts | {"broken": {"torch": str(error)}, "kernels": absent, "gpu_kernels": absent}
    from fastclip.ops import _cuda, _extension

    facts["kernels"] = _extension.load()
    library = _cuda.load()
    facts["gpu_kernels"] = library if isinstance(library, str) else None
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        capability = f"{about.major}{about.minor}"
        facts["gpus"].append(
            {"name": about.name, "capability": capability, "memory_gib": round(about.total_memory / GIB, 1)}
        )
    failure = _import_error("torchvision") if _version("torchvision") else None
    if failure is not None:
        facts["broken"]["torchvision"] = failure
    return facts


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _need_of(distribution: str, package: str) -> str | None:
    """What the distribution says of a package ("torch==2.13.0"); None where it is not installed or silent."""
    try:
        needs = requires(distribution) or []
    except PackageNotFoundError:
        return None
    plain = (need.partition(";")[0].translate(str.maketrans("", "", " ()")) for need in needs if "extra ==" not in need)
    return next(
        (need for need in plain if need.startswith(package) and need.removeprefix(package)[:1] in tuple("=><~!")), None
    )


def _has_module(package: str, part: str) -> bool | None:
    """Whether an installed package has the submodule `part`, without importing it; None where it is not installed."""
    spec = find_spec(package)
    if spec is None:
        return None
    return any(Path(place, part).exists() for place in spec.submodule_search_locations or ())


def _import_error(package: str) -> str | None:
    """The last line of what importing the package says, in a process of its own; None where it works."""
    try:
        done = subprocess.run([sys.executable, "-c", f"import {package}"], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return "importing it takes more than two minutes"
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it crashes"])[-1]


def _cpu() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "name": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cores_of_machine": os.cpu_count(),
        "features": [name for name in CPU_FEATURES if name in flags],
        "memory_gib": round(_memory() / GIB, 1),
    }


def _memory() -> int:
    """Bytes this process may use: the machine's, or its container's limit."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.is_file() else "max"
    return min(installed, int(allowed)) if allowed.isdigit() else installed
