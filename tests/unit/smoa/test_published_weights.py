"""Checkpoints published as FP8, MXFP4 and compressed-tensors: dequantized by transformers, adapted, trained, merged."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from smoa import SmoaConfig, UnsupportedModuleError
from smoa_lab.merge import merge_run
from tests.support import tiny_models
from tests.support.layers import layers_of
from tests.support.published import dequantized, published
from tests.support.tolerance import assert_close, relative_error

pytestmark = [
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning"),  # transformers' own
    pytest.mark.skipif(Version(transformers.__version__) < Version("5.24"), reason="tried with transformers 5.24"),
]
needs_package = pytest.mark.skipif(find_spec("compressed_tensors") is None, reason="compressed-tensors is missing")
METHODS = ["fp8", "mxfp4", pytest.param("compressed-tensors", marks=needs_package)]
QV = ["q_proj", "v_proj"]
EXPERTS = {"mxfp4": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


@pytest.mark.parametrize("method", METHODS)
def test_a_dequantized_checkpoint_is_adapted_trained_saved_and_merged(method: str, tmp_path: Path) -> None:
    original = published(method, tmp_path / "base")
    base = dequantized(method, tmp_path / "base")
    own, plain = (model.model.layers[0].self_attn.q_proj.weight for model in (base, original))
    assert own.dtype == torch.bfloat16
    assert relative_error(own, plain.detach().double()) < 0.05

    targets = {"target_modules": QV, "target_parameters": EXPERTS.get(method)}
    model = get_peft_model(base, SmoaConfig(r=4, **targets, task_type="CAUSAL_LM"))
    batch = tiny_models.batch("llama")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        losses.append(model(**batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]

    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        loaded = PeftModel.from_pretrained(dequantized(method, tmp_path / "base"), tmp_path / "adapter")
        assert torch.equal(loaded.eval()(**batch).logits, expected)
        merge_run(tmp_path / "adapter", tmp_path / "merged", "float32")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert_close(merged(**batch).logits, expected.float(), dtype=torch.bfloat16)
    assert not hasattr(merged.config, "quantization_config")


@needs_package
def test_a_layer_that_is_left_in_its_format_is_refused_with_the_remedy(tmp_path: Path) -> None:
    published("compressed-tensors", tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(UnsupportedModuleError, match=r"q_proj: .*quantized weight.*dequantize=True"):
        get_peft_model(base, SmoaConfig(target_modules=QV))
    assert not layers_of(base)
