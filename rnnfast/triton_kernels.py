"""The time loop in Triton: one launch walks all steps of one layer, forward or backward.

Forward::

    z_t = x_t W_ih^T + b_ih + b_hh + h_{t-1} W_hh^T,    h_t = act(z_t)

and backward, against the forward's order, with ``g_t`` the gradient of ``h_t`` from outside and
``c_t`` the one that comes back through the recurrence (``c`` starts as the gradient of ``h_n`` and
ends as that of ``hx``)::

    dz_t = (g_t + c_t) act'(h_t),    c_{t-1} = dz_t W_hh,    tanh' = 1 - h^2,  ReLU' = [h > 0]

**Who owns what.** A program owns ``ROWS`` rows of the batch and all ``H`` units, and walks the
steps alone: nothing synchronises between programs. The units are ``TILES`` tiles of ``TILE``, the
last one masked, so that ``H`` need not be a power of two: the state is a tuple of ``[ROWS, TILE]``
and the matrix one of ``TILES^2`` tiles.

**Where the operands live.** ``W_hh`` is read from global memory once, before the loop. Then

* ``DOT`` (16-bit types and TF32, ``ROWS`` = 16 or more): the compiler keeps it in shared memory,
  and every step feeds it to the tensor cores from there; the state is in registers and passes
  through shared memory once a step, to be an operand.
* otherwise (float32 and float64 by FMA, ``ROWS`` = 1): it stays in registers, spread over the
  block; a step broadcasts the state along it and sums over the lanes. With a row a program, many
  programs share a multiprocessor and hide each other's latency.

tests/test_triton_compile.py reads both from the compiled code. What the next step needs from global
memory is loaded one step ahead; the state itself never passes through it.

**Precision.** The arithmetic and the state are float32 (float64 for float64). A tensor core takes
16-bit operands, so the state of a 16-bit layer enters the product as the sum of two of them, high
and low: relative to the state, 2^-18 is lost in bfloat16 and 2^-22 in float16, far below the one
rounding to storage that ``out`` undergoes.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

# ------------------------------------------------------------------------------------- pieces


@triton.jit
def _tanh(x):
    # x + x z P(z) below 9/16, with minimax coefficients; beyond it 1 - 2 / (exp(2|x|) + 1), which
    # is at least 1/2 and forgives the error of exp. NaN passes through both, infinities give +-1.
    z = x * x
    if x.dtype == tl.float64:
        p = z * -0.000018903907411166039165 + 0.000082360830980555517499
        p = p * z - 0.00023271614440350185165
        p = p * z + 0.00058818361717666269524
        p = p * z - 0.0014554796336065654794
        p = p * z + 0.0035920822486322000606
        p = p * z - 0.0088632316370338055197
        p = p * z + 0.021869488327266697884
        p = p * z - 0.053968253961724116778
        p = p * z + 0.1333333333332313291
        p = p * z - 0.3333333333333327785
    else:
        p = z * -0.00617981968047 + 0.0210074679527
        p = p * z - 0.0538374331294
        p = p * z + 0.133324523105
        p = p * z - 0.333333138896
    magnitude = tl.abs(x)
    large = 1.0 - 2.0 / (tl.exp(2.0 * magnitude) + 1.0)
    return tl.where(magnitude < 0.5625, x + x * (z * p), tl.where(x < 0, -large, large))


@triton.jit
def _narrow(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    # The conversion rounds to the nearest; the interpreter's to bfloat16 cuts off 16 bits.
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        rounded = bits.to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(dtype)


@triton.jit
def _load_matrix(w_ptr, TRANSPOSED: tl.constexpr, H: tl.constexpr, STRIDE: tl.constexpr,
                 TILE: tl.constexpr, TILES: tl.constexpr, DOT: tl.constexpr,
                 ACC: tl.constexpr):  # fmt: skip
    """All of M in ``s M``, s a row: ``M[i, j]`` is ``w[i, j]``, or ``w[j, i]`` if TRANSPOSED.

    Tile ``j * TILES + i`` holds ``M[i, j]`` as an operand of tl.dot, or turned over, in ACC.
    """
    tiles = ()
    for n in tl.static_range(TILES * TILES):
        j = (n // TILES) * TILE + tl.arange(0, TILE)
        i = (n % TILES) * TILE + tl.arange(0, TILE)
        if DOT:
            j = j[None, :]
            i = i[:, None]
        else:
            j = j[:, None]
            i = i[None, :]
        at = j * STRIDE + i if TRANSPOSED else i * STRIDE + j
        tile = tl.load(w_ptr + at, mask=(i < H) & (j < H), other=0.0)
        tiles = tiles + (tile if DOT else tile.to(ACC),)
    return tiles


@triton.jit
def _product(state, matrix, j: tl.constexpr, TILES: tl.constexpr, DOT: tl.constexpr,
             PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """Tile j of ``state M``, ``[ROWS, TILE]``."""
    if DOT:
        total = tl.zeros_like(state[0])
        for i in tl.static_range(TILES):
            m = matrix[j * TILES + i]
            if m.dtype == tl.float32:
                total = tl.dot(state[i], m, total, input_precision=PRECISION)
            else:
                high = _narrow(state[i], m.dtype, INTERPRETED)
                rest = state[i] - high.to(tl.float32)
                # An infinity is all in the high part: what is left of it would be NaN.
                finite = tl.abs(high.to(tl.float32)) < float("inf")
                low = _narrow(tl.where(finite, rest, 0.0), m.dtype, INTERPRETED)
                if INTERPRETED:  # which would multiply bfloat16 as integers
                    high = high.to(tl.float32)
                    low = low.to(tl.float32)
                    m = m.to(tl.float32)
                total = tl.dot(low, m, total)
                total = tl.dot(high, m, total)
    else:
        terms = matrix[j * TILES] * state[0]
        for i in tl.static_range(1, TILES):
            terms += matrix[j * TILES + i] * state[i]
        total = tl.sum(terms, axis=1)[None, :]
    return total


@triton.jit
def _inside(x, j: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr):
    # Beyond H, infinity times a weight of zero would be NaN, and spread from there.
    if j * TILE + TILE > H:
        x = tl.where(j * TILE + tl.arange(0, TILE)[None, :] < H, x, 0.0)
    return x


@triton.jit
def _length(steps_ptr, T, row):
    """The number of steps of a row of a packed batch: those with more rows than its index."""
    length = 0
    for begin in range(0, T, 256):
        t = begin + tl.arange(0, 256)
        live = tl.load(steps_ptr + T + t, mask=t < T, other=0)
        length += tl.sum((live > row).to(tl.int32))
    return length


@triton.jit
def _visit(s, steps, steps_ptr, T, B, DESCENDING: tl.constexpr):
    """The s-th of the steps to visit: its index t, its first row, and its number of rows."""
    t = tl.cast(steps - 1 - s if DESCENDING else s, tl.int64)
    if steps_ptr is None:
        first, live = t * B, B
    else:
        first, live = tl.load(steps_ptr + t), tl.load(steps_ptr + T + t)
    return t, first, live


@triton.jit
def _load(ptr, t, first, live, stride_t, stride_row, stride_feature, row,
          F: tl.constexpr, steps_ptr, TILE: tl.constexpr, TILES: tl.constexpr,
          ACC: tl.constexpr):  # fmt: skip
    """A step's rows of F features, in tiles of ``[ROWS, TILE]``; zeros for rows not alive."""
    base = ptr + (t * stride_t if steps_ptr is None else first * stride_row)
    tiles = ()
    for j in tl.static_range(TILES):
        f = j * TILE + tl.arange(0, TILE)[None, :]
        at = base + row.to(tl.int64)[:, None] * stride_row + f.to(tl.int64) * stride_feature
        mask = (row < live)[:, None]
        if j * TILE + TILE > F:
            mask &= f < F
        x = tl.load(at, mask=mask, other=0.0)
        tiles = tiles + (x.to(ACC),)
    return tiles


