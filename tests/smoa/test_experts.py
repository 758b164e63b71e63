"""Mixtures of experts through the life of an adapter: trained, saved, loaded, merged, and beside other adapters."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor, nn

from smoa import SmoaConfig, UnsupportedModuleError
from smoa.hotswap import hotswap_adapter
from tests import oracle
from tests.support.layers import assert_close, clone_leaf
from tests.support.tiny import (
    EXPERT_SETTINGS,
    EXPERTS,
    FAMILIES,
    MIXTURES,
    add_second_adapter,
    build,
    experts_of,
    matrix_of,
    oracle_deltas,
    qwen3_moe,
    tokens,
    wrappers,
)
from tests.support.watch import NoDecomposition, count

INTERFACED = sorted(set(MIXTURES) - {"llama4"})
IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]


def adapted(family: str, **settings: Any) -> PeftModel:
    config = {"r": 7, "num_blocks": 3, "alpha": 4.0, "target_modules": [], "target_parameters": EXPERTS}
    torch.manual_seed(3)
    return get_peft_model(build(family), SmoaConfig(**config | settings))


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(input_ids=tokens()).logits


def train_a_step(model: PeftModel, **options: Any) -> float:
    """One step of SGD on the adapter; returns the loss before it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = model(input_ids=tokens(), labels=tokens(), **options).loss
    loss.backward()
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in trained)
    torch.optim.SGD(trained, lr=1.0).step()
    return float(loss.detach())


@pytest.mark.parametrize("family", MIXTURES)
def test_an_adapter_is_trained_saved_and_loaded_without_a_decomposition(family: str, tmp_path: Path) -> None:
    model = adapted(family).train()
    before = logits(model)
    first = train_a_step(model)
    assert float(model(input_ids=tokens(), labels=tokens()).loss.detach()) < first
    model.eval().save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        with NoDecomposition():
            loaded = PeftModel.from_pretrained(build(family), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(loaded.eval()), logits(model))
    assert not torch.equal(logits(loaded), before)


