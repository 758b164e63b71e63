"""W + ΔW: one cut and the same bits by rows, by columns, by numbers and in a merge, rounded once."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from smoa.kernels import one_product
from smoa.kernels.factors import Factors
from smoa.kernels.one_product import Effective, OneProduct, cut
from smoa.spectrum import make_partition
from tests import oracle
from tests.support.watch import LiveBytes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def made(
    shape: tuple[int, int],
    ranks: Sequence[int],
    dtype: torch.dtype,
    partition: Any = "random",
    scale: float = 1.0,
    factors: torch.dtype = torch.float32,
) -> tuple[Tensor, Factors]:
    """W, and random factors of its update."""
    weight = torch.randn(shape).mul_(0.02)
    blocks = make_partition(weight, len(ranks), partition)
    A, B = (torch.randn(size) for size in oracle.factor_shapes(*shape, len(ranks), sum(ranks)))
    rank_scale = torch.full((sum(ranks),), scale)
    return weight.to(dtype), Factors(A.to(factors), B.to(factors).mul_(0.1), tuple(ranks), 0.5, rank_scale, blocks)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16 if tensor.dtype.itemsize == 2 else torch.int32)


@given(size=st.integers(1, 5000), other=st.integers(1, 20_000), fewest=st.sampled_from([16, 64]))
def test_a_cut_covers_each_row_once_in_multiples_of_16_and_leaves_no_short_rest(
    size: int, other: int, fewest: int
) -> None:
    pieces = list(cut(size, other, fewest, 1 << 16))
    assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
    assert pieces[-1].stop == size
    assert all((piece.stop - piece.start) % 16 == 0 for piece in pieces[:-1])
    assert len(pieces) == 1 or pieces[-1].stop - pieces[-1].start >= 16
    assert max(piece.stop - piece.start for piece in pieces) < max(fewest, (1 << 16) // other) + 16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize(
    ("shape", "ranks"),
    [
        ((513, 1025), (8, 8)),
        ((257, 513), (1, 2, 3, 1)),
        ((1025, 257), (40, 30, 40)),  # stacked
        ((64, 10), (1,)),
        ((9, 33), (2, 2)),
    ],
)
@torch.no_grad()
def test_rows_columns_and_numbers_have_the_same_bits_in_any_cut(
    shape: tuple[int, int],
    ranks: tuple[int, ...],
    transposed: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, factors = made(shape, ranks, dtype)
    weight = weight.T.contiguous().T if transposed else weight
    whole = Effective(weight, factors, transposed=transposed).whole()
    monkeypatch.setattr(one_product, "PIECE", 1 << 12)
    effective = Effective(weight, factors, transposed=transposed)
    assert shape[0] < 100 or len(list(effective.rows())) > 1
    assert torch.equal(torch.cat([piece.clone() for _, piece in effective.rows()]), whole)
    assert torch.equal(torch.cat([piece.clone() for _, piece in effective.columns()], 1), whole)
    if not transposed:
        for count in (1, 2, 5, 40):
            numbers = torch.randint(0, shape[0], (count,))
            assert torch.equal(Effective(weight, factors, numbers=numbers).whole(), whole[numbers])


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_it_is_the_oracles_rounded_once(dtype: torch.dtype) -> None:
    weight, factors = made((48, 65), (3, 2, 2), dtype, scale=2.0, factors=dtype)
    row_labels, col_labels = factors.blocks.row_labels.tolist(), factors.blocks.col_labels.tolist()
    wide = [factor.double() for factor in (weight, factors.A, factors.B)]
    exact = wide[0] + oracle.delta_weight(*wide, row_labels, col_labels, factors.ranks, [1.0] * 3, "hadamard")
    found = Effective(weight, factors).whole().double()
    # half a unit of the result, and what U, and in 16 bits its factors, are rounded by
    relative = exact.abs() / 2 + 4 * (exact - wide[0]).abs() + 0.05 * wide[0].abs()
    tolerance = torch.finfo(dtype).eps * (relative + torch.finfo(dtype).smallest_normal)
    assert bool(((found - exact).abs() <= tolerance).all())


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("ranks", [(2, 2, 2), (40, 40, 40)], ids=["spread", "stacked"])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_entries_off_the_blocks_are_the_weights(dtype: torch.dtype, ranks: tuple[int, ...], count: int) -> None:
    weight, factors = made((40, 30), ranks, dtype)
    found = Effective(weight, *[factors] * count).whole()
    off = factors.blocks.row_labels[:, None] != factors.blocks.col_labels
    assert torch.equal(found[off], weight[off])


@torch.no_grad()
def test_a_fresh_update_is_exact_in_float16_however_small_the_weight() -> None:
    weight, factors = made((64, 48), (4, 4), torch.float16, scale=4 / 1e-5)
    weight = (torch.randn(64, 48) * 1e-5).half()
    factors.B.zero_()
    assert torch.equal(bits(Effective(weight, factors).whole()), bits(weight))


@pytest.mark.usefixtures("multiplies_bfloat16")
@torch.no_grad()
def test_the_gradient_of_x_errs_no_more_than_the_whole_product() -> None:
    weight, factors = made((14336, 4096), (8, 8, 8, 8), torch.bfloat16, "contiguous")
    x, g = torch.randn(32, 4096).bfloat16(), torch.randn(32, 14336).bfloat16()
    own = OneProduct()._effective(factors, weight)
    grad_x = torch.empty(32, 4096, dtype=torch.bfloat16)
    for columns, effective in own.operands(torch.bfloat16, columns=True):
        torch.mm(g, effective, out=grad_x[:, columns])
    whole = Effective(weight, factors).whole()
    exact = g.float() @ whole.float()
    assert (grad_x - exact).norm() <= 1.05 * (g @ whole - exact).norm()
    assert torch.equal(OneProduct().backward(factors, g, x, weight, True)[0], grad_x)  # type: ignore[arg-type]


@pytest.mark.usefixtures("multiplies_bfloat16")
@pytest.mark.parametrize("has_amx", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_step_keeps_x_and_the_factors_and_makes_little(
    dtype: torch.dtype, has_amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_product, "sums_by_shape", lambda: has_amx)
    weight, factors = made((2048, 4096), (8, 8, 8, 8), dtype, "contiguous")
    A, B = factors.A.requires_grad_(), factors.B.requires_grad_()
    x = torch.randn(16, 4096, dtype=dtype)
    one_product.SCRATCH.buffers.clear()
    with torch.no_grad(), LiveBytes(weight, A, B, x) as live:
        route, g = OneProduct(), torch.ones(16, 2048, dtype=dtype)
        route.forward(factors, x, weight)
        route.backward(factors, g, x, weight, True)
    most = 12 * max(1 << 21, 64 * 2048) if dtype == torch.float32 or not has_amx else 4 * weight.nbytes
    assert live.peak <= most + 4 * (x.nbytes + g.nbytes) + 8 * (A.nbytes + B.nbytes)
