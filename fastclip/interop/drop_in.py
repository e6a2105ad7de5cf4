"""What every drop-in is: methods of another library that are replaced while it is on, and put back exactly."""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastclip.errors import UserError

_ABSENT = object()


class Replacement(NamedTuple):
    """Method `name` of a class, or of one object; `make` gets the class's function and returns the new one."""

    owner: Any
    name: str
    make: Callable[[Callable[..., Any]], Callable[..., Any]]


class DropIn:
    """Some methods of another library, replaced between `enable` and `disable`, or inside `with`.

    Nothing is replaced before. Enabling twice is enabling once; of two drop-ins of one kind the later one counts, and
    the library's own methods come back when it is disabled.

    Args:
        about: names the kind, for messages.
        find: finds what to replace; called by `enable`, which raises what it raises.
    """

    def __init__(self, about: str, find: Callable[[], Sequence[Replacement]]) -> None:
        self._about, self._find = about, find
        self._replaced: list[tuple[Any, str, Any, Any]] = []  # owner, name, its own attribute before, what stands there
        self._before_with: list[bool] = []

    @property
    def enabled(self) -> bool:
        """Whether the methods are replaced by this drop-in."""
        return any(vars(owner).get(name) is new for owner, name, _, new in self._replaced)

    def enable(self) -> DropIn:
        """Replaces the methods, and returns itself.

        Raises:
            UserError: the library is missing or too old, or there is nothing in it that could be replaced.
        """
        if self.enabled:
            return self
        self.disable()
        found = [self._replacement(*replacement) for replacement in self._find()]
        for owner, name, _, new in found:
            setattr(owner, name, new)
        self._replaced = found
        return self

    def disable(self) -> None:
        """Puts the methods back.

        Raises:
            UserError: other code has replaced one since; that must be undone first.
        """
        if not self.enabled:
            self._replaced = []
            return
        for owner, name, _, new in self._replaced:
            if vars(owner).get(name) is not new:
                raise UserError(
                    f"{self._about}: {name} of {_name(owner)} has been replaced again since: undo that first"
                )
        for owner, name, old, _ in self._replaced:
            if old is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, old)
        self._replaced = []

    def __enter__(self) -> DropIn:
        self._before_with.append(self.enabled)
        return self.enable()

    def __exit__(self, *error: Any) -> None:
        if not self._before_with.pop():
            self.disable()

    def _replacement(self, owner: Any, name: str, make: Callable[..., Any]) -> tuple[Any, str, Any, Any]:
        own = vars(owner).get(name, _ABSENT)
        while getattr(own, "_drop_in", None) == self._about:  # an earlier one of this kind: this one takes over
            own = own._before
        is_class = isinstance(owner, type)
        if own is not _ABSENT and not is_class:
            raise UserError(
                f"{self._about}: other code has replaced {name} of {_name(owner)}: enable this before it does"
            )
        theirs = getattr(owner if is_class else type(owner), name)
        new: Any = functools.wraps(theirs)(make(theirs))
        new._drop_in, new._before = self._about, own
        if not is_class:
            new = types.MethodType(new, owner)  # so that a deep copy of the object calls it on itself
        return owner, name, own, new


def library(name: str, install: str, part: str = "") -> types.ModuleType:
    """The module `name`, or its submodule `part`.

    Raises:
        UserError: it is not installed; `install` is what pip installs.
    """
    try:
        return import_module(f"{name}.{part}" if part else name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise UserError(f"{name} is not installed: pip install {install}") from None


def as_in_a_product(*features: Tensor) -> tuple[Tensor, ...]:
    """The features in one type: the one that a matrix product of the library would take them in."""
    device = features[0].device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = functools.reduce(torch.promote_types, (x.dtype for x in features))
    return tuple(x.to(dtype) for x in features)


def left_alone(what: str, reason: str) -> None:
    """Says, once for each place and reason, that a call ran the library's own code."""
    warnings.warn(f"{what} ran without fastclip: {reason}", stacklevel=3)


def _name(owner: Any) -> str:
    return owner.__qualname__ if isinstance(owner, type) else f"a {type(owner).__name__}"
