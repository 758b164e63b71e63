"""A kill or a full disk in the middle of a save leaves the old adapter or the new one, never half of either."""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from smoa import AdapterFileError, ConfigError, SmoaConfig, SmoaError, save_adapter
from smoa.atomic import SAVE, recover
from smoa.files.card import NamedBase, adapter_card, named_base
from tests import soak
from tests.support.killing import killed_at
from tests.support.layers import Wrapper, randomise

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def base() -> Wrapper:
    torch.manual_seed(1)
    return Wrapper(nn.Linear(12, 10))


def adapter(seed: int, **settings: Any) -> PeftModel:
    model = base()
    torch.manual_seed(seed)
    model = get_peft_model(model, SmoaConfig(target_modules=["layer"], **settings))
    randomise(model.base_model.model.layer)
    return model


def delta(model: PeftModel) -> Tensor:
    return model.base_model.model.layer.get_delta_weight("default").detach()


def loaded(folder: Path) -> Tensor:
    recover(folder)  # as whatever loads an adapter does first
    return delta(PeftModel.from_pretrained(base(), folder))


WEIGHTS = "adapter_model.safetensors"
# They differ in everything: a mixture would fail to load, or give a third ΔW.
OLD = {"r": 4, "num_blocks": 2, "alpha": 3.0}
NEW = {"r": 6, "num_blocks": 3, "alpha": 7.0}


@pytest.fixture
def old() -> PeftModel:
    return adapter(2, **OLD)


@pytest.fixture
def new() -> PeftModel:
    return adapter(3, **NEW)


def kills(
    action: Callable[[], object], folder: Path, previous: PeftModel | None, calls: str = "", step: int = 1
) -> Iterator[int]:
    """Kills of the action as it touches the room of the folder, which held the previous adapter, or nothing.

    test_atomic.py has a kill at every call.
    """
    room, spare = folder.parent, folder.parent.with_name("spare")
    if previous is not None:
        previous.save_pretrained(spare)
    for number in itertools.count(1, step):
        shutil.rmtree(room, ignore_errors=True)
        room.mkdir()
        if previous is not None:
            shutil.copytree(spare, folder)
        killed = killed_at(number, action, lambda event, arguments: calls in event and str(room) in str(arguments))
        yield number
        if not killed:
            return


def test_a_kill_while_an_adapter_replaces_another_leaves_one_of_them(
    tmp_path: Path, old: PeftModel, new: PeftModel
) -> None:
    folder = tmp_path / "room" / "adapter"
    found = []
    for _ in kills(lambda: save_adapter(new, folder), folder, old, step=4):
        result = loaded(folder)
        assert torch.equal(result, delta(old)) or torch.equal(result, delta(new))
        found.append(torch.equal(result, delta(new)))
    assert len(found) > 5
    assert found == sorted(found), "once the new one is there it stays"
    assert not found[0]
    assert found[-1]


def test_a_kill_while_the_first_adapter_is_saved_leaves_it_or_nothing(tmp_path: Path, new: PeftModel) -> None:
    folder = tmp_path / "room" / "adapter"
    found = []
    for _ in kills(lambda: save_adapter(new, folder), folder, None, step=5):
        recover(folder)
        found.append((folder / "adapter_config.json").exists())
        assert not found[-1] or torch.equal(loaded(folder), delta(new))
    assert found == sorted(found)
    assert found[-1]


def killed_while_moving(action: Callable[[], object], folder: Path, previous: PeftModel) -> None:
    """Kill the save where its weights have been moved to their place and its config not yet."""
    for _ in kills(action, folder, previous, "os.rename"):
        if (folder / SAVE / "adapter_config.json").exists() and not (folder / SAVE / WEIGHTS).exists():
            return
    raise AssertionError("no kill came between the two")


