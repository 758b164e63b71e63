"""The public API as a user's type checker sees it. Checked by mypy (`make types`), never run."""

from typing import assert_type

import torch
from peft import get_peft_model
from transformers import PreTrainedModel

from smoa import PartitionError, SmoaConfig, SmoaError, SpectralPartition, make_partition, spectral_scores


def config_fields_have_types() -> None:
    config = SmoaConfig(r=8, num_blocks=2, alpha=16, partition="random", modulation="none", bias="smoa_only")
    assert_type(config.r, int)
    assert_type(config.alpha, float | None)


def unknown_choices_are_refused() -> None:
    SmoaConfig(modulation="khatri-rao")  # type: ignore[arg-type]


def a_config_is_one_of_pefts(base: PreTrainedModel) -> None:
    get_peft_model(base, SmoaConfig())


def partitions_have_types(weight: torch.Tensor) -> None:
    partition = make_partition(weight, 4, "contiguous")
    assert_type(partition, SpectralPartition)
    assert_type(partition.rows(0), torch.Tensor)
    assert_type(spectral_scores(weight), tuple[torch.Tensor, torch.Tensor])


def errors_are_caught_as_smoa_errors_or_builtins() -> None:
    try:
        make_partition(torch.zeros(2, 2), 3)
    except SmoaError as error:
        assert_type(error, SmoaError)
    error_type: type[ValueError] = PartitionError
    assert_type(error_type, type[ValueError])
