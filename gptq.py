"""Calibration mathematics of 4-bit weights, as pure functions of tensors: RTN, HQQ and GPTQ.

All three return the same triple for a weight [..., out, in] whose rows are cut into groups of `groupsize` inputs:
    q uint8 [..., out, in] in 0 ... 15,   scale and zero float16 [..., out, in / groupsize],
    weight ~ (q - zero) * scale   (zero may be fractional; groups are contiguous, whatever order was used inside)
Scale and zero are rounded to float16 before q is chosen: what is stored is what was optimized. Leading dimensions are
a batch (the experts of a layer); no function keeps state, changes its arguments (but for `accumulate_hessian`, which
says so), or knows of modules.

Try it:  python -c "import torch, gptq as g; w, x = torch.randn(64, 256), torch.randn(999, 256) @ torch.randn(256, 256)
for q in (g.rtn(w, 64), g.hqq(w, 64), g.gptq(w, x.T @ x, 64)): print((x @ (g.dequantize(*q, 64) - w).T).norm())"

Sources: GPTQ, Frantar et al. 2022 (arXiv 2210.17323). HQQ, Badri and Shaji 2023 (mobiusml.github.io/hqq_blog).
"""

import torch
from torch import Tensor

LEVELS = 15  # q runs from 0 to 15
SMALLEST_SCALE = 2.0**-24  # float16's smallest positive number: a scale of zero would divide by zero


