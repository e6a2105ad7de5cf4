"""What the tests of the block ops share: the offline compile of an op's kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys

COMPILE = """
import json, sys
from importlib import import_module
from fastclip.testing import compile_offline
for case in import_module(f"fastclip.ops.{sys.argv[1]}.triton").configurations():
    usage = compile_offline(**case, capability=int(sys.argv[2]))
    print(json.dumps([f"{case['kernel'].fn.__name__} {case['types']} {case['constants']}", *usage]))
"""


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