@pytest.mark.parametrize("same_settings", [False, True], ids=["other settings", "same settings"])
def test_a_loader_that_cannot_finish_a_killed_save_never_reads_weights_by_another_config(
    tmp_path: Path, old: PeftModel, same_settings: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = adapter(3, **(OLD if same_settings else NEW))
    folder = tmp_path / "room" / "adapter"
    killed_while_moving(lambda: save_adapter(new, folder), folder, old)
    with monkeypatch.context() as patch:
        patch.setattr("smoa.files.loading.recover", lambda folder: None)
        if same_settings:
            assert torch.equal(delta(PeftModel.from_pretrained(base(), folder)), delta(new))
        else:
            with pytest.raises(AdapterFileError, match=r"adapter_config\.json"):
                PeftModel.from_pretrained(base(), folder)
    assert torch.equal(delta(PeftModel.from_pretrained(base(), folder)), delta(new))


def test_a_killed_save_does_not_come_back_over_a_later_one(tmp_path: Path, old: PeftModel, new: PeftModel) -> None:
    folder, later = tmp_path / "room" / "adapter", adapter(4, **OLD)
    for save in (save_adapter, PeftModel.save_pretrained):
        killed_while_moving(lambda: save_adapter(new, folder), folder, old)
        save(later, folder)
        assert torch.equal(loaded(folder), delta(later))
        assert not (folder / SAVE).exists()


@pytest.mark.parametrize("same_settings", [False, True], ids=["other settings", "same settings"])
def test_a_kill_in_pefts_own_save_leaves_an_adapter_or_a_pair_that_is_refused(
    tmp_path: Path, old: PeftModel, same_settings: bool
) -> None:
    new = adapter(3, **(OLD if same_settings else NEW))
    folder = tmp_path / "room" / "adapter"
    refused = []
    for _ in kills(lambda: new.save_pretrained(folder), folder, old):
        try:
            result = loaded(folder)
        except SmoaError as error:
            refused.append("adapter_config.json" in str(error))
        else:
            assert torch.equal(result, delta(old)) or torch.equal(result, delta(new))
    assert bool(refused) != same_settings  # under one config, the weights of either save are whole
    assert all(refused)
    assert torch.equal(loaded(folder), delta(new))


@pytest.mark.parametrize("limit", [100, 1500])
def test_a_disk_that_fills_up_is_told_and_leaves_the_old_adapter_alone(
    tmp_path: Path, old: PeftModel, new: PeftModel, limit: int
) -> None:
    folder = tmp_path / "room" / "adapter"
    old.save_pretrained(folder)
    process = os.fork()
    if process == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # what no file may outgrow
        try:
            save_adapter(new, folder)
        except Exception as error:
            os._exit(0 if "too large" in str(error).lower() else 2)
        finally:
            os._exit(3)
    _, status = os.waitpid(process, 0)
    assert os.WEXITSTATUS(status) == 0
    assert torch.equal(loaded(folder), delta(old))
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def test_a_disk_that_fills_up_while_the_config_is_written_keeps_the_old_config(
    tmp_path: Path, old: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    old.save_pretrained(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    text = (tmp_path / "adapter_config.json").read_bytes()

    def full(*args: Any, **options: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("peft.config.json.dumps", full)
    with pytest.raises(OSError, match="No space left"):
        SmoaConfig(**NEW).save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").read_bytes() == text
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_saving_keeps_what_else_lies_in_the_folder_and_a_link_to_it(
    tmp_path: Path, old: PeftModel, new: PeftModel
) -> None:
    folder, link = tmp_path / "room" / "adapter", tmp_path / "latest"
    save_adapter(old, folder)
    (folder / "notes.txt").write_text("mine")
    link.symlink_to(folder)
    held = (folder / "notes.txt").stat()
    save_adapter(new, link)
    assert link.is_symlink()
    assert (folder / "notes.txt").stat() == held, "others may have it open"
    assert torch.equal(loaded(folder), delta(new))
    assert (folder / "notes.txt").read_text() == "mine"
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def test_saving_over_a_file_is_refused(tmp_path: Path, new: PeftModel) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file"):
        save_adapter(new, tmp_path / "file")


def test_a_process_that_is_not_the_main_one_writes_nothing(tmp_path: Path, new: PeftModel) -> None:
    save_adapter(new, tmp_path / "adapter", is_main_process=False)
    assert not list(tmp_path.iterdir())


def test_every_adapter_is_saved_in_its_subfolder(tmp_path: Path, new: PeftModel) -> None:
    new.add_adapter("second", SmoaConfig(target_modules=["layer"], **OLD))
    save_adapter(new, tmp_path / "adapter")
    assert torch.equal(loaded(tmp_path / "adapter"), delta(new))
    PeftModel.from_pretrained(base(), tmp_path / "adapter" / "second")


def test_an_adapter_that_lies_in_the_folder_besides_is_left_as_it_is(tmp_path: Path, new: PeftModel) -> None:
    theirs = tmp_path / "adapter" / "theirs"
    save_adapter(adapter(3, **OLD), theirs, base_model_name="their/base")
    config = (theirs / "adapter_config.json").read_bytes()
    save_adapter(new, tmp_path / "adapter", base_model_name="my/base", metrics={})
    assert (theirs / "adapter_config.json").read_bytes() == config
    assert SmoaConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path == "my/base"
    assert "my/base" not in (theirs / "README.md").read_text()


def test_the_path_of_a_base_is_replaced_in_a_card(tmp_path: Path, tiny_llama: PreTrainedModel) -> None:
    place = str(tmp_path / "base")
    tiny_llama.save_pretrained(place)
    model = get_peft_model(type(tiny_llama).from_pretrained(place), SmoaConfig(target_modules=["q_proj"]))
    save_adapter(model, tmp_path / "adapter")
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    card.text += f"\nFrom {place}."
    card.save(tmp_path / "adapter" / "README.md")
    save_adapter(model, tmp_path / "adapter", base_model_name="org/tiny")
    assert "From org/tiny." in (tmp_path / "adapter" / "README.md").read_text()


def test_a_token_given_for_loading_is_not_saved(tmp_path: Path, old: PeftModel) -> None:
    old.save_pretrained(tmp_path / "first")
    again = PeftModel.from_pretrained(base(), tmp_path / "first", token="hf_secret")
    again.save_pretrained(tmp_path / "second")
    assert all(b"hf_secret" not in file.read_bytes() for file in (tmp_path / "second").iterdir())


def test_lives_of_an_adapter_leave_weights_and_memory_as_they_were() -> None:
    soak.soak(100)


def test_the_soak_notices_what_a_life_leaves_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, live = [], soak.cycle

    def leaking(layer: nn.Module, folder: Path, number: int) -> None:
        live(layer, folder, number)
        kept.append(bytearray(4000))

    monkeypatch.setattr(soak, "cycle", leaking)
    with pytest.raises(AssertionError, match=r"leaves something behind: .*'allocated': [34]"):
        soak.soak(25)


# the README.md of a saved adapter


@pytest.fixture
def model(tiny_llama: PreTrainedModel) -> Any:
    return get_peft_model(
        tiny_llama, SmoaConfig(r=8, num_blocks_pattern={"q_proj": 4}, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )


def test_the_card_names_base_config_metrics_and_how_to_load(model: Any, tmp_path: Path) -> None:
    save_adapter(model, tmp_path / "mine", base_model_name="org/base", metrics={"accuracy": 0.625})
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.base_model == "org/base"
    assert card.data.library_name == "peft"
    assert card.data.tags == ["smoa", "base_model:adapter:org/base"]
    assert card.data.pipeline_tag == "text-generation"
    for said in (
        "# mine",
        "import smoa",
        "AutoPeftModelForCausalLM",
        "| accuracy | 0.625 |",
        "layers for which its config gives no other number",
    ):
        assert said in card.text
    settings = json.loads(card.text.split("```json")[1].split("```")[0])
    assert settings["r"] == 8
    assert settings["target_modules"] == ["q_proj"]


def test_the_home_folder_stays_out_of_the_card(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "models" / "base")
    save_adapter(model, tmp_path / "mine", metrics={}, save_embedding_layers=False)
    text = (tmp_path / "mine" / "README.md").read_text()
    assert str(tmp_path) not in text
    assert "base_model:" not in text
    assert "of `base`: r = 8" in text
    assert "Results" not in text


def test_a_base_that_comes_from_elsewhere_is_loaded_from_there() -> None:
    config = SmoaConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM", base_model_name_or_path="/cache/base")
    card = ModelCard(adapter_card("mine", config, {}, NamedBase("org/base (from GGUF)", "org/base"), "## More\n\n"))
    assert card.data.base_model == "org/base"
    assert "of `org/base (from GGUF)`: r = 8" in card.text
    assert 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("org/base"), "PATH")' in card.text
    assert card.text.index("## More") < card.text.index("## Adapter")
    assert "/cache" not in card.content


def test_an_adapter_of_another_method_is_loaded_without_smoa() -> None:
    card = ModelCard(adapter_card("mine", LoraConfig(r=3, base_model_name_or_path="org/base"), {}))
    assert "A LORA adapter of `org/base`" in card.text
    assert card.data.tags == ["lora", "base_model:adapter:org/base"]
    assert "import smoa" not in card.text


def test_a_card_for_another_method_is_refused_before_anything_is_written(
    tiny_llama: PreTrainedModel, tmp_path: Path
) -> None:
    model = get_peft_model(tiny_llama, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="metrics: default is not a SMoA adapter"):
        save_adapter(model, tmp_path / "mine", metrics={})
    save_adapter(model, tmp_path / "mine")
    assert (tmp_path / "mine" / "adapter_config.json").is_file()


def test_of_a_local_base_only_the_last_name_is_told_and_a_hub_id_is_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in ("~/models/base/", "C:\\models\\base", "/models/base"):
        assert named_base(source) == NamedBase("base", None)
    assert named_base("org/base") == NamedBase("org/base", "org/base")
    assert named_base(None) == named_base("") == NamedBase("a model without a name", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "base").mkdir(parents=True)
    assert named_base("org/base") == NamedBase("base", None)


@pytest.mark.parametrize("save", [PeftModel.save_pretrained, save_adapter])
def test_a_pickle_is_refused_when_it_is_saved(save: Any, tmp_path: Path) -> None:
    model = adapter(0)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"is a pickle.*safe_serialization"):
        save(model, tmp_path, safe_serialization=False)
    assert save is PeftModel.save_pretrained or not list(tmp_path.glob("*.bin"))
