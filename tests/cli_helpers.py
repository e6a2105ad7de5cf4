"""What the tests of the command share: a command line run in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fastclip.cli.main import main

Run = Callable[..., tuple[int, str, str]]


def runner(capsys: pytest.CaptureFixture[str]) -> Run:
    """A function that runs a command line: (status, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run
