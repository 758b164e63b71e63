"""How far two routes to the same number may lie apart, by dtype: the one table for all tests."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from smoa import SmoaConfig
from smoa.compat import PREFIX
from smoa.conv import Convolution
from smoa.embedding import Embedding
from smoa.kernels import one_product
from smoa.kernels.factors import Factors
from smoa.kernels.one_product import Update
from smoa.layer import SmoaLayer
from smoa.partition import Blocks
from smoa.spectrum import make_partition
from tests import oracle

# How far two routes to the same number may lie apart, by dtype: the one table for all tests.


class Tolerance(NamedTuple):
    rtol: float
    atol: float


TOLERANCE: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(rtol=1e-10, atol=1e-10),
    torch.float32: Tolerance(rtol=1e-4, atol=1e-5),
    torch.float16: Tolerance(rtol=1e-2, atol=1e-2),
    torch.bfloat16: Tolerance(rtol=5e-2, atol=5e-2),
}


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
    """Compare within the tolerance of `dtype`, by default the coarser of the two; a failure prints the errors."""
    dtype = dtype or max(actual.dtype, expected.dtype, key=lambda d: TOLERANCE[d].rtol)
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, check_dtype=False, **kwargs)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖, in float64."""
    return float((actual.detach().double() - expected).norm() / expected.norm())


# One adapted layer and what the oracle says about it.


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


# Small layers of each kind, inputs for them, and what the oracle says that they give.


CONVS: dict[str, dict[str, Any]] = {
    "conv1d": {"kernel_size": 3, "stride": 2, "padding": 1},
    "conv1d_same": {"kernel_size": 4, "padding": "same", "dilation": 2},
    "conv1d_valid": {"kernel_size": 2, "padding": "valid", "bias": False},
    "conv2d": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
    "conv2d_1x1": {"kernel_size": 1},
    "conv2d_groups": {"kernel_size": 2, "groups": 2},
    "conv2d_depthwise": {"kernel_size": 3, "padding": 1, "groups": 4},
    "conv2d_reflect": {"kernel_size": (2, 3), "padding": (1, 2), "padding_mode": "reflect"},
    "conv2d_replicate": {"kernel_size": 2, "padding": 2, "padding_mode": "replicate"},
    "conv2d_circular": {"kernel_size": (3, 2), "padding": "same", "padding_mode": "circular"},
    "conv3d": {"kernel_size": (2, 1, 2), "stride": (1, 2, 1), "padding": (0, 1, 1)},
}
"""Four channels to eight, in one to three dimensions, with every way of moving and padding a kernel."""
KINDS = ("linear", "conv1d_of_gpt2", "embedding", "conv1d", "conv2d", "conv2d_groups", "conv3d")
"""One layer of each kind."""


