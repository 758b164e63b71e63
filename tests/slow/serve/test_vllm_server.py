"""vLLM's OpenAI server with 32 SMoA adapters: under load, with adapters that come and go, and with a damaged one."""

import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from smoa import SmoaConfig
from tests.support.served import ENVIRONMENT, Answer, differences, save_adapters, smollm2

pytestmark = [
    pytest.mark.serve,
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed"),
    pytest.mark.skipif(not smollm2().is_dir(), reason="SmolLM2 is not unpacked: smoa chat smollm2-135m"),
]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NAMES = [f"a{number}" for number in range(32)]
KINDS: list[dict[str, Any]] = [
    {"num_blocks": 8, "partition": "contiguous", "target_modules": LINEAR},
    {"num_blocks": 8, "partition": "contiguous", "target_modules": LINEAR},
    {"num_blocks": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "layers_to_transform": [0, 14, 29]},
    {"num_blocks": 5, "partition": "contiguous", "target_modules": ["k_proj", "v_proj", "gate_proj"]},
]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """34 adapters of SmolLM2, of four kinds: 32 to serve from the start, and two for later."""
    room = tmp_path_factory.mktemp("adapters")
    kinds = zip([*NAMES, "late", "damaged"], cycle(KINDS), strict=False)
    configs = {name: SmoaConfig(r=8, alpha=16, init_weights=False, **kind) for name, kind in kinds}
    save_adapters(smollm2(), room, configs, strength=6)  # so that each writes something else
    file = room / "damaged" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return room


class Server:
    """vLLM's server in a process of its own."""

    def __init__(self, room: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"http://127.0.0.1:{free.getsockname()[1]}"
        options = {"model": str(smollm2()), "dtype": "float32", "max-model-len": "256", "max-num-seqs": "16"}
        options |= {"max-loras": "16", "max-cpu-loras": "40", "max-lora-rank": "1", "served-model-name": "base"}
        options |= {"host": "127.0.0.1", "port": self.address.rpartition(":")[2]}
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enable-lora", "--enforce-eager"]
        command += [word for name, value in options.items() for word in (f"--{name}", value)]
        command += ["--lora-modules", *(f"{name}={room / name}" for name in NAMES)]
        self.log = log.open("w")
        self.process = subprocess.Popen(command, env=os.environ | ENVIRONMENT, stdout=self.log, stderr=self.log)
        for _ in range(600):
            assert self.process.poll() is None, log.read_text()[-4000:]
            try:
                self.call("/health")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(1)
        raise TimeoutError(log.read_text()[-4000:])

    def call(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
        """Status and text of a GET, or of a POST of JSON."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def ask(self, name: str, prompt: list[int], tokens: int = 12) -> Answer:
        body = {"model": name, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        status, text = self.call("/v1/completions", body | {"return_token_ids": True})
        assert status == 200, text
        return Answer(name, prompt, json.loads(text)["choices"][0]["token_ids"])


@pytest.fixture(scope="module")
def server(room: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(room, tmp_path_factory.mktemp("log") / "server.log")
    yield server
    server.process.terminate()
    server.process.wait(60)
    server.log.close()


def requests(count: int, names: list[str]) -> list[tuple[str, list[int]]]:
    """Every adapter in turn, first all with one prompt. A quarter of the others begin alike, so that vLLM has cached
    their prefixes."""
    rng, start = random.Random(1), list(range(100, 132))
    prompts = [[rng.randrange(5, 40_000) for _ in range(rng.randrange(3, 40))] for _ in range(count)]
    prompts = [start if i < len(names) else start + own[:4] if i % 4 == 0 else own for i, own in enumerate(prompts)]
    return [(names[i % len(names)], prompt) for i, prompt in enumerate(prompts)]


def test_200_requests_over_32_adapters_lose_none(server: Server, room: Path) -> None:
    asked = requests(200, [*NAMES, "base"])
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda request: server.ask(*request), asked))
    assert [len(answer.written) for answer in answers] == [12] * 200
    assert differences(smollm2(), room, answers) == []
    assert len({tuple(answer.written) for answer in answers[:33]}) > 25  # each adapter's is another


def test_adapters_come_and_go_while_requests_run(server: Server, room: Path) -> None:
    late = {"lora_name": "late", "lora_path": str(room / "late")}
    damaged = {"lora_name": "damaged", "lora_path": str(room / "damaged")}
    with ThreadPoolExecutor(8) as clients:
        running = [clients.submit(server.ask, *request) for request in requests(48, NAMES[:8])]
        for _ in range(2):
            assert server.call("/v1/load_lora_adapter", late)[0] == 200
            answers = [server.ask("late", prompt) for _, prompt in requests(3, ["late"])]
            status, text = server.call("/v1/load_lora_adapter", damaged)
            assert status >= 400
            assert "not a whole safetensors file" in text
            assert server.call("/v1/unload_lora_adapter", {"lora_name": "late"})[0] == 200
            assert server.call("/v1/completions", {"model": "late", "prompt": [5], "max_tokens": 1})[0] == 404
        answers += [each.result() for each in running]
    assert differences(smollm2(), room, answers) == []
    served = {model["id"] for model in json.loads(server.call("/v1/models")[1])["data"]}
    assert served == {"base", *NAMES}
