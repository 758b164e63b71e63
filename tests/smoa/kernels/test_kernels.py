"""Blocks, factors, and x ΔWᵀ by every route: values and gradients are the oracle's, and nothing shares memory."""

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from smoa.errors import PartitionError
from smoa.generation import snapshot_of
from smoa.kernels.autograd import is_transformed
from smoa.kernels.blocks import SCRATCH, Branch, block_deltas, product_dtype
from smoa.kernels.factors import Factors, init_factors, saved_shapes
from smoa.kernels.shared import (
    FEW_PRODUCTS,
    MOST_ON_GPU,
    Diagonal,
    Gathered,
    _pieces,
    add_shared,
    formed,
    gathered,
    prefers_shared,
    shared,
    shared_by_one,
)
from smoa.partition import Blocks, Orders, ascend, block_sizes, check_num_blocks
from smoa.spectrum import make_partition
from tests import oracle
from tests.support.layers import (
    CASES,
    ROUTES,
    Problem,
    adapted_layer,
    assert_close,
    base_layer,
    factors,
    oracle_output,
    problem,
)
from tests.support.watch import LiveBytes

cases = pytest.mark.parametrize(("out_features", "in_features", "ranks"), CASES)


# blocks


def shuffled_labels(size: int, num_blocks: int) -> Tensor:
    return torch.tensor(oracle.contiguous_labels(size, num_blocks), dtype=torch.uint8)[torch.randperm(size)]


def shuffled(out_features: int, in_features: int, num_blocks: int) -> Blocks:
    """Blocks of coordinates in random places."""
    return Blocks(shuffled_labels(out_features, num_blocks), shuffled_labels(in_features, num_blocks), num_blocks)


@given(size=st.integers(1, 300), num_blocks=st.integers(1, 255))
def test_coordinates_and_ranks_are_split_as_by_tensor_split(size: int, num_blocks: int) -> None:
    expected = [len(part) for part in torch.tensor_split(torch.empty(size), num_blocks)]
    assert list(block_sizes(size, num_blocks)) == expected


@pytest.mark.parametrize(
    ("row_labels", "col_labels"),
    [
        pytest.param([0, 0, 0, 1], [0, 0, 1], id="blocks of other sizes"),
        pytest.param([0, 0, 1, 2], [0, 0, 1], id="a label that is not a block"),
        pytest.param([0, 0, 1, 1], [0, 1, 1], id="the longer block last"),
        pytest.param([0, 0, 1, 255], [0, 0, 1], id="an undecided label"),
    ],
)
def test_labels_that_are_no_partition_are_refused(row_labels: list[int], col_labels: list[int]) -> None:
    rows, cols = (torch.tensor(labels, dtype=torch.uint8) for labels in (row_labels, col_labels))
    with pytest.raises(PartitionError):
        Blocks(rows, cols, num_blocks=2)
    with pytest.raises(PartitionError, match="uint8"):
        Blocks(rows.long(), cols.long(), num_blocks=2)
    orders = Orders.of(rows, cols)  # with which they count as checked
    assert Blocks(rows, cols, 2, orders).orders is orders


@pytest.mark.parametrize("num_blocks", [0, 6])
def test_a_number_of_blocks_that_does_not_fit_is_refused_with_the_limit(num_blocks: int) -> None:
    with pytest.raises(PartitionError, match=rf"num_blocks={num_blocks} must be between 1 and 5 .*\(9, 5\)"):
        check_num_blocks(num_blocks, 9, 5)
    check_num_blocks(255, 300, 300)
    with pytest.raises(PartitionError, match="between 1 and 255"):  # a byte
        check_num_blocks(256, 300, 300)


