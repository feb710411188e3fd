"""Every configuration of the Triton kernels compiled ahead of time for sm_80 and sm_90, on any
machine: one that could not be launched on such a card, or spills more than is listed, fails."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from rnnfast import triton_layer
from rnnfast.triton_layer import configuration

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
    """A kernel in one configuration, and what it takes on the card."""

    def __init__(self, kernel, capability, dtype, H, config, folder, I=0, packed=False):
        function = getattr(triton_kernels, kernel)
        names = function.arg_names
        constants = {
            "H": H, "I": I, "RELU": False, "REVERSE": False, "PRECISION": "tf32",
            "ACC": tl.float64 if dtype == f64 else tl.float32, "INTERPRETED": False,
            "ROWS": config.rows, "TILE": config.tile, "TILES": config.tiles, "DOT": config.dot,
            "stride_xi": 1, "stride_gh": 1, "stride_w": triton_layer.row_stride(H, config),
        }  # fmt: skip
        if not packed:
            constants["steps_ptr"] = None
        if I == 0:
            constants["w_ih_ptr"] = None
        pointers = {name: "*" + NAMES[dtype] for name in names if name.endswith("_ptr")}
        pointers["steps_ptr"] = "*i64"
        if I == 0:  # the projection, not rounded to storage
            pointers["x_ptr"] = "*fp64" if dtype == f64 else "*fp32"
        strides = {n for n in names if n.startswith("stride") and H % 16 == 0} - constants.keys()
        aligned = [n for n in names if n in pointers.keys() | strides and n not in constants]
        compiled = triton.compile(
            ASTSource(
                function,
                {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names},
                {(names.index(n),): value for n, value in constants.items() if n in names},
                {(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
            ),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": config.warps, "num_stages": 1, "enable_fp_fusion": True},
        )
        self.shared_memory = compiled.metadata.shared
        self.ttgir = compiled.asm["ttgir"]
        file = folder / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        run = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True)
        usage = re.findall(r"REG:(\d+) STACK:(\d+)", run.stdout + run.stderr)
        self.registers, self.stack = map(int, usage[0])

    def loop(self):
        """The operations of the walk over the steps: the last loop that does not end at once."""
        return self.ttgir.rsplit("scf.for", 1)[1].split("scf.yield")[0]


def cases():
    """Every row of the table, at its largest H, with 16 rows and with 32."""
    for (dtype, tf32), table in triton_layer._TABLE.items():
        if dtype == f16:
            continue  # as bfloat16 in all that counts here
        for largest, *_ in table:
            configs = {configuration(largest, batch, dtype, tf32) for batch in (1, 10**6)}
            for config in sorted(configs, key=lambda c: c.rows):
                name = f"{NAMES[dtype]}{' tf32' * tf32} {largest} rows {config.rows}"
                yield pytest.param(dtype, largest, config, id=name)


def check(compiled, capability, dtype, H, config):
    assert compiled.registers * 32 * config.warps <= REGISTERS
    assert compiled.shared_memory <= config.shared_memory(dtype.itemsize)
    assert compiled.shared_memory <= SHARED_MEMORY[capability]
    assert compiled.stack <= spilled(dtype, H, config)


def spilled(dtype, H, config):
    """Bytes of a thread's stack that are accepted.

    Up to 32, eight registers. float32 with more than 192 units in registers: 196 of a thread's 255
    hold W_hh, and up to 128 loop invariants and prefetched values are read again from L1.
    """
    return 512 if dtype == f32 and not config.dot and H > 192 else 32


@pytest.mark.parametrize("kernel", ["rnn_forward", "rnn_backward"])
@pytest.mark.parametrize(("dtype", "H", "config"), list(cases()))
def test_every_configuration_fits_the_card(tmp_path, kernel, dtype, H, config):
    for capability in (80, 90):
        if config.shared_memory(dtype.itemsize) > SHARED_MEMORY[capability]:
            assert capability == 80  # the predicate refuses it there; a Hopper block must hold it
            continue
        check(
            Compiled(kernel, capability, dtype, H, config, tmp_path), capability, dtype, H, config
        )


@pytest.mark.parametrize("kernel", ["rnn_forward", "rnn_backward"])
@pytest.mark.parametrize(
    ("dtype", "H"),
    [(f32, 100), (f32, 129), (f32, 190), (f32, 191), (f64, 50), (f64, 63), (bf16, 63), (f16, 200)],
    ids=str,
)
def test_packed_masked_and_fused(tmp_path, kernel, dtype, H):
    """What takes the most registers beside the matrix: masks, offsets, columns of W_ih."""
    config = configuration(H, 1, dtype)
    compiled = Compiled(kernel, 90, dtype, H, config, tmp_path, I=8 // config.tiles, packed=True)
    check(compiled, 90, dtype, H, config)


@pytest.mark.parametrize("kernel", ["rnn_forward", "rnn_backward"])
@pytest.mark.parametrize(
    ("dtype", "H"),
    [(f32, 64), (f32, 128), (f32, 192), (bf16, 64), (bf16, 192), (bf16, 256)],
    ids=str,
)
def test_the_matrix_is_loaded_once_and_stays(tmp_path, kernel, dtype, H):
    """No load of the loop is one of W_hh; without tensor cores none of it passes through shared
    memory either, so it is in registers (nothing spills), and with them it is in shared memory."""
    config = configuration(H, 1, dtype)
    compiled = Compiled(kernel, 90, dtype, H, config, tmp_path)
    loop, tile = compiled.loop(), f"{config.tile}x{config.tile}x"
    per_step = config.tiles * (1 if kernel == "rnn_forward" else 2)  # x, or h and grad_out
    loads = re.findall(r"tt\.load .*", loop)
    assert len(loads) in (per_step, 2 * per_step)  # twice where that is cheaper than a conversion
    assert not any(tile in load for load in loads)
    through_shared_memory = re.findall(rf"ttg\.(?:local_\w+|convert_layout) .*{tile}", loop)
    if config.dot:
        assert compiled.shared_memory >= H * H * dtype.itemsize
        assert not any("local_alloc" in line for line in through_shared_memory)
    else:
        assert not through_shared_memory
        assert compiled.shared_memory < H * H * dtype.itemsize / 4
