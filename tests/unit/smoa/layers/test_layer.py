from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from smoa import SmoaConfig
from tests import reference
from tests.support.adapted_models import adapted
from tests.support.layers import (
    SHAPES,
    Wrapper,
    adapted_layer,
    base_layer,
    base_weight,
    factors,
    labels,
    oracle_delta,
    oracle_output,
    randomise,
    ranks,
    smoa_layers,
)
from tests.support.tolerance import assert_close

PARTITIONS = ["spectral", "contiguous", "random"]
MODULATIONS = ["hadamard", "none"]
VARIANTS = list(itertools.product(PARTITIONS, MODULATIONS))


@pytest.mark.parametrize(("partition", "modulation"), VARIANTS)
@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize(("out_features", "in_features", "num_blocks"), SHAPES)
def test_delta_output_and_gradients_are_the_oracles(
    out_features: int, in_features: int, num_blocks: int, conv1d: bool, partition: str, modulation: str
) -> None:
    layer = adapted_layer(
        base_layer(out_features, in_features, conv1d=conv1d),
        r=2 * num_blocks + 1,
        num_blocks=num_blocks,
        alpha=5.0,
        partition=partition,
        modulation=modulation,
    )
    x = torch.randn(4, in_features, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(4, out_features, dtype=torch.float64)
    A, B = factors(layer)
    y = layer(x)
    actual = torch.autograd.grad(y, (x, A, B), gradient)

    delta = oracle_delta(layer, A=A, B=B)
    expected_y = reference.forward(x, base_weight(layer), layer.get_base_layer().bias.detach(), [delta])
    expected = torch.autograd.grad(expected_y, (x, A, B), gradient)

    own_delta = layer.get_delta_weight("default")
    assert_close(own_delta.T if conv1d else own_delta, delta)
    assert_close(y, expected_y)
    for own, oracles in zip(actual, expected, strict=True):
        assert_close(own, oracles)


@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize(("out_features", "in_features", "num_blocks"), SHAPES)
def test_labels_are_those_of_a_full_decomposition(
    out_features: int, in_features: int, num_blocks: int, conv1d: bool
) -> None:
    base = base_layer(out_features, in_features, conv1d=conv1d)
    expected = reference.spectral_labels(base_weight(base), num_blocks)
    assert labels(adapted_layer(base, num_blocks=num_blocks)) == expected


@pytest.mark.parametrize("block_ranks", [[4, 1, 2], [1, 1, 5], [7, 0, 0]])
@pytest.mark.parametrize("modulation", MODULATIONS)
def test_unequal_block_ranks_give_the_oracles_output(block_ranks: list[int], modulation: str) -> None:
    layer = adapted_layer(
        base_layer(11, 13), r=7, num_blocks=3, block_ranks=block_ranks, alpha=3.0, modulation=modulation
    )
    x = torch.randn(5, 13, dtype=torch.float64)
    assert ranks(layer) == block_ranks
    assert_close(layer(x), oracle_output(layer, x))


def test_the_rank_is_split_evenly_with_the_remainder_to_the_first_blocks() -> None:
    assert ranks(adapted_layer(base_layer(9, 9), r=7, num_blocks=4)) == [2, 2, 2, 1]


def test_fewer_ranks_than_blocks_leave_the_last_blocks_without_an_update() -> None:
    layer = adapted_layer(base_layer(9, 9), r=2, num_blocks=3)
    x = torch.randn(5, 9, dtype=torch.float64)
    assert_close(layer(x), oracle_output(layer, x))


def test_a_rank_larger_than_a_block_is_possible() -> None:
    layer = adapted_layer(base_layer(6, 6), r=20, num_blocks=3)
    x = torch.randn(5, 6, dtype=torch.float64)
    assert_close(layer(x), oracle_output(layer, x))


def test_weights_with_zero_rows_and_columns_give_the_oracles_output() -> None:
    base = base_layer(12, 10)
    with torch.no_grad():
        base.weight[[0, 5, 6]] = 0
        base.weight[:, [2, 9]] = 0
    expected = reference.spectral_labels(base_weight(base), 3)
    layer = adapted_layer(base, r=4, num_blocks=3)
    x = torch.randn(5, 10, dtype=torch.float64)
    assert labels(layer) == expected
    assert_close(layer(x), oracle_output(layer, x))


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_a_zero_weight_is_adapted(modulation: str) -> None:
    base = base_layer(8, 6)
    nn.init.zeros_(base.weight)
    layer = adapted_layer(base, r=4, num_blocks=2, modulation=modulation)
    x = torch.randn(5, 6, dtype=torch.float64)
    assert labels(layer) == (reference.contiguous_labels(8, 2), reference.contiguous_labels(6, 2))
    assert_close(layer(x), oracle_output(layer, x))


def test_a_layer_without_bias_gives_the_oracles_output() -> None:
    layer = adapted_layer(base_layer(8, 6, bias=False), r=4, num_blocks=2)
    x = torch.randn(5, 6, dtype=torch.float64)
    assert_close(layer(x), oracle_output(layer, x))


def test_alpha_over_r_scales_the_update_once() -> None:
    layer = adapted_layer(base_layer(8, 6), r=4, num_blocks=2, alpha=6.0)
    assert layer.scaling["default"] == 1.5
    assert_close(layer.get_delta_weight("default"), oracle_delta(layer))


def test_without_alpha_the_update_is_not_scaled() -> None:
    assert adapted_layer(base_layer(8, 6), r=4, num_blocks=2).scaling["default"] == 1.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("modulation", MODULATIONS)
def test_an_untrained_adapter_is_exactly_a_no_op(dtype: torch.dtype, conv1d: bool, modulation: str) -> None:
    base = base_layer(17, 12, conv1d=conv1d, dtype=dtype)
    x = torch.randn(6, 12).to(dtype)
    before = base(x)
    layer = adapted_layer(base, trained=False, num_blocks=4, modulation=modulation)
    assert torch.equal(layer(x), before)
    assert (layer.get_delta_weight("default") == 0).all()


def test_a_fresh_A_is_uniform_over_one_by_the_root_of_the_blocks_width_and_a_fresh_B_is_zero() -> None:
    layer = adapted_layer(base_layer(64, 402), trained=False, r=40, num_blocks=4)
    in_A, _ = reference.real_entries(64, 402, [10] * 4)
    A, B = (factor.detach() for factor in factors(layer))
    widths = torch.tensor(reference.block_sizes(402, 4)).repeat_interleave(10)
    limits = (1 / widths.double().sqrt())[:, None]
    scaled = (A / limits)[in_A]
    assert (B == 0).all()
    assert (A[~in_A] == 0).all()
    assert scaled.abs().max() <= 1
    assert scaled.abs().max() > 0.999
    assert abs(scaled.mean()) < 0.03
    assert abs(scaled.std() - 3**-0.5) < 0.02


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_without_init_weights_the_adapter_is_visible_but_not_huge(modulation: str) -> None:
    base = nn.Linear(64, 48)
    layer = adapted_layer(base, trained=False, r=8, num_blocks=2, init_weights=False, modulation=modulation)
    size = layer.get_delta_weight("default").norm() / base.weight.norm()
    assert 1e-3 < size < 2


def test_the_state_is_two_compact_factors_a_byte_per_coordinate_and_a_scale_per_block() -> None:
    layer = adapted_layer(base_layer(11, 13), r=6, num_blocks=3)
    state = {name: tensor for name, tensor in layer.state_dict().items() if not name.startswith("base_layer")}
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()} == {
        "smoa_A.default.weight": ((6, 5), torch.float64),
        "smoa_B.default.weight": ((4, 6), torch.float64),
        "smoa_row_labels.default": ((11,), torch.uint8),
        "smoa_col_labels.default": ((13,), torch.uint8),
        "smoa_block_scale.default": ((3,), torch.float32),
    }


