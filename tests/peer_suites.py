"""A peer's own test suite, first as it is and then with the drop-ins on: no test may change its outcome.

    python tests/peer_suites.py open_clip CHECKOUT [TESTS AND PYTEST OPTIONS]
    python tests/peer_suites.py sentence_transformers CHECKOUT tests/test_cmnrl.py

CHECKOUT is a clone of the peer at the version to be tested; its own code is what is imported. Tests that fail without
the drop-ins too (most of them want a download) are counted, with their reason, and not compared. Prints what ran, how
often a replaced method was called, and every test that the drop-ins changed; exit status 1 if there is one.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SOURCES = {"open_clip": "src", "sentence_transformers": "."}  # where a checkout keeps its package
PEER, WANTED, TARGET = "FASTCLIP_PEER", "FASTCLIP_DROP_INS", "FASTCLIP_OUTCOMES"  # environment of the two runs
NOWHERE = "http://127.0.0.1:9"  # a proxy that refuses: downloads fail at once
calls: Counter[str] = Counter()
outcomes: dict[str, tuple[str, str]] = {}  # by test: how it ended, and why


def pytest_configure() -> None:
    """As pytest's plugin: switches the drop-ins on for the whole session."""
    from peers import peer_module

    from fastclip import interop

    name = os.environ[WANTED]
    peer_module(os.environ[PEER])
    if name:
        _count_calls(interop.DropIn)
    if name == "open_clip":
        interop.open_clip_losses().enable()
        _in_every_model()
    elif name == "sentence_transformers":
        interop.sentence_transformers_losses().enable()


def _count_calls(drop_in: Any) -> None:
    begin = drop_in.__init__

    def init(self: Any, about: str, find: Callable[[], Any]) -> None:
        def counted(make: Callable[..., Any]) -> Callable[..., Any]:
            def made(theirs: Callable[..., Any]) -> Callable[..., Any]:
                ours = make(theirs)

                def call(*args: Any, **kwargs: Any) -> Any:
                    calls[about] += 1
                    return ours(*args, **kwargs)

                return call

            return made

        begin(self, about, lambda: [one._replace(make=counted(one.make)) for one in find()])

    drop_in.__init__ = init


def _in_every_model() -> None:
    """Every model that open_clip makes has our attention and packed captions."""
    import open_clip

    from fastclip.errors import UserError
    from fastclip.interop import open_clip_encoders

    create_model = open_clip.factory.create_model

    @functools.wraps(create_model)
    def create(*args: Any, **kwargs: Any) -> Any:
        model = create_model(*args, **kwargs)
        try:
            open_clip_encoders(model).enable()
        except (UserError, AttributeError):  # nothing in it to replace, or a scripted module
            calls["models left as they are"] += 1
        return model

    open_clip.factory.create_model = open_clip.create_model = create


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = str(crash.message if crash else report.longrepr)
        outcomes[report.nodeid] = (report.outcome, reason if report.outcome != "passed" else "")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.outcome != "passed":
        outcomes[report.nodeid] = (report.outcome, str(report.longrepr).strip().splitlines()[-1])


def pytest_sessionfinish() -> None:
    Path(os.environ[TARGET]).write_text(json.dumps({"outcomes": outcomes, "calls": calls}))


def run(peer: str, checkout: Path, drop_ins: bool, words: list[str]) -> dict[str, Any]:
    """Outcome and reason by test, and the calls of replaced methods by drop-in."""
    here, paths = Path(__file__).parent, [checkout / SOURCES[peer], checkout]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "outcomes.json"
        environment = os.environ | {
            PEER: peer,
            WANTED: peer if drop_ins else "",
            TARGET: str(target),
            "PYTHONPATH": os.pathsep.join(map(str, [here, here.parent, *paths])),
            "HF_HUB_OFFLINE": "1",
            "http_proxy": NOWHERE,
            "https_proxy": NOWHERE,
            "no_proxy": "localhost,127.0.0.1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        plugins = ["-p", "peer_suites", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", *plugins, "--continue-on-collection-errors", *(words or ["tests"])]
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        if not target.exists():
            raise SystemExit(f"the suite of {peer} did not start:\n{done.stdout}{done.stderr}")
        return json.loads(target.read_text())


def main() -> int:
    peer, checkout, *words = sys.argv[1:]
    plain, ours = (run(peer, Path(checkout).absolute(), on, words) for on in (False, True))
    passed = [test for test, (outcome, _) in plain["outcomes"].items() if outcome == "passed"]
    changed = {test: ours["outcomes"].get(test, ("absent", "")) for test in passed}
    changed = {test: found for test, found in changed.items() if found[0] != "passed"}
    print(f"{peer}: {len(passed)} tests pass without the drop-ins, {len(passed) - len(changed)} of them with")
    print("calls of replaced methods: " + ", ".join(f"{name} {count}" for name, count in ours["calls"].items()))
    reasons = Counter(
        reason.strip().splitlines()[-1][:100] for outcome, reason in plain["outcomes"].values() if outcome != "passed"
    )
    for reason, count in reasons.most_common():
        print(f"not compared, {count}: {reason}")
    for test, (outcome, reason) in changed.items():
        print(f"CHANGED {test}: {outcome}\n{reason}")
    return bool(changed)


if __name__ == "__main__":
    sys.exit(main())
