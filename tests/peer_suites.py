"""A peer's own test suite, first as it is and then with the drop-ins on: no test may change its outcome.

    python tests/peer_suites.py open_clip CHECKOUT [TESTS AND PYTEST OPTIONS]
    python tests/peer_suites.py transformers CHECKOUT tests/models/clip/test_modeling_clip.py
    python tests/peer_suites.py sentence_transformers CHECKOUT tests/sentence_transformer/losses

CHECKOUT is a clone of the peer at the version to be tested; its own code is what is imported. What its tests import
beyond our environment may lie in a folder on PYTHONPATH. Tests that fail without the drop-ins too (most of them want a
download) are counted, with their reason, and not compared. Prints what ran, how often a replaced method and the loss
behind it were called, and every test that the drop-ins changed; exit status 1 if there is one.

Two things are not as the peer has them, in both runs alike: transformers' SigLIP tests, which ask for no loss where its
CLIP tests do, ask for it; and sentence-transformers' tests find models of random weights where they would download
small ones, whose weights do not matter to a loss that is compared with another.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# where a checkout keeps its package
SOURCES = {"open_clip": "src", "transformers": "src", "sentence_transformers": "."}
PEER, WANTED, TARGET = "FASTCLIP_PEER", "FASTCLIP_DROP_INS", "FASTCLIP_OUTCOMES"  # environment of the two runs
STAND_INS = {  # by name on the hub: kind and sizes
    "sentence-transformers-testing/stsb-bert-tiny-safetensors": (
        "bert",
        {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512},
    ),
    "distilbert/distilbert-base-uncased": ("distilbert", {"dim": 128, "n_layers": 2, "n_heads": 2, "hidden_dim": 512}),
}
NOWHERE = "http://127.0.0.1:9"  # a proxy that refuses: downloads fail at once
MEANT = {  # tests of what a drop-in changes on purpose
    "test_gradcache_under_autocast": "its premise is a loss in bfloat16: ours is in float32",
}
NAMES = r"<class '[^']*'>|\w+::\w+|`[\w.-]+`|\b\w*(CLIP|S[Ii][Gg][Ll][Ii][Pp])\w*"
calls: Counter[str] = Counter()
reached: set[str] = set()  # tests that called a loss of ours
outcomes: dict[str, tuple[str, str]] = {}  # by test: how it ended, and why


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """As pytest's plugin: switches the drop-ins on for the whole session, before a conftest imports the peer."""
    from peers import peer_module

    from fastclip import interop

    name = os.environ[WANTED]
    peer_module(os.environ[PEER])
    if os.environ[PEER] == "sentence_transformers":
        _make_stand_ins(Path(os.environ["HF_HOME"]) / "hub")
    if name:
        _count_calls(interop.DropIn)
        _count_losses()
        getattr(interop, f"{name}_losses")().enable()
    if name == "open_clip":
        _in_every_model()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """As pytest's plugin: every test of transformers that can ask for the loss does."""
    if os.environ[PEER] == "transformers":
        modules = {item.module for item in items if isinstance(item, pytest.Function)}
        for tester in {x for module in modules for name, x in vars(module).items() if name.endswith("ModelTester")}:
            if "prepare_config_and_inputs_for_common" in vars(tester):
                _ask_for_the_loss(tester)


def _ask_for_the_loss(tester: Any) -> None:
    prepare = tester.prepare_config_and_inputs_for_common

    def with_the_loss(self: Any) -> tuple[Any, dict[str, Any]]:
        config, inputs = prepare(self)
        return config, inputs | {"return_loss": True} if "return_loss" in inputs else inputs

    tester.prepare_config_and_inputs_for_common = with_the_loss


def _make_stand_ins(cache: Path) -> None:
    """Models of random weights in the hub's cache, under the names of those that sentence-transformers' tests load."""
    from transformers import AutoConfig, AutoModel, BertTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    for name, (kind, sizes) in STAND_INS.items():
        repository, revision = cache / f"models--{name.replace('/', '--')}", "0" * 40
        folder, main_branch = repository / "snapshots" / revision, repository / "refs" / "main"
        main_branch.parent.mkdir(parents=True)
        main_branch.write_text(revision)
        torch.manual_seed(0)
        AutoModel.from_config(AutoConfig.for_model(kind, vocab_size=len(words), **sizes)).save_pretrained(folder)
        BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=512).save_pretrained(folder)


