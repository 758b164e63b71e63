"""Runs PEFT's own tests with SMoA in the places of LoRA and HiRA.

    python -m tests.peft_suite          # the cases of SMoA alone
    python -m tests.peft_suite -x -q    # options of pytest

The tests come from PEFT's source distribution, which pip downloads into a temporary folder: nothing of it is kept. This
file is also the plugin of that run. It replaces each list of cases by SMoA's: those of LoRA and HiRA whose settings
SMoA has too, under their names with SMoA in them. In the tests of `target_parameters` it also replaces the classes of
LoRA that they use by name. `REFUSED` has what is left out, and why.

Models that the tests would load from the Hub are random ones of the same classes, with the same names of modules, in
folders that are named as on the Hub.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

FILES = ("test_custom_models.py", "test_config.py", "test_target_parameters.py")
CHOSEN = "(SMoA or Smoa or TestTargetParameters or moe_target_parameters)"
RENAMED = {
    "hira_dropout": "smoa_dropout",
    "lora_dropout": "smoa_dropout",
    "init_lora_weights": "init_weights",
    "lora_alpha": "alpha",
}
ONE_OUTPUT = {"EmbConv1D": "emb", "Conv1d": "lin0"}
"""Models with a layer of one output, which takes one block, and the target beside it."""
REFUSED = {
    "test_save_pretrained_pickle": "smoa reads and writes no pickles",
    "test_save_pretrained_selected_adapters_pickle": "smoa reads and writes no pickles",
    "MHA": "torch.nn.MultiheadAttention: LoRA alone adapts it",
    "test_from_pretrained_config_construction": "each adapter has a copy of its config, not the object that was passed",
    "test_save_load_roundtrip_fsdp_wrapped_learnable_bias": "loads biases with a config that doesn't train them",
    "(TestMultipleActiveAdapters and tokens)": "one output, whose two updates differ less than the test asks",
    "test_rank_pattern_for_moe_target_parameters": "reads lora_A, and counts gate and up as one matrix of each expert",
    "test_targeting_module_and_targeting_param_equivalent": "reads lora_A; tests/unit has the same of smoa_A",
    "test_adding_second_adapter_reuses_param_wrapper": "reads lora_A; tests/unit has the same of smoa_A",
    "test_target_multiple_parameters_on_same_module": "counts the calls of LoRA's parametrization, which SMoA has not",
    "test_target_parameters_forward_under_autocast": "looks into LoRA's parametrization, which SMoA has not",
    "test_target_parameter_result_caching_works": "counts the calls of LoRA's parametrization, which SMoA has not",
    "test_target_parameters_works_with_existing_parametrization": "SMoA refuses parametrized parameters by name",
    "(test_safe_merge and Groups2)": "outputs near 8,000 in float32, compared to 1e-6 except for methods that it names",
}
IGNORED = (
    "`is_gradient_checkpointing` is deprecated:FutureWarning",
    "`gradient_checkpointing_enable` is deprecated:FutureWarning",
)
"""Warnings of transformers 5.24 that PEFT 0.21's own calls give."""
LISTS = {"TEST_CASES": 2, "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": 2, "ALL_CONFIG_CLASSES": 0, "ALL_CONFIGS": 1}
"""The lists of cases in PEFT's tests, and where the class of a config is in a case."""


def main() -> int:
    """Download PEFT's tests, run them, and return pytest's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        source = _download(Path(folder))
        (source / "tests" / "__init__.py").touch()  # the tests import each other relative to it
        _save_models(source)
        root = Path(__file__).parents[1]
        paths = os.pathsep.join([str(root / "src"), str(root / "tests")])
        environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
        chosen = " and not ".join([CHOSEN, *REFUSED])
        ignored = [option for warning in IGNORED for option in ("-W", f"ignore:{warning}")]
        options = ["-p", "peft_suite", "-o", "addopts=", "-k", chosen, "-q", *ignored, *sys.argv[1:]]
        command = [sys.executable, "-m", "pytest", *options, *(f"tests/{file}" for file in FILES)]
        return subprocess.run(command, cwd=source, env=environment, check=False).returncode


def _download(folder: Path) -> Path:
    """The unpacked source distribution of the installed PEFT."""
    wanted = ["--no-deps", "--no-binary", "peft", f"peft=={peft.__version__}"]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "-d", str(folder), *wanted], check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def _save_models(folder: Path) -> None:
    """Save a random model of two layers under the name of each model on the Hub that the tests load."""
    from tests.support import tiny_mixtures, tiny_models

    torch.manual_seed(0)
    models = {
        "trl-internal-testing/tiny-Llama4ForCausalLM": tiny_mixtures.llama4(num_hidden_layers=2),
        "trl-internal-testing/tiny-GptOssForCausalLM": tiny_mixtures.gpt_oss(num_hidden_layers=2),
        "hf-internal-testing/tiny-random-LlamaForCausalLM": tiny_models.llama(),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)


def pytest_collectstart(collector: Any) -> None:
    """Replace the lists of cases in a test module, and LoRA's classes, before its tests are collected."""
    if isinstance(collector, pytest.Module) and collector.path.name == "test_target_parameters.py":
        from smoa import SmoaConfig
        from smoa.layers.experts.param_wrapper import ParamWrapper

        collector.obj.ParamWrapper = ParamWrapper
        collector.obj.LoraConfig = lambda **settings: SmoaConfig(**_as_ours(settings))
    if isinstance(collector, pytest.Class | pytest.Module):
        for name, place in LISTS.items():
            cases = getattr(collector.obj, name, None)
            if isinstance(cases, list):
                cases[:] = _as_smoa(cases, place)


def _as_smoa(cases: list[Any], place: int) -> list[Any]:
    from smoa import SmoaConfig

    if any(case[place] is SmoaConfig for case in cases):
        return cases
    found = [_translated(case, place) for case in cases if case[place].__name__ in ("LoraConfig", "HiraConfig")]
    return list({str(case[place:]) + str(case[:place]): case for case in found if case is not None}.values())


def _translated(case: tuple[Any, ...], place: int) -> tuple[Any, ...] | None:
    """A case of LoRA or HiRA with SMoA's config; None if it has settings or values that SMoA lacks."""
    from smoa import ConfigError, SmoaConfig

    kept = [{"lora": "smoa", "hira": "smoa"}.get(part, _renamed(part)) for part in case[:place]]
    settings = [_as_ours(part) for part in case[place + 1 :]]
    for name in ONE_OUTPUT.keys() & set(kept):
        if ONE_OUTPUT[name] not in settings[0]["target_modules"]:
            settings[0]["num_blocks"] = 1  # as smoa's error says
    try:
        for part in settings:
            SmoaConfig(**part)
    except (ConfigError, TypeError):
        return None
    return (*kept, SmoaConfig, *settings)


def _as_ours(settings: dict[str, Any]) -> dict[str, Any]:
    return {RENAMED.get(key, key): value for key, value in settings.items()}


def _renamed(name: str) -> str:
    return name.replace("LoRA", "SMoA").replace("HiRA", "SMoA")


if __name__ == "__main__":
    sys.exit(main())
