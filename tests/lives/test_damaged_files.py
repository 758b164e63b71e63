"""A short part of `make fuzz`, and what a file may have."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from tests.lives.adapter_mutations import CONFIG, MUTATIONS, WEIGHTS
from tests.lives.fuzz import CORPUS, base, fuzz, outcome, write_corpus
from tests.support.tiny import rewritten, with_settings

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def folder(tmp_path: Path, corpus: dict[str, Path]) -> Path:
    return shutil.copytree(corpus["plain"], tmp_path / "adapter")


def load(folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(base(), folder)


def test_each_kind_of_mutation_is_loaded_as_what_it_is_or_refused(tmp_path: Path) -> None:
    results = fuzz(6 * len(MUTATIONS), seed=20, room=tmp_path)
    assert {mutation for mutation, _ in results} == set(MUTATIONS)
    assert not [result for result in results if result[1].startswith("FINDING")]


@pytest.mark.parametrize(
    "name", [name for name in CORPUS if name not in ("other shapes", "another base", "lora", "hira")]
)
def test_a_folder_that_nobody_touched_is_loaded(name: str, corpus: dict[str, Path]) -> None:
    assert outcome(corpus[name], corpus[name]) == "loaded"


def test_links_as_the_hub_makes_them_are_followed(folder: Path) -> None:
    for name in (CONFIG, WEIGHTS):
        (folder / name).rename(folder / f"blob-{name}")
        (folder / name).symlink_to(f"blob-{name}")
    load(folder)


UP = "base_model.model.up."


def test_biases_of_the_file_are_loaded_by_a_config_that_does_not_train_them_as_in_peft(
    corpus: dict[str, Path],
) -> None:
    saved = load(corpus["head"])
    model = get_peft_model(base(), replace(saved.peft_config["default"], bias="none"))
    set_peft_model_state_dict(model, get_peft_model_state_dict(saved))
    expected = {name: tensor for name, tensor in saved.named_parameters() if name.endswith(".bias")}
    found = dict(model.named_parameters())
    assert len(expected) == 4
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_factors_in_another_floating_dtype_are_loaded(folder: Path, dtype: torch.dtype) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: t.to(dtype) for name, t in tensors.items() if t.is_floating_point()})

    rewritten(with_settings(folder), change)
    loaded, tensors = load(folder).base_model.model.up, load_file(folder / WEIGHTS)
    for side, factors in (("A", loaded.smoa_A), ("B", loaded.smoa_B)):
        assert factors["default"].weight.dtype == torch.float32
        assert torch.equal(factors["default"].weight, tensors[f"base_model.model.up.smoa_{side}.weight"].float())
