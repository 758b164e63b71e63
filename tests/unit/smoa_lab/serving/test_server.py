"""`smoa serve`: what the openai client is told is what PEFT writes with each adapter alone."""

import asyncio
import importlib
import json
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import transformers
from peft import PeftModel

from smoa import AdapterPool
from smoa.errors import ConfigError, UnsupportedVersionError
from tests.support.chats import chat_base, saved_adapter, written
from tests.support.lab import byte_tokenizer

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("transformers", minversion="5.24")

from fastapi import HTTPException  # noqa: E402

import smoa_lab.serving  # noqa: E402
from smoa_lab.base_models import load_base_model  # noqa: E402
from smoa_lab.config.run import ModelSection  # noqa: E402
from smoa_lab.serving.adapters import Adapters  # noqa: E402
from smoa_lab.serving.requests import AskedChat, checked  # noqa: E402
from smoa_lab.serving.server import Settings, listening, serve, serving  # noqa: E402
from smoa_lab.serving.stops import Stops, UntilStop  # noqa: E402

KEY = "a secret"
NEW = 12
ADAPTERS: dict[str, dict[str, Any]] = {
    "anna": {},
    "ben": {},
    "cleo": {"target_modules": ["q_proj", "down_proj"], "num_blocks": 4},
}


@contextmanager
def served(base: Path, folder: Path, **settings: Any) -> Iterator[str]:
    """The address of a server in this process."""
    model, tokenizer = load_base_model(ModelSection(name=str(base), dtype="float32"))
    own = Settings(**({"api_key": KEY, "cache_tokens": 1024} | settings))
    with listening("127.0.0.1", 0) as place, serving(model, tokenizer, "tiny", folder, own) as app:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{place.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and adapters beside it."""
    room = tmp_path_factory.mktemp("served")
    base = chat_base(room / "base")
    for seed, (name, config) in enumerate(ADAPTERS.items(), 1):
        saved_adapter(room / "adapters" / name, base, seed, **config)
    return room


@pytest.fixture(scope="module")
def address(room: Path) -> Iterator[str]:
    with served(room / "base", room / "adapters", max_request_bytes=20_000) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        yield client


class Alone:
    """What PEFT writes with one adapter."""

    def __init__(self, room: Path) -> None:
        self.room, self.tokenizer, self.models = room, *loaded(room / "base"), dict[str, Any]()

    def model(self, name: str) -> Any:
        if name not in self.models:
            model = load_base_model(ModelSection(name=str(self.room / "base"), dtype="float32"))[0].eval()
            known = name in ("base", "tiny")
            self.models[name] = model if known else PeftModel.from_pretrained(model, self.room / "adapters" / name)
        return self.models[name]

    def completion(self, name: str, prompt: str, new: int = NEW) -> str:
        inputs = self.tokenizer(prompt, return_tensors="pt")
        output = self.model(name).generate(**inputs, max_new_tokens=new, do_sample=False)
        text: str = self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return text

    def chat(self, name: str, question: str) -> str:
        return written(self.model(name), self.room / "base", [{"role": "user", "content": question}], NEW)


def loaded(base: Path) -> tuple[Any]:
    return (load_base_model(ModelSection(name=str(base), dtype="float32"))[1],)


@pytest.fixture(scope="module")
def alone(room: Path) -> Alone:
    return Alone(room)


def completed(client: Any, model: str, prompt: str = "abc", **options: Any) -> str:
    options = {"max_tokens": NEW, "temperature": 0} | options
    text: str = client.completions.create(model=model, prompt=prompt, **options).choices[0].text
    return text


MODELS = [*ADAPTERS, "tiny", "base"]


def test_completions_and_chats_are_what_the_adapter_alone_writes(client: Any, alone: Alone) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", *ADAPTERS]
    expected = [alone.completion(name, "abc") for name in MODELS]
    assert len(set(expected)) == len(ADAPTERS) + 1
    assert [completed(client, name) for name in MODELS] == expected
    for name in MODELS:
        messages = [{"role": "user", "content": "hag"}]
        answer = client.chat.completions.create(model=name, messages=messages, max_tokens=NEW, temperature=0)
        assert answer.choices[0].message.content == alone.chat(name, "hag")
        assert (answer.model, answer.choices[0].finish_reason) == (name if name != "base" else "tiny", "length")


def test_many_requests_at_once_each_get_their_own_adapter(client: Any, alone: Alone) -> None:
    found: dict[tuple[str, str], str] = {}

    def ask(name: str, prompt: str) -> None:
        stream = client.completions.create(model=name, prompt=prompt, max_tokens=NEW, temperature=0, stream=True)
        found[name, prompt] = "".join(chunk.choices[0].text for chunk in stream)

    asked = [(name, prompt) for name in MODELS for prompt in ("abc", "h", "bad cab " * 6)]
    threads = [threading.Thread(target=ask, args=pair) for pair in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {pair: alone.completion(*pair) for pair in asked}


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_a_stop_and_others_go_on(client: Any, alone: Alone, stream: bool) -> None:
    whole = alone.completion("anna", "abc")
    found = whole[3:6]
    assert whole.find(whole[-6:]) == NEW - 6  # complete with the last token that there may be
    stops: list[tuple[Any, str]] = [
        (found, whole[: whole.find(found)]),
        (["unseen", whole[1:5]], whole[:1]),
        (whole[-6:], whole[:-6]),
        ("unseen", whole),
    ]
    for stop, expected in stops:
        answer = client.completions.create(
            model="anna", prompt="abc", max_tokens=NEW, temperature=0, stop=stop, stream=stream
        )
        parts = list(answer) if stream else [answer]
        assert "".join(part.choices[0].text for part in parts) == expected
        assert parts[-1].choices[0].finish_reason == ("length" if expected == whole else "stop")
        assert (parts[-1].usage.completion_tokens < NEW) is (expected not in (whole, whole[:-6]))
    assert completed(client, "anna") == whole
    chat = {"model": "anna", "messages": [{"role": "user", "content": "hag"}], "max_tokens": NEW, "temperature": 0}
    whole = alone.chat("anna", "hag")
    answer = client.chat.completions.create(**chat, stop=[whole[2:4]], stream=stream)
    text = (
        "".join(part.choices[0].delta.content or "" for part in answer) if stream else answer.choices[0].message.content
    )
    assert text == whole[: whole.find(whole[2:4])]


def test_the_beginning_of_a_stop_is_held_back_until_it_is_known() -> None:
    queue = asyncio.Queue[Any]()
    stopped: list[bool] = []
    shown = UntilStop(queue, Stops(["\n\n", "END", "x" * 1_000_000], None), lambda: stopped.append(True))
    texts = ["one", "\n", "two E", "N", "E", "\nfour\n", "\n", "five", None]
    for text in texts:
        queue.put_nowait(text)
    parts = []
    while not parts or parts[-1] is not None:
        parts.append(shown.get_nowait())
    assert (parts, stopped) == (["one", "\ntwo ", "EN", "E\nfour", None], [True])
    with pytest.raises(asyncio.QueueEmpty):
        shown.get_nowait()


def test_a_stop_before_a_part_of_a_character_waits_for_the_whole_one() -> None:
    tokenizer = byte_tokenizer(merges=[("Ġ", "ð")])  # as in GPT-2: a space and the first byte of an emoji
    tokens = tokenizer("ab \U0001f600", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokens[:3]) == "ab \ufffd"
    stops = Stops(["b "], tokenizer)
    assert [stops(tokens[:size]) for size in range(1, len(tokens) + 1)] == [False] * (len(tokens) - 1) + [True]


def test_a_special_token_is_a_stop_though_text_has_none(room: Path, alone: Alone, tmp_path: Path) -> None:
    whole = alone.completion("base", "abc")
    shutil.copytree(room / "base", tmp_path / "base")
    tokenizer = loaded(tmp_path / "base")[0]
    tokenizer.add_special_tokens({"additional_special_tokens": [whole[4]]})
    tokenizer.save_pretrained(tmp_path / "base")
    with (
        served(tmp_path / "base", room / "adapters") as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key=KEY) as client,
    ):
        for stop, expected in ((None, whole.replace(whole[4], "")), ([whole[4], "x"], whole[: whole.find(whole[4])])):
            assert completed(client, "base", stop=stop) == expected


def test_an_unknown_model_is_404_with_the_nearest_name(client: Any, room: Path) -> None:
    shutil.copytree(room / "base", room / "outside")
    for name in ("anne", "../outside", "..", "", "/etc", "a\0b", "adapters/anna"):
        words = "did you mean 'anna'" if name == "anne" else "does not exist"
        with pytest.raises(openai.NotFoundError, match=words) as caught:
            completed(client, name)
        assert caught.value.code == "model_not_found"
        assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stop": ""}, "stop"),
        ({"stop": ["a", 1]}, "stop"),
        ({"extra_body": {"n": 2}}, "n=2"),
        ({"extra_body": {"logprobs": 0}}, "logprobs=0"),
        ({"extra_body": {"generation_config": "{}"}}, "generation_config="),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 4000}, "at most 512 together"),
        ({"prompt": "a" * 600}, "at most 512 together"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"temperature": 1e300}, "temperature"),
        ({"temperature": 1, "seed": 10**30}, "seed"),
        ({"stop": ["a"] * 1001}, "stop"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_not_supported_is_refused_and_not_ignored(client: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        completed(client, "anna", **options)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "tool_calls": "now"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "now"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": "{"}}]},
    ],
)
def test_a_message_that_no_template_could_read_is_refused(message: dict[str, Any]) -> None:
    with pytest.raises(HTTPException) as refused:
        checked({"model": "anna", "messages": [message]}, AskedChat)
    assert refused.value.status_code == 400


def test_no_request_ends_the_generation_of_others_and_each_has_its_own_bias(client: Any, alone: Alone) -> None:
    assert completed(client, "anna", temperature=1e-40) == alone.completion("anna", "abc")
    options = {"model": "anna", "messages": [{"role": "user", "content": "hag"}], "max_tokens": NEW, "temperature": 0}
    for bias in ({"99999999": 1}, {"-1": 1}):
        with pytest.raises(openai.BadRequestError, match="generation_config"):
            client.chat.completions.create(**options, logit_bias=bias)
    letter = alone.tokenizer("h", add_special_tokens=False)["input_ids"][0]
    assert completed(client, "anna", logit_bias={str(letter): 1000}) == "h" * NEW
    answer = client.chat.completions.create(**options, logit_bias={})
    assert answer.choices[0].message.content == alone.chat("anna", "hag")


def test_chats_that_the_template_or_the_server_refuse(client: Any) -> None:
    picture = [{"type": "image_url", "image_url": {"url": "http://localhost/picture.png"}}]
    for messages, words in (
        ([{"role": "user", "content": "forbidden"}], "no such prompt"),
        ([{"role": "user", "content": picture}], "messages"),
        ([], "messages"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            client.chat.completions.create(model="anna", messages=messages)


def post(address: str, path: str, body: bytes = b"{}", key: str | None = KEY, **headers: str) -> int:
    headers = (
        {"Content-Type": "application/json"} | headers | ({} if key is None else {"Authorization": f"Bearer {key}"})
    )
    try:
        with urllib.request.urlopen(urllib.request.Request(address + path, body, headers), timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code if json.load(error)["error"]["message"] else 0


def test_nothing_else_of_transformers_app_is_there(address: str) -> None:
    for path in ("/load_model", "/reset", "/v1/responses", "/v1/systemone", "/v1/audio/transcriptions", "/docs"):
        assert post(address, path) == 404
    for path in ("/docs", "/openapi.json"):
        assert post(address, path, None) == 404  # type: ignore[arg-type]
    assert post(address, "/health", None, key=None) == 200  # type: ignore[arg-type]


def test_another_release_of_transformers_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", "5.25.0")
    with pytest.raises(
        UnsupportedVersionError, match=r"is for transformers 5\.24, .*5\.25\.0 is installed: pip install"
    ):
        importlib.reload(smoa_lab.serving)


def test_a_missing_or_wrong_key_is_401(address: str) -> None:
    for key in (None, "", "a secre", "a secret2", "A secret", "ä"):
        headers = {"Authorization": f"Bearer {key}".encode().decode("latin-1")} if key is not None else {}
        assert post(address, "/v1/completions", key=None, **headers) == 401
        assert post(address, "/v1/models", None, key=None, **headers) == 401  # type: ignore[arg-type]


def test_a_request_that_is_too_large_is_413_with_and_without_its_length(address: str) -> None:
    large = json.dumps({"model": "anna", "prompt": "a" * 30_000}).encode()
    assert post(address, "/v1/completions", large) == 413
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    with socket.create_connection(address.removeprefix("http://").split(":")) as raw:  # all at once: it may hang up
        raw.sendall(head.encode() + b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (large, b"")))
        assert raw.recv(99).split()[1] == b"413"
    assert post(address, "/v1/completions", b"[]") == 400
    assert post(address, "/v1/completions", b"no json") == 400


def test_an_adapter_is_served_once_it_is_whole_and_again_once_it_is_replaced(
    client: Any, alone: Alone, room: Path
) -> None:
    new = room / "adapters" / "dora"
    (room / "adapters" / "empty").mkdir()
    new.mkdir()
    shutil.copy(room / "adapters" / "anna" / "adapter_config.json", new)
    weights = (room / "adapters" / "anna" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(openai.NotFoundError):
        completed(client, "dora")
    (new / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(openai.UnprocessableEntityError, match="'dora' can't be served: "):
        completed(client, "dora")
    assert completed(client, "ben") == alone.completion("ben", "abc")
    (new / "adapter_model.safetensors").write_bytes(weights)
    assert completed(client, "dora") == alone.completion("anna", "abc")
    assert "dora" in [model.id for model in client.models.list()]
    running = client.completions.create(model="dora", prompt="abc", max_tokens=90, temperature=0, stream=True)
    begun = [next(iter(running)).choices[0].text]
    shutil.copytree(room / "adapters" / "cleo", new, dirs_exist_ok=True)
    assert completed(client, "dora") == alone.completion("cleo", "abc")
    whole = "".join([*begun, *(chunk.choices[0].text for chunk in running)])
    assert whole == alone.completion("anna", "abc", 90)
    shutil.rmtree(new)
    with pytest.raises(openai.NotFoundError):
        completed(client, "dora")


def test_a_client_that_leaves_ends_its_request_and_requests_wait_for_a_slot(room: Path, alone: Alone) -> None:
    with (
        served(room / "base", room / "adapters", slots=1, api_key=None) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client,
    ):
        stream = client.completions.create(model="anna", prompt="abc", max_tokens=400, stream=True)
        next(iter(stream))
        stream.close()
        body = json.dumps({"model": "anna", "prompt": "abc", "max_tokens": 400}).encode()
        lines = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
        head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode()
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as left:
            left.sendall(head + body)
            time.sleep(0.1)
        assert completed(client, "ben") == alone.completion("ben", "abc")  # which needs the slot
        assert completed(client, "anna") == alone.completion("anna", "abc")


def test_an_adapter_with_many_requests_keeps_nobody_out(room: Path, alone: Alone) -> None:
    ended = threading.Event()
    with (
        served(room / "base", room / "adapters", slots=1, api_key=None) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0, timeout=60) as client,
    ):

        def ask() -> None:
            while not ended.is_set():
                completed(client, "anna", max_tokens=40)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            assert completed(client, "ben") == alone.completion("ben", "abc")
        finally:
            ended.set()
            for thread in threads:
                thread.join()


@pytest.fixture
def adapters(room: Path) -> Adapters:
    model, tokenizer = load_base_model(ModelSection(name=str(room / "base"), dtype="float32"))
    return Adapters(AdapterPool(model, slots=1), tokenizer, "tiny", room / "adapters")


def test_a_client_that_leaves_while_its_adapter_is_read_holds_no_slot(
    adapters: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold, reading = adapters._hold, threading.Event()

    def slowly(name: str) -> Any:
        reading.set()
        time.sleep(0.05)
        return hold(name)

    async def leave(name: str) -> None:
        async def ask() -> None:
            async with adapters.held(name):
                pytest.fail("has left")

        task = asyncio.create_task(ask())
        await asyncio.to_thread(reading.wait)
        task.cancel()
        await asyncio.wait((task,))
        async with adapters.held("ben"):  # once the one slot is free
            assert [name.partition("@")[0] for name in +adapters.pool._in_use] == ["ben"]

    monkeypatch.setattr(adapters, "_hold", slowly)
    asyncio.run(asyncio.wait_for(leave("anna"), 30))


def test_hidden_folders_are_no_adapters(adapters: Adapters, room: Path) -> None:
    hidden = room / "adapters" / ".anna-1234"  # as one is named till it is complete
    shutil.copytree(room / "adapters" / "anna", hidden)
    assert {model["id"] for model in adapters.listed()} >= {"tiny", *ADAPTERS}
    assert hidden.name not in {model["id"] for model in adapters.listed()}
    shutil.rmtree(hidden)


def test_an_empty_key_is_refused(room: Path) -> None:
    with pytest.raises(ConfigError, match="--api-key"):
        serve(ModelSection(name=str(room / "base")), room / "adapters", "127.0.0.1", 0, Settings(api_key=" "))


def test_a_port_in_use_is_one_error() -> None:
    with listening("127.0.0.1", 0) as place:
        place.listen()
        port = place.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--port {port}.*in use"), listening("127.0.0.1", port):
            pass