# Even, tall and ragged, wide and ragged, one block, as many as there are rows.
@pytest.mark.parametrize(
    ("out_features", "in_features", "num_blocks"), [(12, 12, 3), (17, 10, 4), (9, 16, 5), (8, 5, 1), (6, 7, 6)]
)
def test_blocks_are_read_and_written_at_their_coordinates_and_nowhere_else(
    out_features: int, in_features: int, num_blocks: int
) -> None:
    blocks = shuffled(out_features, in_features, num_blocks)
    matrix, source = torch.randn(out_features, in_features), torch.randn(out_features, in_features)
    before = matrix.clone()
    blocks.write(matrix, blocks.of(source))
    is_own = blocks.row_labels[:, None] == blocks.col_labels
    assert torch.equal(matrix, torch.where(is_own, source, before))
    for k, block in enumerate(blocks.of(source)):
        rows, cols = ((labels == k).nonzero()[:, 0] for labels in (blocks.row_labels, blocks.col_labels))
        assert torch.equal(blocks.rows(k), rows)
        assert torch.equal(blocks.cols(k), cols)
        assert torch.equal(block, source[rows][:, cols])
    rows, rows_inverse, cols, cols_inverse = blocks.orders
    assert rows[rows_inverse].tolist() == list(range(out_features))
    assert cols[cols_inverse].tolist() == list(range(in_features))


def test_blocks_are_contiguous_where_the_labels_of_both_sides_ascend() -> None:
    ascending = torch.tensor(oracle.contiguous_labels(9, 4), dtype=torch.uint8)
    other = torch.tensor(oracle.contiguous_labels(6, 4), dtype=torch.uint8)
    assert Blocks(ascending, other, 4).is_contiguous
    assert not Blocks(ascending.roll(1), other, 4).is_contiguous
    assert not Blocks(ascending, other.roll(1), 4).is_contiguous
    assert shuffled(9, 7, 1).is_contiguous
    assert not ascend(ascending.to("meta"))
    x, blocks = torch.randn(2, 3, 9), Blocks(ascending, ascending, 4)
    assert blocks.sort_inputs(x) is x
    assert blocks.unsort_outputs(x) is x


# factors


@pytest.mark.parametrize("init", [True, False, "zero_A"])
def test_factors_start_with_the_size_of_their_block_and_zero_padding(init: Any) -> None:
    sizes, ranks, relative_size = (401, 301), (40, 10, 0, 30), 2.0
    A, B = (torch.full(shape, float("nan"), dtype=torch.float64) for shape in saved_shapes(sizes, ranks)[:2])
    init_factors(A, B, sizes, ranks, init, relative_size)
    in_A, in_B = oracle.real_entries(*sizes, ranks)
    assert (A[~in_A] == 0).all()
    assert (B[~in_B] == 0).all()
    heights, widths = (oracle.block_sizes(size, len(ranks)) for size in sizes)
    runs = [slice(*ends) for ends in pairwise([0, 40, 50, 50, 80])]
    for height, width, run, rank in zip(heights, widths, runs, ranks, strict=True):
        own_A, own_B = A[run, :width], B[:height, run]
        if rank == 0:
            continue
        if init is False:
            assert float((own_B @ own_A).square().mean().sqrt()) == pytest.approx(relative_size, rel=0.15)
            continue
        uniform, zero, limit = (own_B, own_A, rank**-0.5) if init == "zero_A" else (own_A, own_B, width**-0.5)
        assert not zero.any()
        assert 0.995 * limit < uniform.abs().max() <= limit
        assert abs(uniform.mean()) < 0.03 * limit
        assert abs(uniform.std() / limit - 3**-0.5) < 0.03


# every route


def assert_all_close(found: Any, expected: Any) -> None:
    for own, theirs in zip(found, expected, strict=True):
        assert_close(own, theirs)