@triton.jit
def _store(ptr, tiles, first, live, row, H: tl.constexpr, TILE: tl.constexpr,
           TILES: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """The same, to a contiguous tensor."""
    for j in tl.static_range(TILES):
        f = j * TILE + tl.arange(0, TILE)[None, :]
        at = ptr + (first + row.to(tl.int64))[:, None] * H + f
        mask = (row < live)[:, None]
        if j * TILE + TILE > H:
            mask &= f < H
        tl.store(at, _narrow(tiles[j], ptr.dtype.element_ty, INTERPRETED), mask=mask)


# ------------------------------------------------------------------------------------ kernels


@triton.jit(do_not_specialize=["T", "B"])
def rnn_forward(
    x_ptr,  # I > 0: input [T, B, I] or [rows, I]; else x W_ih^T, contiguous [.., H] in ACC
    w_ih_ptr,  # I > 0: [H, I]
    b_ih_ptr,  # [H] or None
    b_hh_ptr,  # [H] or None
    hx_ptr,  # [B, H] or None
    w_hh_ptr,  # [H, H]
    out_ptr,  # [T, B, H] or [rows, H]
    h_n_ptr,  # [B, H]
    steps_ptr,  # packed: int64 [2, T], each step's first row and number of rows; else None
    T,
    B,
    stride_xt,  # in elements, as all strides; every other tensor is contiguous
    stride_xb,
    stride_xi,
    H: tl.constexpr,
    I: tl.constexpr,  # input features, where the projection is fused; else 0
    RELU: tl.constexpr,
    REVERSE: tl.constexpr,
    ACC: tl.constexpr,  # float32, or float64 for float64
    PRECISION: tl.constexpr,  # of tl.dot on float32: "tf32"
    INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    DOT: tl.constexpr,
):
    """Write every ``h_t`` to ``out`` and each row's last to ``h_n``."""
    row0 = tl.program_id(0) * ROWS
    row = row0 + tl.arange(0, ROWS)
    steps = T if steps_ptr is None else _length(steps_ptr, T, row0)
    matrix = _load_matrix(w_hh_ptr, True, H, H, TILE, TILES, DOT, ACC)

    bias = ()
    w_ih = ()
    for j in tl.static_range(TILES):
        f = j * TILE + tl.arange(0, TILE)[None, :]
        b = tl.zeros([1, TILE], ACC)
        if b_ih_ptr is not None:
            b += tl.load(b_ih_ptr + f, mask=f < H, other=0.0).to(ACC)
        if b_hh_ptr is not None:
            b += tl.load(b_hh_ptr + f, mask=f < H, other=0.0).to(ACC)
        bias = bias + (b,)
        for i in tl.static_range(I):
            w_ih = w_ih + (tl.load(w_ih_ptr + f * I + i, mask=f < H, other=0.0).to(ACC),)

    h = ()
    for j in tl.static_range(TILES):
        h = h + (tl.zeros([ROWS, TILE], ACC),)
    if hx_ptr is not None:
        h = _load(hx_ptr, 0, 0, B, 0, H, 1, row, H, None, TILE, TILES, ACC)

    # A step's x: I columns of one feature each, or the projection's tiles.
    X_TILE: tl.constexpr = 1 if I > 0 else TILE
    X_TILES: tl.constexpr = I if I > 0 else TILES
    F: tl.constexpr = I if I > 0 else H
    t, first, live = _visit(0, steps, steps_ptr, T, B, REVERSE)
    x = _load(x_ptr, t, first, live, stride_xt, stride_xb, stride_xi, row, F, steps_ptr,
              X_TILE, X_TILES, ACC)  # fmt: skip
    for s in range(0, steps):
        t, first, live = _visit(s, steps, steps_ptr, T, B, REVERSE)
        t_next, first_next, live_next = _visit(
            tl.minimum(s + 1, steps - 1), steps, steps_ptr, T, B, REVERSE
        )
        x_next = _load(x_ptr, t_next, first_next, live_next, stride_xt, stride_xb, stride_xi, row,
                       F, steps_ptr, X_TILE, X_TILES, ACC)  # fmt: skip
        new = ()
        for j in tl.static_range(TILES):
            z = bias[j]
            if I == 0:
                z = x[j] + z
            for i in tl.static_range(I):
                z = x[i] * w_ih[j * I + i] + z
            z += _product(h, matrix, j, TILES, DOT, PRECISION, INTERPRETED)
            a = tl.where(z <= 0, 0.0, z) if RELU else _tanh(z)
            a = _inside(a, j, H, TILE)
            if steps_ptr is not None:  # a row that has ended, or has not begun, keeps its state
                a = tl.where((row < live)[:, None], a, h[j])
            new = new + (a,)
        h = new
        x = x_next
        _store(out_ptr, h, first, live, row, H, TILE, TILES, INTERPRETED)
    _store(h_n_ptr, h, 0, B, row, H, TILE, TILES, INTERPRETED)


@triton.jit(do_not_specialize=["T", "B"])
def rnn_backward(
    grad_out_ptr,  # [T, B, H] or [rows, H], or None
    grad_h_n_ptr,  # [B, H] or None
    out_ptr,  # as grad_out
    w_hh_ptr,  # [H, H], rows stride_w apart
    dz_ptr,  # as grad_out
    grad_hx_ptr,  # [B, H] or None
    steps_ptr,  # as in rnn_forward
    T,
    B,
    stride_gt,  # of grad_out; every other tensor but w_hh is contiguous
    stride_gb,
    stride_gh,
    stride_w: tl.constexpr,
    H: tl.constexpr,
    RELU: tl.constexpr,
    REVERSE: tl.constexpr,  # the forward's direction
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    DOT: tl.constexpr,
):
    """Write every ``dz_t``, and the gradient of the initial state."""
    row0 = tl.program_id(0) * ROWS
    row = row0 + tl.arange(0, ROWS)
    steps = T if steps_ptr is None else _length(steps_ptr, T, row0)
    matrix = _load_matrix(w_hh_ptr, False, H, stride_w, TILE, TILES, DOT, ACC)

    c = ()
    for j in tl.static_range(TILES):
        c = c + (tl.zeros([ROWS, TILE], ACC),)
    if grad_h_n_ptr is not None:
        c = _load(grad_h_n_ptr, 0, 0, B, 0, H, 1, row, H, None, TILE, TILES, ACC)

    stride_t = tl.cast(B, tl.int64) * H
    t, first, live = _visit(0, steps, steps_ptr, T, B, not REVERSE)
    h = _load(out_ptr, t, first, live, stride_t, H, 1, row, H, steps_ptr, TILE, TILES, ACC)
    g = c
    if grad_out_ptr is not None:
        g = _load(grad_out_ptr, t, first, live, stride_gt, stride_gb, stride_gh, row, H, steps_ptr,
                  TILE, TILES, ACC)  # fmt: skip
    for s in range(0, steps):
        t, first, live = _visit(s, steps, steps_ptr, T, B, not REVERSE)
        t_next, first_next, live_next = _visit(
            tl.minimum(s + 1, steps - 1), steps, steps_ptr, T, B, not REVERSE
        )
        h_next = _load(out_ptr, t_next, first_next, live_next, stride_t, H, 1, row, H, steps_ptr,
                       TILE, TILES, ACC)  # fmt: skip
        g_next = g
        if grad_out_ptr is not None:
            g_next = _load(grad_out_ptr, t_next, first_next, live_next, stride_gt, stride_gb,
                           stride_gh, row, H, steps_ptr, TILE, TILES, ACC)  # fmt: skip
        dz = ()
        for j in tl.static_range(TILES):
            d = c[j] if grad_out_ptr is None else c[j] + g[j]
            d = tl.where(h[j] <= 0, 0.0, d) if RELU else d * (1.0 - h[j] * h[j])
            dz = dz + (d,)
        _store(dz_ptr, dz, first, live, row, H, TILE, TILES, INTERPRETED)
        new = ()
        for j in tl.static_range(TILES):
            d = _product(dz, matrix, j, TILES, DOT, PRECISION, INTERPRETED)
            d = _inside(d, j, H, TILE)
            if steps_ptr is not None:
                d = tl.where((row < live)[:, None], d, c[j])
            new = new + (d,)
        c = new
        h = h_next
        g = g_next
    if grad_hx_ptr is not None:
        _store(grad_hx_ptr, c, 0, B, row, H, TILE, TILES, INTERPRETED)
