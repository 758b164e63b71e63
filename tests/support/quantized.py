"""Small quantized layers and models: by bitsandbytes, and by torchao and HQQ where they are installed."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from smoa import SmoaConfig
from smoa.layer import SmoaLayer
from tests.support import tiny_models
from tests.support.layers import Wrapper, oracle_delta, randomise


def _in_4_bits(linear: nn.Linear, quant_type: str, twice: bool = False, compute_dtype: Any = None) -> nn.Module:
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
KINDS = [
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


def adapted(base: nn.Module, **config: Any) -> SmoaLayer:
    """`base` with an adapter of random factors; r = 7 is not divided by K = 3, alpha is not r."""
    settings = {"r": 7, "num_blocks": 3, "alpha": 4.0, "target_modules": ["layer"]} | config
    layer = inject_adapter_in_model(SmoaConfig(**settings), wrapped(base)).layer
    randomise(layer)
    return layer


def quantized_model(folder: Path, family: str = "llama", **options: Any) -> PreTrainedModel:
    """The tiny model of the family, loaded by bitsandbytes with `options` of BitsAndBytesConfig, by default in NF4."""
    if not (folder / "config.json").is_file():
        tiny_models.build(family).save_pretrained(folder)
    options = options or {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    quantization_config = BitsAndBytesConfig(**options)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization_config, dtype=torch.float32)


def weight_of(layer: SmoaLayer) -> Tensor:
    """The dequantized pristine weight."""
    return layer.pristine_weight().double()


def delta_of(layer: SmoaLayer, adapter: str = "default") -> Tensor:
    """The oracle's ΔW on the dequantized weight, float64."""
    return oracle_delta(layer, adapter, weight=weight_of(layer))


def same_layout_on_every_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes repacks the weights that it evaluates: not for this test."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False, raising=False)
