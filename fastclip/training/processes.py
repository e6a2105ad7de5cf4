"""The processes of a run: who this one is, on which device, and how it hears from the others."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from fastclip.errors import UserError
from fastclip.training.allocator import keep_freed_memory


@dataclass(frozen=True)
class Processes:
    """This process among all of a run's."""

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def agree(self, *values: float) -> list[float]:
        """The maximum of each value over all ranks."""
        together = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(together, dist.ReduceOp.MAX, group=self.group)
        return together.tolist()

    def gather(self, value: Any) -> list[Any]:
        """A small picklable value of every rank, in rank order."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def barrier(self) -> None:
        dist.barrier(group=self.group)

    @contextmanager
    def one_mistake_for_all(self) -> Iterator[None]:
        """A user's mistake (ValueError, OSError) that any rank meets inside is raised on every rank, as one UserError.

        So that no rank waits for one that has left. Nothing inside may itself wait for the other ranks.
        """
        mistake = None
        try:
            yield
        except (ValueError, OSError) as error:
            mistake = error
        self.raise_together(mistake)

    def raise_together(self, mistake: Exception | None) -> None:
        """Raises UserError on every rank if one of them brings a mistake; every rank must call it."""
        for message in self.gather(None if mistake is None else str(mistake) or repr(mistake)):
            if message is not None:
                raise UserError(message) from mistake


def start_processes() -> Processes:
    """Joins the processes that `deepspeed` or `torchrun` started, or makes a group of this one alone.

    On the CPU each process takes its share of the cores.
    """
    on_gpu = torch.cuda.is_available()
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed insists on it
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # oneDNN keeps its last 1,024 products, each with code of its own, and packed captions make ever new ones. With
        # 128 the demo is as fast and takes 0.4 GB less after 60 steps.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))
        keep_freed_memory()
        _leave_dynamo_out()
    if not dist.is_initialized():
        backend = "nccl" if on_gpu else "gloo"
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            store, rank, world_size = next(dist.rendezvous("env://"))
            # torchrun's restarts share a store: without a place of their own ranks would look for the dead ones there.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(f"fastclip/attempt_{attempt}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    # Names that newer versions deprecate and older ones have alone; DeepSpeed uses them too.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    return Processes(dist.get_rank(), dist.get_world_size(), device, dist.group.WORLD)


def stop_processes() -> None:
    """Leaves the group cleanly."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _leave_dynamo_out() -> None:
    """Lets the base of torch's optimizers work without dynamo, which it imports to tell it not to trace them.

    It takes two seconds of a run's start, and nothing is compiled on a CPU. The `step` of torch's own optimizers still
    imports it, that of DeepSpeed's Muon does not.
    """
    for name in ("add_param_group", "state_dict", "load_state_dict", "zero_grad"):
        plain = getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None)
        if plain is not None and "torch._dynamo" not in sys.modules:
            plain.__dynamo_disable = plain  # what torch keeps there once it has asked dynamo
