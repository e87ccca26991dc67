"""The Triton kernels of a block boundary: boundary_torch.py states the equations, boundary_triton.py launches the kernels.

Letters: N rows (tokens), D, G, R. A tile is (BN, BD) of (N, D); G and R fit one tile, padded to at least 16.
All arithmetic is fp32; what is stored has the dtype of where it goes.

`forward`: a program owns BN rows and walks over D three times: for the moments of the norm with both in-projections;
for s' with W_down; for h'. One walk serves norm and in-projections, since

    n · Wᵀ = ρ · (h · (w ⊙ W)ᵀ − μ · slope) + shift,   slope = Σ_d w ⊙ W,   shift = Σ_d bias ⊙ W

with weight w and bias of the norm, μ and ρ = 1 / √(variance + ε) of the row. Few rows would leave most of a GPU idle:
for them D is cut into parts, one program each, and the walks are three launches that hand on their sums in a buffer.

`rows_backward`: the gradients of h and s. The two sums over D in the backward of the norm are sums over G of what is
at hand. `columns_backward`: the gradients of the weights; a program owns BD columns and walks over the rows, so that
nothing of size (N, D) is stored in between and no atomics make the sums vary. Both read μ, ρ, a, b and r from the
forward's buffer: 2 + 2 G + R numbers a row.
"""

# pyright: reportUnboundVariable=false, reportPossiblyUnboundVariable=false
# (Branches on G, R and PHASE are taken when a kernel is compiled.)

import triton
import triton.language as tl

# -- on tiles ------------------------------------------------------------------------------------------------------


@triton.jit
def _tile(matrix, rows, columns, height, width):
    """A tile of a contiguous (height, width) matrix in fp32; 0 outside of it."""
    inside = (rows[:, None] < height) & (columns[None, :] < width)
    return tl.load(matrix + rows[:, None].to(tl.int64) * width + columns[None, :], inside, 0.0).to(tl.float32)


@triton.jit
def _put(matrix, tile, rows, columns, height, width):
    inside = (rows[:, None] < height) & (columns[None, :] < width)
    where = matrix + rows[:, None].to(tl.int64) * width + columns[None, :]
    tl.store(where, tile.to(matrix.dtype.element_ty), inside)


@triton.jit
def _line(vector, entries, length):
    return tl.load(vector + entries, entries < length, 0.0).to(tl.float32)


@triton.jit
def _put_line(vector, values, entries, length):
    tl.store(vector + entries, values, entries < length)


@triton.jit
def _act(x, GELU: tl.constexpr):
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476)) if GELU else x * tl.sigmoid(x)


@triton.jit
def _act_slope(x, GELU: tl.constexpr):
    if GELU:
        y = 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        p = tl.sigmoid(x)
        y = p * (1 + x * (1 - p))
    return y


@triton.jit
def _merge(count, mean, square, count_2, mean_2, square_2):
    """Mean and sum of squared deviations of two samples together (Chan, Golub and LeVeque, 1979)."""
    share = count_2 / (count + count_2)
    delta = mean_2 - mean
    return mean + delta * share, square + square_2 + delta * delta * (count * share)


@triton.jit
def _out(inner, weight, bias, columns, D: tl.constexpr, DOT: tl.constexpr):
    """An out-projection: (BN, BG), the rows of a (D, G) weight as a tile (BD, BG) → (BN, BD)."""
    y = tl.dot(inner, tl.trans(weight), input_precision=DOT)
    if bias is not None:
        y += _line(bias, columns, D)[None, :]
    return y


@triton.jit
def _inner(a, b, factors, rows, gs, N, G: tl.constexpr, GELU: tl.constexpr):
    """The activations of both in-projections, after dropout."""
    act_b = _act(b, GELU)
    if factors is not None:
        act_b *= _tile(factors, rows, gs, N, G)
    return _act(a, GELU), act_b


