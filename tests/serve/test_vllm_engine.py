"""SMoA adapters of every kind, LoRA and the base in one batch of vLLM write what PEFT writes with each alone."""

import json
import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig
from transformers import LlamaConfig, LlamaForCausalLM

from smoa import SmoaConfig
from tests.support.served import ENVIRONMENT, Answer, differences, save_adapters, smollm2

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
rng = random.Random(0)
PROMPTS = [[rng.randrange(5, 500) for _ in range(length)] for length in (5, 40, 17)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in `base`, and an adapter of each kind."""
    room = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.15)).save_pretrained(room / "base")
    save_adapters(room / "base", room, KINDS)
    return room


def ask(base: Path, room: Path, names: list[str], rounds: int = 2, load: list[str] | None = None, **given: Any) -> Any:
    """What vLLM answers to each prompt for each adapter, all asked together, `rounds` times."""
    settings = {"model": str(base), "dtype": "float32", "enforce_eager": True, "max_model_len": 256, "seed": 0}
    settings |= {"max_loras": len(names) + 1, "max_cpu_loras": 32, "max_lora_rank": 8, "enable_prefix_caching": True}
    asked = [(name, prompt) for prompt in PROMPTS for name in names]
    adapters = {name: str(room / name) for name in [*names, *(load or [])] if name != "base"}
    request = {"settings": settings | given, "adapters": adapters, "rounds": [asked] * rounds, "load": load or []}
    out = room / "answers.json"
    command = [sys.executable, "-m", "tests.serve.engine", str(out)]
    environment = os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(
        command, input=json.dumps(request), env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(out.read_text())
    return [Answer(*answer) for answer in found["answers"]], found["refused"]


def assert_as_peft(base: Path, room: Path, answers: list[Answer]) -> None:
    assert differences(base, room, answers) == []
    for prompt in PROMPTS:  # an adapter that does nothing would be no test
        written = {answer.adapter: tuple(answer.written) for answer in answers if answer.prompt == prompt}
        assert len(set(written.values())) > len(written) // 2


def test_all_kinds_share_a_batch(tiny: Path) -> None:
    answers, _ = ask(tiny / "base", tiny, ["base", *KINDS])
    assert len(answers) == 2 * len(PROMPTS) * (len(KINDS) + 1)
    assert_as_peft(tiny / "base", tiny, answers)


def test_adapters_take_turns_in_few_slots(tiny: Path) -> None:
    names = ["base", *(name for name in KINDS if name != "lora")]  # vLLM 0.32 gives the base the last slot's LoRA
    answers, _ = ask(tiny / "base", tiny, names, max_loras=3)
    assert_as_peft(tiny / "base", tiny, answers)


def test_every_adapter_is_reloaded_where_the_cpu_holds_few(tiny: Path) -> None:
    answers, _ = ask(tiny / "base", tiny, ["spectral", "large", "contiguous", "twin"], max_loras=1, max_cpu_loras=1)
    assert_as_peft(tiny / "base", tiny, answers)


def test_an_engine_with_graphs_refuses_smoa_and_serves_lora(tiny: Path) -> None:
    settings: dict[str, Any] = {"enforce_eager": False, "compilation_config": {"mode": 0}}
    answers, refused = ask(tiny / "base", tiny, ["base", "lora"], load=["spectral"], **settings)
    assert "--enforce-eager" in refused["spectral"]
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
