"""The command `smoa serve` under load: every answer is its adapter's, whatever other clients do."""

import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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


def all_answers(port: int, asked: Sequence[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """The answers to requests that come at once, as streams, while others leave theirs after a piece."""
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="key", max_retries=0, timeout=600) as client:

        def stream(name: str, prompt: str, tokens: int = NEW) -> Any:
            options = {"model": name, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
            return client.completions.create(**options, stream=True)

        with ThreadPoolExecutor(len(asked) + 8) as clients:
            leaving = [clients.submit(lambda name: next(iter(stream(name, "abc", 400))), name) for name in NAMES[::2]]
            answers = [clients.submit(lambda pair: [part.choices[0].text for part in stream(*pair)], p) for p in asked]
            assert all(one.result() for one in leaving)
            return {pair: "".join(answer.result()) for pair, answer in zip(asked, answers, strict=True)}


def test_64_requests_over_16_adapters_with_clients_that_leave_and_a_restart(
    room: Path, expected: dict[tuple[str, str], str]
) -> None:
    port = free_port()
    with command(room, port) as process:
        assert all_answers(port, list(expected)) == expected
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0
    with command(room, port):  # and then it is killed
        some = dict(list(expected.items())[::7])
        assert all_answers(port, list(some)) == some
