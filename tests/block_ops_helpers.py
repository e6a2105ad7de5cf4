"""What the tests of the block ops share: where an implementation is tested, and the offline compile of its kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys

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

COMPILE = """
import json, sys
from importlib import import_module
from fastclip.testing import compile_offline
for case in import_module(f"fastclip.ops.{sys.argv[1]}.triton").configurations():
    usage = compile_offline(**case, capability=int(sys.argv[2]))
    print(json.dumps([f"{case['kernel'].fn.__name__} {case['types']} {case['constants']}", *usage]))
"""


@pytest.fixture
def on_its_device(request: pytest.FixtureRequest):
    """New tensors lie where the test's `impl` runs: on the GPU for triton, where there is one."""
    takes_impl = hasattr(request.node, "callspec") and request.node.callspec.params.get("impl") == "triton"
    with torch.device("cuda" if takes_impl and HAS_GPU else "cpu"):
        yield


def assert_configurations_compile(op: str, capability: int) -> None:
    """Every kernel in every launch configuration compiles without a GPU and without a spill."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, op, str(capability)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    usages = [json.loads(line) for line in result.stdout.splitlines()]
    assert usages
    for name, registers, stack_bytes, _ in usages:
        assert stack_bytes == 0, f"{name} spills {stack_bytes} bytes on sm_{capability}"
        assert 0 < registers <= 255