# -- forward -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["N"])
def forward(
    h, s, out, state, norm, norm_bias, g1, g1_bias, g2, g2_bias, t1, t1_bias, t2, t2_bias, down, up,
    in_transform, in_rank, in_delta, buffer, N, epsilon, alpha,
    D: tl.constexpr, G: tl.constexpr, R: tl.constexpr, GELU: tl.constexpr, DOT: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BG: tl.constexpr, BR: tl.constexpr,
    PHASE: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """h' into ``out``, s' into ``state``: all three walks in PHASE 0, one of them in PHASE 1, 2 or 3."""
    rows, gs, rs = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BG), tl.arange(0, BR)
    part = tl.program_id(1)
    begin = part * PART
    # The buffer: (PARTS, 2, N) moments, (PARTS, N, G) a and b, (PARTS, 4, G) slopes and shifts, (PARTS, N, R).
    if buffer is not None:
        saved_a = buffer + 2 * PARTS * N
        saved_b = saved_a + PARTS * N * G
        saved_sums = saved_b + PARTS * N * G
        saved_r = saved_sums + PARTS * 4 * G

    if G > 0 and PHASE < 3:
        count = 0.0
        mean = tl.zeros((BN,), tl.float32)
        square = tl.zeros((BN,), tl.float32)
        a = tl.zeros((BN, BG), tl.float32)
        b = tl.zeros((BN, BG), tl.float32)
        a_slope = tl.zeros((BG,), tl.float32)
        a_shift = tl.zeros((BG,), tl.float32)
        b_slope = tl.zeros((BG,), tl.float32)
        b_shift = tl.zeros((BG,), tl.float32)
        if PHASE < 2:
            for start in range(0, PART, BD):
                columns = begin + start + tl.arange(0, BD)
                x = _tile(h, rows, columns, N, D)
                to_a = _tile(g1, gs, columns, G, D)
                to_b = _tile(t1, gs, columns, G, D)
                if norm is not None:
                    part_size = tl.maximum(tl.minimum(D - begin - start, BD), 0).to(tl.float32)
                    part_mean = tl.sum(x, 1) / tl.maximum(part_size, 1.0)
                    deviation = tl.where(columns[None, :] < D, x - part_mean[:, None], 0.0)
                    mean, square = _merge(count, mean, square, part_size, part_mean, tl.sum(deviation * deviation, 1))
                    count += part_size
                    bias = _line(norm_bias, columns, D)[None, :]
                    a_shift += tl.sum(to_a * bias, 1)
                    b_shift += tl.sum(to_b * bias, 1)
                    weight = _line(norm, columns, D)[None, :]
                    to_a *= weight
                    to_b *= weight
                    a_slope += tl.sum(to_a, 1)
                    b_slope += tl.sum(to_b, 1)
                a = tl.dot(x, tl.trans(to_a), a, input_precision=DOT)
                b = tl.dot(x, tl.trans(to_b), b, input_precision=DOT)
        if PHASE == 1:
            _put_line(buffer + 2 * part * N, mean, rows, N)
            _put_line(buffer + (2 * part + 1) * N, square, rows, N)
            _put(saved_a + part * N * G, a, rows, gs, N, G)
            _put(saved_b + part * N * G, b, rows, gs, N, G)
            if norm is not None:
                _put_line(saved_sums + part * 4 * G, a_slope, gs, G)
                _put_line(saved_sums + part * 4 * G + G, a_shift, gs, G)
                _put_line(saved_sums + part * 4 * G + 2 * G, b_slope, gs, G)
                _put_line(saved_sums + part * 4 * G + 3 * G, b_shift, gs, G)
        if PHASE == 2:
            for other in tl.static_range(PARTS):
                a += _tile(saved_a + other * N * G, rows, gs, N, G)
                b += _tile(saved_b + other * N * G, rows, gs, N, G)
                if norm is not None:
                    part_size = tl.minimum(D - other * PART, PART).to(tl.float32)
                    part_mean, part_square = (
                        _line(buffer + 2 * other * N, rows, N),
                        _line(buffer + (2 * other + 1) * N, rows, N),
                    )
                    mean, square = _merge(count, mean, square, part_size, part_mean, part_square)
                    count += part_size
                    a_slope += _line(saved_sums + other * 4 * G, gs, G)
                    a_shift += _line(saved_sums + other * 4 * G + G, gs, G)
                    b_slope += _line(saved_sums + other * 4 * G + 2 * G, gs, G)
                    b_shift += _line(saved_sums + other * 4 * G + 3 * G, gs, G)
        if PHASE % 2 == 0:
            if norm is not None:
                scale = 1 / tl.sqrt(square / D + epsilon)
                a = scale[:, None] * (a - mean[:, None] * a_slope[None, :]) + a_shift[None, :]
                b = scale[:, None] * (b - mean[:, None] * b_slope[None, :]) + b_shift[None, :]
            if g1_bias is not None:
                a_shift += _line(g1_bias, gs, G)
                b_shift += _line(t1_bias, gs, G)
                a += _line(g1_bias, gs, G)[None, :]
                b += _line(t1_bias, gs, G)[None, :]
            if buffer is not None and PHASE == 0:
                if norm is not None:
                    _put_line(buffer, mean, rows, N)
                    _put_line(buffer + N, scale, rows, N)
                    if tl.program_id(0) == 0:
                        _put_line(saved_sums, a_slope, gs, G)
                        _put_line(saved_sums + G, a_shift, gs, G)
                        _put_line(saved_sums + 2 * G, b_slope, gs, G)
                        _put_line(saved_sums + 3 * G, b_shift, gs, G)
                _put(saved_a, a, rows, gs, N, G)
                _put(saved_b, b, rows, gs, N, G)
            act_a, act_b = _inner(a, b, in_transform, rows, gs, N, G, GELU)

    if PHASE % 2 == 0:
        r = tl.zeros((BN, BR), tl.float32)
        for start in range(0, PART, BD):
            columns = begin + start + tl.arange(0, BD)
            y = _tile(s, rows, columns, N, D)
            if G > 0:
                gate = tl.sigmoid(_out(act_a, _tile(g2, columns, gs, D, G), g2_bias, columns, D, DOT))
                t = _out(act_b, _tile(t2, columns, gs, D, G), t2_bias, columns, D, DOT)
                y = (y + gate * (t - y)).to(s.dtype.element_ty)
                _put(state, y, rows, columns, N, D)
            if R > 0:
                delta = _tile(h, rows, columns, N, D) - y.to(tl.float32)
                if in_delta is not None:
                    delta *= _tile(in_delta, rows, columns, N, D)
                r = tl.dot(delta, tl.trans(_tile(down, rs, columns, R, D)), r, input_precision=DOT)
        if PHASE == 2 and R > 0:
            _put(saved_r + part * N * R, r, rows, rs, N, R)

    if R > 0 and PHASE % 3 == 0:
        if PHASE == 3:
            r = tl.zeros((BN, BR), tl.float32)
            for other in tl.static_range(PARTS):
                r += _tile(saved_r + other * N * R, rows, rs, N, R)
        if in_rank is not None:
            r *= _tile(in_rank, rows, rs, N, R)
        if buffer is not None and PHASE == 0:
            _put(saved_r, r, rows, rs, N, R)
        r *= alpha
        for start in range(0, PART, BD):
            columns = begin + start + tl.arange(0, BD)
            x = _tile(h, rows, columns, N, D) + _out(r, _tile(up, columns, rs, D, R), None, columns, D, DOT)
            _put(out, x, rows, columns, N, D)


