"""Every method of the installed PEFT in the lab: tried without weights, trained, saved, loaded, scored and merged."""

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from smoa.errors import MergeError
from smoa_lab.base_models import empty_model
from smoa_lab.config.methods import base_lost, check_adapter, method_names
from smoa_lab.config.run import check_config
from smoa_lab.export import Merged, merge_in_memory
from smoa_lab.training.loaded_run import LoadedRun, load_run
from smoa_lab.training.train import _untouched
from smoa_lab.training.trainer import fit, make_trainer
from tests.support import lab

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of single methods

OWN: dict[str, dict[str, Any]] = {
    "adalora": {"total_step": 9},
    "adaption_prompt": {"adapter_len": 4, "adapter_layers": 1, "target_modules": None},
    "bone": {"r": 8},
    "c3a": {"block_size": 16},
    "fourierft": {"n_frequency": 64},
    "frod": {"progressbar": False},
    "ia3": {"feedforward_modules": ["down_proj"]},
    "ln_tuning": {"target_modules": None},
    "miss": {"r": 8},
    "oft": {"oft_block_size": 16},
    "road": {"group_size": 16},
    "shira": {"r": 2},
    "trainable_tokens": {"token_indices": [5, 6], "target_modules": ["embed_tokens"]},
    "vblora": {"vector_length": 16},
    "waveft": {"n_frequency": 64},
}
"""What a method needs, by itself or since the layers are narrow."""
UNMERGED = {
    "adaption_prompt": "PEFT can't merge ADAPTION_PROMPT, which is more than a change of weights",
    "beft": "Base layer has no bias",
    "lily": "not supported for Lily",
}

SHORT = {"smoa", "melora", "lora", "dora", "hira", "adalora", "ia3", "vera", "ln_tuning", "trainable_tokens", *UNMERGED}
NAMES = [
    pytest.param(name, marks=[] if name in SHORT else pytest.mark.slow) for name in method_names() if name != "full"
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedRun]:
    """Two steps on a tiny Llama, loaded."""
    with pytest.MonkeyPatch.context() as patch:
        training = lab.steps(2, learning_rate=0.01, save_strategy="no")
        values = lab.tiny_run(tmp_path_factory.mktemp("lab"), patch, train=8, test=4, training=training)
        yield load_run(check_config(values))


@pytest.mark.parametrize("name", NAMES)
def test_a_method_is_trained_saved_loaded_scored_and_merged(name: str, run: LoadedRun, tmp_path: Path) -> None:
    block = {"target_modules": ["q_proj", "down_proj"], **OWN.get(name, {})}
    block = {key: value for key, value in block.items() if value is not None}
    config = check_config({**run.config.model_dump(), "method": name, "adapter": block})
    wanted = config.peft_config()
    assert wanted is not None
    check_adapter(empty_model(config.model), wanted)
    evaluation, _ = run.evaluation(answers=False)

    def measured(model: Any) -> list[float]:
        return evaluation.measure_once(model).losses.nll

    trainer = make_trainer(dataclasses.replace(run, config=config, base=copy.deepcopy(run.base)), wanted)
    model: Any = trainer.model
    before = measured(run.base)
    with _untouched(model):
        assert measured(model) == pytest.approx(before, abs=1e-4)
    fit(trainer, None)
    trained = measured(model)
    assert trainer.state.global_step == 2
    assert trained != before
    with _untouched(model):
        assert base_lost(wanted) or measured(model) == pytest.approx(before, abs=1e-6)

    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(copy.deepcopy(run.base), str(tmp_path / "adapter"))
    assert measured(loaded) == pytest.approx(trained, abs=1e-4)

    def merge() -> None:
        result = Merged(str(tmp_path / "merged"), "base")
        merge_in_memory(copy.deepcopy(run.base), tmp_path / "adapter", result).save_pretrained(result.folder)

    if name in UNMERGED:
        with pytest.raises((MergeError, NotImplementedError, ValueError), match=UNMERGED[name]):
            merge()
        return
    merge()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert measured(merged) == pytest.approx(trained, abs=1e-3)
