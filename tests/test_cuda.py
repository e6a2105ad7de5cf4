"""The kernels of csrc/cuda: what nvcc makes of them, why they do not run, and on a Hopper GPU the shapes that matter.

The losses' own tests run them beside Triton's: `test_contrastive_loss_triton`, `test_sigmoid_loss_triton`.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs_helpers import CUDA_TYPES, DEVICE, GRADIENT, assert_close_to, rectangle, widened
from sigmoid_loss_helpers import sigmoid_inputs

from fastclip.losses import contrastive_loss, sigmoid_loss, small
from fastclip.ops import _cuda
from fastclip.ops.contrastive_loss import contrastive_block
from fastclip.ops.sigmoid_loss import sigmoid_rows
from fastclip.testing import clip_features, value_and_gradients


def forget() -> None:
    _cuda.load.cache_clear()
    _cuda._why_not_on.cache_clear()


@pytest.fixture
def fresh() -> Iterator[None]:
    forget()
    yield
    forget()


# compiled


# Bytes of a thread, a few values that do not change from tile to tile; all others none
SPILLS = {"statistics_kernel": 44, "d_logits_kernel": 44, "sigmoid_kernel": 16}
WITH_PRODUCTS = ("statistics_kernel", "d_logits_kernel", "sigmoid_kernel")
REGISTERS = 65536 // 384  # of a thread, when a program of three warpgroups starts


@pytest.mark.long
def test_it_compiles_for_the_tensor_cores_without_spills(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    library = tmp_path / "kernels.so"
    report = _cuda.build("-Xptxas=-v", "--threads=2", library=library)
    assert "warning" not in report
    pattern = (
        r"Function properties for (\S+)\n"
        r".* (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*Used (\d+) registers"
    )
    usages = re.findall(pattern, report)
    for kernel in WITH_PRODUCTS:  # float16 and bfloat16, rows that fit into shared memory and that do not
        assert sum(kernel in name for name, *_ in usages) == 4
    for name, *spilled, registers in usages:
        allowed = next((most for kernel, most in SPILLS.items() if kernel in name), 0)
        assert max(map(int, spilled)) <= allowed, f"{name} spills {spilled} bytes"
        assert int(registers) <= REGISTERS, name

    instructions = dict(_functions(library))
    assert len(instructions) == len(usages)
    for name, code in instructions.items():
        if any(kernel in name for kernel in WITH_PRODUCTS):
            assert code.count("HGMMA.64x128x16.F32") >= 8, f"{name}: products without tensor cores"
            assert "UTMALDG.2D" in code, f"{name}: no bulk tensor copies"
    _check_grids(ctypes.CDLL(str(library)).fastclip_grid)


def _check_grids(grid: Any) -> None:
    """No more programs than multiprocessors, in whole clusters, which cover all rows and columns; none has nothing."""
    grid.restype = ctypes.c_int64
    for processors, n, m in itertools.product((2, 12, 78, 132), (1, 128, 129, 8192, 20001), (1, 128, 1025, 32768)):
        packed = grid(n, m, processors)
        programs, parts = packed >> 32, packed & 0xFFFFFFFF
        row_blocks, tiles = -(-n // 128), -(-m // 128)
        assert programs % 2 == 0
        assert programs * parts <= processors
        assert programs <= row_blocks + 1
        assert parts <= tiles
        assert (parts - 1) * -(-tiles // max(1, processors // programs)) < tiles


def _functions(library: Path) -> Iterator[tuple[str, str]]:
    """(name, machine code as text) of every kernel."""
    import triton.backends.nvidia

    cuobjdump = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    command = [str(cuobjdump), "-sass", str(library)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for part in text.split("Function : ")[1:]:
        name, _, code = part.partition("\n")
        yield name.strip(), code


# why they do not run


@pytest.mark.parametrize("loss", [contrastive_loss, sigmoid_loss])
def test_what_they_do_not_take(loss) -> None:
    for dtype, reason in ((torch.float16, "the features are on cpu"), (torch.float32, "bfloat16 and float16, not")):
        x, numbers = torch.eye(8, dtype=dtype), [torch.tensor(10.0)] * (2 if loss is sigmoid_loss else 1)
        with pytest.raises(ValueError, match=f"impl='cuda' cannot run: .*{reason}"):
            loss(x, x, *numbers, impl="cuda")


def test_reasons_of_the_library(fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_cuda, "LIBRARY", tmp_path / "kernels.so")
    assert "not built (run `fastclip build` where there is an nvcc)" in _cuda.load()
    forget()
    _cuda.LIBRARY.write_bytes(b"not a library")
    assert "kernels.so cannot be loaded" in _cuda.load()
    forget()
    source = tmp_path / "other.c"
    source.write_text("unsigned fastclip_sources() { return 1; }")
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(tmp_path / "other.so")], check=True)
    monkeypatch.setattr(_cuda, "LIBRARY", tmp_path / "other.so")
    assert "other.so was built of other sources than" in _cuda.load()
    forget()
    monkeypatch.setattr(_cuda, "LIBRARY", tmp_path / "kernels.so")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: _cuda.CAPABILITY)
    assert "kernels.so cannot be loaded" in str(_cuda.why_not("cuda"))
    forget()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    assert "this GPU has (8, 0)" in str(_cuda.why_not("cuda"))


def test_reasons_of_the_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "there is no nvcc" in str(_cuda.missing())
    with pytest.raises(RuntimeError, match="cannot be built: there is no nvcc"):
        _cuda.build(library=tmp_path / "kernels.so")
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\necho unknown option >&2\nexit 1\n")
    compiler.chmod(0o755)
    assert _cuda.missing() is None
    with pytest.raises(RuntimeError, match="nvcc failed:\nunknown option"):
        _cuda.build(library=tmp_path / "kernels.so")
    monkeypatch.setattr(_cuda, "FOLDER", tmp_path / "csrc")
    assert "the sources are not in" in str(_cuda.missing())


# shapes

# Dimensions that need padding, that fit into shared memory and that do not; tiles that are not full, in even and odd
# numbers, more of them along the columns.
SHAPES = [(1, 1, 8), (128, 256, 64), (129, 300, 513), (300, 640, 512), (257, 385, 768), (640, 1000, 33)]
# More blocks of rows than any GPU has multiprocessors: programs go on to a second block.
LARGE = (20000, 20300, 64)


# As on GPUs with so many multiprocessors: one cluster for all blocks of rows, and parts of the columns for each.
FEW = (2, 12)
CASES = [
    *((*shape, None) for shape in (*SHAPES, LARGE)),
    *((*shape, count) for shape in SHAPES for count in FEW),
]


def take_processors(monkeypatch: pytest.MonkeyPatch, count: int | None) -> None:
    if count is not None:
        monkeypatch.setattr(_cuda, "processors", lambda device: count)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(("n", "m", "d", "processors"), CASES)
@pytest.mark.parametrize(("impl", "dtype"), CUDA_TYPES)
def test_contrastive_block(
    monkeypatch: pytest.MonkeyPatch,
    impl: str,
    dtype: torch.dtype,
    n: int,
    m: int,
    d: int,
    processors: int | None,
    labelled: bool,
) -> None:
    take_processors(monkeypatch, processors)
    leaves, options = rectangle(n, m, d, dtype), {"offset": (m - n) // 2}
    if labelled:
        labels = torch.randperm(m, device=DEVICE)[:n]
        labels[n // 2] = -1
        options = {"labels": labels}
    weights = [torch.linspace(1, 2, size, device=DEVICE) for size in (n, n, n, m, m)]
    known, gradients = {}, {}
    for name, inputs in ((impl, leaves), ("reference", widened(leaves))):
        values = contrastive_block(*inputs, impl=name, **options)
        known[name] = [x.nan_to_num(nan=0.0, neginf=-1e3) for x in values]
        total = sum((w * x).sum() for w, x in zip(weights, known[name], strict=True))
        gradients[name] = torch.autograd.grad(total, inputs)
    for ours, plain in zip(known[impl], known["reference"], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=5e-5)
    assert_close_to(gradients["reference"], gradients[impl], dtype)


@pytest.mark.parametrize(("n", "m", "d", "processors"), CASES)
@pytest.mark.parametrize(("impl", "dtype"), CUDA_TYPES)
def test_sigmoid_block(
    monkeypatch: pytest.MonkeyPatch, impl: str, dtype: torch.dtype, n: int, m: int, d: int, processors: int | None
) -> None:
    take_processors(monkeypatch, processors)
    image, text, *others = sigmoid_inputs(m, d, kind="clip", scale=100.0, bias=-20.0, dtype=dtype, device=DEVICE)
    leaves = [x.detach().requires_grad_() for x in (image[:n], text, *others)]
    weights = torch.linspace(1, 2, n, device=DEVICE)
    ours, plain = (
        value_and_gradients(lambda *x, i=name: sigmoid_rows(*x, None, None, (m - n) // 2, i) @ weights, inputs)
        for name, inputs in ((impl, leaves), ("reference", widened(leaves)))
    )
    assert abs(ours[0] - plain[0]) <= 5e-5 * plain[0]  # tensor cores cut off what they should round
    assert_close_to(plain[1:], ours[1:], dtype)


@pytest.mark.parametrize("kind", ["random", "clip", "converged", "permuted", "antipodal", "duplicates", "zero"])
@pytest.mark.parametrize(("impl", "dtype"), CUDA_TYPES)
def test_a_small_batch_in_one_call(monkeypatch: pytest.MonkeyPatch, impl: str, dtype: torch.dtype, kind: str) -> None:
    """The plain loss and its gradient at once are those of the two passes."""
    inputs = clip_features(300, 40, kind=kind, dtype=dtype, device=DEVICE)
    made = {}
    for pairs in (0, 8192):
        monkeypatch.setattr(small, "LAUNCHES", pairs)
        made[pairs] = value_and_gradients(lambda *x: contrastive_loss(*x, impl=impl), inputs)
    for at_once, in_two in zip(made[8192], made[0], strict=True):
        assert (at_once - in_two).norm() <= 1e-5 + GRADIENT[dtype] * in_two.norm()
    monkeypatch.setattr(small, "LAUNCHES", 8192)
    image, text, scale = inputs
    assert contrastive_loss(image, text, -scale, impl=impl).isnan()
    broken = image.detach().clone()
    broken[3, 5] = torch.nan
    assert contrastive_loss(broken.requires_grad_(), text, scale, impl=impl).isnan()