def test_nothing_besides_the_state_is_kept_per_layer() -> None:
    layer = adapted_layer(base_layer(40, 30), r=6, num_blocks=3)
    layer(torch.randn(4, 30, dtype=torch.float64)).sum().backward()
    frozen = layer.get_base_layer().weight
    kept = {name for name, buffer in layer.named_buffers() if buffer.numel() >= frozen.numel()}
    attributes = [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    assert not kept
    assert all(value.numel() < frozen.numel() for value in attributes)


def test_the_partition_of_a_layer_is_that_of_its_labels() -> None:
    layer = adapted_layer(base_layer(11, 13), r=6, num_blocks=3)
    partition = layer.blocks("default")
    assert (partition.row_labels.tolist(), partition.col_labels.tolist()) == labels(layer)
    assert partition.num_blocks == 3


def test_the_branch_output_is_the_adapters_contribution() -> None:
    layer = adapted_layer(base_layer(11, 13), r=6, num_blocks=3, alpha=2.0)
    x = torch.randn(5, 13, dtype=torch.float64)
    assert_close(layer.branch_output(x, "default"), x @ oracle_delta(layer).T)


def test_dropout_acts_on_the_adapters_input_only() -> None:
    layer = adapted_layer(base_layer(11, 13), r=6, num_blocks=3, smoa_dropout=0.4).train()
    x = torch.randn(50, 13, dtype=torch.float64)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.4)
    expected = reference.forward(x, base_weight(layer), layer.get_base_layer().bias, [oracle_delta(layer)], [dropped])
    assert_close(y, expected)


