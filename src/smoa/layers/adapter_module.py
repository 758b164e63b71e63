"""What every module with adapters does besides computing: its state dict, and casts of its parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn

from smoa.layers.distributed import partition_from_state_dict, partition_to_state_dict


class AdapterModule(nn.Module):
    """A module that is a `SmoaLayer` too: its state dict has labels and exact block scales, and no cast rounds them."""

    exact_scales: Any
    refresh_orders: Any

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(partition_to_state_dict)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(partition_from_state_dict)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_refresh_orders)  # type: ignore[no-untyped-call]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        with self.exact_scales():  # `.half()`, `.to(dtype)` and others call this
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _refresh_orders(layer: AdapterModule, incompatible_keys: object) -> None:
    """Load state dict post-hook: give a compiled model the orders of the loaded labels."""
    layer.refresh_orders()
