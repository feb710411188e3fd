"""Which implementation runs a call: the table, what is usable here, and how to force one.

==========  =======================================  ==============================================
backend     what it is                               taken when
==========  =======================================  ==============================================
cpu         C++ time loop, ``torch.ops.rnnfast.*``   CPU or meta tensors of a floating dtype, and
                                                     the extension is built for this torch
cuda        the same op in CUDA C++                  CUDA tensors where it was measured to win
                                                     (nowhere yet but on a GPU of your own, by
                                                     ``tools/gpu_check.py``), or where it is forced
triton      the same op by Triton                    the same
torch       PyTorch's own RNN (cuDNN on CUDA)        where no kernel of ours applies, so that a
                                                     call is never slower than nn.RNN's: devices
                                                     other than the CPU; float32 and float64 there
                                                     too if the extension is missing
reference   plain PyTorch, :mod:`rnnfast.reference`  everything else: forward-mode derivatives, and
                                                     torch.vmap, 16-bit types and torch.compile
                                                     without a kernel of ours
==========  =======================================  ==============================================

``RNNFAST_BACKEND=NAME`` or ``with rnnfast.backend(NAME)`` forces one; a forced backend that cannot
run a call raises RuntimeError and says why. ``RNNFAST_GPU_WINS=FOLDER/gpu_wins.json`` takes our GPU
kernels where ``python tools/gpu_check.py FOLDER`` found them right and no slower than cuDNN.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import dispatch, triton_layer

__all__ = [
    "BACKENDS",
    "TAKEN",
    "FallbackWarning",
    "backend",
    "build_record",
    "chosen",
    "extension_error",
    "forced",
    "plain_calls_are_direct",
    "select",
]

_HOW_TO_BUILD = (
    "To build it: pip install --no-build-isolation --force-reinstall --no-deps <rnnfast source>, "
    "with this torch and a C++ compiler installed."
)


class FallbackWarning(UserWarning):
    """The compiled kernels are missing; calls are no faster than those of ``nn.RNN``."""


# ------------------------------------------------------------------------------ the extension


def build_record() -> dict[str, Any]:
    """What setup.py noted about the build.

    ``torch``, its version; ``extension``, and ``error`` if that failed; ``cuda`` and
    ``cuda_arch_list`` of the CUDA kernels, None where they were left out, and ``why_not_cuda``.
    """
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
    cuda, has = record.get("cuda"), torch.version.cuda
    if cuda and cuda.split(".")[0] != (has or "").split(".")[0]:  # the runtime's name has the major
        here = f"CUDA {has}" if has else "no CUDA"
        return f"the C++ extension was built for CUDA {cuda} and this torch {running} has {here}."
    # setup.py builds _C.abi3.so; a _C.cpython-*.so beside it is left from an older build in place.
    libraries = sorted(Path(__file__).parent.glob("_C.*"), key=lambda p: ".abi3." not in p.name)
    if not libraries:
        return "the C++ extension is missing from the package, which was built with it."
    try:
        torch.ops.load_library(libraries[0])  # type: ignore[no-untyped-call]
        from . import _direct_calls  # noqa: F401  (it calls the ops that were loaded)
    except (OSError, ImportError) as error:
        return f"the C++ extension does not load ({error})."
    return None


extension_error: str | None = _load_extension()
_warned = False
_LIBRARIES = tuple(os.path.dirname(file) + os.sep for file in (__file__, str(torch.__file__)))


def _stack_level() -> int:
    """The stacklevel of the first frame that is neither ours nor torch's.

    ``skip_file_prefixes`` does the same from Python 3.12 on.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        level, frame = level + 1, frame.f_back
    return level


def _warn_fallback() -> None:
    global _warned
    if not _warned and not torch.compiler.is_compiling():
        _warned = True
        warnings.warn(
            f"rnnfast runs without its kernels, no faster than nn.RNN: {extension_error} "
            f"{_HOW_TO_BUILD}",
            FallbackWarning,
            stacklevel=_stack_level(),
        )


# ---------------------------------------------------------------------------------- the table

_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _vmapped() -> bool:
    if torch.compiler.is_compiling():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in stack)


def _why_no_op() -> str | None:
    """What keeps a call from torch.ops.rnnfast, whichever kernel of it is meant."""
    if extension_error is not None:  # the extension defines the ops, and their autograd
        return extension_error
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives are the reference's."
    return None