def kind_of_layer(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A base layer."""
    if kind in ("linear", "conv1d_of_gpt2"):
        return base_layer(11, 13, conv1d=kind == "conv1d_of_gpt2", dtype=dtype)
    if kind == "embedding":
        return nn.Embedding(17, 10, dtype=dtype)
    conv: Callable[..., nn.Module] = getattr(nn, kind.split("_")[0].replace("conv", "Conv"))
    return conv(4, 8, **CONVS[kind], dtype=dtype)


def input_of(kind: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """A batch of two samples."""
    if kind == "embedding":
        return torch.tensor([[3, 16, 0], [5, 3, 12]])
    if kind in ("linear", "conv1d_of_gpt2"):
        return torch.randn(2, 13, dtype=dtype)
    sizes: Sequence[int] = {"1": (7,), "2": (3, 4), "3": (2, 3, 2)}[kind[4]]
    return torch.randn(2, 4, *sizes, dtype=dtype)


def applied(base: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """What the oracle says that a base layer with the matrix `weight` gives for x, without the bias."""
    if isinstance(base, nn.Embedding):
        return oracle.embedding(x.flatten().tolist(), weight).view(*x.shape, -1)
    if not isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return oracle.forward(x, weight, None, [])
    kernel = weight.view(base.weight.shape)
    settings = {"stride": base.stride, "dilation": base.dilation, "groups": base.groups, "mode": base.padding_mode}
    return oracle.convolution(x, kernel, padding=padding_of(base), **settings)


def padding_of(base: Any) -> list[tuple[int, int]]:
    if isinstance(base.padding, str):
        totals = [
            d * (k - 1) if base.padding == "same" else 0 for d, k in zip(base.dilation, base.kernel_size, strict=True)
        ]
        return [(total // 2, total - total // 2) for total in totals]
    return [(size, size) for size in base.padding]


def oracle_of(layer: SmoaLayer, x: Tensor, *adapters: str, **factors: Tensor) -> Tensor:
    """What the oracle says that an adapted layer gives with these adapters active, in float64."""
    base = layer.get_base_layer()
    deltas = [oracle_delta(layer, name, **factors) for name in adapters or ("default",)]
    weight = oracle.effective_weight(base_weight(layer).double(), deltas)
    y = applied(base, x if isinstance(base, nn.Embedding) else x.double(), weight)
    bias = getattr(base, "bias", None)
    if bias is None:
        return y
    shape = (-1, *(1 for _ in getattr(base, "kernel_size", ())))
    return y + bias.detach().double().view(shape)


# A layer's output and gradients, held against the oracle's.


def layer_13_to_11(*, conv1d: bool = False, dtype: torch.dtype = torch.float64, **config: object) -> SmoaLayer:
    """A ragged layer: K = 3 divides neither side, r = 7 not by K, alpha is not r."""
    settings = {"r": 7, "num_blocks": 3, "alpha": 4.0} | config
    return adapted_layer(base_layer(11, 13, conv1d=conv1d, dtype=dtype), **settings)


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, 13, dtype=dtype, requires_grad=True)


def oracle_gradients(layer: SmoaLayer, x: Tensor, gradient: Tensor, *adapters: str) -> list[Tensor]:
    """Output and gradients of x and of every adapter's A and B."""
    names = adapters or ("default",)
    leaves = [clone_leaf(x.double())] + [clone_leaf(f.double()) for name in names for f in factors(layer, name)]
    deltas = [oracle_delta(layer, name, A=leaves[2 * a + 1], B=leaves[2 * a + 2]) for a, name in enumerate(names)]
    bias = layer.get_base_layer().bias
    y = oracle.forward(leaves[0], base_weight(layer).double(), bias.detach().double(), deltas)
    return [y.detach(), *torch.autograd.grad(y, leaves, gradient.double())]


def own_gradients(layer: SmoaLayer, y: Tensor, x: Tensor, gradient: Tensor, *adapters: str) -> list[Tensor]:
    parameters = [f for name in adapters or ("default",) for f in factors(layer, name)]
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], gradient)]


def assert_path(layer: SmoaLayer, y: Tensor, x: Tensor, *adapters: str) -> None:
    """Output and gradients are the oracle's."""
    gradient = torch.randn_like(y)
    expected = oracle_gradients(layer, x, gradient, *adapters)
    for own, oracles in zip(own_gradients(layer, y, x, gradient, *adapters), expected, strict=True):
        assert_close(own, oracles)


# A random update of one weight, and what the oracle says about it.


# (out_features, in_features, block_ranks): square, tall, wide, ragged, r that K does not divide, unequal, an empty one.
CASES = [
    (12, 12, (2, 2, 2)),
    (17, 10, (2, 1, 1, 1)),
    (9, 16, (3, 3)),
    (11, 13, (1, 4, 2)),
    (8, 8, (3, 0)),
    (7, 6, (1,) * 6),
    (5, 9, (4,)),
]


class Problem(NamedTuple):
    weight: Tensor
    A: Tensor
    B: Tensor
    partition: Blocks
    ranks: tuple[int, ...]

    def factors(self, scaling: float = 1.0, block_scale: Sequence[float] | None = None) -> Factors:
        block_scale = block_scale or [1.0] * len(self.ranks)
        rank_scale = [s for s, rank in zip(block_scale, self.ranks, strict=True) for _ in range(rank)]
        return Factors(self.A, self.B, self.ranks, scaling, torch.tensor(rank_scale), self.partition)

    def update(self, modulation: str, scaling: float = 1.0, block_scale: Sequence[float] | None = None) -> Update:
        return Update(**{**vars(self.factors(scaling, block_scale)), "modulation": modulation})  # type: ignore[arg-type]

    def smoa(self, modulation: str, scaling: float = 1.0) -> Tensor:
        return self.update(modulation, scaling).delta(self.weight)

    def oracle(self, modulation: str, scaling: float | Sequence[float] = 1.0) -> Tensor:
        row_labels, col_labels = self.partition.row_labels.tolist(), self.partition.col_labels.tolist()
        return oracle.delta_weight(self.weight, self.A, self.B, row_labels, col_labels, self.ranks, scaling, modulation)

    def double(self) -> "Problem":
        return Problem(*(tensor.double() for tensor in self[:3]), self.partition, self.ranks)


