"""Which implementation runs a call: the table, what is usable here, and how to force one.

==========  =======================================  ==============================================
backend     what it is                               taken when
==========  =======================================  ==============================================
cpu         C++ time loop, ``torch.ops.rnnfast.*``   CPU or meta tensors of a floating dtype, and
                                                     the extension is built for this torch
torch       PyTorch's own RNN (cuDNN on CUDA)        other devices, until a kernel of ours applies:
                                                     never slower than nn.RNN there
reference   plain PyTorch, :mod:`rnnfast.reference`  everything else, forward-mode derivatives, and
                                                     torch.vmap on devices without a kernel of ours
==========  =======================================  ==============================================

``RNNFAST_BACKEND=NAME`` or ``with rnnfast.backend(NAME)`` forces one; a forced backend that cannot
run a call raises RuntimeError and says why.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "BACKENDS",
    "FallbackWarning",
    "backend",
    "build_record",
    "chosen",
    "extension_error",
    "forced",
    "select",
]

_HOW_TO_BUILD = (
    "To build it: pip install --no-build-isolation --force-reinstall --no-deps <rnnfast source>, "
    "with this torch and a C++ compiler installed."
)


class FallbackWarning(UserWarning):
    """The compiled kernels are missing; calls run on the pure-PyTorch reference."""


# ------------------------------------------------------------------------------ the extension


def build_record() -> dict[str, Any]:
    """What setup.py noted about the build: ``torch``, ``extension``, and ``error`` if it failed."""
    try:
        record = json.loads(Path(__file__).with_name("_build.json").read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _load_extension() -> str | None:
    """Load the extension's ops; return None, or one sentence that says why it cannot be used."""
    record = build_record()
    if not record and Path(__file__).parent.with_name("setup.py").exists():
        return (
            f"the C++ extension is not built in the source tree {Path(__file__).parent.parent}, "
            "from which rnnfast was imported (install with -e, or run from another folder)."
        )
    if not record:
        return "the C++ extension is not built (torch was missing when rnnfast was installed)."
    if not record.get("extension"):
        return f"the C++ extension is not built: {record.get('error', 'no reason was recorded')}."
    running, built = str(torch.__version__), str(record.get("torch"))
    if _minor(running) != _minor(built):  # the C++ ABI of torch changes between minor versions
        return f"the C++ extension was built for torch {built} and this is torch {running}."
    library = next(Path(__file__).parent.glob("_C.*"), None)
    if library is None:
        return "the C++ extension is missing from the package, which was built with it."
    try:
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"the C++ extension does not load ({error})."
    return None


extension_error: str | None = _load_extension()
_warned = False


def _warn_fallback() -> None:
    global _warned
    if not _warned and not torch.compiler.is_compiling():
        _warned = True
        warnings.warn(
            f"rnnfast runs on its slow pure-PyTorch reference: {extension_error} {_HOW_TO_BUILD}",
            FallbackWarning,
            stacklevel=5,
        )


# ---------------------------------------------------------------------------------- the table

_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _vmapped() -> bool:
    if torch.compiler.is_compiling():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in stack)


def _why_not_cpu(input: Tensor) -> str | None:
    if extension_error is not None:
        return extension_error
    if not (input.is_cpu or input.is_meta):
        return f"the input is on {input.device}, not on the CPU."
    if input.dtype not in _CPU_DTYPES:
        return f"{input.dtype} is none of float32, float64, bfloat16, float16."
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives are the reference's."
    return None


def _always(input: Tensor) -> str | None:
    return None


#: name -> predicate: None where the backend can run a call with this input, else why not.
BACKENDS: dict[str, Callable[[Tensor], str | None]] = {
    "cpu": _why_not_cpu,
    "torch": _always,
    "reference": _always,
}


def _checked(name: str | None, source: str) -> str | None:
    if name in (None, "", "auto"):
        return None
    if name not in BACKENDS:
        raise RuntimeError(
            f"{source} asks for the backend '{name}'; there are: auto, {', '.join(BACKENDS)}"
        )
    return name


_forced: str | None = _checked(os.environ.get("RNNFAST_BACKEND"), "RNNFAST_BACKEND")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend within a ``with`` block: a name of the table, or ``"auto"``.

    Like ``torch.backends.*.flags`` it holds for the whole process, not for one thread.

    Raises:
        RuntimeError: an unknown name here; a backend that cannot run a call, at that call.
    """
    global _forced
    before, _forced = _forced, _checked(name, "rnnfast.backend")
    try:
        yield
    finally:
        _forced = before


def forced() -> str | None:
    """The name of the backend that is forced, or None."""
    return _forced


def chosen(input: Tensor) -> str:
    """The table's choice for this input where nothing is forced."""
    if _why_not_cpu(input) is None:
        return "cpu"
    if input.is_cpu or input.is_meta or forward_ad._current_level >= 0 or _vmapped():
        return "reference"
    return "torch"


def select(input: Tensor) -> str:
    """Return the name of the backend that runs a call with this input.

    Raises:
        RuntimeError: the forced backend cannot run it.
    """
    if _forced is not None:
        why = BACKENDS[_forced](input)
        if why is not None:
            raise RuntimeError(f"rnnfast: the forced backend '{_forced}' cannot run: {why}")
        return _forced
    name = chosen(input)
    if name == "reference" and extension_error is not None:
        _warn_fallback()
    return name