def _why_not_cpu(input: Tensor, hidden_size: int | None = None) -> str | None:
    if (why := _why_no_op()) is not None:
        return why
    if not (input.is_cpu or input.is_meta):
        return f"the input is on {input.device}, not on the CPU."
    if input.dtype not in _CPU_DTYPES:
        return f"{input.dtype} is none of float32, float64, bfloat16, float16."
    return None


def _why_not_cuda(input: Tensor, hidden_size: int | None = None) -> str | None:
    if (why := _why_no_op()) is not None:
        return why
    if not dispatch.has_compiled_kernels("CUDA"):
        return "the extension was built without CUDA kernels."
    if not input.is_cuda:
        return f"the input is on {input.device}, not on a CUDA device."
    tf32 = dispatch.tf32_allowed()
    return _why_not_cuda_on(input.get_device(), input.dtype, hidden_size or 1, tf32)


@dispatch.constant_in_a_graph
@cache
def _why_not_cuda_on(device: int, dtype: torch.dtype, hidden_size: int, tf32: bool) -> str | None:
    return why_not_cuda(torch.ops.rnnfast._cuda_why_not, device, dtype, hidden_size)


def why_not_cuda(
    ask: Callable[..., int], device: int, dtype: torch.dtype, hidden_size: int
) -> str | None:
    """The sentence for a Refusal of csrc/cuda/time_loop.h, None for none."""
    tracing: Any = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]  # it is no part of a model
    try:
        refusal = ask(device, dtype, hidden_size)
    finally:
        torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]
    if refusal == 0:
        return None
    return (
        f"{dtype} is none of float32, float64, bfloat16, float16.",
        "the GPU's compute capability is below 8.0.",
        f"no kernel holds a hidden_size of {hidden_size} in {dtype} on this GPU "
        f"(they are compiled for {build_record().get('cuda_arch_list')}).",
    )[refusal - 1]


def _why_not_triton(input: Tensor, hidden_size: int | None = None) -> str | None:
    if (why := _why_no_op()) is not None:
        return why
    return triton_layer.why_not(input, hidden_size)


def _why_not_torch(input: Tensor, hidden_size: int | None = None) -> str | None:
    if _vmapped():
        return "PyTorch's own RNN has no batching rule."
    if forward_ad._current_level >= 0 and not input.is_cpu:
        return "PyTorch's own RNN has forward-mode derivatives on the CPU alone."
    return None


def _always(input: Tensor, hidden_size: int | None = None) -> str | None:
    return None


@dataclass(frozen=True)
class Win:
    """Calls that one of our GPU kernels was measured to run faster than cuDNN."""

    backend: str  #: "cuda" or "triton"
    capability: tuple[int, int]  #: of the GPU measured; no other is assumed to be like it
    precision: str  #: of the products, by the name that dispatch.precision gives it
    hidden_sizes: tuple[int, int]  #: from, to
    packed: bool

    def covers(self, input: Tensor, hidden_size: int, packed: bool) -> bool:
        """Whether the measurement speaks for this call."""
        least, largest = self.hidden_sizes
        return (
            packed == self.packed
            and least <= hidden_size <= largest
            and dispatch.precision(input.dtype) == self.precision
            and _capability(input.get_device()) == self.capability
        )


def _read_wins(file: str | None) -> tuple[Win, ...]:
    """The rows of a file that tools/gpu_check.py wrote on this machine; none without a file.

    The versions that it also has are for people: nothing is refused because of them.
    """
    if not file:
        return ()
    wins = []
    try:
        for row in json.loads(Path(file).read_text())["wins"]:
            (major, minor), (least, largest) = row["capability"], row["hidden_sizes"]
            if row["backend"] not in ("cuda", "triton"):
                raise ValueError(f"{row['backend']!r} is no backend of GPUs")
            sizes, capability = (int(least), int(largest)), (int(major), int(minor))
            wins.append(Win(row["backend"], capability, row["precision"], sizes, row["packed"]))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RuntimeError(
            f"RNNFAST_GPU_WINS={file} is no gpu_wins.json of tools/gpu_check.py: "
            f"{type(error).__name__}: {error}"
        ) from error
    return tuple(wins)


