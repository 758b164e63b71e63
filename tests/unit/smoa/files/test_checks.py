"""A short part of `make fuzz`, and what each kind of hostile folder is told."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from smoa import AdapterFileError
from tests.fuzz_adapters import CORPUS, base, fuzz, outcome, write_corpus
from tests.support.adapter_files import rewritten, with_settings
from tests.support.adapter_mutations import CONFIG, MUTATIONS, WEIGHTS

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
    assert outcome(corpus[name], corpus[name]) == "loaded: the same bytes"


@pytest.mark.parametrize("limit", [0, 100, -1])
def test_a_truncated_file_is_refused_by_name(folder: Path, limit: int) -> None:
    file = folder / WEIGHTS
    os.truncate(file, limit % file.stat().st_size)
    with pytest.raises(AdapterFileError, match=r"adapter_model\.safetensors: is not a whole safetensors file"):
        load(folder)


def test_a_pipe_in_the_place_of_the_weights_is_refused_and_not_waited_for(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    with pytest.raises(AdapterFileError, match="not a regular file"):
        load(folder)


def test_links_as_the_hub_makes_them_are_followed(folder: Path) -> None:
    for name in (CONFIG, WEIGHTS):
        (folder / name).rename(folder / f"blob-{name}")
        (folder / name).symlink_to(f"blob-{name}")
    load(folder)


UP = "base_model.model.up."
A, B = UP + "smoa_A.weight", UP + "smoa_B.weight"
BASE_WEIGHT = UP + "base_layer.weight"
Change = Callable[[dict[str, Tensor]], object]


def value(key: str, number: float, dtype: torch.dtype = torch.float32) -> Change:
    """Set the first number of a tensor."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[key] = tensors[key].to(dtype)
        tensors[key].view(-1)[0] = number

    return change


NOT_FINITE, TOO_LARGE = r"up\.smoa_B.*NaN or infinite", r"up: .* multiply to .*, beyond torch\.float32"
CHANGED: dict[str, tuple[Change, str]] = {
    "of the base": (lambda t: t.update({BASE_WEIGHT: torch.ones(10, 12)}), r"has unknown 1 tensor.*up\.base_layer"),
    "of a path": (lambda t: t.update({"../../../etc/passwd": torch.ones(1)}), "has unknown 1 tensor"),
    "bias": (lambda t: t.update({UP.replace("up", "left") + "base_layer.bias": torch.ones(10)}), "unknown.*left.*bias"),
    "missing": (lambda t: t.pop(A), r"lacks 1 tensor\(s\).*smoa_A"),
    "missing scales": (lambda t: t.pop(UP + "smoa_block_scale"), r"lacks 1 tensor\(s\).*smoa_block_scale"),
    "of fewer rows": (
        lambda t: t.update({A: t[A][:2]}),
        r"smoa_A.*shape.*doesn't fit the layer.*adapter_config\.json come from another save",
    ),
    "of integers": (lambda t: t.update({A: t[A].long()}), "smoa_A.*int64.*floating point"),
    "of labels of one block": (lambda t: t[UP + "smoa_row_labels"].zero_(), r"up\.smoa_row_labels"),
    "of fewer labels": (
        lambda t: t.update({UP + "smoa_row_labels": t[UP + "smoa_row_labels"][:-1]}),
        r"up\.smoa_row_labels.*shape",
    ),
    "of wide labels": (
        lambda t: t.update({UP + "smoa_row_labels": t[UP + "smoa_row_labels"].long()}),
        r"up\.smoa_row_labels.*uint8",
    ),
    "infinite": (value(B, float("-inf")), NOT_FINITE),
    "infinite once it is cast": (value(B, 1e300, torch.float64), NOT_FINITE),
    "a flipped bit of A": (value(A, 3e38), TOO_LARGE),
    "a flipped bit of a scale": (value(UP + "smoa_block_scale", 3e38), TOO_LARGE),
    "such a scale of small factors": (
        lambda tensors: value(UP + "smoa_block_scale", 3e38)(tensors | {B: tensors[B].mul_(1e-6)}),
        TOO_LARGE,
    ),
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_changed_tensor_is_refused_by_name_and_the_base_is_left_alone(folder: Path, change: str) -> None:
    rewritten(with_settings(folder), CHANGED[change][0])
    for low_cpu_mem_usage in (False, True):
        model = base()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(AdapterFileError, match=rf"adapter_model\.safetensors: .*{CHANGED[change][1]}"):
            PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=low_cpu_mem_usage)
        after = {key.replace(".base_layer", ""): value for key, value in model.state_dict().items()}
        assert all(torch.equal(after[key], value) for key, value in before.items())


def test_a_missing_bias_is_refused(tmp_path: Path, corpus: dict[str, Path]) -> None:
    folder = with_settings(shutil.copytree(corpus["head"], tmp_path / "adapter"))
    rewritten(folder, lambda tensors: tensors.pop(UP + "base_layer.bias"))
    with pytest.raises(AdapterFileError, match=r"lacks 1 tensor\(s\): up\.base_layer\.bias"):
        load(folder)


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


def test_a_state_dict_without_a_folder_is_checked_as_well(folder: Path) -> None:
    model = get_peft_model(base(), CORPUS["plain"][0])
    tensors = load_file(folder / WEIGHTS)
    tensors[BASE_WEIGHT] = torch.ones(10, 12)
    with pytest.raises(AdapterFileError, match=r"up\.base_layer\.weight"):
        set_peft_model_state_dict(model, tensors)
