from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from smoa.layers.linear import Linear
from smoa.layers.weight_cache import open_caches
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


CHANGES: dict[str, Callable[[Any], object]] = {
    "a step": train_a_step,
    "a factor": lambda layer: layer.smoa_B["default"].weight.mul_(3),
    "another factor": replace_factor,
    "the base": lambda layer: layer.get_base_layer().weight.mul_(2),
    "labels": change_labels,
    "scale": lambda layer: layer.set_scale("default", 7),
    "block scales": lambda layer: layer.smoa_block_scale.__setitem__("default", torch.ones(3)),
    "another adapter of the name": lambda layer: add_adapter(layer, "default", num_blocks=3),
    "dtype": lambda layer: layer.double(),
}
OF_ACTIVE: dict[str, Callable[[Any], object]] = {
    "another adapter": lambda layer: layer.set_adapter(["default", "other"]),
    "disabled": lambda layer: layer.enable_adapters(False),
}
"""Which a mixed batch does not ask for."""
UNSEEN: dict[str, Callable[[Any], object]] = {
    "past the version counter": lambda layer: layer.smoa_A["default"].weight.data.add_(1),
    "its storage": lambda layer: setattr(layer.smoa_B["default"].weight, "data", torch.randn(4, 16)),
    "its module": lambda layer: layer.smoa_A.update({"default": torch.nn.Linear(4, 16, bias=False)}),
}
"""By the counters that `generate` trusts."""


@pytest.mark.parametrize("change", [*CHANGES, *OF_ACTIVE, *UNSEEN])
@torch.no_grad()
def test_every_change_is_seen_in_the_next_forward(change: str) -> None:
    for names in (None,) if change in OF_ACTIVE else (None, ["other", "default"]):
        for caches in (nullcontext,) if change in UNSEEN else (nullcontext, open_caches):
            layer = adapted_layer(base_layer(12, 12, dtype=torch.float32), num_blocks=3).eval()
            add_adapter(layer, "other", num_blocks=3)
            layer.set_adapter("default")
            x, batch = torch.randn(2, 12), {} if names is None else {"adapter_names": names}
            with caches([layer]):
                before = layer(x, **batch)
                (CHANGES | OF_ACTIVE | UNSEEN)[change](layer)
                found = layer(x := x.to(layer.get_base_layer().weight.dtype), **batch)
            torch.testing.assert_close(found, by_its_updates(layer, x, names))
            assert change == "dtype" or not torch.allclose(found, before)


def by_its_updates(layer: Any, x: Tensor, names: list[str] | None) -> Tensor:
    base, rows = layer.get_base_layer(), []
    for row, own in zip(x, [layer.active_adapters] * 2 if names is None else [[name] for name in names], strict=True):
        weight = base.weight + sum(layer.delta(name) for name in own if not layer.disable_adapters)
        rows.append(torch.nn.functional.linear(row, weight, base.bias))
    return torch.stack(rows)


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