def test_dropout_is_off_in_evaluation() -> None:
    layer = adapted_layer(base_layer(11, 13), r=6, num_blocks=3, smoa_dropout=0.4).eval()
    x = torch.randn(5, 13, dtype=torch.float64)
    assert_close(layer(x), oracle_output(layer, x))


@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("modulation", MODULATIONS)
def test_gradients_under_dropout_are_the_oracles(conv1d: bool, modulation: str) -> None:
    base = base_layer(11, 13, conv1d=conv1d)
    layer = adapted_layer(base, r=7, num_blocks=3, alpha=2.0, smoa_dropout=0.3, modulation=modulation).train()
    x = torch.randn(6, 13, dtype=torch.float64, requires_grad=True)
    A, B = factors(layer)
    gradient = torch.randn(6, 11, dtype=torch.float64)
    torch.manual_seed(3)
    actual = torch.autograd.grad(layer(x), (x, A, B), gradient)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.3)
    y = reference.forward(x, base_weight(layer), base.bias.detach(), [oracle_delta(layer, A=A, B=B)], [dropped])
    for own, oracles in zip(actual, torch.autograd.grad(y, (x, A, B), gradient), strict=True):
        assert_close(own, oracles)


def test_the_base_weight_and_bias_are_frozen_and_left_as_they_were() -> None:
    base = base_layer(8, 6)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    layer = adapted_layer(base, r=4, num_blocks=2)
    layer(torch.randn(3, 6, dtype=torch.float64)).sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert all(parameter.grad is None for parameter in base.parameters())


def test_resetting_the_parameters_keeps_the_partition() -> None:
    layer = adapted_layer(base_layer(8, 6), r=4, num_blocks=2)
    before = labels(layer)
    randomise(layer)
    assert labels(layer) == before


def test_the_repr_names_the_method() -> None:
    assert repr(adapted_layer(base_layer(8, 6), r=4, num_blocks=2)).startswith("smoa.")


@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
def test_a_shared_config_is_not_changed_by_the_layers_it_makes(conv1d: bool) -> None:
    from peft import inject_adapter_in_model

    config = SmoaConfig(target_modules=["layer"], r=4, num_blocks=2)
    before = config.to_dict()
    inject_adapter_in_model(config, Wrapper(base_layer(8, 6, conv1d=conv1d)))
    assert config.to_dict() == before


def test_gradients_reach_factors_only() -> None:
    layer = adapted_layer(base_layer(8, 6), r=4, num_blocks=2)
    trainable = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert trainable >= {"smoa_A.default.weight", "smoa_B.default.weight"}


def test_the_scale_of_an_adapter_that_a_layer_does_not_have_is_nobodys() -> None:
    layer = adapted_layer(base_layer(11, 13), r=7, num_blocks=3)
    before = dict(layer.scaling)
    layer.set_scale("other", 3.0)
    assert layer.scaling == before


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_a_fresh_adapter_moves_B_first(modulation: str) -> None:
    layer = adapted_layer(base_layer(8, 6), trained=False, r=4, num_blocks=2, modulation=modulation)
    layer(torch.randn(5, 6, dtype=torch.float64)).square().sum().backward()
    A, B = factors(layer)
    assert (A.grad == 0).all()
    assert (B.grad != 0).all()


def test_an_adapter_with_A_zero_is_a_no_op_that_learns_by_A() -> None:
    layer = adapted_layer(base_layer(12, 10), trained=False, r=4, num_blocks=2, init_weights="zero_A")
    A, B = factors(layer)
    assert (A == 0).all()
    assert (B != 0).all()
    x = torch.randn(5, 10, dtype=torch.float64)
    y = layer(x)
    assert torch.equal(y, layer.get_base_layer()(x))
    y.sin().sum().backward()
    assert A.grad is not None
    assert (A.grad != 0).any()
    assert (B.grad == 0).all()


def test_a_layers_scale_can_be_set_and_put_back(tiny_llama: PreTrainedModel) -> None:
    layer = next(iter(smoa_layers(adapted(tiny_llama, alpha=8.0)).values()))
    before = layer.get_delta_weight("default")
    layer.set_scale("default", 3.0)
    assert_close(layer.get_delta_weight("default"), 3 * before)
    layer.set_scale("default", 1.0)
    layer.scale_layer(0.5)
    assert_close(layer.get_delta_weight("default"), 0.5 * before)
    layer.unscale_layer()
    assert torch.equal(layer.get_delta_weight("default"), before)
