"""Asks a vLLM in this process, as a test has said on standard input, and writes what it answers to a file.

    python -m tests.slow.serve.engine OUT < request.json

The request: the settings of `LLM`, the folder of each adapter, rounds of [adapter, prompt] that are asked together, and
the mode in which the model is compiled, if any.
"""

import json
import sys
from pathlib import Path
from typing import Any


def compile_on_a_cpu(mode: int) -> None:
    """Let vLLM on a CPU compile a model with LoRA, which it never does."""
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def check(cls: Any, config: Any) -> None:
        original(cls, config)
        own = config.compilation_config
        own.mode, own.backend, own.compile_sizes = CompilationMode(mode), "inductor", own.compile_sizes or []

    CpuPlatform.check_and_update_config = classmethod(check)  # type: ignore[assignment]
    FixFunctionalizationPass.__call__ = lambda self, graph: None  # it names operators that a build for CPUs lacks


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    request: dict[str, Any] = json.load(sys.stdin)
    if mode := request.get("mode"):
        compile_on_a_cpu(mode)
    engine = LLM(enable_lora=True, skip_tokenizer_init=True, **request["settings"])
    loras = {
        name: LoRARequest(name, number, path) for number, (name, path) in enumerate(request["adapters"].items(), 1)
    }
    refused = {}
    for name in request.get("load", []):
        try:
            engine.llm_engine.add_lora(loras[name])
        except Exception as error:  # any, to be told
            refused[name] = f"{type(error).__name__}: {error}"
    sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    answers = []
    for asked in request["rounds"]:
        prompts: Any = [{"prompt_token_ids": prompt} for _, prompt in asked]
        outputs = engine.generate(prompts, sampling, lora_request=[loras.get(n) for n, _ in asked], use_tqdm=False)
        written = [list(output.outputs[0].token_ids) for output in outputs]
        answers += [[name, prompt, own] for (name, prompt), own in zip(asked, written, strict=True)]
    Path(sys.argv[1]).write_text(json.dumps({"answers": answers, "refused": refused}))


if __name__ == "__main__":
    main()
