"""LoRAs of several ranks cut from a run's adapter, and what they lose of its task."""

from pathlib import Path
from typing import Any

import peft
import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from typer.testing import CliRunner

from smoa import SmoaConfig
from smoa.errors import ConfigError, UnsupportedModuleError, UnsupportedVersionError
from smoa_lab import base_models
from smoa_lab.cli.main import app
from smoa_lab.config.run import check_config
from smoa_lab.convert import convert_run
from smoa_lab.data.chat_templates import saved_chat_template
from smoa_lab.training.loaded_run import load_run
from smoa_lab.training.run_folder import RunFolder
from smoa_lab.verify import verify
from tests.support import lab, tiny_models
from tests.support.tolerance import assert_close
from tests.unit.smoa_lab.test_merge import saved

pytestmark = pytest.mark.skipif(not hasattr(peft, "convert_to_lora"), reason="this PEFT has no convert_to_lora")
ADAPTER = {"r": 4, "num_blocks": 2, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run's config."""
    return lab.tiny_run(tmp_path, monkeypatch, train=10, test=5, training={}, adapter=ADAPTER)


def finished_run(values: dict[str, Any], init_weights: bool = False, **adapter: Any) -> Path:
    """A folder as a run of that config leaves it, with an adapter of random factors, and whatever else it trains."""
    run = RunFolder(Path(values["training"]["output_dir"]))
    base = AutoModelForCausalLM.from_pretrained(values["model"]["name"])
    config = SmoaConfig(**ADAPTER | adapter, init_weights=init_weights, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "smoa_" not in name:
            nn.init.normal_(parameter)
    model.save_pretrained(run.adapter)
    run.config.write_text(check_config(values).to_yaml())
    run.metrics.write_text("{}")
    return run.path


def test_a_higher_rank_keeps_more_of_update_and_task(values: dict[str, Any], tmp_path: Path) -> None:
    run = finished_run(values)
    points = [convert_run(run, tmp_path / f"rank-{rank}", rank) for rank in (1, 4, 999)]
    assert [point["rank"] for point in points] == [1, 4, 32]  # the smaller side of the larger layer
    assert points[0]["error"] > points[1]["error"] > points[2]["error"]
    assert points[2]["error"] < 1e-6
    changes = [abs(point["loss"]["lora_change"]) for point in points]
    assert changes[2] < 1e-5 < changes[0]
    assert points[2]["loss"]["gain_kept"] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    "adapter", [{"modules_to_save": ["lm_head"]}, {"bias": "all", "target_modules": ["c_attn"]}], ids=["head", "biases"]
)
def test_what_is_kept_is_kept_of_the_gain_over_the_untouched_base(
    adapter: dict[str, Any], values: dict[str, Any], tmp_path: Path
) -> None:
    if "bias" in adapter:
        values["model"]["name"] = str(lab.tiny_gpt2(tmp_path / "gpt2", positions=512))
    values["adapter"] = {**values["adapter"], **adapter}
    untouched, _ = load_run(check_config(values)).evaluation()
    before = untouched.measure_once(load_run(check_config(values)).base).losses.mean
    report = convert_run(finished_run(values, **adapter), tmp_path / "lora", 999)
    assert report["loss"]["base"] == pytest.approx(before)
    assert report["loss"]["lora"] == pytest.approx(report["loss"]["adapter"], rel=1e-4)
    assert abs(report["loss"]["adapter"] - before) > 0.1


def test_no_answers_are_written_for_a_metric_that_the_loss_does_not_need(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: Any) -> None:
        raise AssertionError("an answer is written")

    monkeypatch.setattr("smoa_lab.scoring.evaluation.continue_prompts", write)
    values["data"]["metric"] = "exact"
    report = convert_run(finished_run(values), tmp_path / "lora", 999)
    assert report["loss"]["lora"] == pytest.approx(report["loss"]["adapter"], rel=1e-4)


def test_the_lora_of_a_run_in_bfloat16_is_that_of_the_weights_which_verify_takes(
    values: dict[str, Any], tmp_path: Path
) -> None:
    values["model"]["dtype"] = "bfloat16"
    run = finished_run(values)
    convert_run(run, tmp_path / "lora", 999)
    assert verify(run, [str(tmp_path / "lora")])[-1].agrees


def test_options_of_the_run_that_a_lora_has_no_place_for_are_told(values: dict[str, Any], tmp_path: Path) -> None:
    values["model"]["options"] = {"attn_implementation": "eager", "revision": "main"}
    run, told = finished_run(values), "The adapter's base was loaded with {'attn_implementation': 'eager'}; load the"
    words = [str(run), str(tmp_path / "lora"), "--rank", "2", "--no-score"]
    assert told in CliRunner().invoke(app, ["convert", *words]).stdout


def test_an_adapter_that_learned_nothing_has_no_gain_to_keep(values: dict[str, Any], tmp_path: Path) -> None:
    run = finished_run(values, init_weights=True)
    report = convert_run(run, tmp_path / "lora", 0.9)
    assert report["loss"]["gain_kept"] is None
    assert (report["rank"], report["error"]) == (1, 0.0)


def test_the_lora_is_talked_to_through_the_template_that_the_adapter_was_trained_with(
    values: dict[str, Any], tmp_path: Path
) -> None:
    run = finished_run(values)
    tokenizer = lab.byte_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}<eos>{% endfor %}"
    tokenizer.save_pretrained(RunFolder(run).adapter)
    convert_run(run, tmp_path / "lora", 3, score=False)
    assert saved_chat_template(tmp_path / "lora") == tokenizer.chat_template


