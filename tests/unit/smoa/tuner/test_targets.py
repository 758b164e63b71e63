"""Modules that cannot be adapted are refused by name."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.utils.checkpoint import checkpoint
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from smoa import ConfigError, PartitionError, SmoaConfig, SmoaError, UnsupportedModuleError
from smoa.kinds import kind_of
from smoa.tuner.targets import check_target
from tests.support.kinds import input_of
from tests.support.layers import Wrapper, adapted_layer, smoa_layers
from tests.support.tiny_mixtures import EXPERTS, build_mixture
from tests.support.tolerance import assert_close


def test_the_blocks_of_a_weight_that_zero3_has_left_empty_are_those_of_its_whole_shape() -> None:
    module = Conv1D(2, 10)
    module.weight.ds_shape = module.weight.shape
    module.weight.data = torch.empty(0)
    assert check_target("head", module, SmoaConfig(num_blocks=4), nn.Module())[1] == (2, 10)
    with pytest.raises(PartitionError, match=r"head: num_blocks=3 must be between 1 and 2 .*\(2, 10\)"):
        check_target("head", module, SmoaConfig(num_blocks_pattern={"head": 3}), nn.Module())


SUPPORTED = r"torch\.nn\.Linear.*Conv1D.*Embedding.*Conv3d.*quantized"


class OddModel(nn.Module):
    """Modules of many kinds, some of which other PEFT methods adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.transposed = nn.ConvTranspose2d(8, 8, 3)
        self.attention = nn.MultiheadAttention(8, 2)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize(
    ("target", "shapes"),
    [
        ("transposed", "ConvTranspose2d; "),
        ("attention", "MultiheadAttention; "),
        ("empty", "Identity; .*remove it from target_modules"),
    ],
)
def test_an_unsupported_module_is_refused_with_its_shapes_and_the_remedy(target: str, shapes: str) -> None:
    model = OddModel()
    model.empty = nn.Identity()
    with pytest.raises(UnsupportedModuleError, match=rf"{target}: .*{shapes}") as caught:
        get_peft_model(model, SmoaConfig(r=4, target_modules=[target, "linear"]))
    assert re.search(SUPPORTED, str(caught.value))
    assert type(model.linear) is nn.Linear


def test_a_layer_that_its_parent_never_calls_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModuleError, match=r"attention\.out_proj.*uses its weight without calling it"):
        get_peft_model(OddModel(), SmoaConfig(r=4, target_modules=["out_proj", "linear"]))


def test_a_layer_that_its_parent_calls_in_training_only_is_refused_by_name() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), 1)
    config, x = SmoaConfig(r=4, target_modules=["linear1"], init_weights=False), torch.randn(2, 3, 8)
    with pytest.raises(UnsupportedModuleError, match=r"layers\.0\.linear1.*set_fastpath_enabled\(False\)"):
        get_peft_model(encoder, config)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        model = get_peft_model(encoder, config)
        assert_close(model.eval()(x), model.train()(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
HEADS = {"num_key_value_heads": 2, "num_local_experts": 4, "pad_token_id": 0}


def llama4() -> PreTrainedModel:
    return Llama4ForCausalLM(Llama4TextConfig(**SMALL, **HEADS, num_hidden_layers=5, head_dim=8))


@pytest.mark.filterwarnings("ignore:target_modules='all-linear' takes linear layers only:UserWarning")
def test_all_linear_leaves_out_routers_with_a_forward_of_their_own_and_names_them() -> None:
    with pytest.warns(UserWarning, match=r"leaves out model\.layers\.0\..*and 2 more.*Llama4Router") as found:
        model = get_peft_model(llama4(), SmoaConfig(r=4, target_modules="all-linear", init_weights=False)).eval()
    assert sum("leaves out" in str(warning.message) for warning in found) == 1
    assert not any("router" in name or name.endswith(".gate") for name in smoa_layers(model))
    logits = model(torch.tensor([[5, 9, 3]])).logits
    model.merge_adapter()
    assert_close(model(torch.tensor([[5, 9, 3]])).logits, logits)


def test_all_linear_says_how_layers_of_a_fast_path_are_adapted() -> None:
    base = nn.ModuleDict({"block": nn.TransformerEncoderLayer(8, 2, 16), "out": nn.Linear(8, 8)})
    with pytest.warns(UserWarning, match=r"leaves out block\.linear1.*: in evaluation.*set_fastpath_enabled\(False\)"):
        assert [*smoa_layers(adapted(base, target_modules="all-linear"))] == ["out"]


def test_a_convolution_whose_weight_is_only_read_is_refused() -> None:
    base = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(UnsupportedModuleError, match=r"mixer\.conv1d.*MambaMixer uses its weight without calling it"):
        adapted(base, target_modules=["conv1d", "in_proj"])
    adapted(base, target_modules=["in_proj"])


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 1)
        self.called = nn.Conv1d(4, 4, 1)
        nn.init.normal_(self.called.weight)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.called, nn.functional.conv1d(x, self.conv.weight, self.conv.bias), use_reentrant=False)


