"""One self-contained HTML page from the JSON and YAML that a run left in its folder."""

from __future__ import annotations

import os
from pathlib import Path

from fastclip.errors import UserError

__all__ = ["write_report"]


def write_report(run: str | Path) -> Path:
    """Writes `report.html` into the run folder and returns its path.

    Everything but `metrics.jsonl` may be absent; the page says what is. The old page stays until the new one is whole.
    The same inputs give the same bytes. Errors: `UserError` for a folder without `metrics.jsonl` or a missing package.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
        import yaml  # noqa: F401
    except ImportError as error:
        raise UserError(f"the report needs {error.name}: pip install 'fastclip-kernels[eval]'") from error
    from fastclip.report.inputs import read_run
    from fastclip.report.page import render

    page = render(read_run(run)).encode("utf-8", "replace")  # captions may hold half a surrogate pair
    path = Path(run) / "report.html"
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(page)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path
