"""Many adapters in one product: each row gets what its own adapter alone gives, and each adapter its own gradient."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from smoa.maths.factors import Factors
from smoa.maths.kernels.shared import MOST_ON_GPU, Diagonal, Gathered, _pieces, add_shared, formed, gathered, shared
from tests.support.tolerance import assert_close
from tests.support.updates import CASES, Problem, problem

SLOTS = torch.tensor([2, 0, 0, 1])  # one adapter in two groups, one in none
SCALING = 0.5


def problems(out_features: int, in_features: int, ranks: tuple[int, ...], kind: str) -> list[Problem]:
    """Four adapters of one weight."""
    first = problem(out_features, in_features, ranks, kind)
    others = [problem(out_features, in_features, ranks, kind) for _ in range(3)]
    return [first, *(first._replace(A=other.A, B=other.B) for other in others)]


def factors_of(cases: list[Problem]) -> list[Factors]:
    """Of each adapter, with a scale of its own."""
    return [case.factors(SCALING * (number + 1)) for number, case in enumerate(cases)]


def stacked(factors: Sequence[Factors], slots: Tensor | None = None) -> Gathered:
    scale = torch.stack([own.scale(torch.promote_types(own.B.dtype, torch.float32)) for own in factors])
    return gathered(factors[0].runs(), [own.A for own in factors], [own.B for own in factors], scale, slots)


def of_shared(
    cases: list[Problem],
    x: Tensor,
    modulation: str,
    dtype: torch.dtype = torch.float64,
    total: Tensor | None = None,
) -> Tensor:
    factors, weight = factors_of(cases), cases[0].weight.to(dtype)
    blocks, runs = factors[0].blocks, factors[0].runs()
    entries = [run.of_matrix(weight, blocks) for run in runs] if modulation == "hadamard" else None
    diagonal = Diagonal(blocks, runs, entries)
    if total is not None:
        add_shared(total, x, stacked(factors, SLOTS), diagonal)
        return total
    return shared(x, lambda: stacked(factors, SLOTS), lambda: diagonal)


def each_alone(cases: list[Problem], x: Tensor, modulation: str) -> Tensor:
    deltas = [case.oracle(modulation, SCALING * (number + 1)) for number, case in enumerate(cases)]
    return torch.stack([x[group] @ deltas[slot].T for group, slot in enumerate(SLOTS.tolist())])


@pytest.mark.parametrize(
    ("kind", "modulation"), [("spectral", "hadamard"), ("contiguous", "hadamard"), ("spectral", "none")]
)
@pytest.mark.parametrize(("out_features", "in_features", "ranks"), CASES)
def test_values_and_gradients_are_those_of_each_adapter_alone(
    out_features: int, in_features: int, ranks: tuple[int, ...], kind: str, modulation: str
) -> None:
    cases = problems(out_features, in_features, ranks, kind)
    x = torch.randn(4, 3, in_features, dtype=torch.float64, requires_grad=True)
    g = torch.randn(4, 3, out_features, dtype=torch.float64)
    inputs = [x, *(part for case in cases for part in (case.A, case.B))]
    found, expected = of_shared(cases, x, modulation), each_alone(cases, x, modulation)
    assert_close(found, expected)
    gradients = torch.autograd.grad(found, inputs, g, materialize_grads=True, allow_unused=True)
    of_oracle = torch.autograd.grad(expected, inputs, g, materialize_grads=True, allow_unused=True)
    for gradient, wanted in zip(gradients, of_oracle, strict=True):
        assert_close(gradient, wanted)
    with torch.no_grad():
        assert_close(of_shared(cases, x, modulation), expected)


@pytest.mark.parametrize("kind", ["spectral", "contiguous"])
@pytest.mark.parametrize(("out_features", "in_features", "ranks"), CASES)
@torch.no_grad()
def test_one_adapters_delta_can_be_formed_instead(
    out_features: int, in_features: int, ranks: tuple[int, ...], kind: str
) -> None:
    cases = problems(out_features, in_features, ranks, kind)
    factors, x = factors_of(cases), torch.randn(5, in_features, dtype=torch.float64)
    blocks, runs = factors[0].blocks, factors[0].runs()
    entries = [run.of_matrix(cases[0].weight, blocks) for run in runs]
    found = formed(x, stacked(factors, torch.tensor([2])), Diagonal(blocks, runs, entries))
    assert_close(found, x @ cases[2].oracle("hadamard", SCALING * 3).T)


@pytest.mark.parametrize("modulation", ["hadamard", "none"])
@pytest.mark.parametrize("kind", ["spectral", "contiguous"])
@pytest.mark.parametrize("piece", [2, 10])  # two tokens of a group, or more than one group
@pytest.mark.parametrize(("out_features", "in_features", "ranks"), CASES)
@torch.no_grad()
def test_it_is_added_to_an_output_in_pieces(
    monkeypatch: pytest.MonkeyPatch,
    out_features: int,
    in_features: int,
    ranks: tuple[int, ...],
    piece: int,
    kind: str,
    modulation: str,
) -> None:
    monkeypatch.setattr("smoa.maths.kernels.shared.MOST_PRODUCTS", piece * max(ranks))
    cases = problems(out_features, in_features, ranks, kind)
    x = torch.randn(4, 5, in_features, dtype=torch.float64)
    total = torch.randn(4, 5, out_features, dtype=torch.float64)
    expected = total + each_alone(cases, x, modulation)
    assert_close(of_shared(cases, x, modulation, total=total), expected)
    assert_close(of_shared(cases, x, modulation), each_alone(cases, x, modulation))


def test_gradients_can_be_differentiated_again() -> None:
    cases = problems(6, 8, (1, 2), "spectral")
    x = torch.randn(4, 2, 8, dtype=torch.float64, requires_grad=True)

    def double(y: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(y.square().sum(), cases[0].A, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    assert_close(double(of_shared(cases, x, "hadamard")), double(each_alone(cases, x, "hadamard")))


@pytest.mark.parametrize("kind", ["spectral", "contiguous"])
def test_bfloat16_is_multiplied_as_such_and_summed_in_float32(kind: str) -> None:
    cases = problems(48, 64, (4, 4), kind)
    x = torch.randn(4, 5, 64).bfloat16()
    found = of_shared([case.double() for case in cases], x, "hadamard", torch.bfloat16)
    assert found.dtype == torch.bfloat16
    expected = each_alone(cases, x.double(), "hadamard")
    error = (found.double() - expected).norm() / expected.norm()
    assert error < 6e-3  # a rounding of u, of z and of y, each 2^-9 at most


def test_nothing_of_the_weights_size_is_kept_for_the_backward() -> None:
    cases = problems(64, 64, (1, 1, 1, 1), "spectral")
    x = torch.randn(4, 1, 64, dtype=torch.float64, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.nbytes) or tensor, lambda t: t):
        y = of_shared(cases, x, "hadamard")
    assert y.requires_grad
    assert sum(kept) < 3 * (x.nbytes + sum(case.A.nbytes + case.B.nbytes for case in cases))


def test_it_compiles_to_one_graph() -> None:
    cases = problems(10, 12, (2, 1), "spectral")
    x = torch.randn(4, 2, 12, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(of_shared, fullgraph=True, backend="aot_eager")
    found, expected = compiled(cases, x, "hadamard"), each_alone(cases, x, "hadamard")
    assert_close(found, expected)
    inputs = [x, cases[0].A, cases[0].B]
    gradients = (torch.autograd.grad(y.square().sum(), inputs) for y in (found, expected))
    for gradient, wanted in zip(*gradients, strict=True):
        assert_close(gradient, wanted)


def operations(cases: Sequence[Problem], slots: Tensor) -> int:
    """How many operations the product starts, once the factors are stacked."""
    factors = [case.factors() for case in cases]
    blocks, runs = factors[0].blocks, factors[0].runs()
    entries = [run.of_matrix(cases[0].weight, blocks) for run in runs]
    x, own = torch.randn(len(slots), 1, blocks.in_features, dtype=torch.float64), stacked(factors, slots)
    total = torch.zeros(len(slots), 1, blocks.out_features, dtype=torch.float64)
    with torch.no_grad(), torch.autograd.profiler.profile() as profile:
        add_shared(total, x, own, Diagonal(blocks, runs, entries))
    return len(profile.function_events)


def test_many_adapters_start_no_more_operations_than_one() -> None:
    first = problem(12, 12, (2, 2, 2))
    many = [first._replace(A=torch.randn_like(first.A), B=torch.randn_like(first.B)) for _ in range(32)]
    assert operations(many, torch.arange(32)) == operations(many[:1], torch.zeros(32, dtype=torch.int64))


def test_a_gpu_takes_a_long_prompt_in_pieces_that_its_memory_holds() -> None:
    """A meta tensor is not on a CPU either."""
    taken = torch.zeros(32, 2 * MOST_ON_GPU)
    for groups, tokens in _pieces(torch.empty(*taken.shape, 8, device="meta"), rank=2):
        taken[groups, tokens] += 1
        assert 2 * taken[groups, tokens].numel() <= MOST_ON_GPU
    assert torch.equal(taken, torch.ones_like(taken))
    assert len(_pieces(torch.empty(32, 1, 8, device="meta"), rank=8)) == 1  # a token of each of 32 adapters
