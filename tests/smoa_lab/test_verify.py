"""`smoa verify`: what was made of an adapter says what the adapter says."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from smoa import SmoaConfig
from smoa.errors import ConfigError
from smoa_lab.cli.main import app
from smoa_lab.export import Verdict, merge_run, verify
from tests.support import lab


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes much of a tiny model, beside its base."""
    room = tmp_path_factory.mktemp("verify")
    base = lab.saved(lab.tiny_llama(259, 256), lab.byte_tokenizer(), room / "base")
    torch.manual_seed(0)
    config = SmoaConfig(r=4, num_blocks=2, target_modules=["q_proj", "down_proj"], init_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "smoa_B" in name:
            parameter.data *= 10
    model.save_pretrained(room / "anna")
    return room / "anna"


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["verify", *map(str, arguments)], catch_exceptions=False)


def test_merged_model_and_lora_say_what_the_adapter_says(adapter: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    runner.invoke(app, ["merge", str(adapter), str(tmp_path / "merged")], catch_exceptions=False)
    runner.invoke(app, ["convert", str(adapter), str(tmp_path / "lora"), "--rank", "32"], catch_exceptions=False)
    places = [part for name in ("merged", "lora") for part in ("--against", tmp_path / name)]
    result = invoke(adapter, "--against", "merged", *places, "--json")
    assert result.exit_code == 0, result.output
    verdicts = json.loads(result.stdout)
    assert [verdict["agrees"] for verdict in verdicts] == [True] * 3
    assert all(verdict["difference"] < 1e-4 for verdict in verdicts)


def test_methods_that_cannot_unmerge_are_compared_and_those_that_cannot_merge_are_told(
    adapter: Path, tmp_path: Path
) -> None:
    def saved(config: str, **options: Any) -> Path:
        if not hasattr(peft, config):
            pytest.skip("not in this PEFT")
        base = AutoModelForCausalLM.from_pretrained(adapter.parent / "base")
        model = get_peft_model(base, getattr(peft, config)(target_modules=["q_proj"], **options))
        for parameter in (own for own in model.parameters() if own.requires_grad):
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / config)
        return tmp_path / config

    verdicts = verify(saved("OSFConfig"), ["merged", "merged", str(adapter)])
    assert [verdict.agrees for verdict in verdicts] == [True, True, False]
    with pytest.raises(NotImplementedError, match="not supported for Lily"):
        verify(saved("LilyConfig"), ["merged"])


def test_another_adapter_is_compared_on_the_base_without_the_trained_biases_of_the_first(tmp_path: Path) -> None:
    base = lab.tiny_gpt2(tmp_path / "base", positions=256)
    options = {"r": 4, "num_blocks": 2, "target_modules": ["c_attn"], "init_weights": False}
    for bias in ("all", "none"):
        torch.manual_seed(0)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), SmoaConfig(**options, bias=bias))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.endswith("bias"):
                parameter.data += 1
        model.save_pretrained(tmp_path / bias)
    assert [verdict.agrees for verdict in verify(tmp_path / "all", [str(tmp_path / "none")])] == [False]