def problem(out_features: int, in_features: int, ranks: tuple[int, ...], kind: str = "spectral") -> Problem:
    """Normal numbers in float64; the factors need gradients."""
    weight = torch.randn(out_features, in_features, dtype=torch.float64)
    A_shape, B_shape = oracle.factor_shapes(out_features, in_features, len(ranks), sum(ranks))
    A = torch.randn(A_shape, dtype=torch.float64, requires_grad=True)
    B = torch.randn(B_shape, dtype=torch.float64, requires_grad=True)
    return Problem(weight, A, B, make_partition(weight, len(ranks), kind), ranks)  # type: ignore[arg-type]


# Small quantized layers: by bitsandbytes, and by torchao and HQQ where they are installed.


def _in_4_bits(linear: nn.Linear, quant_type: str, twice: bool = False, compute_dtype: Any = None) -> nn.Module:
    import bitsandbytes as bnb  # not installed where vLLM is

    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=compute_dtype or linear.weight.dtype,
        compress_statistics=twice,
        quant_type=quant_type,
    ).to(linear.weight.dtype)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")  # quantizes


def _in_8_bits(linear: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb  # not installed where vLLM is

    layer = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=linear.bias is not None, has_fp16_weights=False
    )
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")  # quantizes


def _by_torchao(linear: nn.Linear) -> nn.Module:
    from torchao import quantize_
    from torchao.quantization import Int8WeightOnlyConfig

    quantize_(linear, Int8WeightOnlyConfig())
    return linear


def _by_hqq(linear: nn.Linear) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=linear.in_features)
    layer: nn.Module = HQQLinear(linear, config, compute_dtype=linear.weight.dtype, device="cpu")
    return layer


QUANTIZERS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "nf4": lambda linear: _in_4_bits(linear, "nf4"),
    "nf4 twice": lambda linear: _in_4_bits(linear, "nf4", twice=True),
    "fp4": lambda linear: _in_4_bits(linear, "fp4"),
    "int8": _in_8_bits,
    "torchao": _by_torchao,
    "hqq": _by_hqq,
}
BITSANDBYTES = ["nf4", "nf4 twice", "fp4", "int8"]
QUANTIZED = [
    *BITSANDBYTES,
    *(
        pytest.param(name, marks=pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed"))
        for name in ("torchao", "hqq")
    ),
]


def quantized_layer(
    kind: str, out_features: int = 24, in_features: int = 64, *, bias: bool = True, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A quantized layer of random weights."""
    return QUANTIZERS[kind](nn.Linear(in_features, out_features, bias=bias, dtype=dtype).requires_grad_(False))


def in_4_bits(compute_dtype: torch.dtype, dtype: torch.dtype = torch.float32) -> nn.Module:
    """An NF4 layer (64 → 24) that computes in `compute_dtype`."""
    return _in_4_bits(nn.Linear(64, 24, dtype=dtype).requires_grad_(False), "nf4", compute_dtype=compute_dtype)


def wrapped(base: nn.Module) -> Wrapper:
    """A model of one quantized layer."""
    model = Wrapper(base)
    if find_spec("torchao"):
        from torchao.quantization import Int8WeightOnlyConfig

        # as transformers leaves it on a model that it has loaded with a TorchAoConfig
        quantizer = SimpleNamespace(quantization_config=SimpleNamespace(get_apply_tensor_subclass=Int8WeightOnlyConfig))
        model.hf_quantizer = quantizer
    return model


def adapted_quantized(base: nn.Module, **config: Any) -> SmoaLayer:
    """`base` with an adapter of random factors; r = 7 is not divided by K = 3, alpha is not r."""
    settings = {"r": 7, "num_blocks": 3, "alpha": 4.0, "target_modules": ["layer"]} | config
    layer = inject_adapter_in_model(SmoaConfig(**settings), wrapped(base)).layer
    randomise(layer)
    return layer


def weight_of(layer: SmoaLayer) -> Tensor:
    """The dequantized pristine weight."""
    return layer.pristine_weight().double()


def delta_of(layer: SmoaLayer, adapter: str = "default") -> Tensor:
    """The oracle's ΔW on the dequantized weight, float64."""
    return oracle_delta(layer, adapter, weight=weight_of(layer))


def same_layout_on_every_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes repacks the weights that it evaluates: not for this test."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False, raising=False)
