"""Every way of loading a saved adapter gives its own bits, and decomposes nothing."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from smoa import SmoaConfig
from smoa.compat import PREFIX
from tests.support import tiny
from tests.support.layers import layers_of
from tests.support.watch import NoDecomposition

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
SETTINGS: dict[str, Any] = {"r": 6, "num_blocks": 3, "target_modules": ["q_proj", "v_proj"], "init_weights": False}


def by_peft_model(folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(tiny.build("llama"), folder / "adapter")


def beside_another(folder: Path) -> nn.Module:
    model = get_peft_model(tiny.build("llama"), SmoaConfig(partition="contiguous", **SETTINGS), "first")
    model.load_adapter(str(folder / "adapter"), "default")
    model.set_adapter("default")
    return model


def by_auto_model(folder: Path) -> nn.Module:
    return AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")


def by_transformers(folder: Path) -> nn.Module:
    model = tiny.build("llama")
    model.load_adapter(str(folder / "adapter"))
    return model


def by_transformers_auto_model(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder / "adapter")


def by_low_memory(folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(tiny.build("llama"), folder / "adapter", low_cpu_mem_usage=True)


def with_a_given_config(folder: Path) -> nn.Module:
    config = PeftConfig.from_pretrained(folder / "adapter")
    return PeftModel.from_pretrained(tiny.build("llama"), folder / "adapter", config=config)


LOADERS: list[Callable[[Path], nn.Module]] = [
    *(by_peft_model, beside_another, by_auto_model, by_transformers, by_transformers_auto_model),
    *(by_low_memory, with_a_given_config),
]
every_loader = pytest.mark.parametrize("load", LOADERS, ids=lambda loader: loader.__name__)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[PeftModel, Path]:
    """An adapted model, and the folder of its adapter, with its base beside it."""
    folder = tmp_path_factory.mktemp("template")
    tiny.build("llama").save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = get_peft_model(base, SmoaConfig(task_type="CAUSAL_LM", **SETTINGS)).eval()
    model.save_pretrained(folder / "adapter")
    return model, folder / "adapter"


@pytest.fixture
def saved(template: tuple[PeftModel, Path], tmp_path: Path) -> PeftModel:
    """The adapted model, whose adapter is in `tmp_path/adapter`."""
    model, folder = template
    shutil.copytree(folder, tmp_path / "adapter")
    return model


def updates(model: nn.Module) -> list[Tensor]:
    return [layer.delta("default").detach() for layer in layers_of(model)]


@every_loader
def test_a_saved_adapter_is_loaded_without_a_decomposition(
    load: Callable[[Path], nn.Module], saved: PeftModel, tmp_path: Path
) -> None:
    with NoDecomposition():
        found = updates(load(tmp_path))
    assert len(found) == 4
    assert all(torch.equal(*pair) for pair in zip(found, updates(saved), strict=True))


def as_a_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / PICKLE)
    (folder / WEIGHTS).unlink()


def test_weights_without_a_config_are_loaded_where_one_is_given(saved: PeftModel, tmp_path: Path) -> None:
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / CONFIG).unlink()
    with NoDecomposition():
        model = PeftModel.from_pretrained(tiny.build("llama"), tmp_path / "adapter", config=config)
    assert all(torch.equal(*pair) for pair in zip(updates(model), updates(saved), strict=True))


def test_transformers_loads_modules_that_were_trained_whole(tmp_path: Path) -> None:
    model = get_peft_model(tiny.build("llama"), SmoaConfig(modules_to_save=["lm_head"], **SETTINGS))
    nn.init.normal_(model.base_model.model.lm_head.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path / "adapter")
    again = by_transformers(tmp_path)
    batch = tiny.batch("llama")
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).logits, model.eval()(**batch).logits)


# From the Hub: a cache as it makes it, without network.


def in_a_hub_cache(folder: Path, cache: Path, commit: str = "a" * 40) -> None:
    snapshot = cache / "models--lab--adapter" / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)


def test_an_adapter_of_the_hub_is_loaded_without_a_decomposition(saved: PeftModel, tmp_path: Path) -> None:
    in_a_hub_cache(tmp_path / "adapter", tmp_path / "cache")
    with NoDecomposition():
        model = PeftModel.from_pretrained(tiny.build("llama"), "lab/adapter", cache_dir=str(tmp_path / "cache"))
    assert all(torch.equal(*pair) for pair in zip(updates(model), updates(saved), strict=True))


# Foreign adapters, and other ways in.


def test_an_adapter_of_another_method_is_loaded_as_ever(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(tiny.build("llama"), config)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.build("llama"), tmp_path)
    loaded.load_adapter(str(tmp_path), "second")
    batch = tiny.batch("llama")
    assert torch.equal(loaded.eval()(**batch).logits, model.eval()(**batch).logits)
    as_a_pickle(tmp_path)
    PeftModel.from_pretrained(tiny.build("llama"), tmp_path)
    assert isinstance(SmoaConfig.from_pretrained(tmp_path), LoraConfig)


def test_layers_made_for_a_state_dict_wait_for_its_labels(saved: PeftModel, tmp_path: Path) -> None:
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    plain = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
    with NoDecomposition():
        model = inject_adapter_in_model(config, tiny.build("llama"), state_dict=plain)
        set_peft_model_state_dict(model, plain)
    assert all(torch.equal(*pair) for pair in zip(updates(model), updates(saved), strict=True))


@pytest.mark.parametrize(("file", "model"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_factors_have_the_dtype_that_the_model_gives_them_and_not_the_files(
    file: torch.dtype, model: torch.dtype, tmp_path: Path
) -> None:
    config = SmoaConfig(r=4, num_blocks=2, target_modules=["0"], init_weights=False)
    saved = get_peft_model(nn.Sequential(nn.Linear(12, 8, dtype=file)), config, autocast_adapter_dtype=False)
    saved.save_pretrained(tmp_path)
    base = nn.Sequential(nn.Linear(12, 8, dtype=model))
    base.load_state_dict(saved.unload().state_dict())
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {model}


def test_tensors_that_come_with_the_injection_are_not_decided_before(saved: PeftModel) -> None:
    state = get_peft_model_state_dict(saved)
    with NoDecomposition():
        inject_adapter_in_model(
            SmoaConfig(**SETTINGS),
            tiny.build("llama"),
            state_dict={k.removeprefix(PREFIX): state[k] for k in state},
        )
