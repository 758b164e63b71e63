"""The command `smoa serve` under load: every answer is its adapter's, whatever other clients do."""

import json
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.chats import chat_base, saved_adapter
from tests.support.processes import ROOT, environment, free_port

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("transformers", minversion="5.24")
pytestmark = pytest.mark.slow

NAMES = [f"adapter-{number}" for number in range(16)]
PROMPTS = ["abc", "bad cab", "h" * 60, "face " * 25]
NEW = 24


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and adapters of three kinds beside it."""
    room = tmp_path_factory.mktemp("load")
    base = chat_base(room / "base")
    kinds: list[dict[str, Any]] = [{}, {"num_blocks": 4, "target_modules": ["q_proj", "down_proj"]}, {"r": 12}]
    for seed, name in enumerate(NAMES, 1):
        saved_adapter(room / "adapters" / name, base, seed, **kinds[seed % 3])
    return room


@pytest.fixture(scope="module")
def expected(room: Path) -> dict[tuple[str, str], str]:
    """What PEFT writes with each adapter alone."""
    tokenizer: Any = AutoTokenizer.from_pretrained(room / "base")
    found = {}
    for name in NAMES:
        base = AutoModelForCausalLM.from_pretrained(room / "base")
        model: Any = PeftModel.from_pretrained(base, room / "adapters" / name).eval()
        for prompt in PROMPTS:
            inputs = tokenizer(prompt, return_tensors="pt")
            output = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
            found[name, prompt] = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert len(set(found.values())) > len(found) / 2
    return found


@contextmanager
def command(room: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """The server in a process of its own, once it answers."""
    arguments = ["serve", str(room / "base"), "--adapters", str(room / "adapters"), "--port", str(port)]
    options = ["--dtype", "float32", "--slots", "6", "--cache-tokens", "2048"]
    variables = environment(SMOA_API_KEY="key", PYTHONPATH=str(ROOT / "src"))
    with subprocess.Popen([sys.executable, "-m", "smoa_lab", *arguments, *options], env=variables) as process:
        try:
            for _ in range(3000):
                with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                    break
                assert process.poll() is None
                time.sleep(0.1)
            yield process
        finally:
            process.kill()


def leave_in_the_middle(port: int, name: str) -> None:
    """A client whose process is killed after it has read a piece of its stream."""
    body = json.dumps({"model": name, "prompt": "abc", "max_tokens": 400, "stream": True}).encode()
    lines = ["POST /v1/completions HTTP/1.1", "Host: x", "Authorization: Bearer key", "Content-Type: application/json"]
    with socket.create_connection(("127.0.0.1", port)) as place:
        place.sendall("\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body)
        place.recv(100)
        place.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # as the system does: a reset


def all_answers(port: int, asked: list[tuple[str, str]], leaving: list[str]) -> dict[tuple[str, str], str]:
    """The answers to requests that come at once, half of them as streams."""
    found: dict[tuple[str, str], str] = {}

    def ask(place: int) -> None:
        name, prompt = asked[place]
        options = {"model": name, "prompt": prompt, "max_tokens": NEW, "temperature": 0}
        if place % 2:
            chunks = client.completions.create(**options, stream=True)
            found[name, prompt] = "".join(chunk.choices[0].text for chunk in chunks)
        else:
            found[name, prompt] = client.completions.create(**options).choices[0].text

    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="key", max_retries=0, timeout=600) as client:
        threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(asked))]
        threads += [threading.Thread(target=leave_in_the_middle, args=(port, name)) for name in leaving]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return found


def test_64_requests_over_16_adapters_with_killed_clients_and_a_restart(
    room: Path, expected: dict[tuple[str, str], str]
) -> None:
    port = free_port()
    with command(room, port) as process:
        assert all_answers(port, list(expected), leaving=NAMES[::2]) == expected
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0
    for _ in range(2):  # the second time after it was killed
        with command(room, port):
            some = dict(list(expected.items())[::7])
            assert all_answers(port, list(some), leaving=[]) == some
