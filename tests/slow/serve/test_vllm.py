"""SMoA adapters of every kind, LoRA and the base in one batch of vLLM write what PEFT writes with each alone; and its
OpenAI server with 32 SMoA adapters: under load, with adapters that come and go, and with a damaged one."""

import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from smoa import SmoaConfig

TIE = 1e-4
"""Two best logits of PEFT's that differ by less may come in either order."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; without it vLLM takes nearly all memory
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
"""For a vLLM on a small machine."""


class Answer(NamedTuple):
    """The adapter that was asked, or "base", the tokens it was given and those it wrote."""

    adapter: str
    prompt: Sequence[int]
    written: Sequence[int]


def smollm2() -> Path:
    """The folder into which smoa unpacks SmolLM2 135M."""
    return Path(os.environ.get("SMOA_CACHE", "~/.cache/smoa")).expanduser() / "models" / "smollm2-135m"


def save_adapters(base: Path, room: Path, configs: Mapping[str, PeftConfig], strength: float = 1) -> None:
    """Random adapters; the factors B of SMoA are `strength` times what they are made as."""
    for seed, (name, config) in enumerate(configs.items()):
        torch.manual_seed(seed)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
        if isinstance(config, SmoaConfig):
            for parameter in (own for path, own in model.named_parameters() if ".smoa_B." in path):
                parameter.data *= strength
        model.save_pretrained(room / name)


@torch.no_grad()
def differences(base: Path, room: Path, answers: Iterable[Answer]) -> list[tuple[str, int, float]]:
    """Where PEFT, with each adapter alone in float32, would have written another token: the adapter, the token's
    place, and by how much PEFT prefers its own."""
    of_adapter: dict[str, list[Answer]] = {}
    for answer in answers:
        of_adapter.setdefault(answer.adapter, []).append(answer)
    found = []
    for name, own in of_adapter.items():
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        if name != "base":
            model = PeftModel.from_pretrained(model, str(room / name)).eval()
        for _, prompt, written in own:
            logits = model(input_ids=torch.tensor([[*prompt, *written]])).logits[0, len(prompt) - 1 : -1]
            lost = logits.max(-1).values - logits[range(len(written)), list(written)]
            found += [(name, place, by) for place, by in enumerate(lost.tolist()) if by >= TIE]
    return found


pytestmark = [
    pytest.mark.serve,
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed"),
]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SOME = ["q_proj", "v_proj", "down_proj"]
PATTERNS = {"rank_pattern": {"k_proj": 4, "layers.1.mlp.up_proj": 12}, "alpha_pattern": {"q_proj": 40.0}}


def smoa(**settings: Any) -> SmoaConfig:
    return SmoaConfig(**{"r": 8, "alpha": 16, "target_modules": LINEAR, "init_weights": False} | settings)


def lora() -> LoraConfig:
    return LoraConfig(r=8, lora_alpha=64, target_modules=LINEAR, init_lora_weights=False)


KINDS: dict[str, PeftConfig] = {
    "spectral": smoa(num_blocks=8),
    "twin": smoa(num_blocks=8),
    "contiguous": smoa(num_blocks=4, partition="contiguous", scale="layer"),
    "large": smoa(r=64, num_blocks=8, target_modules=SOME, alpha=64),
    "ragged": smoa(r=7, num_blocks=5, scale="block"),
    "patterns": smoa(num_blocks=4, num_blocks_pattern={"v_proj": 2}, **PATTERNS),
    "paper": smoa(r=4, scale="paper", alpha=200, use_rslora=True),
    "unmodulated": smoa(num_blocks=4, modulation="none"),
    "lora": lora(),
}
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
}
rng = random.Random(0)
PROMPTS = [[rng.randrange(5, 500) for _ in range(length)] for length in (5, 40, 17)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in `base`, and an adapter of each kind."""
    room = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).save_pretrained(room / "base")
    save_adapters(room / "base", room, KINDS)
    return room


