"""Triton's kernels compiled without a GPU, as every op's tests ask it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from fastclip.testing import SHARED_BYTES

# (which, of how many): for Hopper all configurations, for the others a third of them, of every kind some.
PART = {80: (0, 3), 90: (0, 1), 100: (1, 3)}
CAPABILITIES = [pytest.param(80, marks=pytest.mark.long), 90, pytest.param(100, marks=pytest.mark.long)]

COMPILE = """
import json, sys
from importlib import import_module
from fastclip.testing import compile_offline
modules, capability, first, step, head_dims = json.loads(sys.argv[1])
cases = [case for name in modules for case in import_module(f"fastclip.ops.{name}").configurations()]
cases = [case for case in cases if case["constants"].get("D") in head_dims or not head_dims]
for case in [case for i, case in enumerate(cases) if (i + i // step) % step == first]:
    usage = compile_offline(**case, capability=capability)
    print(json.dumps([f"{case['kernel'].fn.__name__} {case['types']} {case['constants']}", *usage]))
"""


def assert_compiles(capability: int, *modules: str, head_dims: tuple[int, ...] = ()) -> int:
    """Without a spill and within a block's shared memory; the number of configurations.

    modules: of fastclip.ops, with `configurations`.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    asked = json.dumps([modules, capability, *PART[capability], head_dims])
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, asked]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    usages = [json.loads(line) for line in result.stdout.splitlines()]
    for name, registers, stack_bytes, shared_bytes in usages:
        assert stack_bytes == 0, f"{name} spills {stack_bytes} bytes on sm_{capability}"
        assert 0 < registers <= 255
        assert shared_bytes <= SHARED_BYTES[capability]
    return len(usages)