# -- backward ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["N"])
def rows_backward(
    h, s, d_out, d_state, d_h, d_s, norm, g1, g2, g2_bias, t1, t2, t2_bias, down, up,
    in_transform, in_rank, in_delta, buffer, d_small, N, alpha,
    D: tl.constexpr, G: tl.constexpr, R: tl.constexpr, GELU: tl.constexpr, DOT: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BG: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """The gradients of h, of s, and into ``d_small`` those of a, b and the injection's R, all (N, …)."""
    rows, gs, rs = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BG), tl.arange(0, BR)
    saved_a = buffer + 2 * N
    saved_sums = saved_a + 2 * N * G
    if R > 0:
        d_r = tl.zeros((BN, BR), tl.float32)
        for start in range(0, D, BD):
            columns = start + tl.arange(0, BD)
            d = _tile(d_out, rows, columns, N, D)
            d_r = tl.dot(d, _tile(up, columns, rs, D, R), d_r, input_precision=DOT)
        d_r *= alpha
        if in_rank is not None:
            d_r *= _tile(in_rank, rows, rs, N, R)
        _put(d_small + 2 * N * G, d_r, rows, rs, N, R)
    if G > 0:
        a = _tile(saved_a, rows, gs, N, G)
        b = _tile(saved_a + N * G, rows, gs, N, G)
        act_a, act_b = _inner(a, b, in_transform, rows, gs, N, G, GELU)
        d_a = tl.zeros((BN, BG), tl.float32)
        d_b = tl.zeros((BN, BG), tl.float32)
    for start in range(0, D, BD):
        columns = start + tl.arange(0, BD)
        d = tl.zeros((BN, BD), tl.float32)
        if d_state is not None:
            d += _tile(d_state, rows, columns, N, D)
        if R > 0:
            d_delta = tl.dot(d_r, _tile(down, rs, columns, R, D), input_precision=DOT)
            if in_delta is not None:
                d_delta *= _tile(in_delta, rows, columns, N, D)
            d -= d_delta
        if G > 0:
            w_gate, w_transform = _tile(g2, columns, gs, D, G), _tile(t2, columns, gs, D, G)
            gate = tl.sigmoid(_out(act_a, w_gate, g2_bias, columns, D, DOT))
            t = _out(act_b, w_transform, t2_bias, columns, D, DOT)
            d_t = d * gate
            d_z = d_t * (1 - gate) * (t - _tile(s, rows, columns, N, D))
            d_a = tl.dot(d_z, w_gate, d_a, input_precision=DOT)
            d_b = tl.dot(d_t, w_transform, d_b, input_precision=DOT)
            d -= d_t
        _put(d_s, d, rows, columns, N, D)
    if G > 0:
        if in_transform is not None:
            d_b *= _tile(in_transform, rows, gs, N, G)
        d_a *= _act_slope(a, GELU)
        d_b *= _act_slope(b, GELU)
        _put(d_small, d_a, rows, gs, N, G)
        _put(d_small + N * G, d_b, rows, gs, N, G)
        if norm is not None:
            mean, scale = _line(buffer, rows, N)[:, None], _line(buffer + N, rows, N)[:, None]
            by_mean = d_a * _line(saved_sums, gs, G)[None, :] + d_b * _line(saved_sums + 2 * G, gs, G)[None, :]
            a -= _line(saved_sums + G, gs, G)[None, :]
            b -= _line(saved_sums + 3 * G, gs, G)[None, :]
            by_mean = tl.sum(by_mean, 1)[:, None] / D
            by_scale = tl.sum(d_a * a + d_b * b, 1)[:, None] / D
    for start in range(0, D, BD):
        columns = start + tl.arange(0, BD)
        d = tl.zeros((BN, BD), tl.float32)
        if G > 0:
            d = tl.dot(d_a, _tile(g1, gs, columns, G, D), d, input_precision=DOT)
            d = tl.dot(d_b, _tile(t1, gs, columns, G, D), d, input_precision=DOT)
            if norm is not None:
                x = (_tile(h, rows, columns, N, D) - mean) * scale
                d = scale * (d * _line(norm, columns, D)[None, :] - by_mean - x * by_scale)
        if R > 0:
            d_delta = tl.dot(d_r, _tile(down, rs, columns, R, D), input_precision=DOT)
            if in_delta is not None:
                d_delta *= _tile(in_delta, rows, columns, N, D)
            d += d_delta + _tile(d_out, rows, columns, N, D)
        _put(d_h, d, rows, columns, N, D)


