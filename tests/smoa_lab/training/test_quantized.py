"""`smoa train` on a base model in 4 and 8 bits: what the YAML asks for is what is trained on."""

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from smoa.quantized import QuantizedLinear
from smoa_lab.base_models import load_weights
from smoa_lab.config.run import ModelSection, check_config
from smoa_lab.evaluate import evaluate_run
from smoa_lab.export import merge_run, verify
from smoa_lab.open_run import open_place
from smoa_lab.training import train as run_module
from smoa_lab.training.loaded_run import LoadedRun
from smoa_lab.training.run_folder import RunFolder
from tests.support import lab

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
INT8 = {"load_in_8bit": True}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run of four steps on an NF4 model."""
    config = lab.tiny_run(
        tmp_path,
        monkeypatch,
        train=40,
        test=6,
        training=lab.steps(4, learning_rate=0.01),
        adapter={"r": 4, "num_blocks": 2, "alpha": 128, "target_modules": "all-linear"},
    )
    config["model"]["options"] = {"quantization_config": NF4}
    return config


@pytest.mark.parametrize(("quantization", "kind"), [(NF4, bnb.nn.Linear4bit), (INT8, bnb.nn.Linear8bitLt)])
def test_a_run_trains_on_the_quantized_model_and_is_scored_again_from_its_folder(
    config: dict[str, Any], quantization: dict[str, Any], kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    config["model"]["options"]["quantization_config"] = quantization
    config["adapter"]["other_base"] = True  # 4 bits move such small blocks far from the plain ones
    run = check_config(config)
    loaded: list[LoadedRun] = []
    load = run_module.load_run
    monkeypatch.setattr(run_module, "load_run", lambda config: loaded.append(load(config)) or loaded[0])
    metrics = run_module.run(run)
    adapted = [module for module in loaded[0].base.modules() if isinstance(module, QuantizedLinear)]
    assert adapted
    assert all(type(layer.get_base_layer()) is kind for layer in adapted)
    assert all(layer.smoa_B["default"].weight.any() for layer in adapted)
    assert metrics["evaluation"]["after"] != metrics["evaluation"]["before"]
    again = evaluate_run(open_place(run.folder))
    assert again["scores"] == pytest.approx(metrics["evaluation"]["after"], rel=1e-5)
    full = load_weights(ModelSection(name=config["model"]["name"]))
    packed = metrics["parameters"]
    assert packed["total"] - packed["trainable"] == sum(weight.numel() for weight in full.parameters())
    found = merge_run(run.folder, run.folder.with_name("merged"))
    assert "dequantized" in found.note
    assert found.saved_dtype == "float32"  # not what the base computes in
    assert "dequantized" in (run.folder.with_name("merged") / "README.md").read_text()
    assert merge_run(run.folder, run.folder.with_name("plain"), base=config["model"]["name"]).note == ""
    # both on the weights that were quantized
    verdict = verify(run.folder, [str(run.folder.with_name("merged"))])[0]
    assert verdict.agrees, verdict.line()
    model = PeftModel.from_pretrained(full, str(RunFolder(run.folder).adapter))
    merged = model.merge_and_unload(safe_merge=True)  # warnings are errors here: nothing is rounded
    assert torch.isfinite(merged.lm_head.weight).all()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose layers are wide enough to be repacked."""
    tokenizer = lab.byte_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.1, **sizes, **ends)
    return lab.saved(LlamaForCausalLM(config), tokenizer, tmp_path_factory.mktemp("wide"))


REPACKS = pytest.mark.skipif(
    not getattr(bnb.functional, "has_avx512bf16", lambda: False)(),
    reason="bitsandbytes repacks 4-bit weights on CPUs with AVX512-BF16 only",
)


@REPACKS
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]], ids=["all", "qv"])
@pytest.mark.parametrize("method", ["lora", "dora", "smoa"])
def test_a_run_that_was_scored_before_trains_as_one_that_was_not(
    method: str, targets: Any, wide: Path, config: dict[str, Any], tmp_path: Path
) -> None:
    config["model"]["name"] = str(wide)
    config |= {"method": method, "adapter": {"r": 4, "target_modules": targets}}
    found = {}
    for tokens in (64, 0):
        config["training"]["output_dir"] = str(tmp_path / f"{tokens}")
        own = {"scoring": {"before": bool(tokens)}, "forgetting": {"tokens": tokens}}
        found[tokens] = run_module.run(check_config({**config, **own}))
    norms = {
        tokens: [one["grad_norm"] for one in run["history"] if "grad_norm" in one] for tokens, run in found.items()
    }
    assert norms[64] == norms[0]
    assert min(norms[0]) > 0
    scored, unscored = (found[tokens]["evaluation"]["after"] for tokens in (64, 0))
    assert scored == unscored
    folder = RunFolder(tmp_path / "64")
    again = evaluate_run(open_place(folder.path))
    assert again["scores"]["loss"] == pytest.approx(scored["loss"], abs=1e-3)
    assert {tensor.dtype for tensor in load_file(folder.adapter / "adapter_model.safetensors").values()} <= {
        torch.float32,
        torch.uint8,
    }
