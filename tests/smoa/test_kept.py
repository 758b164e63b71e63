import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from smoa.adapter_names import Call, opened
from smoa.kept import snapshot_of
from smoa.linear import Linear
from tests.support.layers import adapted_layer, add_adapter, assert_close, base_layer, oracle_output


def output(layer: Linear, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)


@pytest.mark.parametrize(
    ("dtype", "modulation", "conv1d"),
    [(torch.float64, "hadamard", True), (torch.float32, "none", False), (torch.bfloat16, "hadamard", True)],
)
def test_what_is_kept_does_not_change_the_output(dtype: torch.dtype, modulation: str, conv1d: bool) -> None:
    layer = adapted_layer(base_layer(13, 11, dtype=dtype, conv1d=conv1d), num_blocks=3, modulation=modulation)
    x = torch.randn(2, 3, 11).to(dtype)
    expected, calls = output(layer, x), []
    layer.base_layer.register_forward_hook(lambda *args: calls.append(1))
    with snapshot_of([layer]):
        for _ in range(2):
            assert_close(output(layer, x), expected, dtype)
    assert calls == [1, 1]


def change_labels(layer: Linear) -> None:
    rows, cols, scale = layer.partition_of("default")
    parts = zip(("row_labels", "col_labels", "block_scale"), (rows.flip(0), cols, scale), strict=True)
    layer.load_state_dict({f"smoa_{part}.default": tensor for part, tensor in parts}, strict=False)


def change_scales(layer: Linear) -> None:
    rows, cols, _ = layer.partition_of("default")
    layer.set_partition("default", (rows, cols, torch.ones(3)))


def replace_factor(layer: Linear) -> None:
    layer.smoa_A["default"].weight = torch.nn.Parameter(torch.randn_like(layer.smoa_A["default"].weight))


def train_a_step(layer: Linear) -> None:
    optimizer = torch.optim.AdamW([layer.smoa_B["default"].weight], lr=1.0, fused=True)  # the counters miss it
    with torch.enable_grad():
        layer(torch.randn(2, 12)).sum().backward()
    optimizer.step()


VALUES: dict[str, Callable[[Any], object]] = {
    "a step": train_a_step,
    "a factor": lambda layer: layer.smoa_B["default"].weight.mul_(3),
    "another factor": replace_factor,
    "past the version counter": lambda layer: layer.smoa_A["default"].weight.data.add_(1),
    "its storage": lambda layer: setattr(layer.smoa_B["default"].weight, "data", torch.randn(4, 16)),
    "its module": lambda layer: layer.smoa_A.update({"default": torch.nn.Linear(4, 16, bias=False)}),
    "the base": lambda layer: layer.get_base_layer().weight.mul_(2),
    "labels": change_labels,
    "scale": lambda layer: layer.set_scale("default", 7),
    "block scales": change_scales,
}
CHOICES: dict[str, Callable[[Any], object]] = {
    "another adapter of the name": lambda layer: add_adapter(layer, "default", num_blocks=3),
    "another adapter": lambda layer: layer.set_adapter(["default", "other"]),
    "disabled": lambda layer: layer.enable_adapters(False),
    "dtype": lambda layer: layer.double(),
}
"""Which adapters compute, and in what."""


def two_adapters() -> Linear:
    settings = {"num_blocks": 3, "other_base": True}  # so that any blocks and scales may come
    layer = adapted_layer(base_layer(12, 12, dtype=torch.float32), **settings).eval()
    add_adapter(layer, "other", **settings)
    layer.set_adapter("default")
    return layer


@pytest.mark.parametrize("change", [*VALUES, *CHOICES])
@torch.no_grad()
def test_every_change_is_seen_in_the_next_forward(change: str) -> None:
    names = [None] if change in ("another adapter", "disabled") else [None, ["other", "default"]]
    for own in names:
        layer, x, batch = two_adapters(), torch.randn(2, 12), {} if own is None else {"adapter_names": own}
        before = layer(x, **batch)
        (VALUES | CHOICES)[change](layer)
        found = layer(x := x.to(layer.get_base_layer().weight.dtype), **batch)
        torch.testing.assert_close(found, by_its_updates(layer, x, own))
        assert change == "dtype" or not torch.allclose(found, before)


@pytest.mark.parametrize("change", VALUES)
@torch.no_grad()
def test_a_value_that_changes_in_a_snapshot_counts_from_the_next_one_on(change: str) -> None:
    layer, x, names = two_adapters(), torch.randn(2, 12), ["other", "default"]
    call = Call(("other", "default"))
    with snapshot_of([layer]), opened(call):
        layer(x)
    with snapshot_of([layer]):
        before = layer(x)
        with opened(call):
            mixed = layer(x)
            VALUES[change](layer)
            if change != "the base":  # whose own product is never kept
                torch.testing.assert_close(layer(x), mixed)
        if change != "the base":
            torch.testing.assert_close(layer(x), before)
        with snapshot_of([layer]):  # of a call within
            torch.testing.assert_close(layer(x), by_its_updates(layer, x, None))
            with opened(call):
                torch.testing.assert_close(layer(x), by_its_updates(layer, x, names))


@pytest.mark.parametrize("change", CHOICES)
@torch.no_grad()
def test_a_choice_counts_at_once(change: str) -> None:
    layer, x = two_adapters(), torch.randn(2, 12)
    with snapshot_of([layer]):
        layer(x)
        CHOICES[change](layer)
        x = x.to(layer.get_base_layer().weight.dtype)
        torch.testing.assert_close(layer(x), by_its_updates(layer, x, None))


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
    with snapshot_of([layer]) as snapshot, torch.no_grad():
        assert_close(compiled(x), oracle_output(layer, x))
        assert not snapshot.kept


def test_nothing_is_kept_with_gradients_in_another_thread_or_of_another_model() -> None:
    layer, other, x = two_adapters(), two_adapters(), torch.randn(2, 12)
    with snapshot_of([layer]) as snapshot:
        layer(x)
        output(other, x)
        thread = threading.Thread(target=output, args=(layer, x))
        thread.start()
        thread.join()
        assert not snapshot.kept
        output(layer, x)
        assert snapshot.kept