#: Where a GPU kernel of ours is taken, the best first. None is known until a figure was measured on
#: a GPU: every CUDA call is PyTorch's own then, and our kernels run where they are forced, or where
#: a run of tools/gpu_check.py on the user's own GPU found them faster.
GPU_WINS: tuple[Win, ...] = _read_wins(os.environ.get("RNNFAST_GPU_WINS"))


@dispatch.constant_in_a_graph
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@dispatch.constant_in_a_graph
def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def _winner(input: Tensor, hidden_size: int | None, packed: bool) -> str | None:
    if hidden_size is None or not GPU_WINS:
        return None
    if packed and _capturing():  # batch_sizes would have to be copied
        return None
    for win in GPU_WINS:
        if win.covers(input, hidden_size, packed) and not BACKENDS[win.backend](input, hidden_size):
            return win.backend
    return None


#: name -> predicate: None where the backend can run a call with this input (and hidden_size, where
#: that is known), else why not.
BACKENDS: dict[str, Callable[[Tensor, int | None], str | None]] = {
    "cpu": _why_not_cpu,
    "cuda": _why_not_cuda,
    "triton": _why_not_triton,
    "torch": _why_not_torch,
    "reference": _always,
}

#: name -> when :func:`chosen` takes a backend, of those that can run the call.
TAKEN: dict[str, str] = {
    "cpu": "always",
    "cuda": "where a row of GPU_WINS says that it was measured to be faster",
    "triton": "where a row of GPU_WINS says that it was measured to be faster",
    "torch": "on other devices, and on the CPU in float32 and float64 without the extension",
    "reference": "where none of the others is",
}


def _checked(name: str | None, source: str) -> str | None:
    if name in (None, "", "auto"):
        return None
    if name not in tuple(BACKENDS):  # a tuple: the value may be unhashable
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
    if _forced == "triton":
        triton_layer.take_calls()
    try:
        yield
    finally:
        _forced = before


def forced() -> str | None:
    """The name of the backend that is forced, or None."""
    return _forced


def runs(name: str) -> dispatch.IsOurs:
    """Whether this backend is the one for a call, as a question to be asked of calls."""
    return lambda input, hidden_size, packed: (
        (_forced or chosen(input, hidden_size, packed)) == name
    )


def chosen(input: Tensor, hidden_size: int | None = None, packed: bool = False) -> str:
    """The table's choice for this call where nothing is forced."""
    if _why_not_cpu(input) is None:
        return "cpu"
    if input.is_cuda and (winner := _winner(input, hidden_size, packed)):
        return winner
    if (input.is_cpu or input.is_meta) and not _torch_takes_over(input):
        return "reference"
    return "torch" if _why_not_torch(input) is None else "reference"


def _torch_takes_over(input: Tensor) -> bool:
    """Whether PyTorch's own RNN is the CPU's fallback: not in 16-bit types, whose state the
    reference keeps in float32, nor in a compiled graph, which may hold a vmap that it cannot run.
    """
    return (
        extension_error is not None
        and input.dtype in (torch.float32, torch.float64)
        and forward_ad._current_level < 0
        and not torch.compiler.is_compiling()
    )


def plain_calls_are_direct() -> bool:
    """Whether a module may offer its call to ``_direct_calls``, which runs what is plain, on
    tensors for which the table has ``cpu``.
    """
    may_run = _forced in (None, "cpu") and _why_no_op() is None
    return may_run and not torch.compiler.is_compiling()


def select(input: Tensor, hidden_size: int | None = None, packed: bool = False) -> str:
    """Return the name of the backend that runs a call with this input.

    Args:
        input: of the call.
        hidden_size: of the layer, where known: some kernels hold only so many units.
        packed: whether the input is that of a PackedSequence.

    Raises:
        RuntimeError: the forced backend cannot run it.
    """
    if _forced is not None:
        why = BACKENDS[_forced](input, hidden_size)
        if why is not None:
            raise RuntimeError(f"rnnfast: the forced backend '{_forced}' cannot run: {why}")
        name = _forced
    else:
        name = chosen(input, hidden_size, packed)
        if extension_error is not None and (name == "reference" or input.is_cpu):
            _warn_fallback()
    if name == "triton":
        triton_layer.take_calls()
    return name