class ReadsToo(Reads):
    pass


@pytest.mark.parametrize("kind", [Reads, ReadsToo])
def test_a_convolution_that_is_used_in_any_way_beside_its_weight_is_adapted(kind: type[nn.Module]) -> None:
    assert [*smoa_layers(adapted(nn.ModuleDict({"own": kind()}), target_modules=["called"]))] == ["own.called"]
    with pytest.raises(UnsupportedModuleError, match=rf"own\.conv: .*; {kind.__name__} uses its weight without call"):
        adapted(nn.ModuleDict({"own": kind()}), target_modules=["conv"])


class Renamed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_linear_layer_with_a_forward_of_its_own_is_adapted_if_it_computes_the_same(device: str) -> None:
    with torch.device(device):
        renamed, doubled = Wrapper(Renamed(8, 6)), Wrapper(Doubled(8, 6))
    state = torch.random.get_rng_state()
    with pytest.raises(UnsupportedModuleError, match=r"layer: .*Doubled has a forward of its own"):
        get_peft_model(doubled, SmoaConfig(target_modules=["layer"]))
    assert torch.equal(torch.random.get_rng_state(), state)
    model = get_peft_model(renamed, SmoaConfig(target_modules=["layer"]))
    assert set(smoa_layers(model)) == {"layer"}