def assert_is_the_oracles(case: Problem, modulation: str, transposed: bool = False, tokens: int = 5) -> None:
    """ΔW, its blocks, and values and gradients by every route, of a weight that is stored, made anew, or trained."""
    (m, n), scale = case.weight.shape, [1.0 + k for k in range(len(case.ranks))]
    update, delta = case.update(modulation, 0.5, scale), case.oracle(modulation, [s / 2 for s in scale])
    weight, trained = case.weight.T.contiguous().T if transposed else case.weight, case.weight.clone().requires_grad_()
    x, g = torch.randn(tokens, n, dtype=torch.float64, requires_grad=True), torch.randn(tokens, m, dtype=torch.float64)
    bias, of_update, reads = torch.randn(m, dtype=torch.float64, requires_grad=True), x @ delta.T, list[int]()

    def read() -> Tensor:
        reads.append(1)
        return weight

    def check(y: Tensor, expected: Tensor, *leaves: Tensor) -> None:
        assert_close(y, expected)
        oracles = torch.autograd.grad(expected, leaves, g, retain_graph=True)
        assert_all_close(torch.autograd.grad(y, leaves, g), oracles)

    assert tuple(factor.shape for factor in (case.A, case.B)) == saved_shapes((m, n), case.ranks)[:2]
    check_delta = torch.autograd.grad(update.delta(weight).sum(), (case.A, case.B), retain_graph=True)
    assert_close(update.delta(weight), delta)
    assert_all_close(check_delta, torch.autograd.grad(delta.sum(), (case.A, case.B), retain_graph=True))
    check(update.apply(x, weight), of_update, x, case.A, case.B)
    check(update.apply(x.detach(), read), of_update, case.A, case.B)
    if modulation == "none":
        return
    assert len(reads) == 2  # for the backward again, so that it need not be kept
    with torch.no_grad():
        kept = block_deltas(update, weight, torch.float64)
        assert_all_close([block for _, stacked in kept for block in stacked], case.partition.of(delta))
        for few in (update.apply_to_few(x, weight), shared_by_one(update, x, weight)):
            assert_close(few, of_update)
    check(update.apply_with_base(x, weight, bias, transposed), x @ (weight + delta).T + bias, x, case.A, case.B, bias)
    check(update.apply_with_base(x.detach(), weight, None, transposed), x @ (weight + delta).T, case.A, case.B)
    of_trained = x @ case._replace(weight=trained).oracle(modulation, [s / 2 for s in scale]).T
    check(update.apply(x, trained), of_trained, x, case.A, case.B, trained)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize(
    ("kind", "modulation", "transposed"),
    [("spectral", "hadamard", False), ("contiguous", "hadamard", True), ("random", "none", False)],
)
@cases
def test_every_route_is_the_oracles(
    out_features: int, in_features: int, ranks: tuple[int, ...], kind: str, modulation: str, transposed: bool
) -> None:
    assert_is_the_oracles(problem(out_features, in_features, ranks, kind), modulation, transposed)


@pytest.mark.usefixtures("pieces")
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_route_is_the_oracles_whatever_the_sizes(data: st.DataObject) -> None:
    out_features, in_features = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 14))
    num_blocks = data.draw(st.integers(1, min(out_features, in_features)))
    ranks = data.draw(st.lists(st.integers(0, 4), min_size=num_blocks, max_size=num_blocks).filter(any))
    kind = data.draw(st.sampled_from(["spectral", "random", "contiguous"]))
    case = problem(out_features, in_features, tuple(ranks), kind)
    assert_is_the_oracles(case, "hadamard", data.draw(st.booleans()), data.draw(st.integers(0, 5)))


def test_more_ranks_than_pay_to_be_spread_are_stacked() -> None:
    assert_is_the_oracles(problem(70, 45, (40, 30, 40)), "hadamard")


@pytest.mark.usefixtures("pieces")
@torch.no_grad()
def test_padding_has_no_effect_and_gets_no_gradient() -> None:
    case, forward, backward = problem(11, 13, (2, 2, 2)), Branch().forward, Branch().backward
    in_A, in_B = oracle.real_entries(11, 13, case.ranks)
    x, g = torch.randn(5, 13, dtype=torch.float64), torch.randn(5, 11, dtype=torch.float64)
    before = forward(case.factors(), x, case.weight)
    case.A[~in_A], case.B[~in_B] = 1e6, 1e6
    assert torch.equal(forward(case.factors(), x, case.weight), before)
    _, grad_A, grad_B = backward(case.factors(), g, x, case.weight, False)
    assert (grad_A[~in_A] == 0).all()
    assert (grad_B[~in_B] == 0).all()


