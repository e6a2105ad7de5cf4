"""Snapshots: the state of a run's last steps, for a run whose processes die on a machine that lives.

A checkpoint is hashed and flushed, and holds a model to use. A snapshot is what the engine needs to go on and nothing
else, in files that the kernel keeps whatever becomes of the processes, and costs little more than a copy in memory. It
is worth nothing once the machine has started anew, which its boot id tells. Two take turns, so that a kill within one
leaves the other.

runs/x/snapshots/0/rank_0.json     step, identity, boot id; where the loader and the run stood; every rank has one
                   state/, ema.pt  see `fastclip.training.mapped`
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from fastclip.models.config import CLIPConfig
from fastclip.training.checkpoint import AVERAGE, STATE, NotSaved, Saved, normalisers_file, random_states
from fastclip.training.engine import Engine
from fastclip.training.mapped import MappedWriter
from fastclip.training.metrics import of_all_ranks
from fastclip.training.processes import Processes

FOLDER, _BOOT = "snapshots", Path("/proc/sys/kernel/random/boot_id")


class Snapshots:
    """Of the run in `run`; every rank makes one and calls its methods together."""

    def __init__(self, run: Path, model: CLIPConfig, identity: dict[str, Any], processes: Processes) -> None:
        self.run, self.processes = run, processes
        self.identity = json.loads(json.dumps(identity | {"model": asdict(model)}))
        self._slots, self._turn = [run / FOLDER / name for name in ("0", "1")], 0
        self._write = MappedWriter()

    def save(
        self,
        step: int,
        engine: Engine,
        loader: dict[str, Any],
        progress: dict[str, Any],
        average: Mapping[str, Tensor] | None = None,
        normalisers: Tensor | None = None,
    ) -> None:
        """Whole once every rank has returned; what is `loader`'s own on each rank is added up when it is taken up.

        Raises NotSaved on a rank that cannot write; the snapshot before is as it was.
        """
        slot = self._slots[self._turn]
        self._turn = 1 - self._turn
        mine = self._record(slot)
        failure: Exception | None = None
        try:
            mine.unlink(missing_ok=True)
            (slot / STATE).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            failure = error
        try:
            engine.save_state(slot / STATE, self._write)  # in which ranks wait for each other
            self._write(random_states(), slot / STATE / f"random_{self.processes.rank}.pt")
            if normalisers is not None:
                self._write(normalisers, normalisers_file(slot, self.processes.rank))
            if average:
                self._write(dict(average), slot / AVERAGE)
            record = {"step": step, "identity": self.identity, "boot": _boot(), "loader": loader, "progress": progress}
            aside = mine.with_name(f".{mine.name}")
            aside.write_text(json.dumps(record))
            aside.rename(mine)
        except OSError as error:
            failure = failure or error
        if failure:
            raise NotSaved(f"a snapshot in {self.run} could not be written: {failure}") from failure

    def newest(self) -> Saved | None:
        """The last one that is whole, of a run like this one, on machines that have not started anew since."""
        found: dict[int, tuple[Path, dict[str, Any]]] = {}
        for slot in self._slots:
            try:
                record = json.loads(self._record(slot).read_text())
            except (OSError, ValueError):
                continue
            if record["identity"] == self.identity and record["boot"] == _boot():
                found[record["step"]] = slot, record
        everywhere = set.intersection(*map(set, self.processes.gather(list(found))))
        if not everywhere:
            return None
        slot, record = found[max(everywhere)]
        self._turn = 1 - self._slots.index(slot)
        loader = of_all_ranks(record["loader"], self.processes)
        return Saved(slot, record["step"], self.identity, loader, record["progress"], is_snapshot=True)

    def are_there(self) -> bool:
        """Whether a run has left any, of use or not."""
        return any(self._record(slot).is_file() for slot in self._slots)

    def _record(self, slot: Path) -> Path:
        return slot / f"rank_{self.processes.rank}.json"

    def remove(self) -> None:
        """All of them, which are of no more use; the first rank's."""
        shutil.rmtree(self.run / FOLDER, ignore_errors=True)


def _boot() -> str:
    """What changes when the machine starts anew."""
    return _BOOT.read_text().strip()
