"""The methods of studies/neighbours against naive loops, in float64."""

import importlib.util
import math
import sys
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

FILE = Path(__file__).parents[2] / "studies" / "neighbours" / "neighbours.py"
M, N = 12, 8


def _loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("neighbours", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["neighbours"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


neighbours = _loaded()
FORMS = {
    "lora": neighbours.LowRank(4, alpha=6.0),
    "hira": neighbours.Grid(4),
    "bhra 2": neighbours.Grid(4, blocks=2),
    "bhra 4": neighbours.Grid(4, blocks=4),
    "control": neighbours.Grid(4, blocks=2, modulated=False),
    "abba": neighbours.Abba(4, alpha=3.0),
}
of_each_form = pytest.mark.parametrize("name", FORMS)


def in_loops(name: str, f: dict[str, Tensor], W: Tensor) -> Tensor:
    """ΔW entry by entry, as the papers write it."""
    entries = []
    for i, j in product(range(M), range(N)):
        if name == "lora":
            entry = 6.0 / 4 * sum(f["B"][i, k] * f["A"][k, j] for k in range(4))
        elif name == "abba":
            first = sum(f["B1"][i, k] * f["A1"][k, j] for k in range(2))
            entry = 9.0 / math.sqrt(2 * 2) * first * sum(f["B2"][i, k] * f["A2"][k, j] for k in range(2))
        else:
            b = FORMS[name].blocks
            (p, row), (q, column) = divmod(i, M // b), divmod(j, N // b)
            entry = sum(f["B"][p, q, row, k] * f["A"][p, q, k, column] for k in range(4 // b))
            entry = entry if name == "control" else W[i, j] * entry
        entries.append(entry)
    return torch.stack(entries).reshape(M, N)


def drawn(name: str) -> tuple[dict[str, Tensor], Tensor]:
    """Factors that are zero nowhere, and W."""
    torch.manual_seed(0)
    W = torch.randn(M, N, dtype=torch.float64)
    return {key: torch.randn(t.shape, dtype=torch.float64) for key, t in FORMS[name].start(W).items()}, W


@of_each_form
def test_a_form_is_what_its_paper_says_in_values_and_gradients(name: str) -> None:
    form, (factors, W) = FORMS[name], drawn(name)
    x, weights = torch.randn(3, 2, N, dtype=torch.float64), torch.randn(3, 2, M, dtype=torch.float64)
    ways = {
        "loops": lambda f: x @ in_loops(name, f, W).T,
        "delta": lambda f: x @ form.delta(f, W).T,
        "apply": lambda f: form.apply(x, f, W),
    }
    found = {}
    for way, updated in ways.items():
        own = {key: tensor.clone().requires_grad_() for key, tensor in factors.items()}
        value = updated(own)
        found[way] = [value, *torch.autograd.grad((value * weights).sum(), list(own.values()))]
    for way in ("delta", "apply"):
        torch.testing.assert_close(found[way], found["loops"], rtol=1e-12, atol=1e-12)


@of_each_form
def test_a_form_trains_as_many_numbers_as_lora_and_starts_at_no_change(name: str) -> None:
    form, W = FORMS[name], torch.randn(M, N)
    factors = form.start(W)
    assert sum(tensor.numel() for tensor in factors.values()) == 4 * (M + N)
    assert not form.delta(factors, W).any()
    layer = neighbours.Adapted(nn.Linear(N, M), form)
    layer(torch.randn(5, N)).square().sum().backward()
    assert layer.base.weight.grad is None
    last = "B2" if name == "abba" else "B"
    assert [key for key, factor in layer.factors.items() if factor.grad is not None and factor.grad.any()] == [last]


@of_each_form
def test_no_delta_has_a_higher_rank_than_its_bound_and_random_factors_reach_it(name: str) -> None:
    factors, W = drawn(name)
    assert torch.linalg.matrix_rank(FORMS[name].delta(factors, W)) == FORMS[name].rank_bound(M, N)


def test_one_block_is_hira_and_a_grid_of_rank_one_blocks_reaches_what_hira_needs_their_square_for() -> None:
    W = torch.ones(M, N, dtype=torch.float64)  # ΔW is the factors' product then
    factors = {key: torch.randn(t.shape, dtype=torch.float64) for key, t in FORMS["bhra 4"].start(W).items()}
    assert torch.linalg.matrix_rank(FORMS["bhra 4"].delta(factors, W)) == N  # of 16 blocks of rank one
    hira = {key: torch.randn(t.shape, dtype=torch.float64) for key, t in FORMS["hira"].start(W).items()}
    whole = hira["B"][0, 0] @ hira["A"][0, 0]
    torch.testing.assert_close(FORMS["hira"].delta(hira, W), whole)


def test_abba_starts_from_the_best_approximation_of_w() -> None:
    torch.manual_seed(0)
    W = torch.randn(40, 24) @ torch.randn(24, 30)
    form = neighbours.Abba(6, alpha=3.0)
    factors = form.start(W)
    U, S, Vh = torch.linalg.svd(W)
    torch.testing.assert_close(factors["B1"] @ factors["A1"], (U[:, :3] * S[:3]) @ Vh[:3], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(factors["B1"].norm(dim=0), factors["A1"].norm(dim=1))
    assert form.scale == 3.0
    assert factors["A2"].abs().max() <= math.sqrt(6 / 30)
    with pytest.raises(ValueError, match="halves r"):
        neighbours.Abba(1, alpha=3.0).start(W)


def test_a_grid_that_does_not_divide_the_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="a grid of 5 × 5 blocks"):
        neighbours.Grid(5, blocks=5).start(torch.randn(M, N))
