from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from smoa import SmoaConfig
from smoa.layers.linear import Linear
from smoa.layers.weight_cache import DIAGONAL, open_caches
from tests.support.layers import adapted_layer, add_adapter, base_layer, layers_of, oracle_output
from tests.support.tolerance import assert_close


def output(layer: Linear, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)


@pytest.mark.parametrize(
    ("dtype", "modulation", "conv1d"),
    [(torch.float64, "hadamard", True), (torch.float32, "none", False), (torch.bfloat16, "hadamard", True)],
)
def test_the_cache_does_not_change_the_output(dtype: torch.dtype, modulation: str, conv1d: bool) -> None:
    layer = adapted_layer(base_layer(13, 11, dtype=dtype, conv1d=conv1d), num_blocks=3, modulation=modulation)
    x = torch.randn(2, 3, 11).to(dtype)
    expected, calls = output(layer, x), []
    layer.base_layer.register_forward_hook(lambda *args: calls.append(1))
    with open_caches([layer]):
        for _ in range(2):
            assert_close(output(layer, x), expected, dtype)
    assert calls == [1, 1]


def change_labels(layer: Linear) -> None:
    rows = layer.smoa_row_labels["default"].flip(0)
    layer.load_state_dict({"smoa_row_labels.default": rows}, strict=False)


def replace_factor(layer: Linear) -> None:
    layer.smoa_A["default"].weight = torch.nn.Parameter(torch.randn_like(layer.smoa_A["default"].weight))


def train_a_step(layer: Linear) -> None:
    optimizer = torch.optim.AdamW([layer.smoa_B["default"].weight], lr=1.0, fused=True)  # the counters miss it
    with torch.enable_grad():
        layer(torch.randn(2, 12)).sum().backward()
    optimizer.step()


CHANGES: dict[str, Callable[[Linear], object]] = {
    "a step": train_a_step,
    "a factor": lambda layer: layer.smoa_B["default"].weight.mul_(3),
    "another factor": replace_factor,
    "the base": lambda layer: layer.get_base_layer().weight.mul_(2),
    "labels": change_labels,
    "scale": lambda layer: layer.set_scale("default", 7),
    "dtype": lambda layer: layer.double(),
    "another adapter": lambda layer: layer.set_adapter(["default", "other"]),
    "disabled": lambda layer: layer.enable_adapters(False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(change: str) -> None:
    layer = adapted_layer(base_layer(12, 12, dtype=torch.float32, conv1d=True), num_blocks=3)
    layer.update_layer("other", SmoaConfig(r=4, num_blocks=2, init_weights=False))
    layer.set_adapter("default")
    x = torch.randn(2, 12)
    with open_caches([layer]):
        before = output(layer, x)
        with torch.no_grad():
            CHANGES[change](layer)
        x = x.to(layer.get_base_layer().weight.dtype)
        cached = output(layer, x)
    torch.testing.assert_close(cached, output(layer, x))
    if change != "dtype":
        assert not torch.allclose(cached, before)


CHANGES_OF_BATCHES: dict[str, Callable[[Linear], object]] = {
    **{name: CHANGES[name] for name in ("a step", "a factor", "another factor", "labels", "scale", "dtype")},
    "replaced scales": lambda layer: layer.smoa_block_scale.__setitem__(
        "default", layer.smoa_block_scale["default"] * 2
    ),
    "another adapter of the name": lambda layer: add_adapter(layer, "default", num_blocks=3),
}


@pytest.mark.parametrize("change", CHANGES_OF_BATCHES)
@torch.no_grad()
def test_a_batch_of_many_adapters_sees_every_change_in_the_next_forward(change: str) -> None:
    layer = adapted_layer(base_layer(12, 12, dtype=torch.float32), num_blocks=3)
    add_adapter(layer, "other", num_blocks=3)
    model, batch = torch.nn.ModuleList([layer, adapted_layer(base_layer(12, 12), num_blocks=3)]).eval(), {}
    batch["adapter_names"] = ["other", "default"]
    with open_caches(layers_of(model)):
        before = layer(x := torch.randn(2, 12), **batch)
        CHANGES_OF_BATCHES[change](layer)
        kept = layer(x := x.to(layer.get_base_layer().weight.dtype), **batch)
    torch.testing.assert_close(kept, layer(x, **batch))
    if change != "dtype":
        assert not torch.allclose(kept, before)


def bytes_of_blocks(layer: Any) -> int:
    """Of the blocks of W that are kept."""
    kept = layer.smoa_weight_cache.kept
    return sum(part.nbytes for slot, (_, parts) in kept.items() if slot[0] == DIAGONAL for part in parts)


def test_only_what_a_call_uses_is_kept() -> None:
    layer = adapted_layer(base_layer(12, 12), num_blocks=3)
    add_adapter(layer, "other", num_blocks=2)
    layer.set_adapter("default")
    x = torch.randn(2, 12, dtype=torch.float64)
    blocks = {"default": 3 * 4 * 4 * 8, "other": 2 * 6 * 6 * 8}
    with open_caches([layer]), torch.no_grad():
        layer(x)
        assert layer.smoa_weight_cache.nbytes() == blocks["default"]
        layer(x, adapter_names=["default", "other"])
        assert bytes_of_blocks(layer) == sum(blocks.values())
        layer(x, adapter_names=["other", "__base__"])
        assert bytes_of_blocks(layer) == sum(blocks.values())  # of W, for the next batch
        layer(x)
        assert layer.smoa_weight_cache.nbytes() == sum(blocks.values()) + blocks["default"]


def test_a_compiled_model_keeps_nothing() -> None:
    torch.compiler.reset()
    layer = adapted_layer(base_layer(12, 12), route="apart")
    x = torch.randn(2, 12, dtype=torch.float64)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with open_caches([layer]), torch.no_grad():
        assert_close(compiled(x), oracle_output(layer, x))
        assert layer.smoa_weight_cache.nbytes() == 0


def test_nothing_is_kept_between_a_backward_and_the_step_after_it() -> None:
    first, second = (adapted_layer(base_layer(12, 12, dtype=torch.float32)) for _ in range(2))
    model, x = torch.nn.Sequential(first, second), torch.randn(2, 12)
    optimizer = torch.optim.AdamW(
        [part["default"].weight for part in (first.smoa_B, second.smoa_B)], lr=1.0, fused=True
    )
    with open_caches(layers_of(model)):
        output(model, x)
        model(x).sum().backward()
        before = output(model, x)
        optimizer.step()
        after = output(model, x)
        optimizer.zero_grad()
        kept = output(model, x)
    assert_close(after, output(model, x))
    assert_close(kept, output(model, x))
    assert not torch.allclose(before, after, atol=1e-3)
