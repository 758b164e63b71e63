"""Training with an adapter for each row: each adapter gets the gradient of its own rows, as if it were alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from tests.support import tiny_models
from tests.support.adapted_models import QV, adapted, add_adapter
from tests.support.tolerance import assert_close

NAMES = ["other", "default", "other", "__base__"]


def two_adapters(**settings: Any) -> Any:
    model = adapted(tiny_models.build("llama").double(), target_modules=QV, **settings)
    add_adapter(model, "other", target_modules=QV, **settings)
    model.base_model.set_adapter(["default", "other"])
    return model.train()


def rows() -> Tensor:
    return torch.randint(3, 20, (4, 6), generator=torch.Generator().manual_seed(0))


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def step(model: Any, ids: Tensor, **options: Any) -> dict[str, Tensor]:
    (model(input_ids=ids, **options).logits.float().square().sum() / 100).backward()
    return gradients(model)


def each_alone(model: Any, ids: Tensor) -> dict[str, Tensor]:
    found = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        mine = torch.tensor([row for row, own in enumerate(NAMES) if own == name])
        found |= step(model, ids[mine])
    model.base_model.set_adapter(["default", "other"])
    return found


@pytest.mark.parametrize("modulation", ["hadamard", "none"])
def test_each_adapter_gets_the_gradient_of_its_own_rows(modulation: str) -> None:
    model = two_adapters(modulation=modulation)
    expected = each_alone(model, rows())
    found = step(model, rows(), adapter_names=NAMES)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert_close(gradient, expected[name])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_computes_the_same_rows_again(reentrant: bool) -> None:
    model = two_adapters()
    expected = step(model, rows(), adapter_names=NAMES)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    first = model(input_ids=rows(), adapter_names=NAMES).logits.float().square().sum() / 100
    model(input_ids=rows(), adapter_names=["default"] * 4)  # another batch before the backward
    first.backward()
    for name, gradient in gradients(model).items():
        assert_close(gradient, expected[name])


def test_another_checkpoint_is_refused() -> None:
    model = two_adapters()
    layer: Any = next(m for m in model.modules() if hasattr(m, "smoa_A"))
    x = torch.randn(4, 3, layer.in_features, dtype=torch.float64, requires_grad=True)

    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return layer(x, **options)  # type: ignore[no-any-return]

    options: dict[str, Any] = {"adapter_names": NAMES}
    y = checkpoint(Block(), x, use_reentrant=True)
    options.clear()
    with pytest.raises(ValueError, match="checkpoint"):
        y.sum().backward()


def test_autocast_multiplies_a_mixed_batch_in_its_dtype(tiny_llama: PreTrainedModel) -> None:
    model = adapted(tiny_llama, target_modules=QV)
    add_adapter(model, "other", target_modules=QV)
    model.base_model.set_adapter(["default", "other"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = step(model.train(), rows(), adapter_names=NAMES)
    exact = step(model, rows(), adapter_names=NAMES)
    for name, gradient in found.items():
        assert (gradient - exact[name]).norm() < 0.08 * exact[name].norm()


def test_dropout_acts_on_each_row() -> None:
    model = two_adapters(smoa_dropout=0.5)
    first, second = (step(model, rows(), adapter_names=NAMES) for _ in range(2))
    assert any(not torch.equal(first[name], second[name]) for name in first)
    model.eval()
    first, second = (step(model, rows(), adapter_names=NAMES) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_ddp_passes_the_names_on(tmp_path: Path) -> None:
    model = two_adapters()
    expected = step(model, rows(), adapter_names=NAMES)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        (wrapped(input_ids=rows(), adapter_names=NAMES).logits.float().square().sum() / 100).backward()
    finally:
        dist.destroy_process_group()
    for name, gradient in gradients(model).items():
        assert_close(gradient, expected.get(name, torch.zeros_like(gradient)))
