"""LAMB, Lion and StableAdamW in plain torch, for any device, with one state a parameter.

Lion works on each figure by itself and may be partitioned at will (ZeRO). LAMB and StableAdamW measure whole tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT


class _PerParameter(Optimizer):
    """An optimizer that updates one parameter after the other."""

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, self.state[parameter], group)

    def _update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        raise NotImplementedError


class Lion(_PerParameter):
    """p <- p - lr (sign(b1 m + (1 - b1) g) + wd p), m <- b2 m + (1 - b2) g (Chen et al. 2023, arXiv 2302.06675)."""

    def _update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["exp_avg"] = torch.zeros_like(p)
        beta1, beta2 = group["betas"]
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(state["exp_avg"].lerp(grad, 1 - beta1).sign_(), alpha=-group["lr"])
        state["exp_avg"].lerp_(grad, 1 - beta2)


class Lamb(_PerParameter):
    """p <- p - lr (|p| / |u|) u with u = m' / (sqrt(v') + eps) + wd p, m' and v' Adam's unbiased moments (You et al.
    2020, arXiv 1904.00962, algorithm 2). Parameters without decay, and norms of 0, take the ratio 1."""

    def _update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        count = _moments(p, state)
        beta1, beta2 = group["betas"]
        mean, square = state["exp_avg"].lerp_(grad, 1 - beta1), state["exp_avg_sq"]
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        update = (mean / (1 - beta1**count)) / ((square / (1 - beta2**count)).sqrt_().add_(group["eps"]))
        if group["weight_decay"]:
            update.add_(p, alpha=group["weight_decay"])
            weight, size = p.norm(), update.norm()
            update.mul_(torch.where((weight > 0) & (size > 0), weight / size, 1.0))
        p.add_(update, alpha=-group["lr"])


class StableAdamW(_PerParameter):
    """AdamW whose rate for a tensor is lr / max(1, RMS) with RMS^2 = mean(g^2 / max(v, eps^2)), after Adafactor's
    update clipping; m and v with betas that unbias them (Wortsman et al. 2023, arXiv 2304.13013, algorithm 2)."""

    def _update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        count = _moments(p, state)
        beta1, beta2 = (beta * (1 - beta ** (count - 1)) / (1 - beta**count) for beta in group["betas"])
        mean, square = state["exp_avg"].lerp_(grad, 1 - beta1), state["exp_avg_sq"]
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        rms = (grad.square() / square.clamp(min=group["eps"] ** 2)).mean().sqrt_()
        rate = group["lr"] / rms.clamp_(min=1.0)
        p.mul_(1 - rate * group["weight_decay"])
        p.sub_(rate * mean / square.sqrt().add_(group["eps"]))


def _moments(p: Tensor, state: dict[str, Any]) -> float:
    """Makes the state at the first update; the number of this one."""
    if not state:
        state["step"] = torch.zeros(())
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
    state["step"] += 1
    return float(state["step"])


OPTIMIZERS: dict[str, Callable[[ParamsT], Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "lamb": Lamb,
    "lion": Lion,
    "stableadamw": StableAdamW,
}
