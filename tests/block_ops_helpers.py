"""What the tests of the block ops share: where an implementation is tested, and the offline compile of its kernels."""

from __future__ import annotations

import pytest
import torch

from fastclip.ops import _extension

HAS_GPU = torch.cuda.is_available()
NOT_BUILT = _extension.load()
needs_cpu_kernels = pytest.mark.skipif(NOT_BUILT is not None, reason=f"compiled kernels: {NOT_BUILT}")
FAST = (pytest.param("cpu", marks=needs_cpu_kernels), "triton")
# In the interpreter bfloat16 is cut off where it should be rounded.
TYPES = [
    *(pytest.param("cpu", dtype, marks=needs_cpu_kernels) for dtype in (torch.float32, torch.bfloat16)),
    *(("triton", dtype) for dtype in (torch.float32, torch.float16, *[torch.bfloat16] * HAS_GPU)),
]


@pytest.fixture
def on_its_device(request: pytest.FixtureRequest):
    """New tensors lie where the test's `impl` runs: on the GPU for triton, where there is one."""
    takes_impl = hasattr(request.node, "callspec") and request.node.callspec.params.get("impl") == "triton"
    with torch.device("cuda" if takes_impl and HAS_GPU else "cpu"):
        yield
