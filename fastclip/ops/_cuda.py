"""The compiled GPU kernels of csrc/cuda: how they are built, and how they are called.

One library of plain functions that take pointers, sizes and a stream: no header of torch, so that it is built without
a GPU and goes with any torch.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGE = Path(__file__).resolve().parents[1]
FOLDER = PACKAGE.parent / "csrc" / "cuda"
LIBRARY = PACKAGE / "_cuda_sm90.so"
CAPABILITY = (9, 0)  # whose own instructions they are made of: H100, H200
FLAGS = ("-O3", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-shared", "-Xcompiler=-fPIC")


def missing() -> str | None:
    """What is missing to build the kernels, in one line, or None."""
    if not FOLDER.is_dir():
        return f"the sources are not in {FOLDER} (an installed wheel has none: build from a checkout)"
    if shutil.which("nvcc") is None:
        return "there is no nvcc (install the CUDA toolkit, 12.5 or newer)"
    return None


def build(*flags: str, library: Path = LIBRARY) -> str:
    """Compiles csrc/cuda into the package, half a minute; what the compiler says.

    Raises:
        RuntimeError: something is missing, or the compiler failed.
    """
    reason = missing()
    if reason is not None:
        raise RuntimeError(f"the GPU kernels cannot be built: {reason}")
    sources = [str(path) for path in sorted(FOLDER.glob("*.cu"))]
    command = ["nvcc", *FLAGS, f"-DFASTCLIP_SOURCES={_sources()}", *flags, *sources, "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed:\n{done.stdout}{done.stderr}")
    load.cache_clear()
    return done.stdout + done.stderr


def _sources() -> int:
    """A checksum of csrc/cuda, by which a library built of other sources is known."""
    return zlib.crc32(b"".join(path.read_bytes() for path in sorted(FOLDER.iterdir())))


@cache
def load() -> Any:
    """The library, or the reason it cannot be used."""
    if not LIBRARY.exists():
        return "the GPU kernels are not built (run `fastclip build` where there is an nvcc)"
    try:
        library = ctypes.CDLL(str(LIBRARY))
        library.fastclip_sources.restype = ctypes.c_uint32
        built_of = library.fastclip_sources()
    except (OSError, AttributeError) as error:
        return f"{LIBRARY.name} cannot be loaded ({error}): run `fastclip build`"
    if FOLDER.is_dir() and built_of != _sources():
        return f"{LIBRARY.name} was built of other sources than {FOLDER}: run `fastclip build`"
    return library


def why_not(device_type: str) -> str | None:
    """The reason the kernels cannot run on the current GPU, or None."""
    if device_type != "cuda":
        return f"the features are on {device_type}"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    return _why_not_on(torch.cuda.current_device())


@cache
def _why_not_on(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability != CAPABILITY:
        return f"it is made for compute capability {CAPABILITY}, this GPU has {capability}"
    library = load()
    return library if isinstance(library, str) else None


def launch(name: str, tensors: Sequence[Tensor | None], numbers: Sequence[int], addresses: Sequence[int] = ()) -> None:
    """Calls a function of the library: tensors, addresses, numbers, then the current stream of the tensors' device.

    Raises:
        RuntimeError: CUDA refused the launch.
    """
    first = next(x for x in tensors if x is not None)
    pointers = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tensors]
    pointers += [ctypes.c_void_p(address) for address in addresses]
    with torch.cuda.device(first.device):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        status = getattr(load(), name)(*pointers, *map(ctypes.c_int, numbers), stream)
    if status:
        raise RuntimeError(f"{name} could not be launched: error {status}")


def number(name: str, numbers: Sequence[int]) -> int:
    """What a function of the library makes of numbers, in 64 bits."""
    function = getattr(load(), name)
    function.restype = ctypes.c_int64
    return function(*map(ctypes.c_int, numbers))


def grid(n: int, m: int, processors: int) -> tuple[int, int]:
    """(programs, parts) of the kernels over n x m pairs."""
    packed = number("fastclip_grid", (n, m, processors))
    return packed >> 32, packed & 0xFFFFFFFF


@cache
def processors(device: torch.device) -> int:
    """How many multiprocessors a GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def blas() -> tuple[int, int]:
    """cuBLAS's handle for the current device and stream, and where its `cublasGemmEx` is: the library of torch."""
    return torch.cuda.current_blas_handle(), _gemm()


@cache
def _gemm() -> int:
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libcublas.so" in line}
    if not loaded:
        raise RuntimeError("cuBLAS is not loaded: this torch is built without it")
    return ctypes.cast(ctypes.CDLL(min(loaded)).cublasGemmEx, ctypes.c_void_p).value or 0
