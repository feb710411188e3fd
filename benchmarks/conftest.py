import platform

import torch

import rnnfast


def pytest_benchmark_update_machine_info(config, machine_info):
    """What a figure depends on, saved beside it and read by benchmarks/report.py."""
    machine_info["rnnfast"] = {
        "rnnfast": rnnfast.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "extension_error": rnnfast.backends.extension_error,
    }
