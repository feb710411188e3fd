"""Swapping the RNNs of a whole model, and of code that cannot be edited.

A module is swapped by giving the object the other class, as ``torch.nn.utils.parametrize`` and
``fully_shard`` do. The object stays, so everything that hangs on it stays too: parameters and the
optimisers that hold them, hooks, parametrizations, buffers, training mode, device, names, and every
reference to it from elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from . import modules

__all__ = ["Change", "Report", "patch", "restore", "swap"]

_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: modules.RNN,
    nn.RNNCell: modules.RNNCell,
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}
#: Methods of theirs that ours do not call, or only of a call that the kernel has refused.
_REPLACEABLE = (
    "forward", "check_input", "check_forward_args", "check_hidden_size", "get_expected_hidden_size",
    "permute_hidden",
)  # fmt: skip
_SWAPPED = "_rnnfast_swapped"  # an attribute of the module, so that copies and pickles keep it


@dataclass(frozen=True)
class Change:
    """What happened to one recurrent module of a model.

    Attributes:
        name: the module's name in the model, as in ``named_modules``; empty for the model itself.
        kind: the name of the class that it had.
        why_not: why it was left as it was, or None where it was changed.
    """

    name: str
    kind: str
    why_not: str | None


@dataclass(frozen=True)
class Report:
    """What :func:`swap` or :func:`restore` did to each recurrent module of a model."""

    verb: str
    changes: tuple[Change, ...]

    @property
    def changed(self) -> list[str]:
        """Names of the modules that were changed."""
        return [change.name for change in self.changes if change.why_not is None]

    @property
    def unchanged(self) -> dict[str, str]:
        """Name to reason, for the modules that were not."""
        return {c.name: c.why_not for c in self.changes if c.why_not is not None}

    def __str__(self) -> str:
        lines = [f"{self.verb} {len(self.changed)} of {len(self.changes)} recurrent modules"]
        for change in self.changes:
            result = self.verb if change.why_not is None else f"not {self.verb}: {change.why_not}"
            lines.append(f"  {change.name or '(the model)'} ({change.kind}): {result}")
        return "\n".join(lines)


def _original_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, below the one that parametrizations give it."""
    if parametrize.is_parametrized(module):
        base: type[nn.Module] = type(module).__bases__[0]
        return base
    return type(module)


def _change_class(module: nn.Module, target: type[nn.Module]) -> None:
    if parametrize.is_parametrized(module):
        # The same class again, on another base: it holds the properties of the parametrized
        # tensors. Not changed in place, as a deep copy of the module shares it.
        current = type(module)
        members = {k: v for k, v in vars(current).items() if k != "__doc__"}
        target = type(current.__name__, (target,), members)
    module.__class__ = target


def _is_recurrent(module: nn.Module) -> bool:
    scripted = isinstance(module, torch.jit.ScriptModule)
    return isinstance(module, (nn.RNNBase, nn.RNNCellBase)) or (
        scripted and getattr(module, "original_name", None) in ("RNN", "RNNCell")
    )


def _why_not_swap(module: nn.Module) -> str | None:
    cls = _original_class(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript; swap before torch.jit.script or trace"
    if isinstance(module, (modules.RNN, modules.RNNCell)):
        return "it is rnnfast's already"
    if not isinstance(module, tuple(_OURS)):  # by name they are ours within patch()
        return f"{cls.__name__} is not a cell that rnnfast has"
    if cls not in _OURS:
        return f"{cls.__module__}.{cls.__qualname__} is a subclass, whose own code might be lost"
    for method in _REPLACEABLE:
        if method in vars(module):
            return f"its {method} is replaced on the instance, by what may call the original's"
    return None


def _why_not_restore(module: nn.Module) -> str | None:
    if _SWAPPED not in vars(module):
        return "rnnfast.swap did not change it"
    if _original_class(module) not in _THEIRS:
        return f"its class has become {type(module).__name__} since"
    return None


def swap(model: nn.Module) -> Report:
    """Turn every ``nn.RNN`` and ``nn.RNNCell`` of a model, or the model itself, into rnnfast's.

    In place: each module keeps its identity, parameters, hooks, parametrizations, training mode,
    device and name. Subclasses of ``nn.RNN`` (``fully_shard`` makes one too: swap before it), other
    cells, scripted modules and those whose ``forward`` or checks were replaced are left alone, and
    the report says so.

    Args:
        model: any module. Afterwards ``isinstance(module, nn.RNN)`` is False for what was swapped
            and ``isinstance(module, nn.RNNBase)`` is True.

    Returns:
        What was changed and what was not, and why; print it.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.RNN(4, 5), nn.LSTM(5, 6))
        >>> print(rnnfast.swap(model))
        swapped 1 of 2 recurrent modules
          1 (RNN): swapped
          2 (LSTM): not swapped: LSTM is not a cell that rnnfast has
    """
    changes = []
    for name, module in model.named_modules():
        if not _is_recurrent(module):
            continue
        why_not = _why_not_swap(module)
        changes.append(Change(name, _original_class(module).__name__, why_not))
        if why_not is None:
            _change_class(module, _OURS[_original_class(module)])
            vars(module)[_SWAPPED] = True
    return Report("swapped", tuple(changes))


def restore(model: nn.Module) -> Report:
    """Undo :func:`swap`: what it changed is ``nn.RNN`` and ``nn.RNNCell`` again, in place.

    Modules that were built as rnnfast's stay so. Copies and pickles of a swapped model can be
    restored too.

    Args:
        model: any module.

    Returns:
        What was changed and what was not, and why.
    """
    changes = []
    for name, module in model.named_modules():
        if not isinstance(module, (modules.RNN, modules.RNNCell)):
            continue
        why_not = _why_not_restore(module)
        changes.append(Change(name, _original_class(module).__name__, why_not))
        if why_not is None:
            _change_class(module, _THEIRS[_original_class(module)])
            del vars(module)[_SWAPPED]
    return Report("restored", tuple(changes))


@contextmanager
def patch() -> Iterator[None]:
    """Within the ``with`` block ``torch.nn.RNN`` and ``torch.nn.RNNCell`` are rnnfast's.

    For models built by code that cannot be edited. It holds for the whole process, nests, and is
    undone when the block is left in any way; the models stay as they were built. It changes what
    ``torch.nn`` (and ``torch.nn.modules``) call RNN: code that ran ``from torch.nn import RNN``
    before the block keeps PyTorch's, and so does unpickling. Use :func:`swap` on such models.
    ``torch.compile(fullgraph=True)`` belongs after the block: Dynamo refuses every instance of what
    ``torch.nn.RNN`` then is.

    Example:
        >>> with rnnfast.patch():
        ...     model = nn.Sequential(nn.RNN(3, 5))
        >>> isinstance(model[0], rnnfast.RNN)
        True
    """
    namespaces = (nn, nn.modules)  # not nn.modules.rnn, by which pickle finds the originals
    places = [(space, cls.__name__) for space in namespaces for cls in _OURS]
    saved = [getattr(space, name) for space, name in places]
    for space, name in places:
        setattr(space, name, getattr(modules, name))
    try:
        yield
    finally:
        for (space, name), value in zip(places, saved, strict=True):
            setattr(space, name, value)