def rtn(weight: Tensor, groupsize: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round to nearest on the grid that spans each group's minimum, maximum and 0.

    weight: float [..., out, in] -> q, scale, zero as in the header. Errors are at most about scale / 2. Zero is not
    rounded to an integer: no kernel needs that, and both ends of the span stay on the grid.
    ValueError: groupsize does not divide `in`, a weight is not finite, or a range is beyond float16 scales.
    """
    groups = _groups(weight, groupsize)
    scale, zero = _span(groups)
    return _pack(_quantize(groups, scale, zero), scale, zero)


@torch.no_grad()
def hqq(
    weight: Tensor, groupsize: int, p: float = 0.7, beta: float = 10.0, kappa: float = 1.01, iters: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """Half-quadratic quantization: a better zero, and scale, for each group without any data.

    Alternates a proximal step, which takes the few large errors out of the l_p norm (p < 1), and the zero that is best
    for the others; beta is multiplied by kappa each time. Two things differ from the paper: residuals are in units of
    the scale, so that beta means the same for every weight; and this runs from several scales, of which each group
    keeps what gave it the least squared error, so that none ends worse than by `rtn`. Shapes and errors as in `rtn`.
    """
    groups = _groups(weight, groupsize)
    span, start = _span(groups)
    best = (_loss(groups, span, start), span, start)
    for shrink in (1.0, 0.95, 0.9, 0.85, 0.8):
        scale, zero, b = _to16(span * shrink), start, beta
        for _ in range(iters):
            x = groups / scale + zero
            residual = x - x.round().clamp_(0, LEVELS)
            # The proximal operator of the l_p norm, a generalized soft threshold.
            size = residual.abs()
            outlier = residual.sign() * (size - size.clamp(min=1e-4).pow(p - 1) / b).clamp(min=0)
            zero = (zero - (residual - outlier).mean(-1, keepdim=True)).half().float()
            best = _better(best, (_loss(groups, scale, zero), scale, zero))
            b *= kappa
    _, scale, zero = best
    return _pack(_quantize(groups, scale, zero), scale, zero)


@torch.no_grad()
def gptq(
    weight: Tensor, hessian: Tensor, groupsize: int, act_order: bool = True, damp: float = 0.01
) -> tuple[Tensor, Tensor, Tensor]:
    """GPTQ: quantize column by column; each column's error is made good by the columns not yet quantized.

    weight: float [..., out, in]; hessian: [..., in, in], any positive multiple of sum x x^T over the calibration
    inputs x (see `accumulate_hessian`). damp: share of the Hessian's mean diagonal that is added to the diagonal.
    act_order: the columns that see the largest inputs go first, group by group and then inside each group, so that the
    stored groups stay contiguous. A column (or an expert) that no input reached is simply rounded. Shapes and errors as
    in `rtn`; also ValueError if the Hessian has another shape, is not finite, or is not positive semidefinite.
    """
    w = _groups(weight, groupsize).flatten(-2)
    n = w.shape[-1]
    if hessian.shape != (*w.shape[:-2], n, n):
        raise ValueError(f"hessian is {list(hessian.shape)}; a weight {list(w.shape)} needs {[*w.shape[:-2], n, n]}")
    h = hessian.float()
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    if act_order:
        by_group = diagonal.unflatten(-1, (-1, groupsize))
        inside = by_group.argsort(dim=-1, descending=True, stable=True)
        outside = by_group.amax(-1).argsort(dim=-1, descending=True, stable=True)
        order = inside + torch.arange(0, n, groupsize, device=w.device)[:, None]
        order = order.take_along_dim(outside[..., None], -2).flatten(-2)
        w = w.take_along_dim(order[..., None, :], -1)
        h = h.take_along_dim(order[..., None, :], -1).take_along_dim(order[..., :, None], -2)
    # Where there was no input at all (an expert that no token chose): the identity, and GPTQ rounds to nearest.
    mean = diagonal.mean(-1, keepdim=True)
    h = h + torch.diag_embed(torch.where(mean > 0, damp * mean, 1.0).expand(diagonal.shape))
    u = _inverse_factor(h)
    importance = h.diagonal(dim1=-2, dim2=-1)  # of an error in that column, other errors aside

    w = w.mT.clone(memory_format=torch.contiguous_format)  # [..., in, out]: a column of the weight is contiguous
    q, grids = torch.empty_like(w, dtype=torch.uint8), []
    block = groupsize * max(1, 128 // groupsize)
    for start in range(0, n, block):
        stop = min(start + block, n)
        b, ub = w[..., start:stop, :], u[..., start:stop, start:stop]
        errors = torch.empty_like(b)
        for i in range(stop - start):
            if i % groupsize == 0:  # the group's grid suits its weights as the updates so far have left them
                group = slice(start + i, start + i + groupsize)
                grids.append(_search(w[..., group, :].mT, importance[..., None, group]))
                scale, zero = (x[..., 0] for x in grids[-1])
            column = b[..., i, :]
            q[..., start + i, :] = level = _quantize(column, scale, zero)
            errors[..., i, :] = error = (column - (level - zero) * scale) / ub[..., i, i, None]
            b[..., i + 1 :, :].addcmul_(ub[..., i, i + 1 :, None], error[..., None, :], value=-1)
        # The columns behind the block are updated once a block: one large product instead of many thin ones.
        w[..., stop:, :] -= u[..., start:stop, stop:].mT @ errors

    q, (scale, zero) = q.mT, (torch.cat(x, -1) for x in zip(*grids, strict=True))
    if act_order:
        back = outside.argsort(-1)[..., None, :]
        scale, zero = scale.take_along_dim(back, -1), zero.take_along_dim(back, -1)
        q = q.take_along_dim(order.argsort(-1)[..., None, :], -1)
    return q.contiguous(), scale.half(), zero.half()


def accumulate_hessian(hessian: Tensor, x: Tensor) -> Tensor:
    """hessian += x^T x, in place. hessian: float32 [in, in], zeros at first; x: a linear's inputs, [..., in].

    A sum, not GPTQ's running mean of 2 x x^T: `gptq` does not depend on the factor, and sums need no counter.
    """
    x = x.reshape(-1, x.shape[-1]).float()
    return hessian.addmm_(x.mT, x)


def dequantize(q: Tensor, scale: Tensor, zero: Tensor, groupsize: int) -> Tensor:
    """(q - zero) * scale: q [..., out, in], scale and zero [..., out, in / groupsize] -> float32 [..., out, in]."""
    groups = q.unflatten(-1, (-1, groupsize)).float()
    return ((groups - zero.float()[..., None]) * scale.float()[..., None]).flatten(-2)


# ---------------------------------------------------------------------------------------------------------- the pieces
# Below, groups are float32 [..., groupsize], scale and zero float32 [..., 1] that hold float16 values.
def _groups(weight: Tensor, groupsize: int) -> Tensor:
    """[..., out, in] -> float32 [..., out, in / groupsize, groupsize], checked."""
    n = weight.shape[-1]
    if groupsize < 1 or n % groupsize:
        raise ValueError(f"groupsize {groupsize} does not divide in_features {n}; choose a divisor of {n}")
    size, limit = weight.detach().abs().amax().item(), 65504 * LEVELS // 2  # scales are float16
    if not size < limit:  # NaN too
        raise ValueError(f"the largest weight is {size}; 4-bit groups need finite weights below {limit}")
    return weight.detach().float().unflatten(-1, (-1, groupsize))


def _to16(x: Tensor) -> Tensor:
    """A scale rounded to float16 (and never to zero), as float32."""
    return x.half().float().clamp(min=SMALLEST_SCALE)


def _span(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero of the grid from the smallest weight (or 0) to the largest (or 0)."""
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scale = _to16((high - low) / LEVELS)
    return scale, (-low / scale).clamp(0, LEVELS).half().float()


def _quantize(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The nearest grid point's number, 0 ... 15, as float32."""
    return (x / scale + zero).round_().clamp_(0, LEVELS)


def _pack(q: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.to(torch.uint8).flatten(-2), scale[..., 0].half(), zero[..., 0].half()


def _loss(groups: Tensor, scale: Tensor, zero: Tensor, importance: Tensor | None = None) -> Tensor:
    """The sum of (importance *) error^2 over each group -> [..., 1]."""
    loss = (groups - (_quantize(groups, scale, zero) - zero) * scale).square()
    return (loss if importance is None else loss * importance).sum(-1, keepdim=True)


def _better(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Group by group, of two (loss, scale, zero) the one with the smaller loss; of equals the first."""
    second = b[0] < a[0]
    return tuple(torch.where(second, y, x) for x, y in zip(a, b, strict=True))


def _search(groups: Tensor, importance: Tensor, steps: int = 8, refine: int = 3) -> tuple[Tensor, Tensor]:
    """The scale and zero with the least sum of importance * error^2, near enough.

    From several shares of the group's span at once (dimension 0: few launches on a GPU), alternates rounding and the
    weighted linear regression of the weights on q; every grid met is judged by its own error, in float16's numbers.
    """
    span, start = _span(groups)
    share = importance / importance.sum(-1, keepdim=True)
    mean_w = (groups * share).sum(-1, keepdim=True)
    shrink = torch.linspace(1.0, 0.6, steps, device=groups.device).view(-1, *[1] * groups.dim())
    scale, zero = _to16(span * shrink), start.expand(steps, *start.shape)
    best = (_loss(groups, scale, zero, share), scale, zero)
    for _ in range(refine):
        q = _quantize(groups, scale, zero)
        mean_q = (q * share).sum(-1, keepdim=True)
        dq = (q - mean_q) * share
        slope = (dq * groups).sum(-1, keepdim=True) / (dq * q).sum(-1, keepdim=True).clamp(min=1e-6)
        scale = torch.where(slope > span * 0.25, _to16(slope), scale)  # a group on one level has no slope
        zero = (mean_q - mean_w / scale).clamp(-LEVELS, 2 * LEVELS).half().float()
        best = _better(best, (_loss(groups, scale, zero, share), scale, zero))
    least = best[0].argmin(0, keepdim=True)
    return best[1].gather(0, least)[0], best[2].gather(0, least)[0]


def _inverse_factor(h: Tensor) -> Tensor:
    """Upper triangular u with u^T u = h^-1, float32 [..., n, n].

    Cholesky of h from its last row to its first gives h = r r^T with r upper triangular; then u = r^-1. That is one
    factorization where the paper has two and an inverse between, so float32 goes a long way; float64 goes the rest.
    """
    if not torch.isfinite(h).all():
        raise ValueError("the Hessian is not finite; look for NaN or infinity in the calibration activations")
    for dtype in (torch.float32, torch.float64):
        r, info = torch.linalg.cholesky_ex(h.to(dtype).flip(-1, -2))
        if not info.any():
            r = r.flip(-1, -2)
            eye = torch.eye(h.shape[-1], dtype=dtype, device=h.device).expand_as(r)
            return torch.linalg.solve_triangular(r, eye, upper=True).float()
    raise ValueError("the Hessian is not positive definite; raise damp, or calibrate on more text")