def test_a_lora_that_lost_much_and_an_adapter_that_changes_nothing_are_told(adapter: Path, tmp_path: Path) -> None:
    arguments = ["convert", str(adapter), str(tmp_path / "lora"), "--rank", "4"]
    CliRunner().invoke(app, arguments, catch_exceptions=False)
    result = invoke(adapter, "--against", tmp_path / "lora")
    assert result.exit_code == 1
    assert re.search(r"DIFFERS  .*lora: has 5\d\.\d% of what the adapter changes", result.output)
    model = AutoModelForCausalLM.from_pretrained(adapter.parent / "base")
    get_peft_model(model, SmoaConfig(r=4, num_blocks=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "new")
    result = invoke(tmp_path / "new")
    assert result.exit_code == 1
    assert "changes nothing" in result.stderr


def merge(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["merge", *map(str, arguments)], catch_exceptions=False)


def test_a_merge_is_compared_with_its_adapter_unless_told_otherwise(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = merge(adapter, tmp_path / "merged")
    assert done.exit_code == 0, done.output
    assert f"agrees  {tmp_path / 'merged'}: has 100.0% of what the adapter changes" in done.stdout
    told = json.loads(merge(adapter, tmp_path / "halved", "--dtype", "bfloat16", "--json").stdout)["verified"]
    assert told["agrees"]
    assert told["difference"] > 1e-4
    done = merge(adapter, tmp_path / "unseen", "--no-verify")
    assert (done.exit_code, "agrees" in done.stdout) == (0, False)


def test_a_merge_that_went_wrong_is_kept_and_told(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*arguments: Any) -> Any:
        export = merge_run(*arguments)
        AutoModelForCausalLM.from_pretrained(adapter.parent / "base").save_pretrained(export.folder)
        return export

    monkeypatch.setattr("smoa_lab.export.merge_run", wrong)
    done = merge(adapter, tmp_path / "merged")
    assert done.exit_code == 1
    assert "DIFFERS" in done.stdout
    assert "has 0.0% of what the adapter changes" in done.stdout
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def scaled(adapter: Path, factor: float, place: Path) -> Path:
    """The adapter with so many times its update."""
    shutil.copytree(adapter, place)
    tensors = load_file(place / "adapter_model.safetensors")
    save_file({n: t * factor if "smoa_B" in n else t for n, t in tensors.items()}, place / "adapter_model.safetensors")
    return place


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_copy_of_the_base_differs_however_little_the_adapter_changes(
    dtype: str, adapter: Path, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(adapter.parent / "base", dtype=getattr(torch, dtype))
    base.save_pretrained(tmp_path / "copy")
    for factor in (1.0, 0.01):  # as trained from zero, and by a thousandth of the weights
        small = scaled(adapter, factor, tmp_path / f"{factor}")
        [found] = verify(small, [str(tmp_path / "copy")])
        assert (found.agrees, found.share) == (False, 0.0)
        result = invoke(small, "--against", tmp_path / "copy")
        assert result.exit_code == 1
        assert "has 0.0% of what the adapter changes" in result.stdout


def test_a_merge_in_16_bits_that_loses_much_differs(adapter: Path, tmp_path: Path) -> None:
    codes, shares = [], []
    for factor in (0.1, 0.001, 0.0001):
        small = scaled(adapter, factor, tmp_path / f"{factor}")
        done = merge(small, tmp_path / f"merged-{factor}", "--dtype", "bfloat16", "--json")
        codes.append(done.exit_code)
        shares.append(json.loads(done.stdout)["verified"]["share"])
    assert codes == [0, 1, 1]
    assert shares[0] > 0.9 > shares[1] > 0.1 > shares[2]


def test_what_has_half_or_twice_the_change_differs(adapter: Path, tmp_path: Path) -> None:
    small = scaled(adapter, 0.01, tmp_path / "small")
    targets = [str(scaled(small, factor, tmp_path / f"{factor}")) for factor in (0.5, 0.95, 1.05, 2.0)]
    verdicts = verify(small, targets)
    assert [verdict.share for verdict in verdicts] == pytest.approx([0.5, 0.95, 1.05, 2], rel=0.02)
    assert [verdict.agrees for verdict in verdicts] == [False, True, True, False]


def test_noise_larger_than_the_change_differs_and_so_does_what_is_no_number() -> None:
    known = ((1.0, 0.1), (1.0, 9.0), (0.0, 0.0), (float("nan"), 0.0))
    assert [Verdict("x", share, noise, 0.0).agrees for share, noise in known] == [True, False, False, False]


def test_what_is_nothing_to_compare_with_is_refused_before_a_model_is_loaded(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is neither merged, nor a model's folder, nor an adapter's"):
        verify(adapter, [str(tmp_path / "nothing")])
