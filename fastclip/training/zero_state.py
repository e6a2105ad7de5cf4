"""The weights and the optimizer's state of a DeepSpeed engine by parameter name, whole and in fp32, out of it and in.

Every rank calls these together: ZeRO 1 to 3 gather and scatter one parameter at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad

STEP = "step"  # how many updates the optimizer has made, one figure for all its states


class ZeroState:
    """Reads and writes the state behind `engine` (deepspeed.DeepSpeedEngine), whatever its stage.

    names: of the parameters, the same objects that the optimizer was made with.
    """

    def __init__(self, engine: Any, names: Mapping[nn.Parameter, str]) -> None:
        self.engine, self.names = engine, names
        self.stage = engine.zero_optimization_stage()
        # In fp32 ZeRO-0 leaves the optimizer as it is.
        self.is_bare = isinstance(engine.optimizer, torch.optim.Optimizer)
        self.optimizer = engine.optimizer if self.is_bare else engine.optimizer.optimizer
        self.masters = self._masters()

    def _masters(self) -> dict[Tensor, Tensor]:
        """The whole fp32 weights that a rank has: below ZeRO-3 its own in an fp32 run, at ZeRO-0 a copy in others."""
        if self.is_bare or (self.stage < 3 and all(p.dtype == torch.float32 for p in self.names)):
            return {parameter: parameter for parameter in self.names}
        if self.stage > 0:
            return {}
        groups = zip(self.engine.optimizer.fp16_groups, self.engine.optimizer.fp32_groups, strict=True)
        return {half: full for halves, fulls in groups for half, full in zip(halves, fulls, strict=True)}

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """fp32; a parameter that is not trained has no other copy than the model's."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        master = self.masters.get(parameter)
        value = master if master is not None else safe_get_full_fp32_param(parameter)
        if value is not None:
            return value.detach().float()
        with GatheredParameters([parameter], enabled=self.stage == 3):
            return parameter.detach().float().clone()

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """("exp_avg/visual.proj", its value) and the like for all that the optimizer holds; nothing before a step."""
        self._link()
        steps = [float(state[STEP]) for state in self.optimizer.state.values() if STEP in state]
        if steps:
            yield STEP, torch.tensor(max(steps))
        for parameter, name in self.names.items():
            for key in self._keys() if parameter.requires_grad else []:
                value = self._moment(parameter, key)
                if value is not None:
                    yield f"{key}/{name}", value

    def put(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Overwrites fp32 weights and moments. The model's own (rounded) weights must be those already."""
        if moments:
            self._make_states()
        self._link()
        for state in self.optimizer.state.values():
            if STEP in state and STEP in moments:
                is_tensor, count = isinstance(state[STEP], Tensor), float(moments[STEP])
                state[STEP] = torch.full_like(state[STEP], count) if is_tensor else int(count)
        for parameter, name in self.names.items():
            if parameter.requires_grad:
                self._put(parameter, None, weights[name])
                for key in self._keys():
                    if f"{key}/{name}" in moments:
                        self._put(parameter, key, moments[f"{key}/{name}"])

    def _keys(self) -> list[str]:
        """What the states hold beside their step."""
        states = self.optimizer.state.values()
        return sorted({key for state in states for key, value in state.items() if isinstance(value, Tensor)} - {STEP})

    def _moment(self, parameter: nn.Parameter, key: str) -> Tensor | None:
        from deepspeed.utils import safe_get_full_optimizer_state

        if self.stage == 0:
            return self.optimizer.state[self.masters[parameter]].get(key)
        if self.stage < 3 and not self._has_moment(parameter, key):
            return None
        try:
            return safe_get_full_optimizer_state(parameter, key)
        except KeyError:
            return None

    def _has_moment(self, parameter: nn.Parameter, key: str) -> bool:
        """ZeRO 1 and 2: whether the group that the parameter is in has such a state; the same on every rank."""
        groups = zip(
            self.engine.optimizer.bit16_groups, self.engine.optimizer.single_partition_of_fp32_groups, strict=True
        )
        flat = next(flat for group, flat in groups if any(one is parameter for one in group))
        return key in self.optimizer.state.get(flat, {})

    def _put(self, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        value = value.to(self.engine.device, torch.float32)
        if self.stage == 0:
            master = self.masters[parameter]
            target = master if key is None else self.optimizer.state[master][key]
            with torch.no_grad():
                target.copy_(value.view_as(target))
        elif self.stage == 3:
            # The setters of whole values fail where a size does not divide by the ranks.
            size, rank = parameter.ds_tensor.numel(), dist.get_rank()  # type: ignore[attr-defined]
            own = value.flatten()[rank * size : (rank + 1) * size]
            own = pad(own, (0, size - own.numel()))
            if key is None:
                safe_set_local_fp32_param(parameter, own)
            else:
                safe_set_local_optimizer_state(parameter, own, key)
        elif key is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def _make_states(self) -> None:
        """A step with a gradient and a learning rate of zero, which makes the states that are not there yet."""
        zero = self.engine.optimizer
        if self.stage == 3:
            flat = zero.fp32_partitioned_groups_flat
        elif self.stage:
            flat = zero.single_partition_of_fp32_groups
        else:
            flat = [master for master in self.masters.values() if master.requires_grad]
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        for target in flat:
            target.grad = torch.zeros_like(target)
        if self.stage == 3:
            for number in range(len(flat)):
                zero._optimizer_step(number)
        else:
            self.optimizer.step()
        for target in flat:
            target.grad = None
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _link(self) -> None:
        """ZeRO 1 and 2 know a parameter's part of the flat states only once told, and no longer after a load."""
        if self.stage in (1, 2) and self.optimizer.state:
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()
