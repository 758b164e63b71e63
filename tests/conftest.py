"""What every test may ask for. Nothing is downloaded: models are built from configs (tests/tiny_models.py)."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator

# Before transformers is imported: a test that would reach for a hub fails at once instead of waiting for it.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from transformers import PreTrainedModel

from smoa import use_kernels
from tests.support import tiny_models
from tests.support.peft_versions import adapt_to_peft

# Models this small lose more to starting threads than they gain from them.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what an old PEFT can't do."""
    adapt_to_peft(items)


def pytest_collection_finish() -> None:
    """What is imported stays: a collection of garbage, as each training ends with one, needs not walk through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test draws the same numbers, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _float32_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose config names no dtype has the same one on every CPU."""
    if config := sys.modules.get("smoa_lab.config.run"):  # a test of the library needs nothing of the lab
        monkeypatch.setattr(config, "cpu_multiplies_bfloat16", lambda: False)


@pytest.fixture(autouse=True)
def _kernels_of_its_own() -> Iterator[None]:
    """What a test chooses holds for no other one."""
    yield
    use_kernels("auto")


@pytest.fixture(params=["loop", "batched"])
def kernels(request: pytest.FixtureRequest) -> str:
    """Each way to compute the blocks' products in turn."""
    use_kernels(request.param)
    name: str = request.param
    return name


@pytest.fixture(params=tiny_models.BUILDERS)
def family(request: pytest.FixtureRequest) -> str:
    """Each family of models in turn: llama, gemma3, gpt2, bert, t5."""
    name: str = request.param
    return name


@pytest.fixture
def tiny_llama() -> PreTrainedModel:
    """A decoder with grouped-query attention."""
    return tiny_models.build("llama")


@pytest.fixture
def tiny_gemma3() -> PreTrainedModel:
    """A decoder with one key-value head and tied embeddings."""
    return tiny_models.build("gemma3")
