"""Every way of loading a saved adapter goes through one door, which looks at the files before layers are made."""

import importlib
import inspect
import json
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
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.integrations.peft import PeftAdapterMixin

import smoa
from smoa import AdapterFileError, ConfigError, SmoaConfig
from smoa.files import loading
from smoa.files.loading import find_adapter, guard_loading, incoming
from tests.support import tiny_models
from tests.support.adapter_files import rewritten, with_settings
from tests.support.decompositions import NoDecomposition
from tests.support.layers import layers_of

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
SETTINGS: dict[str, Any] = {"r": 6, "num_blocks": 3, "target_modules": ["q_proj", "v_proj"], "init_weights": False}


def by_peft_model(folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(tiny_models.build("llama"), folder / "adapter")


def beside_another(folder: Path) -> nn.Module:
    model = get_peft_model(tiny_models.build("llama"), SmoaConfig(partition="contiguous", **SETTINGS), "first")
    model.load_adapter(str(folder / "adapter"), "default")
    model.set_adapter("default")
    return model


def by_auto_model(folder: Path) -> nn.Module:
    return AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")


def by_transformers(folder: Path) -> nn.Module:
    model = tiny_models.build("llama")
    model.load_adapter(str(folder / "adapter"))
    return model


def by_transformers_auto_model(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder / "adapter")


def by_low_memory(folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(tiny_models.build("llama"), folder / "adapter", low_cpu_mem_usage=True)


def with_a_given_config(folder: Path) -> nn.Module:
    config = PeftConfig.from_pretrained(folder / "adapter")
    return PeftModel.from_pretrained(tiny_models.build("llama"), folder / "adapter", config=config)


LOADERS: list[Callable[[Path], nn.Module]] = [
    *(by_peft_model, beside_another, by_auto_model, by_transformers, by_transformers_auto_model),
    *(by_low_memory, with_a_given_config),
]
every_loader = pytest.mark.parametrize("load", LOADERS, ids=lambda loader: loader.__name__)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[PeftModel, Path]:
    """An adapted model, and the folder of its adapter, with its base beside it."""
    folder = tmp_path_factory.mktemp("template")
    tiny_models.build("llama").save_pretrained(folder / "base")
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
def test_a_saved_adapter_is_opened_once_and_loaded_without_a_decomposition(
    load: Callable[[Path], nn.Module], saved: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    find = loading.find_adapter
    monkeypatch.setattr(loading, "find_adapter", lambda *given, **more: opened.append(given) or find(*given, **more))
    smoa.clear_spectrum_cache()
    with NoDecomposition():
        found = updates(load(tmp_path))
    assert len(found) == 4
    assert all(torch.equal(*pair) for pair in zip(found, updates(saved), strict=True))
    assert incoming() is None
    assert len(opened) == 1


def as_a_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / PICKLE)
    (folder / WEIGHTS).unlink()


def with_nan(folder: Path) -> None:
    rewritten(folder, lambda tensors: next(t for key, t in tensors.items() if "smoa_B" in key).fill_(float("nan")))


def of_a_smoa_before_0_2(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    del config["smoa_format"]
    (folder / CONFIG).write_text(json.dumps(config))


SPOILED: list[tuple[Callable[[Path], None], str]] = [
    (as_a_pickle, r"adapter_model\.bin: is a pickle"),
    (of_a_smoa_before_0_2, r"adapter_config\.json has no smoa_format, as before smoa 0\.2"),
    (with_nan, r"adapter_model\.safetensors: .*smoa_B.*NaN or infinite"),
]


@pytest.mark.parametrize(
    ("load", "spoil", "words"),
    [(load, *case) for case in SPOILED for load in (LOADERS if case[0] is with_nan else LOADERS[::3])],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_spoiled_adapter_is_refused_whoever_loads_it(
    load: Callable[[Path], nn.Module], spoil: Callable[[Path], None], words: str, saved: PeftModel, tmp_path: Path
) -> None:
    spoil(tmp_path / "adapter")
    with pytest.raises(AdapterFileError, match=words):
        load(tmp_path)
    assert incoming() is None


@pytest.mark.parametrize("load", [by_peft_model, by_transformers])
def test_a_config_that_breaks_a_rule_is_refused_with_its_file(
    load: Callable[[Path], nn.Module], saved: PeftModel, tmp_path: Path
) -> None:
    with_settings(tmp_path / "adapter", r=-1, alpha="x")
    with pytest.raises(ConfigError, match=r"adapter_config\.json: SmoaConfig: r=-1 .*; alpha='x'"):
        load(tmp_path)


def test_weights_without_a_config_are_looked_at_where_one_is_given(saved: PeftModel, tmp_path: Path) -> None:
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / CONFIG).unlink()
    with NoDecomposition():
        model = PeftModel.from_pretrained(tiny_models.build("llama"), tmp_path / "adapter", config=config)
    assert all(torch.equal(*pair) for pair in zip(updates(model), updates(saved), strict=True))
    as_a_pickle(tmp_path / "adapter")
    with pytest.raises(AdapterFileError, match="pickle"):
        PeftModel.from_pretrained(tiny_models.build("llama"), tmp_path / "adapter", config=config)


def test_transformers_loads_modules_that_were_trained_whole(tmp_path: Path) -> None:
    model = get_peft_model(tiny_models.build("llama"), SmoaConfig(modules_to_save=["lm_head"], **SETTINGS))
    nn.init.normal_(model.base_model.model.lm_head.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path / "adapter")
    again = by_transformers(tmp_path)
    batch = tiny_models.batch("llama")
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).logits, model.eval()(**batch).logits)


# From the Hub: a cache as it makes it, without network.


def in_a_hub_cache(folder: Path, cache: Path, revision: str = "main", commit: str = "a" * 40) -> Path:
    snapshot = cache / "models--lab--adapter" / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    (snapshot.parents[1] / "refs").mkdir(exist_ok=True)
    (snapshot.parents[1] / "refs" / revision).write_text(commit)
    return snapshot


def test_an_adapter_of_the_hub_comes_through_the_door(saved: PeftModel, tmp_path: Path) -> None:
    snapshot = in_a_hub_cache(tmp_path / "adapter", tmp_path / "cache")
    with NoDecomposition():
        model = PeftModel.from_pretrained(tiny_models.build("llama"), "lab/adapter", cache_dir=str(tmp_path / "cache"))
    assert all(torch.equal(*pair) for pair in zip(updates(model), updates(saved), strict=True))
    as_a_pickle(snapshot)
    with pytest.raises(AdapterFileError, match="pickle"):
        PeftModel.from_pretrained(tiny_models.build("llama"), "lab/adapter", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(AdapterFileError, match="pickle"):
        tiny_models.build("llama").load_adapter("lab/adapter", adapter_kwargs={"cache_dir": str(tmp_path / "cache")})


def test_the_revision_that_is_asked_for_is_checked_and_loaded(saved: PeftModel, tmp_path: Path) -> None:
    as_a_pickle(in_a_hub_cache(tmp_path / "adapter", tmp_path / "cache"))
    in_a_hub_cache(tmp_path / "adapter", tmp_path / "cache", "safe", "b" * 40)
    options = {"cache_dir": str(tmp_path / "cache"), "revision": "safe"}
    by_peft = PeftModel.from_pretrained(tiny_models.build("llama"), "lab/adapter", **options)
    by_transformers = tiny_models.build("llama")
    by_transformers.load_adapter("lab/adapter", adapter_kwargs=options)
    for model in (by_peft, by_transformers):
        assert all(torch.equal(*pair) for pair in zip(updates(model), updates(saved), strict=True))


def test_what_the_hub_does_not_have_is_left_to_peft() -> None:
    assert find_adapter("lab/nothing") is None
    with pytest.raises(ValueError, match=r"adapter_config\.json.*lab/nothing"):
        PeftModel.from_pretrained(tiny_models.build("llama"), "lab/nothing")


# Foreign adapters, and other ways in.


def test_an_adapter_of_another_method_costs_no_request_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    get_peft_model(tiny_models.build("llama"), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "a"
    )
    in_a_hub_cache(tmp_path / "a", tmp_path / "cache")
    monkeypatch.setattr(loading, "hf_hub_download", lambda *_, **__: pytest.fail("asks the Hub"))
    options = {"cache_dir": str(tmp_path / "cache")}
    PeftModel.from_pretrained(tiny_models.build("llama"), "lab/adapter", **options)
    tiny_models.build("llama").load_adapter("lab/adapter", adapter_kwargs=options)


def test_an_adapter_of_another_method_is_loaded_as_ever(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_models.build("llama"), config)
    model.save_pretrained(tmp_path)
    assert find_adapter(tmp_path) is None
    loaded = PeftModel.from_pretrained(tiny_models.build("llama"), tmp_path)
    loaded.load_adapter(str(tmp_path), "second")
    batch = tiny_models.batch("llama")
    assert torch.equal(loaded.eval()(**batch).logits, model.eval()(**batch).logits)
    as_a_pickle(tmp_path)
    PeftModel.from_pretrained(tiny_models.build("llama"), tmp_path)
    assert isinstance(SmoaConfig.from_pretrained(tmp_path), LoraConfig)


def test_layers_made_for_a_state_dict_wait_for_its_labels(saved: PeftModel, tmp_path: Path) -> None:
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    plain = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
    with NoDecomposition():
        model = inject_adapter_in_model(config, tiny_models.build("llama"), state_dict=plain)
        set_peft_model_state_dict(model, tensors)
    assert all(torch.equal(*pair) for pair in zip(updates(model), updates(saved), strict=True))


def test_guarding_again_puts_up_no_second_door() -> None:
    before = [PeftModel.__dict__["load_adapter"], PeftAdapterMixin.__dict__["load_adapter"]]
    guard_loading()
    importlib.reload(smoa)
    for function, again in zip(before, (PeftModel.load_adapter, PeftAdapterMixin.load_adapter), strict=True):
        assert inspect.unwrap(again) is function.__wrapped__
    assert isinstance(PeftModel.__dict__["from_pretrained"], classmethod)


@pytest.mark.parametrize(("file", "model"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_factors_have_the_dtype_that_the_model_gives_them_and_not_the_files(
    file: torch.dtype, model: torch.dtype, low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    config = SmoaConfig(r=4, num_blocks=2, target_modules=["0"], init_weights=False)
    saved = get_peft_model(nn.Sequential(nn.Linear(12, 8, dtype=file)), config, autocast_adapter_dtype=False)
    saved.save_pretrained(tmp_path)
    base = nn.Sequential(nn.Linear(12, 8, dtype=model))
    base.load_state_dict(saved.unload().state_dict())
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert {parameter.dtype for parameter in loaded.parameters()} == {model}
