"""open_clip's `rank` and `world_size` arguments, and the process group they stand for."""

import torch.distributed as dist


def check_ranks(rank: int, world_size: int) -> None:
    """Raises ValueError unless 0 <= rank < world_size."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}, must be at least 0 and below world_size, which is {world_size}")


def group_of(rank: int, world_size: int, group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group to gather over: None for one process, else `group` or the default one.

    Raises:
        ValueError: torch.distributed is not started, or the group has another rank or size.
    """
    if world_size == 1:
        return None
    group = group or dist.group.WORLD
    if group is None:
        raise ValueError(f"world_size is {world_size}, must be 1 before torch.distributed.init_process_group")
    found = (dist.get_rank(group), dist.get_world_size(group))
    if found != (rank, world_size):
        raise ValueError(f"rank, world_size are {(rank, world_size)}, must be those of the group: {found}")
    return group