class Reading(nn.Module):
    """Reads the weight of one layer, as WavLM does those of its projections, and uses one of its experts."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.experts[1](self.called(nn.functional.linear(x, self.read.weight))))


def step(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    get_peft_model_state_dict(model)  # without a warning
    optimizer = torch.optim.AdamW([factor for factor in model.parameters() if factor.requires_grad], lr=0.1)
    loss().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "settings", [{"target_modules": "all-linear"}, {"target_modules": ["read"], "modules_to_save": ["head"]}], ids=str
)
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_save_names_the_layers_that_training_left_as_they_were(settings: dict[str, Any], is_compiled: bool) -> None:
    model = get_peft_model(Reading(), SmoaConfig(r=4, **settings))
    forward = torch.compile(model, backend="eager", fullgraph=True) if is_compiled else model
    step(model, lambda: forward(torch.randn(3, 8)).sum())
    with pytest.warns(UserWarning, match=r"training left ΔW of 'default' at zero in read: .*exclude_modules") as caught:
        get_peft_model_state_dict(model)
    assert len(caught) == 1
    for layer in smoa_layers(model).values():
        layer.requires_grad_(False)  # an adapter that is only used
    get_peft_model_state_dict(model)


# All targets at once.


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.good = nn.Linear(12, 8)
        self.bilinear = nn.Bilinear(4, 4, 4)
        self.bank = nn.Module()
        self.bank.bias = nn.Parameter(nn.init.zeros_(nn.Linear(4, 1).weight)[0])


def test_problems_of_modules_and_of_parameters_are_one_error_before_anything_is_changed() -> None:
    model = Net()
    config = SmoaConfig(r=4, num_blocks=2, target_modules=["good", "bilinear"], target_parameters=["bank.bias"])
    with pytest.raises(SmoaError, match=r"(?s)bilinear.*; .*bank\.bias"):
        get_peft_model(model, config)
    assert type(model.good) is nn.Linear


# parameters of experts


def adapted(model: nn.Module, **settings: Any) -> nn.Module:
    return inject_adapter_in_model(SmoaConfig(**{"target_modules": [], **settings}), model)


@pytest.mark.parametrize(
    "named",
    [["model.layers.0.mlp.experts.down_proj"], ["mlp.experts.gate_up_proj", "self_attn.q_proj.weight"], ["down_proj"]],
)
def test_the_parameters_are_those_that_lora_adapts(named: list[str]) -> None:
    found = []
    for config in (SmoaConfig, LoraConfig):
        model = get_peft_model(build_mixture("qwen3_moe"), config(r=4, target_modules=[], target_parameters=named))
        found.append(sorted(model.base_model.targeted_parameter_names))
        wrapped = [name for name, m in model.named_modules() if type(m).__name__ == "ParamWrapper"]
        found[-1] += sorted(wrapped)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("all-linear", "='all-linear' takes linear layers only"),
        (["q_proj", "gate_proj", "down_proj"], " has gate_proj, down_proj"),
        (r".*\.(q_proj|up_proj)", " has up_proj"),
        (["q_proj", "self_attn.v_proj"], None),
    ],
)
def test_names_that_lora_takes_for_experts_are_told_to_leave_them_out(named: Any, told: str | None) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        get_peft_model(build_mixture("qwen3_moe"), SmoaConfig(r=4, num_blocks=2, target_modules=named))
    messages = [text for warning in found if "experts" in (text := str(warning.message))]
    expected = "target_modules{}; the experts of this mixture are parameters and not adapted. To adapt them too, add "
    names = "target_parameters=['mlp.experts.down_proj', 'mlp.experts.gate_up_proj']"
    assert messages == ([] if told is None else [expected.format(told) + names])


# PEFT looks at modules only, from 0.21 on
@pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning")
def test_patterns_go_by_the_parameters_name() -> None:
    patterns = {"experts.down_proj": 8}
    model = adapted(build_mixture("qwen3_moe"), r=4, target_parameters=EXPERTS, rank_pattern=patterns)
    ranks = {m.parameter_name: m.adapters["default"].r for m in model.modules() if type(m).__name__ == "ParamWrapper"}
    assert ranks == {"gate_up_proj": 4, "down_proj": 8}


class Odd(nn.Module):
    """Parameters that can't be adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(8))
        self.kernel = nn.Parameter(torch.ones(2, 3, 4, 5))
        self.packed = nn.Parameter(torch.ones(2, 8, 8, dtype=torch.uint8), requires_grad=False)

        self.plain = nn.Linear(8, 8)
        self.parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))