@pytest.mark.parametrize("rank", [3, 0.7])
def test_the_errors_that_are_reported_are_those_of_the_loaded_lora(
    rank: float, values: dict[str, Any], tmp_path: Path
) -> None:
    run = finished_run(values)
    report = convert_run(run, tmp_path / "lora", rank, score=False)
    ours, theirs = (
        PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(values["model"]["name"]), folder)
        for folder in (RunFolder(run).adapter, tmp_path / "lora")
    )
    error, total = 0.0, 0.0
    for layer in report["layers"]:
        wanted, found = (
            model.base_model.model.get_submodule(layer["module"]).get_delta_weight("default").detach()
            for model in (ours, theirs)
        )
        difference, norm = float((found - wanted).norm()), float(wanted.norm())
        assert layer["error"] == pytest.approx(difference / norm, rel=1e-3)
        assert isinstance(rank, int) or 1 - layer["error"] ** 2 >= rank
        error, total = error + difference**2, total + norm**2
    assert report["error"] == pytest.approx((error / total) ** 0.5, rel=1e-3)
    assert report["parameters"] == sum(p.numel() for name, p in theirs.named_parameters() if ".lora_" in name)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "bias": "smoa_only", "modules_to_save": ["ln_f"]}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["mlp"], "revision": "v2"}),
        ("llama", {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [3, 5]}),
    ],
)
def test_what_was_trained_besides_comes_along(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    model, base = saved(tmp_path / "base", tmp_path / "adapter", family, **config), str(tmp_path / "base")
    convert_run(tmp_path / "adapter", tmp_path / "lora", 999, base=base)
    lora = PeftModel.from_pretrained(tiny_models.build(family), tmp_path / "lora").eval()
    own = lora.peft_config["default"]
    assert (own.base_model_name_or_path, own.revision) == (base, config.get("revision"))
    assert own.bias == ("lora_only" if "bias" in config else "none")
    assert_close(tiny_models.logits(lora, family), tiny_models.logits(model, family))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_layers_that_are_not_linear_are_refused_with_the_remedy(tmp_path: Path) -> None:
    saved(tmp_path / "base", tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(UnsupportedModuleError, match=r"embed_tokens: PEFT converts linear layers only; merge"):
        convert_run(tmp_path / "adapter", tmp_path / "lora", 2)
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("rank", [0, 0.0, 1.5])
def test_a_rank_that_is_none_is_refused(rank: float, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--rank is a positive integer, and --energy a share"):
        convert_run(tmp_path, tmp_path / "lora", rank)


def test_a_peft_that_converts_nothing_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(peft, "convert_to_lora")
    with pytest.raises(UnsupportedVersionError, match=r"has no convert_to_lora; install peft 0\.19 or later"):
        convert_run(tmp_path, tmp_path / "lora", 2)


def test_scoring_can_be_left_out_and_a_local_base_is_named_in_the_loras_config_only(
    values: dict[str, Any], tmp_path: Path
) -> None:
    report = convert_run(finished_run(values), tmp_path / "lora", 0.99, score=False)
    assert report["loss"] is None
    assert lab.files_with(tmp_path, tmp_path / "lora") == {"adapter_config.json"}


def test_an_adapter_of_another_method_is_refused_by_its_type(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = LlamaForCausalLM.from_pretrained(values["model"]["name"])
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(base_models, "load_weights", pytest.fail)
    with pytest.raises(ConfigError, match="adapter: is an adapter of the type LORA; only SMoA's are converted"):
        convert_run(tmp_path / "adapter", tmp_path / "lora", 2)
    assert not (tmp_path / "lora").exists()
