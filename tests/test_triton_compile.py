"""Every configuration of the Triton kernels compiled ahead of time for sm_80 and sm_90, on any
machine: one that could not be launched on such a card, or spills, fails here."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from rnnfast import triton_layer

try:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rnnfast import triton_kernels
except ImportError:
    if os.environ.get("RNNFAST_REQUIRE_TRITON", "0") not in ("", "0"):
        raise
    pytest.skip("triton is not installed", allow_module_level=True)

pytestmark = pytest.mark.skipif(
    triton_layer.INTERPRETED, reason="with TRITON_INTERPRET=1 nothing is compiled"
)

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
NAMES = {f32: "fp32", f64: "fp64", bf16: "bf16", f16: "fp16"}
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # of a block, CUDA C++ programming guide
REGISTERS = 65536  # of a block


class Compiled:
    """A kernel for one configuration, and what it takes on the card."""

    def __init__(self, kernel, capability, dtype, H, config, I=0, packed=False):
        function = getattr(triton_kernels, kernel)
        constants = {
            "H": H, "RELU": False, "REVERSE": False, "ACC": tl.float64 if dtype == f64 else tl.float32,
            "PRECISION": "tf32", "INTERPRETED": False, "ROWS": config.rows, "TILE": config.tile,
            "TILES": config.tiles, "DOT": config.dot, "stride_xi": 1, "stride_gh": 1,
        }  # fmt: skip
        constants |= {"I": I} if kernel == "rnn_forward" else {}
        if not packed:
            constants["steps_ptr"] = None
        if I == 0:
            constants["w_ih_ptr"] = None
        names = function.arg_names
        pointers = {name: "*" + NAMES[dtype] for name in names if name.endswith("_ptr")}
        pointers["steps_ptr"] = "*i64"
        if I == 0:
            pointers["x_ptr"] = "*fp64" if dtype == f64 else "*fp32"
        signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
        aligned = [
            i for i, n in enumerate(names)
            if n not in constants and (n in pointers or n.startswith("stride") and H % 16 == 0)
        ]  # fmt: skip
        source = ASTSource(
            function,
            signature,
            {(names.index(n),): value for n, value in constants.items() if n in names},
            {(i,): [["tt.divisibility", 16]] for i in aligned},
        )
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": config.warps, "num_stages": 1},
        )
        self.shared_memory = compiled.metadata.shared
        self.ttgir = compiled.asm["ttgir"]
        self.registers, self.stack = resources(compiled.asm["cubin"])

    def loop(self):
        """The operations of the walk over the steps."""
        (body,) = re.findall(r"scf\.for %s .*?\n(.*?)\n    \}", self.ttgir, re.S)
        return body


def resources(cubin):
    """Registers of a thread, and bytes of its stack, where what is spilled goes."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    file = Path(os.environ["TMPDIR"]) / "kernel.cubin"
    file.write_bytes(cubin)
    run = subprocess.run(
        [tool, "-res-usage", file], capture_output=True, text=True, check=True
    )
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", run.stdout + run.stderr)[0]
    return int(registers), int(stack)