@triton.jit(do_not_specialize=["N", "SHARE"])
def columns_backward(
    h, s, state, d_out, d_state, norm, g2, g2_bias, t2, t2_bias, down,
    in_transform, in_delta, buffer, d_small, d_weights, N, SHARE, alpha,
    D: tl.constexpr, G: tl.constexpr, R: tl.constexpr, GELU: tl.constexpr, DOT: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BG: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """The gradients of the weights, summed over SHARE rows; those of the in-projections as if the norm had no weights."""
    columns, gs, rs = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, BG), tl.arange(0, BR)
    begin = tl.program_id(1) * SHARE
    saved_a = buffer + 2 * N
    saved_r = saved_a + 2 * N * G + 4 * G
    d_weights += tl.program_id(1) * (
        4 * D * G + 2 * D + 2 * D * R
    )  # gate and transform: in, out; their biases; down, up
    if R > 0:
        w_down = _tile(down, rs, columns, R, D)
        d_down = tl.zeros((BR, BD), tl.float32)
        d_up = tl.zeros((BD, BR), tl.float32)
    if G > 0:
        w_gate, w_transform = _tile(g2, columns, gs, D, G), _tile(t2, columns, gs, D, G)
        d_g1 = tl.zeros((BG, BD), tl.float32)
        d_t1 = tl.zeros((BG, BD), tl.float32)
        d_g2 = tl.zeros((BD, BG), tl.float32)
        d_t2 = tl.zeros((BD, BG), tl.float32)
        d_g2_bias = tl.zeros((BD,), tl.float32)
        d_t2_bias = tl.zeros((BD,), tl.float32)
    for start in range(begin, tl.minimum(begin + SHARE, N), BN):
        rows = start + tl.arange(0, BN)
        x = _tile(h, rows, columns, N, D)
        d = tl.zeros((BN, BD), tl.float32)
        if d_state is not None:
            d += _tile(d_state, rows, columns, N, D)
        if R > 0:
            d_r = _tile(d_small + 2 * N * G, rows, rs, N, R)
            delta = x - _tile(state, rows, columns, N, D)
            d_delta = tl.dot(d_r, w_down, input_precision=DOT)
            if in_delta is not None:
                factors = _tile(in_delta, rows, columns, N, D)
                delta *= factors
                d_delta *= factors
            d -= d_delta
            d_down = tl.dot(tl.trans(d_r), delta, d_down, input_precision=DOT)
            d_correction = tl.trans(_tile(d_out, rows, columns, N, D))
            d_up = tl.dot(d_correction, _tile(saved_r, rows, rs, N, R), d_up, input_precision=DOT)
        if G > 0:
            a, b = _tile(saved_a, rows, gs, N, G), _tile(saved_a + N * G, rows, gs, N, G)
            act_a, act_b = _inner(a, b, in_transform, rows, gs, N, G, GELU)
            gate = tl.sigmoid(_out(act_a, w_gate, g2_bias, columns, D, DOT))
            t = _out(act_b, w_transform, t2_bias, columns, D, DOT)
            d_t = d * gate
            d_z = d_t * (1 - gate) * (t - _tile(s, rows, columns, N, D))
            d_g2 = tl.dot(tl.trans(d_z), act_a, d_g2, input_precision=DOT)
            d_t2 = tl.dot(tl.trans(d_t), act_b, d_t2, input_precision=DOT)
            d_g2_bias += tl.sum(d_z, 0)
            d_t2_bias += tl.sum(d_t, 0)
            if norm is not None:
                x = (x - _line(buffer, rows, N)[:, None]) * _line(buffer + N, rows, N)[:, None]
            d_g1 = tl.dot(tl.trans(_tile(d_small, rows, gs, N, G)), x, d_g1, input_precision=DOT)
            d_t1 = tl.dot(tl.trans(_tile(d_small + N * G, rows, gs, N, G)), x, d_t1, input_precision=DOT)
    if G > 0:
        _put(d_weights, d_g1, gs, columns, G, D)
        _put(d_weights + D * G, d_t1, gs, columns, G, D)
        _put(d_weights + 2 * D * G, d_g2, columns, gs, D, G)
        _put(d_weights + 3 * D * G, d_t2, columns, gs, D, G)
        _put_line(d_weights + 4 * D * G, d_g2_bias, columns, D)
        _put_line(d_weights + 4 * D * G + D, d_t2_bias, columns, D)
    if R > 0:
        _put(d_weights + 4 * D * G + 2 * D, d_down, rs, columns, R, D)
        _put(d_weights + 4 * D * G + 2 * D + R * D, d_up * alpha, columns, rs, D, R)