def ask(
    base: Path,
    room: Path,
    names: list[str],
    rounds: int = 2,
    load: list[str] | None = None,
    mode: int = 0,
    environment: dict[str, str] | None = None,
    **given: Any,
) -> Any:
    """What vLLM answers to each prompt for each adapter, all asked together, `rounds` times, and whom it refused.

    If a mode is given the model is compiled so.
    """
    settings = {"model": str(base), "dtype": "float32", "enforce_eager": not mode, "max_model_len": 256, "seed": 0}
    settings |= {"max_loras": len(names) + 1, "max_cpu_loras": 32, "max_lora_rank": 8, "enable_prefix_caching": True}
    asked = [(name, prompt) for prompt in PROMPTS for name in names]
    adapters = {name: str(room / name) for name in [*names, *(load or [])] if name != "base"}
    request = {"settings": settings | given, "adapters": adapters, "rounds": [asked] * rounds, "load": load or []}
    out = room / "answers.json"
    command = [sys.executable, "-m", "tests.slow.serve.engine", str(out)]
    environment = os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | (environment or {})
    done = subprocess.run(
        command,
        input=json.dumps(request | {"mode": mode}),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    found = json.loads(out.read_text())
    return [Answer(*answer) for answer in found["answers"]], found["refused"]


def assert_as_peft(base: Path, room: Path, answers: list[Answer]) -> None:
    assert differences(base, room, answers) == []
    for prompt in PROMPTS:  # an adapter that does nothing would be no test
        written = {answer.adapter: tuple(answer.written) for answer in answers if answer.prompt == prompt}
        assert len(set(written.values())) > len(written) // 2


def test_all_kinds_share_a_batch(tiny: Path) -> None:
    examples = {"smoa_examples": [str(tiny / "spectral"), str(tiny / "large")]}
    answers, _ = ask(tiny / "base", tiny, ["base", *KINDS], additional_config=examples)
    assert len(answers) == 2 * len(PROMPTS) * (len(KINDS) + 1)
    assert_as_peft(tiny / "base", tiny, answers)


@pytest.mark.parametrize("mode", [2, 3])
def test_a_compiled_model_serves_all_kinds_also_from_vllms_cache(tiny: Path, mode: int, tmp_path: Path) -> None:
    compiled = list[set[Path]]()
    for _ in range(2):
        place = {"VLLM_CACHE_ROOT": str(tmp_path)}
        answers, _ = ask(tiny / "base", tiny, ["base", *KINDS], mode=mode, environment=place)
        assert_as_peft(tiny / "base", tiny, answers)
        compiled.append(set(tmp_path.glob("torch_compile_cache/torch_aot_compile/*")))
    assert compiled[0] == compiled[1] != set()


@pytest.mark.parametrize("mode", [2, 3])
def test_a_model_that_was_compiled_without_smoa_is_compiled_again(tiny: Path, mode: int, tmp_path: Path) -> None:
    place = {"VLLM_CACHE_ROOT": str(tmp_path)}
    settings: dict[str, Any] = {"mode": mode, "max_loras": 4}
    answers, _ = ask(tiny / "base", tiny, ["base"], environment=place | {"VLLM_PLUGINS": "none"}, **settings)
    assert differences(tiny / "base", tiny, answers) == []
    answers, _ = ask(tiny / "base", tiny, ["base", "spectral", "lora"], environment=place, **settings)
    assert_as_peft(tiny / "base", tiny, answers)


def test_a_compiled_model_that_is_cut_elsewhere_refuses_smoa_and_loads_lora(tiny: Path, tmp_path: Path) -> None:
    fusions = ("fuse_rope_kvcache", "fuse_rope_kvcache_cat_mla", "fuse_qk_norm_rope_kvcache")
    cuts: dict[str, Any] = {"pass_config": dict.fromkeys(fusions, False)}  # which a build for CPUs lacks
    cuts["splitting_ops"] = ["vllm::unified_attention_with_output", "vllm::unified_kv_cache_update"]
    place = {"VLLM_CACHE_ROOT": str(tmp_path)}
    settings: dict[str, Any] = {"compilation_config": cuts, "mode": 3, "environment": place, "max_loras": 4}
    answers, refused = ask(tiny / "base", tiny, ["base"], load=["spectral", "lora"], **settings)
    assert "vllm::smoa_add" in refused.pop("spectral")
    assert refused == {}
    assert differences(tiny / "base", tiny, answers) == []


@pytest.mark.parametrize("mode", [0, 2])  # in 3, the ranks' processes would need the patches too
def test_two_ranks_serve_all_kinds(tiny: Path, mode: int, tmp_path: Path) -> None:
    place = {"VLLM_CACHE_ROOT": str(tmp_path)}
    answers, _ = ask(tiny / "base", tiny, ["base", *KINDS], mode=mode, tensor_parallel_size=2, environment=place)
    assert len(answers) == 2 * len(PROMPTS) * (len(KINDS) + 1)
    assert_as_peft(tiny / "base", tiny, answers)


def test_two_ranks_refuse_what_does_not_fit_and_go_on(tiny: Path) -> None:
    wide = LlamaConfig.from_pretrained(tiny / "base")
    wide.intermediate_size = 352
    LlamaForCausalLM(wide).save_pretrained(tiny / "wide")
    save_adapters(tiny / "wide", tiny, {"other shapes": smoa(num_blocks=8)})
    names = ["base", *(name for name in KINDS if name != "lora")]
    settings: dict[str, Any] = {"max_loras": 3, "tensor_parallel_size": 2}
    answers, refused = ask(tiny / "base", tiny, names, load=["other shapes"], **settings)
    assert "doesn't fit the layer" in refused["other shapes"]
    assert_as_peft(tiny / "base", tiny, answers)


@pytest.mark.parametrize("model", ["one head of k and v", "fused"])
def test_two_ranks_serve_other_models(model: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = SIZES | {"num_key_value_heads": 1 if model != "fused" else 2}
    linear = LINEAR if model != "fused" else ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    made = LlamaForCausalLM(LlamaConfig(**sizes)) if model != "fused" else Phi3ForCausalLM(Phi3Config(**sizes, **ids))
    made.save_pretrained(tmp_path / "base")
    kinds: dict[str, PeftConfig] = {
        "spectral": smoa(num_blocks=8, target_modules=linear),
        "ragged": smoa(r=7, num_blocks=5, scale="block", target_modules=linear),
        "contiguous": smoa(num_blocks=4, partition="contiguous", scale="layer", target_modules=linear),
        "unmodulated": smoa(num_blocks=4, modulation="none", target_modules=linear),
        "lora": LoraConfig(r=8, lora_alpha=64, target_modules=linear, init_lora_weights=False),
    }
    save_adapters(tmp_path / "base", tmp_path, kinds)
    answers, _ = ask(tmp_path / "base", tmp_path, ["base", *kinds], tensor_parallel_size=2)
    assert_as_peft(tmp_path / "base", tmp_path, answers)


def test_adapters_take_turns_in_few_slots(tiny: Path) -> None:
    names = ["base", *(name for name in KINDS if name != "lora")]  # vLLM 0.32 gives the base the last slot's LoRA
    answers, _ = ask(tiny / "base", tiny, names, max_loras=3)
    assert_as_peft(tiny / "base", tiny, answers)


def test_every_adapter_is_reloaded_where_the_cpu_holds_few(tiny: Path) -> None:
    answers, _ = ask(tiny / "base", tiny, ["spectral", "large", "contiguous", "twin"], max_loras=1, max_cpu_loras=1)
    assert_as_peft(tiny / "base", tiny, answers)


def test_smollm2_in_float32(tmp_path: Path) -> None:
    if not smollm2().is_dir():
        pytest.skip("SmolLM2 is not unpacked: smoa chat smollm2-135m")
    kinds: dict[str, PeftConfig] = {
        "contiguous": smoa(num_blocks=8, partition="contiguous"),
        "spectral": smoa(num_blocks=8, layers_to_transform=[0, 11, 29]),
        "large": smoa(r=64, num_blocks=8, target_modules=SOME, partition="contiguous"),
        "lora": lora(),
    }
    save_adapters(smollm2(), tmp_path, kinds, strength=6)
    answers, _ = ask(smollm2(), tmp_path, ["base", *kinds])
    assert_as_peft(smollm2(), tmp_path, answers)


# the server

needs_smollm2 = pytest.mark.skipif(not smollm2().is_dir(), reason="SmolLM2 is not unpacked: smoa chat smollm2-135m")
NAMES = [f"a{number}" for number in range(32)]
SERVED: list[dict[str, Any]] = [
    {"num_blocks": 8, "partition": "contiguous", "target_modules": LINEAR},
    {"num_blocks": 8, "partition": "contiguous", "target_modules": LINEAR},
    {"num_blocks": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "layers_to_transform": [0, 14, 29]},
    {"num_blocks": 5, "partition": "contiguous", "target_modules": ["k_proj", "v_proj", "gate_proj"]},
]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """34 adapters of SmolLM2, of four kinds: 32 to serve from the start, and two for later."""
    room = tmp_path_factory.mktemp("adapters")
    kinds = zip([*NAMES, "late", "damaged"], cycle(SERVED), strict=False)
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


@needs_smollm2
def test_200_requests_over_32_adapters_lose_none(server: Server, room: Path) -> None:
    asked = requests(200, [*NAMES, "base"])
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda request: server.ask(*request), asked))
    assert [len(answer.written) for answer in answers] == [12] * 200
    assert differences(smollm2(), room, answers) == []
    assert len({tuple(answer.written) for answer in answers[:33]}) > 25  # each adapter's is another


@needs_smollm2
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
