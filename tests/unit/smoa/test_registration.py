from __future__ import annotations

import copy
import importlib
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType

import smoa
from smoa import SmoaConfig, SmoaModel, UnsupportedVersionError, registration
from smoa.registration import check_peft_version, ensure_peft_type, register
from tests.support import tiny_models

CONFIG = SmoaConfig(
    r=7, num_blocks=3, block_ranks=[4, 2, 1], alpha=2.5, target_modules=["q_proj", "v_proj"], smoa_dropout=0.1
)


def test_smoa_is_a_member_of_pefts_enum() -> None:
    member = PeftType("SMOA")
    assert member is PeftType.SMOA is PeftType["SMOA"]
    assert member in list(PeftType)
    assert isinstance(member, PeftType)
    assert (member.name, member.value, str.__str__(member)) == ("SMOA", "SMOA", "SMOA")
    assert member == "SMOA"
    assert {"SMOA": 1}[member] == 1
    names = [member.name for member in PeftType]
    assert len(names) == len(set(names))
    assert PeftType("LORA") is PeftType.LORA
    with pytest.raises(ValueError, match="NO_SUCH_METHOD"):
        PeftType("NO_SUCH_METHOD")
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is SmoaConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is SmoaModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == "smoa_"


def test_registering_again_changes_nothing() -> None:
    before = [member.name for member in PeftType], dict(PEFT_TYPE_TO_TUNER_MAPPING)
    ensure_peft_type()
    register(SmoaConfig, SmoaModel)
    assert ([member.name for member in PeftType], dict(PEFT_TYPE_TO_TUNER_MAPPING)) == before


def test_reloading_smoa_keeps_one_member() -> None:
    member = PeftType.SMOA
    importlib.reload(smoa)
    assert PeftType.SMOA is member
    assert [m.name for m in PeftType].count("SMOA") == 1


def test_another_method_of_the_same_name_is_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = type("ForeignModel", (), {"__module__": "peft.tuners.smoa.model"})
    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, PeftType.SMOA, foreign)
    with pytest.raises(UnsupportedVersionError, match=r"peft\.tuners\.smoa"):
        register(SmoaConfig, SmoaModel)
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.SMOA] is foreign


@pytest.mark.parametrize("again", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_a_config_survives_copying_and_pickling(again: Callable[[SmoaConfig], SmoaConfig]) -> None:
    assert again(CONFIG) == CONFIG
    assert again(CONFIG).peft_type is PeftType.SMOA


@pytest.mark.parametrize("loader", [SmoaConfig, PeftConfig])
def test_a_config_survives_saving(tmp_path: Path, loader: type[PeftConfig]) -> None:
    CONFIG.save_pretrained(tmp_path)
    again = loader.from_pretrained(tmp_path)
    assert isinstance(again, SmoaConfig)
    from_file = {"inference_mode": again.inference_mode, "save_id": CONFIG.make_save_id()}
    assert again.to_dict() == {**CONFIG.to_dict(), **from_file}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "SMOA"


def test_a_fresh_process_that_only_imports_smoa_loads_an_adapter_and_needs_nothing_of_the_lab(tmp_path: Path) -> None:
    settings = {"r": 5, "num_blocks": 3, "target_modules": ["q_proj"], "init_weights": False}
    model = get_peft_model(tiny_models.build("llama"), SmoaConfig(**settings)).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**tiny_models.batch("llama")).logits.double().sum().item()
    # peft imports accelerate and transformers imports others by itself: what counts is what smoa adds to them.
    code = """
import sys, peft, transformers
lab = {"accelerate", "altair", "datasets", "gguf", "pydantic", "rich", "typer"}
old = lab & set(sys.modules)
import smoa
print(len(lab & set(sys.modules) - old))
from peft import PeftModel
from tests.support import tiny_models
model = PeftModel.from_pretrained(tiny_models.build("llama"), sys.argv[1]).eval()
print(type(model.base_model).__name__, model(**tiny_models.batch("llama")).logits.double().sum().item())
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3])
    assert result.returncode == 0, result.stderr
    added, name, total = result.stdout.split()
    assert added == "0"
    assert name == "SmoaModel"
    assert float(total) == pytest.approx(expected, rel=1e-6)


def test_an_enum_that_takes_no_member_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Changed(StrEnum):
        SMOA = "another value"

        @classmethod
        def _missing_(cls, value: object) -> Changed:
            return cls.SMOA

    monkeypatch.setattr(registration, "PeftType", Changed)
    with pytest.raises(UnsupportedVersionError, match="PEFT has changed its enum"):
        ensure_peft_type()


def test_old_versions_of_peft_are_refused_and_newer_ones_tried_with_a_warning() -> None:
    for version in ("0.18.1", "0.20.0", "0.21.99", "0.21.1.dev0"):
        check_peft_version(version)
    for version in ("0.18.0", "0.9.1"):
        with pytest.raises(UnsupportedVersionError, match=rf"(?s)>=0\.18\.1.*{version}"):
            check_peft_version(version)
    for version in ("0.22.0.dev0", "1.0.0"):
        with pytest.warns(UserWarning, match=rf"tested with peft .*, found {version}"):
            check_peft_version(version)