@pytest.mark.parametrize("family", INTERFACED)
def test_every_implementation_of_the_experts_gives_the_same_output_and_gradients(family: str) -> None:
    found = []
    for implementation in IMPLEMENTATIONS:
        model = adapted(family, init_weights=False)
        model.base_model.model.set_experts_implementation(implementation)
        output = model(input_ids=tokens()).logits
        output.square().sum().backward()
        found.append([output, *(p.grad for p in model.parameters() if p.requires_grad)])
    for other in found[1:]:
        for own, first in zip(other, found[0], strict=True):
            torch.testing.assert_close(own, first, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("experts", [8, 32])
def test_an_adapted_layer_starts_few_operations_however_many_experts_it_has(
    experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = qwen3_moe(num_experts=experts)
    base.set_experts_implementation("grouped_mm")
    config = SmoaConfig(target_modules=[], target_parameters=EXPERTS, num_blocks=4, partition="random")
    model = get_peft_model(base, config)
    layer, x = base.model.layers[0], torch.randn(1, 64, 24, requires_grad=True)
    positions = base.model.rotary_emb(x, torch.arange(64)[None])

    def started() -> int:
        return len(count(lambda: layer(x, position_embeddings=positions).sum().backward(), monkeypatch))

    adapted = started()
    with model.disable_adapter():
        assert adapted <= 4 * started()


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpoint in (False, True):
        model = adapted("qwen3_moe", init_weights=False).train()
        if checkpoint:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for own, plain in zip(*gradients, strict=True):
        assert_close(own, plain)


@pytest.mark.parametrize(
    ("family", "implementation"),
    [("qwen3_moe", "grouped_mm"), ("gpt_oss", "eager"), ("gpt_oss", "batched_mm"), ("llama4", None)],
)
def test_autocast_and_half_precision_train(family: str, implementation: str | None) -> None:
    model = adapted(family).train()
    if implementation is not None:
        model.base_model.model.set_experts_implementation(implementation)
    with torch.autocast("cpu", torch.bfloat16):
        train_a_step(model)
    half = copy.deepcopy(model).to(torch.bfloat16)
    train_a_step(half)


def test_a_file_names_parameters_as_pefts_wrappers_are_nested(tmp_path: Path) -> None:
    model = adapted("mixtral", target_parameters=EXPERTS[1:], init_weights=False)
    model.add_adapter("both", SmoaConfig(target_modules=[], target_parameters=EXPERTS, init_weights=False))
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "both" / "adapter_model.safetensors").keys()
    place = "base_model.model.model.layers.0.mlp.experts"
    assert {f"{place}.base_layer.smoa_A.weight", f"{place}.smoa_row_labels"} < names
    model.set_adapter("both")
    loaded = PeftModel.from_pretrained(build("mixtral"), str(tmp_path / "both")).eval()
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4"])
def test_a_weighted_sum_of_adapters_of_experts_is_exact(family: str) -> None:
    model = adapted(family, init_weights=False)
    settings = {"r": 6, "num_blocks": 3, "init_weights": False, "scale": "paper"}
    model.add_adapter("second", SmoaConfig(target_modules=[], target_parameters=EXPERTS, **settings))
    model.add_weighted_adapter(["default", "second"], [0.7, -1.3], "sum")
    for wrapper in wrappers(model).values():
        assert wrapper.adapters["sum"].r == 13
        assert_close(wrapper.delta("sum"), 0.7 * wrapper.delta("default") - 1.3 * wrapper.delta("second"))
    model.add_weighted_adapter(["second"], [-2.0], "scaled", combination_type="linear")
    for wrapper in wrappers(model).values():
        assert_close(wrapper.delta("scaled"), -2.0 * wrapper.delta("second"))


@pytest.mark.parametrize(
    ("family", "other"),
    [
        ("qwen3_moe", {"r": 4, "alpha": 5.0}),
        ("gpt_oss", {"partition": "random"}),
        ("llama4", {"target_parameters": EXPERTS[1:]}),
    ],
)
def test_an_adapter_of_experts_is_swapped_in_place(family: str, other: dict[str, Any], tmp_path: Path) -> None:
    new = adapted(family, init_weights=False, **other).eval()
    for parameter in new.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    new.save_pretrained(tmp_path)
    model = adapted(family, init_weights=False).eval()
    before = logits(model)
    assert not torch.allclose(logits(new), before)
    model.save_pretrained(tmp_path / "first")
    hotswap_adapter(model, tmp_path)
    assert_close(logits(model), logits(new))
    hotswap_adapter(model, tmp_path / "first")
    assert_close(logits(model), before)


# layers


def inputs(wrapped: nn.Module, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Hidden states, the two experts of each token (never the last one) and their weights; sorted for Llama 4."""
    torch.manual_seed(0)
    layout = wrappers(wrapped)["gate_up_proj"].layout
    x = torch.randn(10, layout.in_features, dtype=dtype, requires_grad=True)
    if type(wrapped["experts"].get_base_layer()).__name__.startswith("Llama4"):
        return (x,)
    picked = torch.stack([torch.randperm(layout.experts - 1)[:2] for _ in range(10)])
    return x, picked, torch.rand(10, 2, dtype=dtype)


def with_oracles_weights(wrapped: nn.Module, leaves: dict[str, tuple[Tensor, Tensor]]) -> nn.Module:
    """The plain experts with the oracle's W + ΔW in the place of the parameters, differentiable in the factors."""
    plain = copy.deepcopy(wrapped["experts"].get_base_layer())
    for name, wrapper in wrappers(wrapped).items():
        layout, deltas = wrapper.layout, oracle_deltas(wrapper, *leaves[name])
        merged = [
            matrix_of(wrapper, number // layout.halves, number % layout.halves).double() + delta
            for number, delta in enumerate(deltas)
        ]
        experts = torch.stack(merged).unflatten(0, (-1, layout.halves))
        rows = experts.transpose(1, 2).flatten(1, 2) if layout.interleaved else experts.flatten(1, 2)
        delattr(plain, name)
        setattr(plain, name, rows.mT if layout.transposed else rows)
    return plain


@pytest.mark.parametrize(
    ("family", "settings"), [*((family, {}) for family in FAMILIES), ("qwen3_moe", {"modulation": "none"})]
)
def test_outputs_and_gradients_are_those_of_the_oracles_weights(family: str, settings: dict[str, str]) -> None:
    wrapped = experts_of(family, **settings)
    arguments = inputs(wrapped)
    leaves = {
        name: tuple(clone_leaf(f) for f in wrapper.factors("default")) for name, wrapper in wrappers(wrapped).items()
    }
    own = [arguments[0], *(f for wrapper in wrappers(wrapped).values() for f in wrapper.factors("default"))]
    theirs = [arguments[0], *(f for pair in leaves.values() for f in pair)]
    y, expected = wrapped["experts"](*arguments), with_oracles_weights(wrapped, leaves)(*arguments)
    assert_close(y, expected)
    g = torch.randn_like(y)
    pairs = zip(torch.autograd.grad(y, own, g), torch.autograd.grad(expected, theirs, g), strict=True)
    for found, oracles in pairs:
        assert_close(found, oracles)


def test_two_active_adapters_add_up() -> None:
    wrapped = experts_of("gpt_oss")
    plain = copy.deepcopy(wrapped["experts"].get_base_layer())
    add_second_adapter(wrapped)
    for name, wrapper in wrappers(wrapped).items():
        wrapper.set_adapter(["default", "second"])
        getattr(plain, name).data += wrapper.get_delta_weight("default") + wrapper.get_delta_weight("second")
    arguments = inputs(wrapped)
    assert_close(wrapped["experts"](*arguments), plain(*arguments))


def test_the_parameter_is_itself_again_after_a_call_and_after_a_failed_one() -> None:
    wrapped = experts_of("qwen3_moe")
    base, arguments = wrapped["experts"].get_base_layer(), inputs(wrapped)
    wrapped["experts"](*arguments)
    with pytest.raises(RuntimeError):
        wrapped["experts"](arguments[0], arguments[1] + 100, arguments[2])
    assert type(base.gate_up_proj) is nn.Parameter
    assert type(base.down_proj) is nn.Parameter


def test_compiled_experts_give_the_same_output() -> None:
    wrapped = experts_of("qwen3_moe")
    arguments = inputs(wrapped)
    compiled = torch.compile(wrapped["experts"], backend="eager")
    assert_close(compiled(*arguments), wrapped["experts"](*arguments))


class InputsFirst(nn.Module):
    """A linear layer that stores its weight as (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(11, 13, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@pytest.mark.parametrize("modulation", ["hadamard", "none"])
def test_a_matrix_that_is_stored_with_its_inputs_first_computes_what_the_merged_one_does(modulation: str) -> None:
    config = SmoaConfig(target_modules=[], target_parameters=["layer.weight"], modulation=modulation, **EXPERT_SETTINGS)
    model = inject_adapter_in_model(config, nn.ModuleDict({"layer": InputsFirst()}))
    wrapper, x = wrappers(model)["weight"], torch.randn(2, 5, 11, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(clone_leaf(factor) for factor in wrapper.factors("default"))]
    (delta,) = oracle_deltas(wrapper, *leaves[1:])
    expected = x @ (wrapper.stored_weight().detach() + delta)
    assert_close(wrapper(x), expected)
    g = torch.randn_like(expected)
    own = torch.autograd.grad(wrapper(x), [x, *wrapper.factors("default")], g)
    for found, oracles in zip(own, torch.autograd.grad(expected, leaves, g), strict=True):
        assert_close(found, oracles)
    wrapper.merge()
    assert_close(wrapper(x), expected)


K, R = EXPERT_SETTINGS["num_blocks"], EXPERT_SETTINGS["r"]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_each_expert_has_the_oracles_blocks_and_scales_of_unit_rms(family: str) -> None:
    wrapper = wrappers(experts_of(family, scale="block"))["gate_up_proj"]
    for number, scales in enumerate(wrapper.decided("default").block_scale):
        weight = matrix_of(wrapper, number // 2, number % 2)
        rows, cols = (labels["default"][number] for labels in (wrapper.smoa_row_labels, wrapper.smoa_col_labels))
        assert (rows.tolist(), cols.tolist()) == oracle.spectral_labels(weight, K)
        blocks = [weight[rows == k][:, cols == k] for k in range(K)]
        assert_close(scales, torch.stack([1 / block.square().mean().sqrt() for block in blocks]), torch.float32)


def test_a_parameter_that_fsdp1_has_flattened_is_refused() -> None:
    wrapper = wrappers(experts_of("qwen3_moe"))["down_proj"]
    base: nn.Module = wrapper.get_base_layer()
    base.register_parameter("down_proj", None)
    with pytest.raises(UnsupportedModuleError, match=r"down_proj: FSDP1 has flattened this parameter.*use FSDP2"):
        wrapper.stored_weight()


@pytest.mark.parametrize("family", MIXTURES)
def test_a_merged_model_says_the_same_under_the_same_names_and_unmerging_restores_every_bit(family: str) -> None:
    model, plain = adapted(family, init_weights=False), build(family)
    expected, state = logits(model), plain.state_dict()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    generated = model.generate(input_ids=tokens(), **options)
    model.merge_adapter()
    assert_close(logits(model), expected)
    model.unmerge_adapter()
    weights = {name: wrapper.stored_weight() for name, wrapper in wrappers(model).items()}
    for name, weight in weights.items():
        assert any(torch.equal(weight, tensor) for key, tensor in state.items() if key.endswith(name))
    merged = model.merge_and_unload()
    assert_close(logits(merged), expected)
    assert torch.equal(merged.generate(input_ids=tokens(), **options), generated)
    assert merged.state_dict().keys() == state.keys()
    assert [type(module) for module in merged.modules()] == [type(module) for module in plain.modules()]