def _counted(about: str, function: Callable[..., Any], is_loss: bool = False) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            calls[about] += 1
            if is_loss:
                reached.add(os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0])
        return function(*args, **kwargs)

    return call


def _count_losses() -> None:
    """A replaced method may still run the peer's code: count what reaches our losses."""
    from fastclip.interop import sentence_transformers_loss, transformers_loss
    from fastclip.losses import clip, siglip

    for module in (sentence_transformers_loss, transformers_loss, clip, siglip):
        for name in vars(module).keys() & {"contrastive_loss", "sigmoid_loss"}:
            setattr(module, name, _counted(name, getattr(module, name), is_loss=True))


def _count_calls(drop_in: Any) -> None:
    begin = drop_in.__init__

    def init(self: Any, about: str, find: Callable[[], Any]) -> None:
        def counted(make: Callable[..., Any]) -> Callable[..., Any]:
            return lambda theirs: _counted(about, make(theirs))

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
        crash, skip = getattr(report.longrepr, "reprcrash", None), report.longrepr
        reason = skip[2] if isinstance(skip, tuple) else str(crash.message if crash else report.longrepr)
        outcomes[report.nodeid] = (report.outcome, reason if report.outcome != "passed" else "")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.outcome != "passed":
        outcomes[report.nodeid] = (report.outcome, str(report.longrepr).strip().splitlines()[-1])


def pytest_sessionfinish() -> None:
    Path(os.environ[TARGET]).write_text(json.dumps({"outcomes": outcomes, "calls": calls, "reached": len(reached)}))


def run(peer: str, checkout: Path, drop_ins: bool, words: list[str]) -> dict[str, Any]:
    """Outcome and reason by test, and the calls of replaced methods by drop-in."""
    here, given = Path(__file__).parent, filter(None, [os.environ.get("PYTHONPATH")])
    paths = [here, here.parent, checkout / SOURCES[peer], checkout, *given]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "outcomes.json"
        environment = os.environ | {
            PEER: peer,
            WANTED: peer if drop_ins else "",
            TARGET: str(target),
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "HF_HOME": folder,
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


def _reason(message: str) -> str:
    """The last line of a message, without the names of what it is about: one line for each reason."""
    return re.sub(NAMES, "...", message.strip().splitlines()[-1])[:100]


def main() -> int:
    peer, checkout, *words = sys.argv[1:]
    plain, ours = (run(peer, Path(checkout).absolute(), on, words) for on in (False, True))
    passed = [test for test, (outcome, _) in plain["outcomes"].items() if outcome == "passed"]
    changed = {test: ours["outcomes"].get(test, ("absent", "")) for test in passed}
    changed = {test: found for test, found in changed.items() if found[0] != "passed"}
    meant = {
        test: why for test in changed for name, why in MEANT.items() if test.partition("[")[0].endswith(f"::{name}")
    }
    print(f"{peer}: {len(passed)} tests pass without the drop-ins, {len(passed) - len(changed)} of them with")
    print("calls of replaced methods: " + ", ".join(f"{name} {count}" for name, count in ours["calls"].items()))
    print(f"tests that call a loss of ours behind them: {ours['reached']}")
    for test, why in meant.items():
        print(f"changed on purpose: {test.rpartition('::')[2]}: {why}")
    reasons = Counter(_reason(reason) for outcome, reason in plain["outcomes"].values() if outcome != "passed")
    for reason, count in reasons.most_common():
        print(f"not compared, {count}: {reason}")
    for test in changed.keys() - meant.keys():
        print("CHANGED {}: {}\n{}".format(test, *changed[test]))
    return changed.keys() != meant.keys()


if __name__ == "__main__":
    sys.exit(main())
