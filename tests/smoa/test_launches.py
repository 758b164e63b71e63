"""What a training step of an adapted layer starts on a device, and what a compiled one keeps for its backward."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from smoa.kernels import blocks as by_blocks
from smoa.kernels import one_product
from smoa.layer import SmoaLayer
from tests.support.layers import adapted_layer, assert_path, base_layer, factors, take_route
from tests.support.watch import SORTS_OR_WAITS, count

PARTITIONS = ["spectral", "contiguous"]
LAUNCHES = {"apart": (16, 28), "one product": (26, 50)}
"""Of a forward and of a backward, at most."""


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    take_route("apart")
    monkeypatch.setattr(by_blocks, "PIECE", 1 << 60)
    monkeypatch.setattr(by_blocks, "_pieces_of", by_blocks._pieces_of.__wrapped__)  # without its cache
    torch.compiler.reset()


def adapted(dtype: torch.dtype, **config: object) -> tuple[SmoaLayer, Tensor, Tensor]:
    """A layer after its first step, with an input and a gradient for its output."""
    layer = adapted_layer(base_layer(96, 64, dtype=dtype), **({"r": 16} | config))
    layer.get_base_layer().requires_grad_(False)
    x, g = torch.randn(5, 64, dtype=dtype, requires_grad=True), torch.randn(5, 96, dtype=dtype)
    layer(x).backward(g)
    layer.zero_grad()
    x.grad = None
    return layer, x, g


def launches_of(layer: SmoaLayer, x: Tensor, g: Tensor, patch: pytest.MonkeyPatch) -> tuple[list[str], list[str]]:
    """Of the forward and of the backward."""
    outputs: list[Tensor] = []
    forward = count(lambda: outputs.append(layer(x)), patch)
    return forward, count(lambda: outputs[0].backward(g), patch)


@pytest.mark.usefixtures("multiplies_bfloat16")
@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize(
    ("route", "dtype"), [("apart", torch.bfloat16), ("apart", torch.float32), ("one product", torch.bfloat16)]
)
def test_a_step_starts_few_operations_whatever_the_number_of_blocks(
    route: str, dtype: torch.dtype, partition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_route(route)
    monkeypatch.setattr(one_product, "PIECE", 1 << 60)
    most, found = LAUNCHES[route], set()
    for num_blocks in (2, 8, 16):
        forward, backward = launches_of(*adapted(dtype, num_blocks=num_blocks, partition=partition), monkeypatch)
        assert len(forward) <= most[0], forward
        assert len(backward) <= most[1], backward
        assert not SORTS_OR_WAITS & {*forward, *backward}
        found.add((len(forward), len(backward)))
    assert len(found) == 1


def test_ragged_blocks_start_four_times_as_much_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = adapted_layer(base_layer(97, 67, dtype=torch.bfloat16), r=7, num_blocks=5)
    x, g = torch.randn(5, 67).bfloat16().requires_grad_(), torch.randn(5, 97).bfloat16()
    forward, backward = launches_of(layer, x, g, monkeypatch)
    assert len(forward) <= 4 * LAUNCHES["apart"][0]
    assert len(backward) <= 4 * LAUNCHES["apart"][1]


@pytest.mark.slow  # compiles C++
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of inductor's own imports
@pytest.mark.filterwarnings("ignore:`torch._prims:FutureWarning")
def test_a_layer_compiled_by_inductor_fuses_and_keeps_the_input_and_the_factors_only() -> None:
    layer, x, _ = adapted(torch.float32, num_blocks=4)
    compiled = torch.compile(layer, fullgraph=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = compiled(x)
    own = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters(), *layer.buffers())}
    sizes = [t.numel() for t in kept if t.untyped_storage().data_ptr() not in own]
    assert max(sizes, default=0) <= max(factor.numel() for factor in factors(layer)) + x.numel()
    assert torch._inductor.metrics.generated_kernel_count > 0
    assert_path(layer, y, x)


def test_a_compiled_layer_may_be_checkpointed() -> None:
    layer, x, _ = adapted(torch.float64, smoa_dropout=0.1, r=7, num_blocks=3)
    layer.eval()
    compiled = torch.compile(lambda x: checkpoint(layer, x, use_reentrant=False), fullgraph=True, backend="aot_eager")
    assert_path(layer, compiled(x), x)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))
