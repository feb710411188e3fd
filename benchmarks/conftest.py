"""Options, pinned threads, what a result file says of the machine, and the table at the end."""

import importlib.metadata
import os
import platform

import pytest
import pytest_benchmark.plugin
import torch

import rnnfast

from . import measure

RECORDS = pytest.StashKey[list]()
MACHINE = pytest.StashKey[dict]()
PINNED = pytest.StashKey[list]()


def pytest_addoption(parser):
    group = parser.getgroup("rnnfast")
    group.addoption(
        "--full",
        action="store_true",
        help="the whole grid and the sweeps of the plots, instead of a quick look",
    )
    group.addoption(
        "--threads",
        type=int,
        help="threads of every contender, and cores that the process is bound to (default: all)",
    )
    group.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda where there is one",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    option = config.option
    if option.device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no GPU here")
    if option.device == "cpu":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    else:  # float32 means float32 for all, and JAX takes what memory it needs
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    option.threads = option.threads or len(measure.cores())
    try:
        config.stash[PINNED] = measure.pin(option.threads)
    except ValueError as error:
        raise pytest.UsageError(f"--threads: {error}") from None
    config.stash[MACHINE] = _machine(config)
    config.stash[RECORDS] = []
    option.benchmark_columns = option.benchmark_columns or ["median", "iqr", "min", "rounds"]


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def pytest_benchmark_generate_machine_info(config):
    """What a figure depends on, saved beside it and read by benchmarks.report."""
    return config.stash[MACHINE]


def _machine(config):
    """pytest-benchmark's own description, which forks: so before any library starts its threads."""
    peers = ("jax", "onnxruntime", "openvino", "flashrnn")
    return pytest_benchmark.plugin.pytest_benchmark_generate_machine_info() | {
        "node": "",  # a result file is published: no name of a machine, folder or branch
        "release": platform.release().split("-")[0],
        "rnnfast": {
            "device": config.option.device,
            "gpu": torch.cuda.get_device_name() if config.option.device == "cuda" else None,
            "threads": config.option.threads,
            "cpus": config.stash[PINNED],
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "full": config.option.full,
            "python": platform.python_version(),
            "versions": {
                "rnnfast": rnnfast.__version__,
                "torch": str(torch.__version__),
                **{name: version for name in peers if (version := _version(name))},
            },
            "extension_error": rnnfast.backends.extension_error,
        },
    }


def pytest_benchmark_update_commit_info(config, commit_info):
    commit_info["project"] = "rnnfast"
    commit_info.pop("branch", None)


def pytest_benchmark_update_json(output_json):
    for benchmark in output_json["benchmarks"]:  # extra_info says it all, in better words
        benchmark |= {"params": None, "options": {}}
        benchmark["stats"].pop("data", None)  # samples: a third of a file


def pytest_terminal_summary(terminalreporter, config):
    """Each group's contenders side by side, with what pytest-benchmark has no columns for."""
    records = config.stash[RECORDS]
    if not records:
        return
    from . import report

    terminalreporter.section("against nn.RNN")
    terminalreporter.write_line(report.summary(records))
