"""What is trained is what is merged: the weights, and the outputs, of both have the same bits."""

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import smoa
from smoa import SmoaConfig, UnsupportedModuleError, keep_in_generate
from smoa.kernels.one_product import Update
from smoa.layer import smoa_layers
from smoa.route import route_of
from tests.support.layers import KINDS, adapted_layer, input_of, kind_of_layer, stored_bits, take_route

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def llama(dtype: torch.dtype, hidden: int = 64, **config: Any) -> Any:
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden + 16, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=96, num_hidden_layers=2, num_key_value_heads=2, **sizes)).to(dtype)
    settings = {"r": 8, "num_blocks": 4, "alpha": 20, "target_modules": TARGETS, "init_weights": False} | config
    return get_peft_model(base, SmoaConfig(task_type="CAUSAL_LM", **settings)).eval()


def tokens(rows: int = 2, length: int = 64) -> Tensor:
    return torch.randint(3, 96, (rows, length))


@pytest.mark.usefixtures("multiplies_bfloat16")
@pytest.mark.parametrize("partition", ["spectral", "contiguous"])
@pytest.mark.parametrize("num_blocks", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_model_in_training_gives_the_merged_ones_logits(dtype: torch.dtype, num_blocks: int, partition: str) -> None:
    model = llama(dtype, num_blocks=num_blocks, partition=partition)
    ids = tokens(4)
    logits = model(input_ids=ids).logits
    before = stored_bits(model)
    with smoa.merged(model):
        assert torch.equal(model(input_ids=ids).logits, logits)
    model.merge_adapter()
    assert torch.equal(model(input_ids=ids).logits, logits)
    model.unmerge_adapter()
    assert stored_bits(model) == before
    assert torch.equal(copy.deepcopy(model).merge_and_unload()(input_ids=ids).logits, logits)


def test_nothing_is_recorded_for_training_while_adapters_are_merged() -> None:
    model, given = llama(torch.float32), torch.randn(1, 5, 64, requires_grad=True)
    with smoa.merged(model):
        assert not model(inputs_embeds=given).logits.requires_grad
    assert model(inputs_embeds=given).logits.requires_grad


@pytest.mark.usefixtures("multiplies_bfloat16")
@torch.no_grad()
def test_under_autocast_too() -> None:
    model, ids = llama(torch.float32), tokens(4)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids).logits
        assert torch.equal(model.merge_and_unload()(input_ids=ids).logits, logits)


@pytest.mark.usefixtures("multiplies_bfloat16")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "linear_without_bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_every_kind_of_layer(kind: str, dtype: torch.dtype) -> None:
    layer = adapted_layer(kind_of_layer(kind).to(dtype), r=4, num_blocks=2, route="one product")
    x = input_of(kind)
    x = x.to(dtype) if x.is_floating_point() else x
    y = layer(x)
    layer.merge()
    assert torch.equal(layer(x), y)


@pytest.mark.usefixtures("multiplies_bfloat16")
def test_the_step_is_the_merged_ones_too() -> None:
    model, ids = llama(torch.bfloat16), tokens(4)
    embeddings = model.get_input_embeddings()(ids).detach()

    def gradient(model: Any) -> Tensor:
        leaf = embeddings.clone().requires_grad_()
        model(inputs_embeds=leaf, labels=ids).loss.backward()
        assert leaf.grad is not None
        return leaf.grad

    own = gradient(model)
    assert torch.equal(gradient(model.merge_and_unload()), own)


@pytest.mark.parametrize("why", ["dropout", "two adapters", "few tokens", "no modulation"])
def test_what_keeps_base_and_blocks_apart(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    products = []
    original = Update.apply_with_base
    monkeypatch.setattr(Update, "apply_with_base", lambda *args: products.append(1) or original(*args))
    options: dict[str, Any] = {"dropout": {"smoa_dropout": 0.1}, "no modulation": {"modulation": "none"}}.get(why, {})
    model = llama(torch.bfloat16, **options).train()
    if why == "two adapters":
        model.add_adapter("second", SmoaConfig(r=4, num_blocks=2, target_modules=TARGETS))
        model.base_model.set_adapter(["default", "second"])
    model(input_ids=tokens(1, 3) if why == "few tokens" else tokens(4))
    assert products == []
    if why == "dropout":
        model.eval()(input_ids=tokens(4))
        assert len(products) == len(smoa_layers(model))


# generate


def test_generate_can_compute_with_the_trained_weights_and_gives_every_bit_back() -> None:
    model = llama(torch.bfloat16)
    before = stored_bits(model)
    seen: list[bool] = []
    hook = model.base_model.model.model.register_forward_hook(
        lambda *_: seen.append(all(layer.merged for layer in smoa_layers(model).values()))
    )
    keep_in_generate(model, "merged")
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    answer = model.generate(input_ids=tokens(2, 8), **settings)
    assert seen
    assert all(seen)
    hook.remove()
    assert not any(layer.merged for layer in smoa_layers(model).values())
    assert stored_bits(model) == before
    with model.disable_adapter():
        model.generate(input_ids=tokens(2, 8), **settings)
    named = model.generate(input_ids=answer[:, :8], adapter_names=["default", "__base__"], **settings)
    assert named.shape == answer.shape


def test_generate_gives_the_weights_back_after_an_error() -> None:
    model = llama(torch.bfloat16)
    keep_in_generate(model, "merged")
    before = stored_bits(model)

    def fail(*args: Any) -> None:
        raise RuntimeError("stop")

    model.base_model.model.model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        model.generate(input_ids=tokens(2, 8), max_new_tokens=2)
    assert stored_bits(model) == before


# 4 bits


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("nested", [False, True])
def test_a_fresh_adapter_of_a_4_bit_base_gives_the_bases_bits_in_one_product(
    compute: torch.dtype, nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bnb: Any = pytest.importorskip("bitsandbytes")
    base = bnb.nn.Linear4bit(64, 48, compute_dtype=compute, quant_type="nf4", compress_statistics=nested)
    weight = torch.randn(48, 64, dtype=torch.bfloat16) * 0.02
    base.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=nested)
    base = base.to("cpu").train()
    x = torch.randn(64, 64, dtype=torch.bfloat16)
    expected = base(x)
    model = get_peft_model(nn.ModuleDict({"linear": base}), SmoaConfig(r=4, num_blocks=2, target_modules=["linear"]))
    layer = model.base_model.model["linear"]
    take_route("one product")
    assert route_of(layer, x, "default", alone=True) == "one product"
    assert torch.equal(layer(x), expected)
    with pytest.raises(UnsupportedModuleError, match=r"quantized.*blocks"):
        keep_in_generate(model, "merged")


def test_8_bits_stay_apart() -> None:
    bnb: Any = pytest.importorskip("bitsandbytes")
    base = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False)
    base.weight = bnb.nn.Int8Params(torch.randn(48, 64), requires_grad=False, has_fp16_weights=False)
    base = base.to("cpu")
    model = get_peft_model(nn.ModuleDict({"linear": base}), SmoaConfig(r=4, num_blocks=2, target_modules=["linear"]))
    take_route("one product")
    assert route_of(model.base_model.model["linear"], torch.randn(64, 64), "default", alone=True) != "one product"
