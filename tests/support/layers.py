"""One adapted layer and what the oracle says about it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from smoa import SmoaConfig
from smoa.compat import PREFIX
from smoa.conv import Convolution
from smoa.embedding import Embedding
from smoa.kernels import one_product
from smoa.layer import SmoaLayer
from tests import oracle

# (out_features, in_features, num_blocks): square, tall, wide, K that divides neither side, K = min(m, n), K = 1.
SHAPES = [(12, 12, 3), (17, 10, 4), (9, 16, 2), (11, 13, 5), (6, 7, 6), (8, 5, 1)]
ROUTES = ["one product", "apart"]


def take_route(route: str | None) -> None:
    """The rest of the test forms W + ΔW wherever that is allowed ("one product"), or nowhere ("apart")."""
    if route is not None:
        one_product.MIN_TOKENS = 0 if route == "one product" else 1 << 60
    if route == "apart":
        Convolution.fits_one_product = Embedding.fits_one_product = SmoaLayer.fits_one_product  # type: ignore[method-assign]


class Wrapper(nn.Module):
    """A model of one linear layer, named `layer`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.layer(x, **kwargs)


def base_layer(
    out_features: int,
    in_features: int,
    *,
    conv1d: bool = False,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
) -> nn.Module:
    """A Linear, or a Conv1D of the same function, with a bias that is not zero."""
    if not conv1d:
        return nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    layer = Conv1D(out_features, in_features).to(dtype)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


def adapted_layer(
    base: nn.Module, adapter: str = "default", *, trained: bool = True, route: str | None = None, **config: Any
) -> SmoaLayer:
    """`base` with a SMoA adapter whose factors hold random numbers, as if trained (unless `trained=False`).

    With `route` the rest of the test takes it.
    """
    take_route(route)
    model = inject_adapter_in_model(SmoaConfig(target_modules=["layer"], **config), Wrapper(base), adapter)
    if trained:
        randomise(model.layer, adapter)
    return model.layer


def add_adapter(layer: SmoaLayer, adapter: str, **config: Any) -> None:
    """A second adapter on the same layer, also with random factors; all adapters become active."""
    inject_adapter_in_model(SmoaConfig(target_modules=["layer"], **config), Wrapper(layer), adapter)
    randomise(layer, adapter)
    layer.set_adapter(sorted(layer.smoa_A))


def factors(layer: SmoaLayer, adapter: str = "default") -> tuple[nn.Parameter, nn.Parameter]:
    """A (r, ceil(n / K)) and B (ceil(m / K), r)."""
    return layer.smoa_A[adapter].weight, layer.smoa_B[adapter].weight


def randomise(layer: SmoaLayer, adapter: str = "default", scale: float = 0.5) -> None:
    """Fill the entries of A and B that are not padding."""
    in_A, in_B = oracle.real_entries(layer.out_features, layer.in_features, ranks(layer, adapter))
    A, B = factors(layer, adapter)
    with torch.no_grad():
        A.copy_(torch.randn_like(A) * in_A.to(A) * scale)
        B.copy_(torch.randn_like(B) * in_B.to(B) * scale)


def base_weight(layer: nn.Module) -> Tensor:
    """W (out_features, in_features) of a base layer or of an adapted one that is not merged."""
    base = layer.get_base_layer() if isinstance(layer, SmoaLayer) else layer
    return base.weight.detach().T if isinstance(base, Conv1D) else base.weight.detach().flatten(1)


def labels(layer: SmoaLayer, adapter: str = "default") -> tuple[list[int], list[int]]:
    return layer.smoa_row_labels[adapter].tolist(), layer.smoa_col_labels[adapter].tolist()


def ranks(layer: SmoaLayer, adapter: str = "default") -> list[int]:
    """r_k of every block."""
    return list(layer.adapters[adapter].ranks)


def oracle_delta(
    layer: SmoaLayer,
    adapter: str = "default",
    *,
    weight: Tensor | None = None,
    A: Tensor | None = None,
    B: Tensor | None = None,
) -> Tensor:
    """The oracle's delta W (m, n) in float64, from the layer's factors and labels and from W or `weight`."""
    own_A, own_B = factors(layer, adapter)
    return oracle.delta_weight(
        (base_weight(layer) if weight is None else weight).double(),
        (own_A.detach() if A is None else A).double(),
        (own_B.detach() if B is None else B).double(),
        *labels(layer, adapter),
        ranks(layer, adapter),
        [layer.scaling[adapter] * s for s in layer.decided(adapter).block_scale.tolist()],
        layer.adapters[adapter].modulation,
    )


def oracle_output(layer: SmoaLayer, x: Tensor, *adapters: str) -> Tensor:
    """The oracle's y in float64 with the given adapters active and dropout off; no adapter named means "default"."""
    bias = layer.get_base_layer().bias
    deltas = [oracle_delta(layer, adapter) for adapter in adapters or ("default",)]
    return oracle.forward(x.double(), base_weight(layer).double(), None if bias is None else bias.double(), deltas)


def smoa_layers(model: nn.Module) -> dict[str, SmoaLayer]:
    """Adapted layers by their names in the base model."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, SmoaLayer)}
    return {name.removeprefix(PREFIX): layer for name, layer in found.items()}


def layers_of(model: nn.Module) -> list[SmoaLayer]:
    """Adapted layers in the model's order."""
    return list(smoa_layers(model).values())


def clone_leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """A context in which PyTorch makes tensors of this dtype by default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def stored_bits(module: nn.Module) -> dict[str, bytes]:
    """Every byte that a module keeps: weights, and of quantized ones scales, their statistics and biases."""
    return {name: _bytes(value) for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def _bytes(tensor: Tensor) -> bytes:
    if hasattr(tensor, "__tensor_flatten__") and type(tensor) is not nn.Parameter:
        names, _ = tensor.__tensor_flatten__()
        return b"".join(_bytes(getattr(tensor, name)) for name in names)
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
