import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import CONFIG_NAME
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from smoa import SmoaConfig
from smoa.errors import ConfigError, DataError
from smoa_lab.cli.main import app
from smoa_lab.config.run import ModelSection, check_config
from smoa_lab.evaluate import evaluate_run
from smoa_lab.open_run import (
    adapter_of_run,
    find_model,
    model_of,
    open_run,
    run_name,
    with_saved_adapter,
)
from smoa_lab.training.run_folder import RunFolder
from smoa_lab.training.train import run as train
from tests.support import lab, tiny_models
from tests.support.own_rows import MARKED, chats, rows_base, rows_config, write_rows


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """The config of an adapter, in a run's folder."""
    folder = RunFolder(tmp_path / "run").adapter
    LoraConfig(base_model_name_or_path="its/base", revision="v2").save_pretrained(folder)
    return folder


def test_a_place_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a config file nor the folder of a finished run"):
        open_run(tmp_path)


def test_an_adapter_is_found_in_its_run_and_missed_elsewhere(adapter: Path, tmp_path: Path) -> None:
    assert adapter_of_run(tmp_path / "run") == adapter_of_run(adapter) == adapter
    (tmp_path / "base").mkdir()
    missed = r"base: contains no adapter \(adapter_config\.json\), nor does .*base/adapter"
    with pytest.raises(ConfigError, match=missed):
        adapter_of_run(tmp_path / "base")


