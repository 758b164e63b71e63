"""What a save writes, and lives of adapters with a save in each."""

from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel, get_peft_model
from peft.utils import save_and_load
from torch import nn

from smoa import SmoaConfig, compat
from tests.lives import soak
from tests.support.layers import Wrapper


def base() -> Wrapper:
    return Wrapper(nn.Linear(12, 10))


@pytest.fixture
def adapter() -> PeftModel:
    return get_peft_model(base(), SmoaConfig(target_modules=["layer"]))


def test_a_token_given_for_loading_is_not_saved(tmp_path: Path, adapter: PeftModel) -> None:
    adapter.save_pretrained(tmp_path / "first")
    again = PeftModel.from_pretrained(base(), tmp_path / "first", token="hf_secret")
    again.save_pretrained(tmp_path / "second")
    assert all(b"hf_secret" not in file.read_bytes() for file in (tmp_path / "second").iterdir())


def test_lives_of_an_adapter_leave_weights_and_memory_as_they_were() -> None:
    soak.soak(100)


@pytest.mark.parametrize(("bias", "count"), [("none", 0), ("smoa_only", 1), ("all", 2)])
def test_biases_are_saved_whatever_peft_leaves_out(bias: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def get_peft_model_state_dict(model: Any, *args: Any, **options: Any) -> dict[str, Any]:  # as PEFT ≤ 0.20's
        return {}

    monkeypatch.setattr(compat, "SAVES_ITS_OWN", False)
    monkeypatch.setattr(save_and_load, "get_peft_model_state_dict", get_peft_model_state_dict)
    compat.save_as_later_versions()
    base = nn.Sequential(Wrapper(nn.Linear(12, 10)), nn.Linear(10, 4))
    saved = save_and_load.get_peft_model_state_dict(
        get_peft_model(base, SmoaConfig(target_modules=["layer"], bias=bias))
    )
    assert len(saved) == count
