"""``python -m rnnfast``: versions, builds, and which backend runs which calls here, and why not
another.
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

import rnnfast

from . import backends

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
_LARGEST = 2048  # hidden sizes are tried one by one up to here; larger ones are taken to be alike


def diagnosis() -> dict[str, Any]:
    """Everything that decides which kernel runs, ready for a bug report."""
    return {
        "rnnfast": rnnfast.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_kernels": _cpu_kernels(),
        "threads": torch.get_num_threads(),
        "triton": _version("triton"),
        "gpus": _gpus(),
        "build": backends.build_record(),
        "extension_error": backends.extension_error,
        "forced_backend": backends.forced(),
        "gpu_wins": [asdict(win) for win in backends.GPU_WINS],
        "taken": backends.TAKEN,
        "calls": list(_calls()),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_kernels() -> str | None:
    """The instruction sets of the C++ kernels that run here."""
    if backends.extension_error is not None:
        return None
    products: str = torch.ops.rnnfast._cpu_bfloat16_products()
    instruction_set: str = torch.ops.rnnfast._cpu_instruction_set()
    return f"{instruction_set} and {products}" if products else instruction_set


def _cpu(found: dict[str, Any]) -> str:
    kernels = f"kernels for {found['cpu_kernels']}" if found["cpu_kernels"] else "no kernels"
    return f"{found['cpu_capability']}, {kernels}"


def _cuda_kernels(build: dict[str, Any]) -> str:
    if build.get("cuda"):
        return f"kernels for {build['cuda_arch_list']}, built with CUDA {build['cuda']}"
    return ": ".join(["no kernels built", *filter(None, [build.get("why_not_cuda")])])


def _gpus() -> list[str]:
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


# ---------------------------------------------------------------------------------- the table


def _calls() -> Iterator[dict[str, Any]]:
    """The classes of calls that the table of backends tells apart, found by asking it.

    Keys: ``device`` (the first of its model), ``dtype``, ``transform`` (None, ``"vmap"`` or
    ``"jvp"``), ``packed``, ``hidden_size`` (ranges ``[first, last]``, None for no end), ``runs``,
    ``usable`` (what could run it, the rest where forced), ``why_not`` (backend -> sentence, that of
    the first hidden size).
    """
    gpus = _gpus()
    devices = ["cpu", *(f"cuda:{gpus.index(model)}" for model in dict.fromkeys(gpus))]
    for device in devices:
        for dtype in _DTYPES:
            for transform, within in _TRANSFORMS.items():
                for packed in (False, True):
                    probe = torch.empty((1, 1) if packed else (1, 1, 1), dtype=dtype, device=device)
                    for found in within(_classes, probe, packed):
                        yield {
                            "device": device,
                            "dtype": str(dtype).removeprefix("torch."),
                            "transform": transform,
                            "packed": packed,
                            **found,
                        }


_Classes = list[dict[str, Any]]
_Look = Callable[[Tensor, bool], _Classes]


def _plain(look: _Look, probe: Tensor, packed: bool) -> _Classes:
    return look(probe, packed)


def _vmap(look: _Look, probe: Tensor, packed: bool) -> _Classes:
    found: _Classes = []

    def call(x: Tensor) -> Tensor:
        found.extend(look(x, packed))
        return x

    torch.vmap(call)(probe.unsqueeze(0))
    return found


def _jvp(look: _Look, probe: Tensor, packed: bool) -> _Classes:
    with forward_ad.dual_level():
        return look(probe, packed)


_TRANSFORMS: dict[str | None, Callable[[_Look, Tensor, bool], _Classes]] = {
    None: _plain,
    "vmap": _vmap,
    "jvp": _jvp,
}


def _classes(probe: Tensor, packed: bool) -> _Classes:
    """Hidden sizes that the same backend runs and the same others could."""
    classes: dict[Any, dict[str, Any]] = {}
    for hidden_size in range(1, _LARGEST + 1):
        runs = backends.chosen(probe, hidden_size, packed)
        why_not = {name: why(probe, hidden_size) for name, why in backends.BACKENDS.items()}
        usable = [name for name, why in why_not.items() if why is None]
        found = classes.get((runs, *usable))
        if found is None:
            reasons = {name: why for name, why in why_not.items() if why is not None}
            found = {"hidden_size": [], "runs": runs, "usable": usable, "why_not": reasons}
            classes[(runs, *usable)] = found
        ranges = found["hidden_size"]
        if ranges and ranges[-1][1] == hidden_size - 1:
            ranges[-1][1] = hidden_size
        else:
            ranges.append([hidden_size, hidden_size])
    for found in classes.values():
        if found["hidden_size"][-1][1] == _LARGEST:
            found["hidden_size"][-1][1] = None
    return list(classes.values())


# ----------------------------------------------------------------------------------- in words

_ROW = "{:27} {:20} {:10} {}"


def _words(ranges: list[list[int | None]]) -> str:
    def word(first: int | None, last: int | None) -> str:
        if last is None:
            return f"{first} on"
        return f"{first}" if first == last else f"{first} to {last}"

    if ranges == [[1, None]]:
        return "any"
    shown = [word(*some) for some in ranges[:3]]
    return ", ".join(shown + ["..."] * (len(ranges) > 3))


def _names(calls: list[tuple[str | None, bool]]) -> str:
    """Of (transform, packed): ``dense, packed, vmap``, or ``any`` for all there are."""
    if len(calls) == 2 * len(_TRANSFORMS):
        return "any"
    names = []
    for transform in _TRANSFORMS:
        kinds = [
            k for packed, k in ((False, "dense"), (True, "packed")) if (transform, packed) in calls
        ]
        if transform is None:
            names += kinds
        elif len(kinds) == 2:
            names.append(transform)
        else:
            names += [f"{transform} of {kind}" for kind in kinds]
    return ", ".join(names)


def _table(calls: list[dict[str, Any]]) -> Iterator[str]:
    """Which backend runs and why not another; calls and dtypes that are alike share lines."""
    yield _ROW.format("call", "hidden_size", "runs on", "if forced")
    alike: dict[tuple[str, ...], list[str]] = {}
    for device, dtype in dict.fromkeys((c["device"], c["dtype"]) for c in calls):
        classes: dict[tuple[str, ...], list[tuple[str | None, bool]]] = {}
        for c in calls:
            if (c["device"], c["dtype"]) == (device, dtype):
                forced = ", ".join(name for name in c["usable"] if name != c["runs"])
                reasons = [f"      not {name}: {why}" for name, why in c["why_not"].items()]
                found = (_words(c["hidden_size"]), c["runs"], forced, *reasons)
                classes.setdefault(found, []).append((c["transform"], c["packed"]))
        lines = []
        for (sizes, runs, forced, *reasons), who in classes.items():
            lines.append(_ROW.format(f"  {_names(who)}", sizes, runs, forced).rstrip())
            for reason in reasons:
                lines += textwrap.wrap(reason, 96, subsequent_indent=" " * 8)
        alike.setdefault((device, *lines), []).append(dtype)
    for (device, *lines), dtypes in alike.items():
        yield f"{device}: {', '.join(dtypes)}"
        yield from lines


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m rnnfast", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the diagnosis as JSON")
    as_json = parser.parse_args().json
    found = diagnosis()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    build = found["build"]
    extension = found["extension_error"] or f"built for torch {build['torch']}, loaded"
    print(f"rnnfast    {found['rnnfast']}")
    print(f"torch      {found['torch']}, Python {found['python']}, {found['platform']}")
    print(f"extension  {extension}")
    print(f"CUDA       {_cuda_kernels(build)}")
    threads = found["threads"]
    print(f"CPU        {_cpu(found)}, {threads} thread{'s' * (threads > 1)}")
    print(f"GPUs       {', '.join(found['gpus']) or 'none'}")
    rows = len(found["gpu_wins"])
    print(f"GPU wins   {rows or 'no'} row{'s' * (rows != 1)} (RNNFAST_GPU_WINS)")
    print(f"triton     {found['triton'] or 'not installed'}")
    print(f"forced     {found['forced_backend'] or 'nothing (RNNFAST_BACKEND, rnnfast.backend)'}")
    print("", *_table(found["calls"]), sep="\n")
    print("\nOf the backends that can run a call, one is taken")
    for name, where in found["taken"].items():
        print(f"  {name:10} {where}")


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # `| head` is no error
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()
