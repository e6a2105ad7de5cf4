"""Ends a run in which a rank has died or stands still, and says which: the others would wait for it in silence.

Each rank tells a store (the rendezvous's) every few seconds that it lives, and how far it has come. The first rank
reads all of them and judges; the others read the first rank and its judgement. A launcher that sees a rank die asks the
others to end: those look whether one on their machine is gone, and do not wait for it. Three threads a rank, none of
which holds the interpreter; nothing of it is in the way of a step.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch.distributed as dist

from fastclip.errors import UserError
from fastclip.training.processes import Processes
from fastclip.training.signals import GO_ON, Request

BEATS = 8  # in the time that a rank may be silent
LOOKS = 0.1  # seconds between two looks at the processes beside this one, once it has been asked to end
SLOWER = 10.0  # times the longest part of a step so far that a part may take
_VERDICT = "verdict"
_SEVERAL = -1  # in place of a rank


@dataclass
class _Seen:
    """What is known of a rank: its last words, and when they changed."""

    words: dict[str, Any] = field(default_factory=dict)
    at: float = field(default_factory=time.monotonic)


class Watchdog:
    """Of this rank. `at` says where the main thread is; `limit` seconds without a sign are too many.

    A rank that lives but makes no progress within a step is given the longer of `limit` and ten times the longest part
    of a step so far; what happens before the first step, in a save or an evaluation may take as long as it needs.
    """

    def __init__(self, processes: Processes, limit: float) -> None:
        self.processes, self.limit = processes, limit
        self._where, self._since, self._count, self._longest, self._is_limited = (
            "the start",
            time.monotonic(),
            0,
            0.0,
            False,
        )
        self._seen = {rank: _Seen() for rank in range(processes.world_size)}
        self._stopped = threading.Event()
        self._last_answer = time.monotonic()
        self._store: Any = None
        self.before_end: Callable[[], None] = lambda: None  # what this rank has to bring to its end without the others

    def start(self, request: Request) -> None:
        # A copy with a connection of its own: an operation of the main thread's may wait for minutes.
        store: Any = dist.distributed_c10d._get_default_store()
        store = store.clone()
        self._store = dist.PrefixStore("fastclip/watchdog", store)
        self._tell()
        for task in (self._beat, self._judge_store):
            threading.Thread(target=task, daemon=True, name="watchdog").start()
        places = self.processes.gather((os.getpid(), socket.gethostname()))
        beside = {rank: pid for rank, (pid, host) in enumerate(places) if host == socket.gethostname()}
        threading.Thread(target=self._look_beside, args=(request, beside), daemon=True, name="watchdog").start()

    def stop(self, fault: str = "") -> None:
        """This rank has come to its end and will not be missed; or it ends with a fault, and so must the others."""
        self._stopped.set()
        with contextlib.suppress(RuntimeError, dist.DistError):
            self._tell(has_left=True, fault=fault)

    def wait_for_judgement(self, request: Request) -> None:
        """What went wrong is another rank's doing: this one ends by the time that rank is named, or it is told to."""
        end = time.monotonic() + 1.5 * self.limit
        while time.monotonic() < end and request.value == GO_ON:
            time.sleep(0.1)

    def at(self, where: str, is_limited: bool = True) -> None:
        """The main thread goes on with `where` now."""
        now = time.monotonic()
        if self._is_limited:
            self._longest = max(self._longest, now - self._since)
        self._where, self._since, self._is_limited = where, now, is_limited
        self._count += 1

    def _wait(self) -> float | None:
        """The time between two beats; how much longer it was than it should be, or None at the end.

        A process that was held (a suspended machine, a frozen container) blames nobody for that time: the others may
        have been held too.
        """
        interval, began = self.limit / BEATS, time.monotonic()
        if self._stopped.wait(interval):
            return None
        held = time.monotonic() - began - interval
        return held if held > interval else 0.0

    def _beat(self) -> None:
        while (held := self._wait()) is not None:
            self._since += held
            for seen in self._seen.values():
                seen.at += held
            try:
                self._tell()
                if self.processes.is_first:
                    verdict = self._judged(range(self.processes.world_size))
                    if verdict:
                        self._store.set(_VERDICT, json.dumps(verdict))
                elif self._store.check([_VERDICT]):
                    verdict = json.loads(self._store.get(_VERDICT))
                else:
                    verdict = self._judged([0])
                self._last_answer = time.monotonic()
            except (RuntimeError, dist.DistError):  # the store does not answer: see `_judge_store`
                continue
            if verdict:
                self._end(*verdict)

    def _judge_store(self) -> None:
        """An operation on the store of a process that was stopped returns only when that goes on."""
        while (held := self._wait()) is not None:
            self._last_answer += held
            silence = time.monotonic() - self._last_answer
            if silence > self.limit * (1 + 2 / BEATS):
                self._end(0, f"rank 0, which holds the rendezvous, has not answered for {silence:.0f} s")

    def _look_beside(self, request: Request, beside: dict[int, int]) -> None:
        """Once asked to end: a rank that died on this machine is why, and no step ends without it.

        beside: rank -> process id, of this machine's.
        """
        request.arrived.wait()
        while not self._stopped.wait(LOOKS):
            dead = next((rank for rank, pid in beside.items() if not _lives(pid)), None)
            if dead is not None and not self._has_left(dead):
                who = self._who(dead, {"pid": beside[dead], "host": socket.gethostname()})
                self._end(dead, f"{who} has died", is_known=True)

    def _has_left(self, rank: int) -> bool:
        try:
            return self._words(rank)["has_left"]
        except (RuntimeError, dist.DistError):  # the store has died with its rank
            return False

    def _words(self, rank: int) -> dict[str, Any]:
        """The last words of a rank; none before its first."""
        return json.loads(self._store.get(str(rank))) if self._store.check([str(rank)]) else {}

    @staticmethod
    def _who(rank: int, words: dict[str, Any]) -> str:
        process = f"process {words['pid']} on {words['host']}" if words else "a process that never came"
        return f"rank {rank} ({process})"

    def _tell(self, has_left: bool = False, fault: str = "") -> None:
        words = {
            "count": self._count,
            "where": self._where,
            "age": time.monotonic() - self._since,
            "most": max(self.limit, SLOWER * self._longest) if self._is_limited else None,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "beat": time.monotonic(),
            "has_left": has_left,
            "fault": fault,
        }
        self._store.set(str(self.processes.rank), json.dumps(words))

    def _judged(self, ranks: Any) -> tuple[int, str] | None:
        """(rank, what is wrong with it), or None while all is well."""
        now = time.monotonic()
        for rank in ranks:
            seen = self._seen[rank]
            words = self._words(rank)
            who = self._who(rank, words)
            if words.get("fault"):
                return rank, f"{who} has ended: {words['fault']}"
            if words != seen.words:
                self._seen[rank] = _Seen(words, now)
            elif now - seen.at > self.limit and not words.get("has_left"):
                silence = f"{now - seen.at:.0f} s, it was at {words.get('where')}"
                return rank, f"{who} has given no sign of life for {silence}"
        return self._standing_still() if self.processes.is_first else None

    def _standing_still(self) -> tuple[int, str] | None:
        """The rank that is furthest behind, or all that are: which of them the others wait for, nothing here shows."""
        counts = {rank: seen.words["count"] for rank, seen in self._seen.items() if seen.words}
        behind = [rank for rank, count in counts.items() if count == min(counts.values())]
        words = self._seen[behind[0]].words
        if words["most"] is None or words["age"] <= words["most"] or words["has_left"]:
            return None
        since = f"stood still for {words['age']:.0f} s at {words['where']}"
        if len(behind) == 1:
            return behind[0], f"{self._who(behind[0], words)} has {since}"
        return _SEVERAL, f"ranks {', '.join(map(str, behind))} have {since}"

    def _end(self, culprit: int, message: str, is_known: bool = False) -> None:
        """is_known: the others have seen it themselves."""
        if self._stopped.is_set():
            return
        rank = self.processes.rank
        if rank == (1 if culprit == 0 else 0):
            print(f"fastclip train: {message}: the run ends; --resume latest goes on", file=sys.stderr, flush=True)
        self.before_end()
        if culprit in (rank, _SEVERAL):  # it lives: where it stands
            faulthandler.dump_traceback(file=sys.stderr)
        if self.processes.is_first and not is_known:  # the others read the verdict where this rank may hold it
            time.sleep(2 * self.limit / BEATS)
        os._exit(1)


def _lives(pid: int) -> bool:
    """Of a process on this machine, which may have died without having been reaped."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def watched(processes: Processes, limit: float, request: Request) -> Iterator[Watchdog]:
    """A watchdog at work; of one process alone, or with a limit of 0, one that does nothing."""
    watchdog = Watchdog(processes, limit)
    if limit <= 0 or processes.world_size == 1:
        yield watchdog
        return
    watchdog.start(request)
    try:
        yield watchdog
    except (UserError, KeyboardInterrupt):  # on every rank
        watchdog.stop()
        raise
    except BaseException as error:
        if _is_of_another_rank(error):
            watchdog.wait_for_judgement(request)
        watchdog.stop(f"{type(error).__name__}: {error}".splitlines()[0])
        raise
    else:
        watchdog.stop()


def _is_of_another_rank(error: BaseException) -> bool:
    """Whether a collective failed because a rank is gone."""
    signs = ("connection closed by peer", "connection reset", "broken pipe", "gloo", "nccl", "socket timeout")
    said = str(error).lower()
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(x in said for x in signs))