BAD: dict[str, tuple[dict[str, Any], type[SmoaError], str]] = {
    "no such parameter": (
        {"target_parameters": ["inner.nrom"]},
        ConfigError,
        r"target_parameters: 'inner.nrom' matches no parameter.*did you mean 'inner\.",
    ),
    "one dimension": (
        {"target_parameters": ["inner.norm"]},
        ConfigError,
        r"target_parameters: inner.norm has shape \(8,\), and only those of 2 or 3 dimensions .*leave it out",
    ),
    "quantized": (
        {"target_parameters": ["packed"]},
        UnsupportedModuleError,
        r"inner.packed has shape \(2, 8, 8\) and is quantized to torch.uint8.*dequantize=True",
    ),
    "its module too": (
        {"target_parameters": ["plain.weight"], "target_modules": ["plain"]},
        ConfigError,
        r"inner.plain.weight: target_modules names its module too; name it in one of the two",
    ),
    "K by a pattern": (
        {"target_parameters": ["plain.weight"], "num_blocks_pattern": {"plain.weight": 9}, "r": 9},
        PartitionError,
        r"inner.plain.weight: num_blocks=9 must be between 1 and 8.*\(8, 8\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_parameter_that_can_not_be_adapted_is_refused_before_anything_changes(case: str) -> None:
    settings, error, message = BAD[case]
    model = nn.ModuleDict({"inner": Odd()})
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(error, match=message):
        adapted(model, **settings)
    assert [name for name, _ in model.named_modules()] == before


@pytest.mark.parametrize(("family", "name"), [("qwen3_moe", "mlp.gate.weight"), ("gpt_oss", "mlp.router.weight")])
def test_a_router_is_refused(family: str, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} has shape \(5, 24\) and chooses the experts.*leave the router out"):
        adapted(build_mixture(family), target_parameters=[*EXPERTS, name])


def test_a_router_of_any_class_is_refused_by_its_name() -> None:
    with pytest.raises(ConfigError, match=r"gate.weight has shape \(8, 24\) and chooses the experts"):
        adapted(nn.ModuleDict({"gate": nn.Linear(24, 8)}), target_parameters=["gate.weight"])


def test_a_parametrized_parameter_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"weight' matches no parameter.*remove the parametrization first"):
        adapted(nn.ModuleDict({"inner": Odd()}), target_parameters=["inner.parametrized.weight"])


def test_all_linear_says_once_that_it_leaves_the_experts_out_and_how_to_name_them() -> None:
    with pytest.warns(UserWarning, match="linear layers only") as caught:
        model = get_peft_model(build_mixture("mixtral"), SmoaConfig(target_modules="all-linear"))
    told = [str(warning.message) for warning in caught if "linear layers only" in str(warning.message)]
    assert len(told) == 1
    assert "target_parameters=['mlp.experts.down_proj', 'mlp.experts.gate_up_proj']" in told[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_adapter("second", SmoaConfig(target_modules="all-linear"))


# kinds of layers


def pruned() -> nn.Module:
    layer = nn.Linear(6, 8)
    prune.l1_unstructured(layer, "weight", 0.3)
    return layer


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: parametrizations.weight_norm(nn.Linear(6, 8)),
        lambda: parametrizations.spectral_norm(nn.Conv1d(6, 8, 2)),
        lambda: weight_norm(nn.Linear(6, 8)),
        pruned,
    ],
)
def test_a_layer_whose_weight_is_computed_is_refused(make: Callable[[], nn.Module]) -> None:
    base = make()
    refusal = kind_of(base).refusal(base)
    assert refusal is not None
    assert "computed from others" in refusal


class Positions(nn.Embedding):
    """Looks up places and not its input, as positional embeddings of transformers do."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(torch.arange(tokens.shape[-1]))


class Standardized(nn.Conv2d):
    """Computes with another weight than the one that it holds."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Inherited(Doubled):
    pass


@pytest.mark.parametrize(
    ("base", "owner"),
    [
        (Inherited(6, 8), "Doubled"),
        (Positions(17, 10), "Positions"),
        (Standardized(4, 4, 3), "Standardized"),
        (T5Gemma2TextScaledWordEmbedding(16, 8, 0, embed_scale=2.0, eoi_token_index=5), "T5Gemma2"),
        (Llama4Router(Llama4TextConfig(hidden_size=8, num_local_experts=4)), "Llama4Router"),
    ],
)
def test_a_layer_whose_class_computes_something_else_is_refused(base: nn.Module, owner: str) -> None:
    refusal = kind_of(base).refusal(base)
    assert refusal is not None
    assert refusal.startswith(owner)


def hooked() -> nn.Module:
    """As accelerate's offloading leaves a layer: with a forward of this one layer."""
    layer = nn.Linear(13, 11, dtype=torch.float64)
    add_hook_to_module(layer, ModelHook())
    assert "forward" in vars(layer)
    return layer


def sharded() -> nn.Module:
    """Of the class that FSDP2 makes for a layer."""
    layer = nn.Linear(13, 11, dtype=torch.float64)
    layer.__class__ = type("FSDPLinear", (FSDPModule, nn.Linear), {})
    return layer


def patched() -> nn.Module:
    """As Unsloth changes layers: one at a time, by a function that computes the same."""
    layer = nn.Linear(13, 11, dtype=torch.float64)
    layer.forward = lambda x: torch.nn.functional.linear(x, layer.weight, layer.bias)
    return layer


@pytest.mark.parametrize("make", [hooked, sharded, patched, lambda: FalconLinear(13, 11, dtype=torch.float64)])
def test_a_layer_that_computes_the_same_in_another_way_is_adapted(make: Callable[[], nn.Module]) -> None:
    layer = adapted_layer(make(), r=6, num_blocks=3)
    x = input_of("linear")
    unmerged = layer(x)
    assert (unmerged - layer.get_base_layer()(x)).abs().max() > 1e-3
    layer.merge()
    assert_close(layer(x), unmerged)
