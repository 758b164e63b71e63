"""`smoa verify`: what was made of an adapter, or serves it, says what the adapter says."""

import json
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
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from smoa import SmoaConfig
from smoa.errors import MergeError
from smoa_lab.cli.main import app
from smoa_lab.merge import merge_run
from smoa_lab.verify import verify
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
    arguments = ["convert", str(adapter), str(tmp_path / "lora"), "--rank", "1"]
    CliRunner().invoke(app, arguments, catch_exceptions=False)
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
    assert "100.0% of what the adapter changes" in done.stdout
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_what_is_no_language_model_is_merged_without_a_comparison(tmp_path: Path) -> None:
    base = lab.saved(lab.tiny_llama(259, 256), lab.byte_tokenizer(), tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    config = SmoaConfig(r=4, num_blocks=2, target_modules=["q_proj"], init_weights=False, task_type="SEQ_CLS")
    get_peft_model(model, config).save_pretrained(tmp_path / "classes")
    done = merge(tmp_path / "classes", tmp_path / "merged")
    assert (done.exit_code, "only language models" in done.stdout) == (0, True)


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
    model: Any = AutoModelForCausalLM.from_pretrained(adapter.parent / "base")
    model = PeftModel.from_pretrained(model, str(adapter)).eval() if adapted else model.eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(adapter.parent / "base")

    def answer(prompt: str) -> str:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        written = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
        return str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))

    return answer


def test_a_server_is_asked_and_one_that_ignores_the_adapter_is_told(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
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


def test_what_is_nothing_to_compare_with_is_refused_before_a_model_is_loaded(adapter: Path, tmp_path: Path) -> None:
    for target in (tmp_path, "nowhere"):
        result = invoke(adapter, "--against", target)
        assert result.exit_code == 1
        assert f"{target}: is neither merged" in result.output
    result = invoke(adapter, "--against", "http://127.0.0.1:9/v1")
    assert result.exit_code == 1
    assert "gives no completion" in result.output
