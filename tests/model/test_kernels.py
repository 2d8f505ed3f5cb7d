"""The norm, the rotated norm and the rows of a matrix against autograd through the formula, in float64; and dropout."""

import pytest
import torch

from scorelm.model.kernels import EPS, Dropout, different_rows, rotate, rotation, unit_rms, unit_rms_rotated

POSITION = torch.tensor([[0, 1, 2, 0, 7], [3, 1, 0, 0, 63]])
F64 = torch.float64


def inputs(*shape):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_unit_rms_and_its_gradient():
    x = inputs(3, 5, 8)
    expected = x / x.pow(2).mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(unit_rms(x), expected)
    assert torch.autograd.gradcheck(unit_rms, x)


def test_nothing_is_normalised_to_nothing():
    x = torch.zeros(2, 8, requires_grad=True)
    unit_rms(x).sum().backward()
    assert (unit_rms(x) == 0).all() and torch.isfinite(x.grad).all()
    assert (unit_rms(torch.full((4,), EPS / 2)) == 0.5).all()


def test_rotated_norm_and_its_gradient():
    x, turn = inputs(2, 5, 2, 3, 8), rotation(POSITION, 8).double()
    normalised = x / x.pow(2).mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(unit_rms_rotated(x, turn), rotate(normalised, turn))
    assert torch.autograd.gradcheck(lambda t: unit_rms_rotated(t, turn), x)


def test_a_view_of_a_larger_tensor_is_rotated_alike():
    x, turn = inputs(2, 5, 3, 3, 8), rotation(POSITION, 8)
    part = x.split((2, 1), dim=2)[0]
    torch.testing.assert_close(unit_rms_rotated(part, turn), unit_rms_rotated(part.contiguous(), turn))
    assert torch.equal(x.detach(), inputs(2, 5, 3, 3, 8).detach())  # nothing was changed in place


@pytest.mark.parametrize("name", ["unit_rms", "unit_rms_rotated"])
def test_bfloat16_in_and_out(name):
    x = inputs(2, 5, 3, 8).detach()
    turn = rotation(POSITION, 8)
    with torch.autocast("cpu", torch.bfloat16):
        if name == "unit_rms":
            half, exact = unit_rms(x.float()), x / x.pow(2).mean(-1, keepdim=True).sqrt()
        else:
            half, exact = unit_rms_rotated(x.bfloat16(), turn), unit_rms_rotated(x, turn)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), exact.double(), rtol=1e-2, atol=2e-2)


def test_rows_of_a_matrix_and_their_gradient():
    x, place = inputs(6, 3), torch.tensor([4, 0, 5])
    assert torch.equal(different_rows(x, place), x[place])
    assert torch.autograd.gradcheck(lambda t: different_rows(t, place), x)


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_leaves_out_a_share_and_keeps_the_mean(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(999, 1001, dtype=dtype, requires_grad=True)  # a number of values that four does not divide
    y = Dropout(p)(x)
    kept = (y != 0).double()
    deviation = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(1 - kept.mean() - p) < 5 * deviation + 1e-5  # it is one of 65,536 shares
    torch.testing.assert_close(y.unique()[-1].double(), torch.tensor(1 / (1 - p)).double(), rtol=5e-3, atol=0)
    assert (kept[:, 1:] * kept[:, :-1]).mean() == pytest.approx((1 - p) ** 2, abs=5 * deviation + 2e-5)
    y.sum().backward()
    assert torch.equal(x.grad, y)


def test_dropout_of_nearly_all_is_none_of_all():
    assert torch.isfinite(Dropout(1 - 1e-9)(torch.ones(9))).all()


def test_dropout_is_drawn_from_the_global_generator_and_only_in_training():
    x, dropout = torch.randn(64, 64), Dropout(0.3)
    first, other = (torch.manual_seed(seed) and dropout(x) for seed in (1, 2))
    assert torch.equal(torch.manual_seed(1) and dropout(x), first) and not torch.equal(first, other)
    assert torch.equal(dropout.eval()(x), x)
