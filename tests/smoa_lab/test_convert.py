"""LoRAs of several ranks cut from a run's adapter."""

from pathlib import Path
from typing import Any

import peft
import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from typer.testing import CliRunner

from smoa import SmoaConfig
from smoa.errors import ConfigError
from smoa_lab.cli.main import app
from smoa_lab.config.run import check_config
from smoa_lab.evaluate import evaluate_run
from smoa_lab.export import convert_run, verify
from smoa_lab.open_run import open_place
from smoa_lab.training.run_folder import RunFolder
from tests.smoa_lab.test_merge import saved
from tests.support import lab, tiny
from tests.support.layers import assert_close

pytestmark = pytest.mark.skipif(not hasattr(peft, "convert_to_lora"), reason="this PEFT has no convert_to_lora")
ADAPTER = {"r": 4, "num_blocks": 2, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run's config."""
    return lab.tiny_run(tmp_path, monkeypatch, train=10, test=5, training={}, adapter=ADAPTER)


def finished_run(values: dict[str, Any], **adapter: Any) -> Path:
    """A folder as a run of that config leaves it, with an adapter of random factors, and whatever else it trains."""
    run = RunFolder(Path(values["training"]["output_dir"]))
    base = AutoModelForCausalLM.from_pretrained(values["model"]["name"])
    model = get_peft_model(base, SmoaConfig(**ADAPTER | adapter, init_weights=False, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "smoa_" not in name:
            nn.init.normal_(parameter)
    model.save_pretrained(run.adapter)
    run.config.write_text(check_config(values).to_yaml())
    run.metrics.write_text("{}")
    return run.path


def test_a_higher_rank_keeps_more_of_update_and_task(values: dict[str, Any], tmp_path: Path) -> None:
    run = finished_run(values)
    points = [convert_run(run, tmp_path / f"rank-{rank}", rank) for rank in (1, 4, 16)]
    assert [point["rank"] for point in points] == [1, 4, 16]
    assert points[0]["error"] > points[1]["error"] > points[2]["error"]
    own = evaluate_run(open_place(run))["scores"]["loss"]
    losses = [evaluate_run(open_place(run), tmp_path / f"rank-{rank}")["scores"]["loss"] for rank in (1, 16)]
    assert abs(losses[1] - own) < abs(losses[0] - own)


@pytest.mark.parametrize("rank", [3, 0.7])
def test_the_error_that_is_reported_is_that_of_the_loaded_lora(
    rank: float, values: dict[str, Any], tmp_path: Path
) -> None:
    run = finished_run(values)
    report = convert_run(run, tmp_path / "lora", rank)
    ours, theirs = (
        PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(values["model"]["name"]), folder)
        for folder in (RunFolder(run).adapter, tmp_path / "lora")
    )
    error, total = 0.0, 0.0
    for name, layer in ours.base_model.model.named_modules():
        if hasattr(layer, "smoa_A"):
            wanted = layer.get_delta_weight("default").detach()
            found = theirs.base_model.model.get_submodule(name).get_delta_weight("default").detach()
            difference, norm = float((found - wanted).norm()), float(wanted.norm())
            assert isinstance(rank, int) or 1 - (difference / norm) ** 2 >= rank
            error, total = error + difference**2, total + norm**2
    assert report["error"] == pytest.approx((error / total) ** 0.5, rel=1e-3)
    assert report["parameters"] == sum(p.numel() for name, p in theirs.named_parameters() if ".lora_" in name)
    assert lab.files_with(tmp_path / "run", tmp_path / "lora") == set()


def test_the_lora_of_a_run_in_bfloat16_is_that_of_the_weights_which_verify_takes(
    values: dict[str, Any], tmp_path: Path
) -> None:
    values["model"]["dtype"] = "bfloat16"
    run = finished_run(values)
    convert_run(run, tmp_path / "lora", 16)
    assert verify(run, [str(tmp_path / "lora")])[0].agrees


def test_options_of_the_run_that_a_lora_has_no_place_for_are_told(values: dict[str, Any], tmp_path: Path) -> None:
    values["model"]["options"] = {"attn_implementation": "eager", "revision": "main"}
    run, told = finished_run(values), "The adapter's base was loaded with {'attn_implementation': 'eager'}; load the"
    words = [str(run), str(tmp_path / "lora"), "--rank", "2"]
    assert told in CliRunner().invoke(app, ["convert", *words]).stdout


def test_the_lora_is_talked_to_through_the_template_that_the_adapter_was_trained_with(
    values: dict[str, Any], tmp_path: Path
) -> None:
    run = finished_run(values)
    tokenizer = lab.byte_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}<eos>{% endfor %}"
    tokenizer.save_pretrained(RunFolder(run).adapter)
    convert_run(run, tmp_path / "lora", 3)
    assert (tmp_path / "lora" / "chat_template.jinja").read_text() == tokenizer.chat_template


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "modules_to_save": ["ln_f"]}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "revision": "v2"}),
    ],
)
def test_what_was_trained_besides_comes_along(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    model, base = saved(tmp_path / "base", tmp_path / "adapter", family, **config), str(tmp_path / "base")
    lab.byte_tokenizer().save_pretrained(tmp_path / "base")
    convert_run(tmp_path / "adapter", tmp_path / "lora", 1.0, base=base)
    lora = PeftModel.from_pretrained(tiny.build(family), tmp_path / "lora").eval()
    own = lora.peft_config["default"]
    assert (own.base_model_name_or_path, own.revision) == (base, config.get("revision"))
    assert_close(tiny.logits(lora, family), tiny.logits(model, family))


def test_what_is_no_smoa_adapter_is_refused_by_its_type(values: dict[str, Any], tmp_path: Path) -> None:
    base = LlamaForCausalLM.from_pretrained(values["model"]["name"])
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="adapter: is a LORA adapter; only SMoA's are converted"):
        convert_run(tmp_path / "adapter", tmp_path / "lora", 2)
    assert not (tmp_path / "lora").exists()