@pytest.mark.parametrize("modulation", ["hadamard", "none"])
def test_modulation_lifts_the_rank_above_the_budget_up_to_the_bound(modulation: str) -> None:
    case = problem(48, 40, (2, 2))
    labels = case.partition.row_labels.tolist(), case.partition.col_labels.tolist()
    rank = int(torch.linalg.matrix_rank(case.smoa(modulation)))
    assert rank == oracle.rank_bound(case.weight, *labels, case.ranks, modulation)
    assert (rank > 4) == (modulation == "hadamard")


# 16 bits


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize(("dtype", "kind"), [(torch.bfloat16, "spectral"), (torch.float16, "contiguous")])
@torch.no_grad()
def test_half_precision_rounds_the_update_once(dtype: torch.dtype, kind: str) -> None:
    case, forward, backward = problem(11, 13, (1, 4, 2), kind), Branch().forward, Branch().backward
    single = case._replace(A=case.A.detach().float(), B=case.B.detach().float(), weight=case.weight.to(dtype))
    given, x, g = single.factors(0.5), torch.randn(5, 13).to(dtype), torch.randn(5, 11).to(dtype)
    y, (grad_x, grad_A, grad_B) = forward(given, x, single.weight), backward(given, g, x, single.weight, True)
    assert [tensor.dtype for tensor in (y, grad_x, grad_A, grad_B)] == [dtype, dtype, torch.float32, torch.float32]
    delta = single.double().oracle("hadamard", 0.5)
    assert_close(y, x.double() @ delta.T)
    assert_close(grad_x, g.double() @ delta)
    halves = single._replace(A=single.A.to(dtype), B=single.B.to(dtype))
    assert halves.smoa("hadamard").dtype == torch.float32
    assert_close(halves.smoa("hadamard"), halves.double().oracle("hadamard"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_blocks_are_rounded_to_the_dtype_of_products(dtype: torch.dtype) -> None:
    case = problem(11, 13, (1, 4, 2))
    single = case._replace(A=case.A.detach().float(), B=case.B.detach().float())
    update, weight = single.update("hadamard"), case.weight.to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # which does not reach the factors
        found = [block for _, blocks in block_deltas(update, weight, dtype) for block in blocks]
        for own, theirs in zip(found, case.partition.of(update.delta(weight.double())), strict=True):
            assert own.dtype == product_dtype(dtype, "cpu")
            assert_close(own, theirs, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_rounds_no_update_of_a_weight_that_trains(dtype: torch.dtype) -> None:
    case = problem(11, 13, (1, 4, 2))
    single = case._replace(A=case.A.detach().float(), B=case.B.detach().float())
    update, weight = single.update("hadamard"), case.weight.to(dtype).requires_grad_()
    x = torch.randn(5, 13).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = update.apply(x, weight)
    assert torch.equal(found, update.apply(x, weight))


def test_a_pytorch_without_onednn_trains_and_multiplies_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(torch.ops.__dict__, "mkldnn", SimpleNamespace())
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    layer = adapted_layer(base_layer(8, 8, dtype=torch.bfloat16), r=4, num_blocks=2)
    layer(torch.ones(2, 8, dtype=torch.bfloat16)).sum().backward()
    assert all(factor.grad.any() for factor in factors(layer))
    assert product_dtype(torch.bfloat16, "cpu") == torch.float32


# buffers


def test_threads_and_calls_share_no_memory() -> None:
    layers = [adapted_layer(base_layer(150, 120), r=8, num_blocks=2) for _ in range(4)]
    inputs = [torch.randn(70, 120, dtype=torch.float64) for _ in layers]

    def repeat(i: int) -> bool:
        with torch.no_grad():
            first = layers[i](inputs[i])
            return all(torch.equal(layers[i](inputs[i]), first) for _ in range(30))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(repeat, range(4)))
    y = layers[0](inputs[0])
    layers[0](inputs[1]).sum().backward()
    assert_close(y, oracle_output(layers[0], inputs[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("route", ROUTES)
def test_a_call_with_fake_tensors_changes_nothing_for_later_ones(route: str, dtype: torch.dtype) -> None:
    layer = adapted_layer(base_layer(220, 200, dtype=dtype), r=8, num_blocks=2, route=route)
    x = torch.randn(7, 200, dtype=dtype)
    with torch.no_grad(), snapshot_of([layer]):
        expected = layer(x)
        copied = copy.deepcopy(layer)
        SCRATCH.buffers.clear()
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, snapshot_of([copied]):
            for fake in (mode.from_tensor(x), x):
                assert layer(fake).shape == copied(fake).shape == (7, 220)
            known = mode.from_tensor(x)
        assert is_transformed(known), "outside its mode too"
        assert torch.equal(layer(x), expected)
    assert torch.equal(copied(x), layer(x))
    assert not any(isinstance(tensor, FakeTensor) for tensor in [*SCRATCH.buffers.values(), *copied.buffers()])


@pytest.mark.parametrize(("num_blocks", "kind"), [(2, "random"), (8, "contiguous"), (8, "random")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_step_holds_at_most_three_times_the_diagonal_blocks(dtype: torch.dtype, num_blocks: int, kind: str) -> None:
    weight = torch.randn(512, 768).to(dtype)  # beside which the factors and two tokens are small
    A, B = (torch.randn(shape) for shape in saved_shapes((512, 768), (1,) * num_blocks)[:2])
    blocks: Blocks = make_partition(weight, num_blocks, kind)
    given = Factors(A, B, (1,) * num_blocks, 1.0, torch.ones(num_blocks), blocks)
    x, g = torch.randn(2, 768).to(dtype), torch.randn(2, 512).to(dtype)
    Branch().backward(given, g, x, weight, True)  # makes the buffers that a CPU keeps
    known = x, g, weight, A, B, given.rank_scale, *blocks.orders, *SCRATCH.buffers.values()
    with LiveBytes(*known) as forward:
        Branch().forward(given, x, weight)
    with LiveBytes(*known) as backward:
        Branch().backward(given, g, x, weight, True)
    small = 4 * (A.nbytes + B.nbytes) + 3 * (x.nbytes + g.nbytes)
    for peak in (forward.peak, backward.peak):
        assert weight.nbytes / num_blocks < peak <= 3 / num_blocks * weight.nbytes + small


# many adapters in one product

SLOTS = torch.tensor([2, 0, 0, 1])  # one adapter in two groups, one in none
SCALING = 0.5


def adapters(out_features: int, in_features: int, ranks: tuple[int, ...], kind: str = "spectral") -> list[Problem]:
    """Four of one weight."""
    first, *others = (problem(out_features, in_features, ranks, kind) for _ in range(4))
    return [first, *(first._replace(A=other.A, B=other.B) for other in others)]


def stacked(own: Sequence[Problem], slots: Tensor | None = None) -> Gathered:
    """The factors of adapters, each with a scale of its own."""
    of_each = [case.factors(SCALING * (number + 1)) for number, case in enumerate(own)]
    scale = torch.stack([each.scale(torch.promote_types(each.B.dtype, torch.float32)) for each in of_each])
    return gathered(of_each[0].runs(), [each.A for each in of_each], [each.B for each in of_each], scale, slots)


def diagonal_of(case: Problem, modulation: str = "hadamard", dtype: torch.dtype = torch.float64) -> Diagonal:
    runs, weight = case.factors().runs(), case.weight.to(dtype)
    entries = [run.of_matrix(weight, case.partition) for run in runs] if modulation == "hadamard" else None
    return Diagonal(case.partition, runs, entries)


def each_alone(own: list[Problem], x: Tensor, modulation: str = "hadamard") -> Tensor:
    deltas = [case.oracle(modulation, SCALING * (number + 1)) for number, case in enumerate(own)]
    return torch.stack([x[group] @ deltas[slot].T for group, slot in enumerate(SLOTS.tolist())])


@pytest.mark.parametrize(
    ("kind", "modulation"), [("spectral", "hadamard"), ("contiguous", "hadamard"), ("spectral", "none")]
)
@cases
def test_each_group_gets_what_its_own_adapter_gives_and_each_adapter_its_own_gradient(
    out_features: int,
    in_features: int,
    ranks: tuple[int, ...],
    kind: str,
    modulation: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = adapters(out_features, in_features, ranks, kind)
    x = torch.randn(4, 5, in_features, dtype=torch.float64, requires_grad=True)
    g, diagonal = torch.randn(4, 5, out_features, dtype=torch.float64), diagonal_of(own[0], modulation)
    inputs = [x, *(part for case in own for part in (case.A, case.B))]
    found, expected = shared(x, lambda: stacked(own, SLOTS), lambda: diagonal), each_alone(own, x, modulation)
    assert_close(found, expected)
    options = {"materialize_grads": True, "allow_unused": True}
    assert_all_close(
        torch.autograd.grad(found, inputs, g, **options), torch.autograd.grad(expected, inputs, g, **options)
    )
    with torch.no_grad():
        for most in (1 << 20, 2 * max(ranks), 10 * max(ranks)):  # all, two tokens of a group, more than one group
            monkeypatch.setattr("smoa.kernels.shared.MOST_PRODUCTS", most)
            for factors, slots in ((stacked(own, SLOTS), None), (stacked(own), SLOTS)):
                total = g.clone()
                add_shared(total, x, factors, diagonal, slots)
                assert_close(total, g + expected)
        if modulation == "hadamard":
            assert_close(formed(x[0], stacked(own, SLOTS[:1]), diagonal), expected[0])


def test_gradients_of_a_shared_product_can_be_differentiated_again() -> None:
    own = adapters(6, 8, (1, 2))
    x = torch.randn(4, 2, 8, dtype=torch.float64, requires_grad=True)

    def double(y: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(y.square().sum(), own[0].A, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    found = shared(x, lambda: stacked(own, SLOTS), lambda: diagonal_of(own[0]))
    assert_close(double(found), double(each_alone(own, x)))


@pytest.mark.parametrize("kind", ["spectral", "contiguous"])
def test_bfloat16_is_multiplied_as_such_and_summed_in_float32(kind: str) -> None:
    own = adapters(48, 64, (4, 4), kind)
    x, diagonal = torch.randn(4, 5, 64).bfloat16(), diagonal_of(own[0], dtype=torch.bfloat16)
    found = shared(x, lambda: stacked([case.double() for case in own], SLOTS), lambda: diagonal)
    assert found.dtype == torch.bfloat16
    expected = each_alone(own, x.double())
    error = (found.double() - expected).norm() / expected.norm()
    assert error < 6e-3  # a rounding of u, of z and of y, each 2^-9 at most


def test_many_adapters_start_no_more_operations_than_one() -> None:
    own = adapters(12, 12, (2, 2, 2)) * 8
    counts = []
    for slots in (torch.zeros(32, dtype=torch.int64), torch.arange(32)):
        x, given = torch.randn(32, 1, 12, dtype=torch.float64), stacked(own, slots)
        with torch.no_grad(), torch.autograd.profiler.profile() as profile:
            add_shared(torch.zeros_like(x), x, given, diagonal_of(own[0]))
        counts.append(len(profile.function_events))
    assert counts[0] == counts[1]


def test_a_backward_takes_all_tokens_at_once_so_that_many_are_not_shared_at_rank_1_either() -> None:
    many = FEW_PRODUCTS + 1
    found = [prefers_shared(rank, many, trains) for rank, trains in ((1, False), (1, True), (2, False))]
    assert found == [True, False, False]


def test_a_gpu_takes_a_long_prompt_in_pieces_that_its_memory_holds() -> None:
    """A meta tensor is not on a CPU either."""
    taken = torch.zeros(32, 2 * MOST_ON_GPU)
    for groups, tokens in _pieces(torch.empty(*taken.shape, 8, device="meta"), rank=2):
        taken[groups, tokens] += 1
        assert 2 * taken[groups, tokens].numel() <= MOST_ON_GPU
    assert torch.equal(taken, torch.ones_like(taken))
    assert len(_pieces(torch.empty(32, 1, 8, device="meta"), rank=8)) == 1  # a token of each of 32 adapters
