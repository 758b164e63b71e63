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
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

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