def test_an_adapter_is_called_by_its_run_wherever_the_command_is_given(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_name(adapter) == run_name(tmp_path / "run") == "run"
    for inside in (adapter, adapter.parent):
        monkeypatch.chdir(inside)
        assert run_name(".") == run_name(adapter_of_run(".")) == "run"


def test_the_recorded_base_is_loaded_in_the_recorded_revision_and_another_is_not(adapter: Path) -> None:
    recorded = ModelSection(name="its/base", options={"revision": "v2"})
    assert model_of(adapter).section == model_of(adapter, "its/base").section == recorded
    assert model_of(adapter, "another/base").section == ModelSection(name="another/base")


def test_a_base_may_have_any_name(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("{model: {name: base}, data: {train: csqa-demo}, training: {}}")
    for name in ("./modèle😀", 'a "b" #c', "null"):
        config, _ = open_run(file, base=name)
        assert config.model.name == name
        file.write_text(config.to_yaml(), encoding="utf-8")
        assert open_run(file)[0].model.name == name


def test_a_run_of_a_release_that_knew_fewer_keys_is_read_as_it_was(tmp_path: Path) -> None:
    config, metrics = tmp_path / "config.yaml", tmp_path / "metrics.json"
    config.write_text("{model: {name: base}, data: {train: csqa-demo}, method: full, training: {}}")
    metrics.write_text("{}")
    data = open_run(tmp_path)[0].data
    assert (data.group, data.answer_tokens, data.recall) == (False, 128, False)
    config.write_text(open_run(tmp_path, ["data.answer_tokens=null"])[0].to_yaml())
    assert open_run(tmp_path)[0].data.answer_tokens is None


@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")  # PEFT looks where the base was
def test_another_model_of_the_bases_name_is_refused_unless_the_user_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = lab.tiny_run(tmp_path, monkeypatch, train=20, test=3, training=lab.steps(1, save_strategy="no"))
    monkeypatch.chdir(tmp_path)
    values["model"]["name"] = "base"
    train(check_config(values))
    run = (tmp_path / "run").rename(tmp_path / "renamed")
    openings: list[Callable[[str | None], Any]] = [
        lambda base: model_of(run / "adapter", base).section.name,
        lambda base: open_run(run, base=base)[0].model.name,
        lambda base: find_model(str(run), {} if base is None else {"name": base}).section.name,
    ]
    for opened in openings:
        assert opened(None) == "base"
    shutil.copytree("base", "elsewhere/base")
    shutil.move("base", "moved")
    monkeypatch.chdir("elsewhere")
    with Path("base/generation_config.json").open("a") as file:
        file.write("\n")
    for opened in openings:
        with pytest.raises(ConfigError, match=r"renamed: was trained on another model than .*elsewhere/base, or on"):
            opened(None)
        assert [opened(name) for name in ("base", "../moved")] == ["base", "../moved"]
    monkeypatch.chdir(tmp_path)
    for opened in openings:
        with pytest.raises(ConfigError, match=f"renamed: its base model 'base' is not in {tmp_path}; name it, or"):
            opened(None)


def test_a_base_on_the_hub_is_that_of_the_commit_that_was_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = lab.tiny_run(tmp_path, monkeypatch, train=20, test=3, training=lab.steps(1, save_strategy="no"))
    train(check_config(values))
    run, commit = RunFolder(tmp_path / "run"), "0123456789abcdef" * 2 + "01234567"
    for file in (run.config, run.adapter / CONFIG_NAME):
        file.write_text(file.read_text().replace(values["model"]["name"], "its/base"))
    run.inputs.write_text(json.dumps(json.loads(run.inputs.read_text()) | {"base model": commit}))
    sections = [open_run(run.path)[0].model, model_of(run.adapter).section, find_model(str(run.path), {}).section]
    assert [section.options for section in sections] == [{"revision": commit}] * 3
    assert model_of(run.adapter, "another/base").section.options == {}


def test_a_run_is_scored_by_the_template_that_it_was_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = lab.tiny_run(tmp_path, monkeypatch, train=20, test=3, training=lab.steps(2, save_strategy="no"))
    template = tmp_path / "own.jinja"
    written = re.sub(r"<\|im_(start|end)\|>", "#", MARKED)
    template.write_text(written)
    values["data"]["template"] = str(template)
    metrics = train(check_config(values))
    template.write_text(written.replace("#", "+"))
    config, adapter = open_run(tmp_path / "run")
    found = evaluate_run(config, adapter, RunFolder(tmp_path / "run"))
    assert found["scores"]["loss"] == pytest.approx(metrics["evaluation"]["after"]["loss"], abs=1e-6)
    assert found["digests"]["encoder"] == metrics["digests"]["encoder"]
    assert open_run(tmp_path / "run", [f"data.template={template}"])[0].data.template == str(template)


def test_what_a_run_knows_of_its_inputs_is_told_where_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    values = lab.tiny_run(tmp_path, monkeypatch, train=20, test=3, training=lab.steps(1, save_strategy="no"))
    train(check_config(values))
    run = RunFolder(tmp_path / "run")
    shutil.copytree(tmp_path / "base", tmp_path / "other")
    (tmp_path / "other/generation_config.json").write_text("{}")
    assert open_run(run.path, base=str(tmp_path / "other"))
    assert "was trained on another model than" in caplog.messages[-1]
    run.inputs.unlink()
    assert open_run(run.path)
    assert "doesn't keep which model it was trained on" in caplog.messages[-1]


@pytest.mark.parametrize("content", ['{"peft_type": "NOPE"}', '{"peft_type": "SMOA", "base_mod', "[]", "\udcff"])
def test_a_config_that_this_peft_cannot_read_is_one_error(content: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).write_text(content, errors="surrogateescape")
    with pytest.raises(ConfigError, match=r"adapter_config\.json: is missing, damaged or of a method that this PEFT"):
        model_of(tmp_path)


@pytest.mark.parametrize("method", ["smoa", "lora"])
def test_weights_that_are_damaged_or_of_another_base_are_one_error(method: str, tmp_path: Path) -> None:
    config = SmoaConfig(target_modules=["q_proj"]) if method == "smoa" else LoraConfig(target_modules=["q_proj"])
    get_peft_model(tiny_models.build("llama"), config).save_pretrained(tmp_path)
    assert isinstance(with_saved_adapter(tiny_models.build("llama"), tmp_path), PeftModel)
    with pytest.raises(DataError, match=r"cannot be loaded into this base: .*q_proj"):
        with_saved_adapter(tiny_models.build("gpt2"), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    next(tensor for name, tensor in tensors.items() if "_B" in name)[0] = math.nan
    save_file(tensors, file)
    with pytest.raises(DataError, match=r"holds NaN or infinite values; the adapter is broken$"):
        with_saved_adapter(tiny_models.build("llama"), tmp_path)
    file.write_bytes(file.read_bytes()[:99])
    with pytest.raises(DataError, match=r"adapter_model\.safetensors: is not a whole safetensors file"):
        with_saved_adapter(tiny_models.build("llama"), tmp_path)
    file.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(DataError, match="is not a whole safetensors file"):
        with_saved_adapter(tiny_models.build("llama"), tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    room = tmp_path_factory.mktemp("finished")
    rows = write_rows(room / "rows.jsonl", chats(20))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOA_CACHE", str(room / "cache"))
        train(rows_config(room, rows, rows_base(room / "base"), training={"max_steps": 1}))
        yield room / "run"


@pytest.mark.parametrize("damage", ["{", "[]", "[" * 100_000], ids=["cut", "list", "deep"])
@pytest.mark.parametrize(
    ("file", "commands"),
    [
        ("metrics.json", ["report"]),
        ("inputs.json", ["eval", "merge", "verify", "chat"]),
        ("trained.npy", ["eval"]),
        ("adapter/adapter_config.json", ["merge", "inspect", "verify", "chat"]),
    ],
)
def test_a_damaged_file_of_a_run_is_named(
    file: str, commands: list[str], damage: str, finished: Path, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(finished, tmp_path / "run"))
    (place / file).write_text(damage)
    for command in commands:
        done = CliRunner().invoke(app, [command, str(place), *([str(tmp_path / "new")] if command == "merge" else [])])
        assert done.exit_code == 1
        assert isinstance(done.exception, SystemExit)
        assert done.stderr.splitlines()[-1].startswith(f"error: {(place / file).parent}")


def test_a_damaged_target_of_verify_is_named(finished: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    assert CliRunner().invoke(app, ["merge", str(finished), str(merged), "--no-verify"]).exit_code == 0
    for file, damage in (("smoa_share.json", "{}"), ("smoa_share.json", "{"), ("config.json", "[" * 100_000)):
        (merged / file).write_text(damage)
        done = CliRunner().invoke(app, ["verify", str(finished), "--against", str(merged)])
        assert isinstance(done.exception, SystemExit)
        assert re.search(rf"error: .*{re.escape(str(merged))}", done.stderr)
        (merged / "smoa_share.json").unlink(missing_ok=True)
