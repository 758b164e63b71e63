"""A partition by a function of the user's: only making an adapter needs it."""

from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import smoa
from smoa import ConfigError, PartitionError, SmoaConfig, register_partition, spectrum
from smoa.partition import block_sizes


def by_norm(weight: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Rows and columns sorted by their norm, and cut evenly."""
    labels = []
    for norms in (weight.norm(dim=1), weight.norm(dim=0)):
        sizes = torch.tensor(block_sizes(len(norms), num_blocks))
        side = torch.empty(len(norms), dtype=torch.long)
        side[norms.argsort()] = torch.arange(num_blocks).repeat_interleave(sizes)
        labels.append(side)
    return labels[0], labels[1]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(13, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectrum, "_registered", {})
    register_partition("by_norm", by_norm)


def config() -> SmoaConfig:
    return SmoaConfig(r=4, num_blocks=2, partition="by_norm", target_modules=["linear"], init_weights=False)


def test_its_labels_are_taken_and_saved_and_loaded_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(Model(), config())
    layer = model.base_model.model.linear
    labels = by_norm(layer.base_layer.weight, 2)
    blocks = layer.blocks("default")
    assert (blocks.row_labels.tolist(), blocks.col_labels.tolist()) == tuple(side.tolist() for side in labels)
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 13)
    expected = model(x)

    monkeypatch.setattr(spectrum, "_registered", {})
    loaded = PeftModel.from_pretrained(Model(), tmp_path)
    assert torch.equal(loaded(x), expected)
    torch.testing.assert_close(loaded.merge_and_unload()(x), expected)
    anew = get_peft_model(Model(), PeftConfig.from_pretrained(tmp_path))
    with pytest.raises(ConfigError, match=r"partition='by_norm' must be one of .*'spectral', .*register_partition"):
        anew(x)


def test_a_name_that_is_taken_or_unknown_is_refused() -> None:
    with pytest.raises(ConfigError, match="smoa has a partition 'spectral'"):
        register_partition("spectral", by_norm)
    register_partition("by_norm", by_norm)  # as a notebook's cell does that runs again
    with pytest.raises(ConfigError, match=r"partition='by_norn' must be one of .*'by_norm'"):
        SmoaConfig(partition="by_norn")
    assert smoa.make_partition(torch.randn(6, 6), 2, "by_norm").num_blocks == 2


def test_loaded_adapters_are_summed_and_copied_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    get_peft_model(Model(), config()).save_pretrained(tmp_path)
    monkeypatch.setattr(spectrum, "_registered", {})
    model = PeftModel.from_pretrained(Model(), tmp_path, is_trainable=True)
    model.load_adapter(tmp_path, "two")
    model.add_weighted_adapter(["default", "two"], [0.5, 0.5], "sum", combination_type="cat")
    layer = model.base_model.model.linear
    torch.testing.assert_close(layer.delta("sum"), layer.delta("default"))
    model.add_adapter("ref", model.peft_config["default"])  # as TRL does, which then copies the factors
    assert torch.equal(layer.blocks("ref").row_labels, layer.blocks("default").row_labels)


@pytest.mark.parametrize("labels", [torch.zeros(10), torch.tensor([0, 1] * 4), torch.tensor([0] * 9 + [1])])
def test_labels_that_are_no_partition_are_refused(labels: Tensor) -> None:
    register_partition("wrong", lambda weight, num_blocks: (labels, by_norm(weight, num_blocks)[1]))
    with pytest.raises(PartitionError):
        smoa.make_partition(torch.randn(10, 13), 2, "wrong")
