"""`smoa verify`: what was made of an adapter, or serves it, says what the adapter says."""

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from types import SimpleNamespace
from typing import Any

import peft
import psutil
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from smoa import SmoaConfig
from smoa.errors import MergeError
from smoa_lab.cli.main import app
from smoa_lab.merge import SHARE, merge_run
from smoa_lab.verify import Verdict, exit_code, verify
from tests.support import lab

Answer = Callable[[str], str]


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
    runner.invoke(app, ["convert", str(adapter), str(tmp_path / "lora"), "--rank", "999"], catch_exceptions=False)
    places = [part for name in ("merged", "lora") for part in ("--against", tmp_path / name)]
    result = invoke(adapter, "--against", "merged", *places, "--json")
    assert result.exit_code == 0, result.output
    base, *others = json.loads(result.stdout)
    assert "changes logits by up to" in base["note"]
    assert len(others) == 3
    assert all(verdict["difference"] < 1e-4 for verdict in others)


def test_a_folder_called_merged_is_compared_where_there_is_one(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke(adapter, "--against", "merged").exit_code == 0  # in memory
    shutil.copytree(adapter.parent / "base", "merged")
    assert invoke(adapter, "--against", "merged").exit_code == 1
    assert invoke(adapter).exit_code == 0


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
    assert [verdict.agrees for verdict in verdicts] == [True, True, True, False]
    with pytest.raises(MergeError, match="not supported for Lily"):
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
    assert [verdict.agrees for verdict in verify(tmp_path / "all", [str(tmp_path / "none")])] == [True, False]


def test_a_lora_that_lost_much_and_an_adapter_that_changes_nothing_are_told(adapter: Path, tmp_path: Path) -> None:
    arguments = ["convert", str(adapter), str(tmp_path / "lora"), "--rank", "4"]
    CliRunner().invoke(app, arguments, catch_exceptions=False)
    result = invoke(adapter, "--against", tmp_path / "lora")
    assert result.exit_code == 0, result.output
    assert re.search(
        r"agrees .*lora: .*; 5\d\.\d% of what the adapter changes is there, 5\d\.\d% expected", result.output
    )
    (tmp_path / "lora" / SHARE).unlink()  # as one that nobody measured
    result = invoke(adapter, "--against", tmp_path / "lora")
    assert result.exit_code == 1
    assert "DIFFERS" in result.output
    model = AutoModelForCausalLM.from_pretrained(adapter.parent / "base")
    get_peft_model(model, SmoaConfig(r=4, num_blocks=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "new")
    result = invoke(tmp_path / "new")
    assert result.exit_code == 1
    assert "changes nothing" in result.output


def merge(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["merge", *map(str, arguments)], catch_exceptions=False)


def test_a_merge_is_compared_with_its_adapter_unless_told_otherwise(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = merge(adapter, tmp_path / "merged")
    assert done.exit_code == 0, done.output
    assert f"agrees  {tmp_path / 'merged'}: largest difference " in done.stdout
    told = json.loads(merge(adapter, tmp_path / "halved", "--dtype", "bfloat16", "--json").stdout)["verified"]
    assert (told["agrees"], told["allowed"]) == (True, 5e-2)
    assert told["difference"] > 1e-4
    done = merge(adapter, tmp_path / "unseen", "--no-verify")
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, "Not compared with the adapter: --no-verify.")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    done = merge(adapter, tmp_path / "large")
    assert done.exit_code == 0
    assert "Not compared with the adapter: in float32 it takes" in done.stdout
    assert "of which 1.0 kB are free" in done.stdout


def test_a_merge_that_went_wrong_is_kept_and_told(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*arguments: Any) -> Any:
        export = merge_run(*arguments)
        AutoModelForCausalLM.from_pretrained(adapter.parent / "base").save_pretrained(export.folder)
        return export

    monkeypatch.setattr("smoa_lab.merge.merge_run", wrong)
    done = merge(adapter, tmp_path / "merged")
    assert done.exit_code == 1
    assert "DIFFERS" in done.stdout
    assert "0.0% of what the adapter changes is there, 100.0% expected" in done.stdout
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_what_is_no_language_model_is_merged_without_a_comparison(tmp_path: Path) -> None:
    base = lab.saved(lab.tiny_llama(259, 256), lab.byte_tokenizer(), tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    config = SmoaConfig(r=4, num_blocks=2, target_modules=["q_proj"], init_weights=False, task_type="SEQ_CLS")
    get_peft_model(model, config).save_pretrained(tmp_path / "classes")
    done = merge(tmp_path / "classes", tmp_path / "merged")
    assert (done.exit_code, "only language models" in done.stdout) == (0, True)


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
        _, found = verify(small, [str(tmp_path / "copy")])
        assert (found.outcome, found.share) == ("differs", 0.0)
        result = invoke(small, "--against", tmp_path / "copy")
        assert result.exit_code == 1
        assert "0.0% of what the adapter changes is there" in result.stdout


def test_a_merge_in_16_bits_is_held_to_what_rounding_left(adapter: Path, tmp_path: Path) -> None:
    codes, shares = [], []
    for factor in (0.01, 0.002, 0.0001):
        small = scaled(adapter, factor, tmp_path / f"{factor}")
        merged = tmp_path / f"merged-{factor}"
        done = merge(small, merged, "--dtype", "bfloat16", "--json")
        assert done.exit_code == 0, done.output
        shares.append(json.loads(done.stdout)["verified"])
        codes.append(invoke(small, "--against", merged).exit_code)
        assert ("Little of the adapter is in the merged model" in done.stderr) == (codes[-1] == 3)
    assert codes == [0, 0, 3]
    assert [one["outcome"] for one in shares] == ["agrees", "agrees", "can't tell"]
    assert all(abs(one["share"] - one["expected"]) < 0.1 for one in shares)
    assert 0.2 < shares[1]["expected"] < 0.9


def test_what_has_half_or_twice_the_change_differs(adapter: Path, tmp_path: Path) -> None:
    small = scaled(adapter, 0.01, tmp_path / "small")
    targets = [str(scaled(small, factor, tmp_path / f"{factor}")) for factor in (0.5, 0.95, 1.05, 2.0)]
    verdicts = verify(small, targets)[1:]
    assert [verdict.share for verdict in verdicts] == pytest.approx([0.5, 0.95, 1.05, 2], rel=0.02)
    assert {verdict.outcome for verdict in verdicts} == {"differs"}  # 1e-4 is all that float32 explains


def test_of_several_targets_one_that_differs_counts_before_one_that_cannot_be_told() -> None:
    agrees, noisy, differs = (
        Verdict("x", 0.0, 1.0, share=share, noise=noise) for share, noise in ((1, 0), (1, 9), (0, 0))
    )
    assert [each.outcome for each in (agrees, noisy, differs)] == ["agrees", "can't tell", "differs"]
    assert exit_code([agrees]) == 0
    assert exit_code([agrees, noisy]) == 3
    assert exit_code([noisy, differs, agrees]) == 1
    assert Verdict("x", float("nan"), 1.0, share=1.0).outcome == "differs"


@contextmanager
def serving(answer: Answer) -> Iterator[str]:
    """The address of a server of OpenAI's protocol that asks for a key, and knows one adapter, anna."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked = self.path, self.headers["Authorization"], body["model"], body["temperature"]
            known = asked == ("/v1/completions", "Bearer key", "anna", 0)
            content = {"choices": [{"text": answer(body["prompt"])}]} if known else {"error": "no such model"}
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def server_bind(self) -> None:
            TCPServer.server_bind(self)  # without asking for the host's name, for seconds

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()


def writer(adapter: Path, adapted: bool) -> Answer:
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(model, str(adapter)).eval() if adapted else model.eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(base)

    def answer(prompt: str) -> str:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        written = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
        return str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))

    return answer


def test_a_server_is_asked_and_one_that_ignores_the_adapter_is_told(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    with serving(writer(adapter, adapted=True)) as address:
        result = invoke(adapter, "--against", address, "--tokens", 8)
        assert result.exit_code == 0, result.output
        assert "10 of 10 answers are the same" in result.output
        refused = invoke(adapter, "--against", address, "--served-name", "bob")
        assert refused.exit_code == 1
        assert "no such model" in refused.output
    with serving(writer(adapter, adapted=False)) as address:
        result = invoke(adapter, "--against", address, "--tokens", 8)
        assert result.exit_code == 1
        assert "ignore the adapter" in result.output
    small = scaled(adapter, 1e-5, tmp_path / "anna")
    with serving(writer(small, adapted=True)) as address:
        result = invoke(small, "--against", address, "--tokens", 8)
        assert result.exit_code == 3, result.output
        assert "can't tell" in result.output
        assert invoke(small, "--against", address, "--against", "merged", "--tokens", 8).exit_code == 3


def test_what_is_nothing_to_compare_with_is_refused_before_a_model_is_loaded(adapter: Path, tmp_path: Path) -> None:
    for target in (tmp_path, "nowhere"):
        result = invoke(adapter, "--against", target)
        assert result.exit_code == 1
        assert f"{target}: is neither merged" in result.output
    result = invoke(adapter, "--against", "http://127.0.0.1:9/v1")
    assert result.exit_code == 1
    assert "gives no completion" in result.output
