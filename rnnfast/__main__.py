"""``python -m rnnfast``: versions, builds, and which backend runs here and why another does not."""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import rnnfast

from . import backends


def diagnosis() -> dict[str, Any]:
    """Everything that decides which kernel runs, ready for a bug report."""
    probes = {
        f"{device} {str(dtype).removeprefix('torch.')}": torch.empty(0, dtype=dtype, device=device)
        for device in ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    }
    return {
        "rnnfast": rnnfast.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "triton": _version("triton"),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "build": backends.build_record(),
        "extension_error": backends.extension_error,
        "forced_backend": backends.forced(),
        "inputs": {
            name: {backend: why(x, None) or "usable" for backend, why in backends.BACKENDS.items()}
            | {"runs": backends.chosen(x)}
            for name, x in probes.items()
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cuda_kernels(build: dict[str, Any]) -> str:
    if build.get("cuda"):
        return f"kernels for {build['cuda_arch_list']}, built with CUDA {build['cuda']}"
    return ": ".join(["no kernels built", *filter(None, [build.get("why_not_cuda")])])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m rnnfast", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the diagnosis as JSON")
    found = diagnosis()
    if parser.parse_args().json:
        print(json.dumps(found, indent=2))
        return
    build = found["build"]
    extension = found["extension_error"] or f"built for torch {build['torch']}, loaded"
    print(f"rnnfast    {found['rnnfast']}")
    print(f"torch      {found['torch']}, Python {found['python']}, {found['platform']}")
    print(f"extension  {extension}")
    print(f"CUDA       {_cuda_kernels(build)}")
    print(f"CPU        {found['cpu_capability']}, {found['threads']} threads")
    print(f"GPUs       {', '.join(found['gpus']) or 'none'}")
    print(f"triton     {found['triton'] or 'not installed'}")
    print(f"forced     {found['forced_backend'] or 'nothing (RNNFAST_BACKEND, rnnfast.backend)'}")
    print("\ninput            runs on")
    for name, row in found["inputs"].items():
        print(f"{name:16} {row['runs']}")
        for backend in backends.BACKENDS:
            if row[backend] != "usable":
                print(f"{'':16}   not {backend}: {row[backend]}")


if __name__ == "__main__":
    main()
