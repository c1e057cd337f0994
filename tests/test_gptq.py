"""gptq.py: what the three methods return, how exact it is, and that each does what its paper promises.

    pytest tests/test_gptq.py
"""

import pytest
import torch

from gptq import accumulate_hessian, dequantize, gptq, hqq, rtn

METHODS = {
    "rtn": rtn,
    "hqq": hqq,
    "gptq": lambda w, g: gptq(w, torch.eye(w.shape[-1]).expand(*w.shape[:-2], -1, -1), g),
    "gptq_in_order": lambda w, g: gptq(w, torch.eye(w.shape[-1]).expand(*w.shape[:-2], -1, -1), g, act_order=False),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def correlated(n, dim, rank=24):
    """Inputs [n, dim] of a few directions and some noise, with unequal channels, as activations are."""
    x = torch.randn(n, rank) @ torch.randn(rank, dim) + 0.3 * torch.randn(n, dim)
    return x * torch.exp(0.7 * torch.randn(dim))


def heavy(*shape):
    return torch.distributions.StudentT(3.0).sample(shape) * 0.02


@every_method
@pytest.mark.parametrize("shape", [(24, 128), (3, 8, 128), (2, 2, 4, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_and_dtypes(method, shape, dtype):
    weight = torch.randn(shape).to(dtype)
    before = weight.clone()
    q, scale, zero = method(weight, 32)
    assert q.shape == shape and q.dtype == torch.uint8 and q.max() <= 15 and q.is_contiguous()
    assert scale.shape == zero.shape == (*shape[:-1], shape[-1] // 32)
    assert scale.dtype == zero.dtype == torch.float16 and (scale > 0).all() and zero.isfinite().all()
    back = dequantize(q, scale, zero, 32)
    assert back.shape == shape and back.dtype == torch.float32
    assert (back - weight.float()).square().mean() < 0.02 * weight.float().square().mean()
    assert torch.equal(weight, before)


@every_method
def test_the_weight_is_left_alone_in_any_layout(method):
    for weight in (torch.randn(1, 64), torch.randn(64, 8).T, torch.randn(1, 64, 8).mT):
        before = weight.clone()
        q, scale, zero = method(weight, 32)
        assert q.shape == weight.shape and torch.equal(weight, before)
        assert all(torch.equal(a, b) for a, b in zip(method(before, 32), (q, scale, zero), strict=True))


@every_method
def test_a_representable_weight_is_exact(method):
    q = torch.randint(0, 16, (16, 128), dtype=torch.uint8)
    q[:, ::32], q[:, 1::32] = 0, 15  # each group uses its whole range
    scale, zero = (torch.rand(16, 4) * 0.01 + 0.001).half(), torch.randint(1, 15, (16, 4)).half()
    weight = dequantize(q, scale, zero, 32)
    got = method(weight, 32)
    torch.testing.assert_close(dequantize(*got, 32), weight, rtol=0, atol=1e-6)
    assert torch.equal(got[0], q)


def test_rtn_error_is_at_most_half_a_step():
    for weight in (torch.randn(32, 256), heavy(32, 256), torch.rand(32, 256) + 3, -torch.rand(32, 256)):
        q, scale, zero = rtn(weight, 64)
        error = (dequantize(q, scale, zero, 64) - weight).abs().unflatten(-1, (-1, 64)).amax(-1)
        assert (error <= 0.52 * scale.float()).all()  # float16 rounding of scale and zero moves the ends a little


@every_method
@pytest.mark.parametrize("value", [0.0, 1.0, -0.3, 1e-7, 1e-30, -2e4])
def test_equal_and_tiny_groups(method, value):
    weight = torch.randn(4, 64)
    weight[1, :32] = value
    weight[2] = value
    q, scale, zero = method(weight, 32)
    back = dequantize(q, scale, zero, 32)
    assert back.isfinite().all() and scale.isfinite().all() and (scale > 0).all()
    torch.testing.assert_close(back[1, :32], weight[1, :32], rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(back[2], weight[2], rtol=1e-3, atol=1e-7)


@every_method
def test_tiny_ranges_lose_no_more_than_float16_must(method):
    weight = torch.randn(8, 64) * 1e-6  # scales among float16's subnormals
    back = dequantize(*method(weight, 32), 32)
    assert (back - weight).abs().max() < 1.5e-6


@every_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e9])
def test_weights_that_are_not_finite_are_refused(method, bad):
    weight = torch.randn(4, 64)
    weight[2, 3] = bad
    with pytest.raises(ValueError, match="largest weight is"):
        method(weight, 32)


@every_method
@pytest.mark.parametrize("groupsize", [0, 48, 128])
def test_a_groupsize_that_does_not_divide_is_refused(method, groupsize):
    with pytest.raises(ValueError, match=f"groupsize {groupsize} does not divide in_features 64"):
        method(torch.randn(4, 64), groupsize)


@every_method
def test_a_batch_equals_its_members(method):
    weight = heavy(3, 16, 64)
    together = method(weight, 32)
    for i in range(3):
        alone = method(weight[i], 32)
        assert all(torch.equal(a[i], b) for a, b in zip(together, alone, strict=True))


# ----------------------------------------------------------------------------------------------------------------- HQQ
@pytest.mark.parametrize("groupsize", [32, 64, 128])
def test_hqq_lowers_the_lp_norm_of_heavy_tailed_weights(groupsize):
    weight = heavy(64, 512)

    before, after = ((dequantize(*f(weight, groupsize), groupsize) - weight).abs() for f in (rtn, hqq))
    assert after.pow(0.7).sum() < 0.97 * before.pow(0.7).sum()
    assert after.square().sum() < 0.97 * before.square().sum()


# ---------------------------------------------------------------------------------------------------------------- GPTQ
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("groupsize", [32, 64, 128, 256])
def test_gptq_lowers_the_error_of_the_output(groupsize, act_order):
    weight, x = heavy(96, 512), correlated(2048, 512)
    hessian = accumulate_hessian(torch.zeros(512, 512), x)

    def loss(result):
        return ((dequantize(*result, groupsize) - weight) @ x.T).square().sum()

    nearest = loss(rtn(weight, groupsize))
    got = loss(gptq(weight, hessian, groupsize, act_order=act_order))
    assert got < 0.6 * nearest
    # The factor of the Hessian matters no more than rounding does.
    scaled = loss(gptq(weight, 1e3 * hessian, groupsize, act_order=act_order))
    torch.testing.assert_close(scaled, got, rtol=0.06, atol=0)


def test_gptq_is_the_algorithm_of_the_paper():
    """Against GPTQ written plainly: the inverse Hessian, updated after every column (equations 2 and 3)."""
    weight, x = torch.randn(8, 48), correlated(256, 48, rank=8)
    hessian = accumulate_hessian(torch.zeros(48, 48), x)
    q, scale, zero = gptq(weight, hessian, 16, act_order=False)
    w = weight.double()
    inverse = torch.linalg.inv(hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(48))
    for i in range(48):
        s, z = scale[:, i // 16].double(), zero[:, i // 16].double()
        column = (w[:, i] / s + z).round().clamp(0, 15)
        assert torch.equal(column, q[:, i].double())
        error = (w[:, i] - (column - z) * s) / inverse[i, i]
        w = w - error[:, None] * inverse[i]
        inverse = inverse - inverse[:, i, None] * inverse[i] / inverse[i, i]


def test_act_order_helps_unequal_channels_and_keeps_groups_contiguous():
    weight, x = torch.randn(64, 256), correlated(2048, 256) * torch.logspace(-1, 1, 256)[torch.randperm(256)]
    hessian = accumulate_hessian(torch.zeros(256, 256), x)
    ordered, plain = (gptq(weight, hessian, 32, act_order=order) for order in (True, False))
    loss = [((dequantize(*r, 32) - weight) @ x.T).square().sum() for r in (ordered, plain)]
    assert loss[0] < loss[1]
    # Each group's scale belongs to its own weights, in their own order: no column is far from its weight's grid.
    span = weight.unflatten(-1, (-1, 32)).abs().amax(-1)
    assert (ordered[1].float() < 0.5 * span).all()


def test_dead_columns_and_unreached_experts_are_rounded():
    weight, x = torch.randn(2, 32, 128), correlated(512, 128)
    x[:, [3, 64]] = 0
    hessian = torch.zeros(2, 128, 128)
    accumulate_hessian(hessian[0], x)  # no token reached the second expert
    back = dequantize(*gptq(weight, hessian, 32), 32)
    assert back.isfinite().all()
    assert (back - weight)[0, :, [3, 64]].square().mean() < 0.03  # 0.015 is what rounding costs
    assert (back - weight)[1].square().mean() <= (dequantize(*rtn(weight[1], 32), 32) - weight[1]).square().mean()


def test_a_singular_hessian_is_damped():
    weight, x = torch.randn(16, 128), torch.randn(3, 128)
    x[:, :64] *= 1e4
    back = dequantize(*gptq(weight, accumulate_hessian(torch.zeros(128, 128), x), 32), 32)
    assert back.isfinite().all()


def test_bad_hessians_are_refused():
    weight, eye = torch.randn(4, 64), torch.eye(64)
    with pytest.raises(ValueError, match=r"hessian is \[32, 32\]"):
        gptq(weight, torch.eye(32), 32)
    with pytest.raises(ValueError, match="not finite"):
        gptq(weight, eye * float("nan"), 32)
    with pytest.raises(ValueError, match="not positive definite"):
        gptq(weight, -0.5 * eye + torch.ones(64, 64), 32)


def test_accumulate_hessian():
    x = torch.randn(2, 50, 16).bfloat16()
    hessian = torch.zeros(16, 16)
    got = accumulate_hessian(accumulate_hessian(hessian, x[0]), x[1])
    assert got is hessian and got.dtype == torch.float32
    flat = x.flatten(0, 1).double()
    torch.testing.assert_close(got, (flat.T @ flat).float())
