"""Runs PEFT's own tests with SMoA in the places of LoRA and HiRA.

    python -m tests.slow.peft_suite                # every file of them
    python -m tests.slow.peft_suite --short        # one test of each kind of model, as `make test`
    python -m tests.slow.peft_suite -x -k gpt2     # options of pytest

The tests come from PEFT's source distribution, which pip downloads into a temporary folder: nothing of it is kept. In
`FILES`, names of LoRA and HiRA are replaced by SMoA's (`NAMES`), so their cases and what they read of a layer are
SMoA's. Tests of other methods are left away. Models of the Hub are random ones of the same classes (`_models`).

This file is also the plugin of that run. At the end it prints how many tests passed and failed, and what was left out,
by the reasons in `LEFT_OUT` and by settings that LoRA alone has.
"""

import inspect
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, wraps
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

FILES = tuple(
    f"test_{name}.py"
    for name in (
        *("config", "custom_models", "decoder_models", "encoder_decoder_models", "feature_extraction_models"),
        *("low_level_api", "other", "seq_classifier", "token_classification_qa", "target_parameters", "initialization"),
    )
)
NAMES = {
    r"\((config_cls == LoraConfig)\)": "False",  # LoRA does not merge grouped convolutions
    r"\b(Lora|Hira)(Config|Layer|Model)\b": r"Smoa\2",
    r"\blora_embedding_([AB])(\.adapter\d\b|\[\w+\])": r"smoa_\1\2.weight",
    r"\b(lora|hira)_(embedding_)?([AB])\b": r"smoa_\3",
    r'"(lora|hira)(_only|_)?"': r'"smoa\2"',
    r"\bhira_dropout\b": "smoa_dropout",
    r"\b(PeftType\.|\")(LORA|HIRA)\b(?!\":)": r"\1SMOA",
    r"\b(LoRA|HiRA)\b": "SMoA",
}
"""Regular expressions in PEFT's tests, and what they become."""
EDITS = {
    # the words of an error
    "lora.ParamWrapper does not support mixed adapter batches yet.": "has adapted experts",
    'startswith("lora.Conv2d': 'startswith("smoa.Conv',
    'startswith("lora.': 'startswith("smoa.',
    "peft.tuners.lora.layer.Embedding": "smoa.embedding.Embedding",
    "peft.tuners.lora.layer.Linear": "smoa.linear.Linear",
    "config.lora_alpha": "config.alpha",
    '"Cannot add weighted adapters if they target the same module with modules_to_save, but found 1 such "': (
        '"can\'t combine adapters with modules_to_save"'
    ),
    '"instance(s)."': '""',
    # numbers for every tensor of a file, whose labels must be a partition and whose scales are the base's
    "{k: torch.ones_like(v) * 555 for k, v": (
        "{k: torch.ones_like(v) * 555 if 'smoa_A' in k or 'smoa_B' in k else v for k, v"
    ),
    "{k: torch.randn(v.shape, dtype=v.dtype) for k, v": (
        "{k: torch.randn(v.shape) if 'smoa_A' in k or 'smoa_B' in k else v for k, v"
    ),
    # all tensors of a layer, which has more than A and B
    'del sd_before["model.decoder.layers.5.self_attn.q_proj.smoa_A.weight"]': (
        'sd_before = {k: v for k, v in sd_before.items() if "layers.5.self_attn.q_proj" not in k}'
    ),
    'del sd_before["model.decoder.layers.5.self_attn.q_proj.smoa_B.weight"]': "pass",
}
"""Text in PEFT's tests, and what it becomes where SMoA has other words or more tensors."""
REFUSED = "a documented refusal: "
LORAS = "reads what LoRA alone has: "
ADAPTED = "expects a refusal of what smoa adapts: "
LEFT_OUT: dict[str, str] = {
    "MHA|mha_|multihead": f"{REFUSED}MultiheadAttention (docs/what-works.md)",
    "existing_parametrization": f"{REFUSED}a parameter that something else computes (docs/what-works.md)",
    "duplicate_name_without_mutation.*True|PeftMixedModel|mixed_model": f"{REFUSED}PeftMixedModel (docs/what-works.md)",
    "TestHotSwapping": f"{REFUSED}PEFT's own hot-swapping; test_hotswap.py has smoa's (docs/what-works.md)",
    r"bias_argument\[invalid": f"{REFUSED}a bias of no known name, at once, by the config (docs/what-works.md)",
    r"adapters_mixed_modules_to_save_merging|cat_with_rank_pattern|active_adapters_forward\[SMoA Different": (
        f"{REFUSED}sums of adapters with modules_to_save, rank_pattern, other layers (docs/how-to/several-adapters.md)"
    ),
    "test_weighted_combination_of_adapters|weighted_adapter_with_different_scaling": (
        f"{LORAS}sums by SVD, TIES and DARE; test_combining.py has cat and linear"
    ),
    "key_mapping_save_old_load_new_lora|load_resized_embedding_ignore": (
        f"{REFUSED}an adapter of a base with other weights (docs/api.md)"
    ),
    "TestDynamicDispatch": f"{LORAS}its dispatcher of custom layers; test_route.py has smoa's kinds",
    "TestLoraNestedConfig|TestEva|with_runtime_config": f"{LORAS}configs inside its config",
    "(?<!alt_)weight_tying_tied_model_target_modules_(str_)?lora|weight_tying_enc_dec_target_modules": (
        f"{LORAS}factors of the two ends that are one, transposed"
    ),
    "rslora_scaling|scaling_with_rslora": (
        f"{LORAS}alpha / √r; test_rank_stabilized_scaling_is_loras_at_equal_parameters has smoa's"
    ),
    "lora_embedding_(default|false)": f"{LORAS}normal numbers in B of an embedding; test_kernels.py has A and B",
    "divisible_by_groups.*lora with rank not": f"{LORAS}a rank of each group; test_kinds.py has grouped convolutions",
    "rank_pattern_for_moe": (
        f"{LORAS}one matrix for gate and up; test_patterns_go_by_the_parameters_name has the pattern of experts"
    ),
    "multiple_parameters_on_same_module|result_caching_works|target_parameters_forward_under_autocast": (
        f"{LORAS}the calls of its parametrization; test_experts.py and test_autocast_and_half_precision_train"
    ),
    "inject_from_state_dict_low_cpu_mem_usage$": (
        f"{LORAS}no buffers, which stay real; test_low_cpu_mem_usage_makes_meta_factors_only has the factors"
    ),
    "warns_for_unsharded": f"{LORAS}a warning in PEFT's save, by the names of LoRA's tensors",
    "different_target_parameters_raises": f"{ADAPTED}adapters of several parameters; test_route.py",
    "mixed_adapter_batches_training_mode_raises": f"{ADAPTED}training by names; test_adapter_names.py trains by them",
    "mamba_modules": f"{ADAPTED}what Mamba only reads (docs/what-works.md)",
    "groups_greater_than_one": f"{ADAPTED}grouped convolutions; test_kinds.py",
    "stable_diffusion": "loads a pipeline of the Hub; tests/lives/test_towers.py has a UNet and a transformer",
    r"trainable tokens Same.*merge_layers_multi|merge_layers_multi.*trainable tokens Same": (
        "one output, changed by 0.0013 by the second of two random updates where the test asks for 0.0019; "
        "test_merging.py has several adapters"
    ),
    r"inject_from_state_dict_(transformers|compiled)": (
        "transformers 5.24 demands PEFT 0.22 for its own add_adapter, whatever the method; "
        "test_transformers_own_adapter_interface_takes_smoa runs with older ones"
    ),
}
"""Expressions for the ids of tests, and why they are left out. The tests named are smoa's that do the same."""
IGNORED = (
    "`is_gradient_checkpointing` is deprecated:FutureWarning",
    "`gradient_checkpointing_enable` is deprecated:FutureWarning",
)
"""Warnings of transformers 5.24 that PEFT 0.21's own calls give."""
SHORT = {
    "TEST_CASES": ("Vanilla MLP 1 SMoA", "Embedding + transformers Conv1D 1 SMoA", "Conv2d 1 SMoA"),
    "files": ("config", "custom", "decoder", "feature", "seq_classifier", "token_classification", "target_parameters"),
}
"""With --short: the cases of custom models, and files by a part of their names. Other lists keep their first case."""
LISTS = ("TEST_CASES", "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES", "ALL_CONFIGS")
"""The lists of cases in PEFT's tests."""
ONLY_LORA = re.compile(
    r"SmoaConfig\.__init__\(\) got an unexpected keyword argument '(\w+)'|SmoaConfig: (init_weights=\S+) must be"
)
"""The errors for settings and values that LoRA has and SMoA lacks."""


def main() -> int:
    """Download PEFT's tests, run them, and return pytest's exit code."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--short"]
    short = len(arguments) < len(sys.argv) - 1
    with tempfile.TemporaryDirectory() as folder:
        source = _download(Path(folder))
        (source / "tests" / "__init__.py").touch()  # the tests import each other relative to it
        for file in (*FILES, "testing_common.py", "testing_utils.py"):
            path = source / "tests" / file
            path.write_text(_as_smoas(path.read_text(encoding="utf-8")), encoding="utf-8")
        _save_models(source)
        root = Path(__file__).parents[2]
        paths = os.pathsep.join([str(root / "src"), str(root), str(root / "tests" / "slow")])
        settings = {"HF_HUB_OFFLINE": "1", "PEFT_SUITE": "short" if short else "", "SMOA_SPECTRUM_CACHE": "off"}
        environment = os.environ | {"PYTHONPATH": paths} | settings
        ignored = [option for warning in IGNORED for option in ("-W", f"ignore:{warning}")]
        options = ["-p", "peft_suite", "-p", "no:cacheprovider", "-o", "addopts=", "-q", *ignored, *arguments]
        files = [file for file in FILES if not short or any(part in file for part in SHORT["files"])]
        command = [sys.executable, "-m", "pytest", *options, *(f"tests/{file}" for file in files)]
        return subprocess.run(command, cwd=source, env=environment, check=False).returncode


def _download(folder: Path) -> Path:
    """The unpacked source distribution of the installed PEFT."""
    # setuptools, which a build of its own would fetch first, is here with torch
    wanted = ["--no-deps", "--no-build-isolation", "--no-binary", "peft", f"peft=={peft.__version__}"]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "-d", str(folder), *wanted], check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # since 3.11.4
    return folder / archive.name.removesuffix(".tar.gz")


def _as_smoas(text: str) -> str:
    """A file of PEFT's tests, for SMoA."""
    for old, new in NAMES.items():
        text = re.sub(old, new, text)
    for old, new in EDITS.items():
        text = text.replace(old, new)
    return text


def _save_models(folder: Path) -> None:
    """Save a random model or adapter under the name of each one on the Hub that the tests load."""
    from smoa import SmoaConfig

    torch.manual_seed(0)
    for names, build in _models().items():
        model = build()
        for name in names.split():
            model.save_pretrained(folder / name)
    base = _models()["peft-internal-testing/tiny-random-OPTForCausalLM"]()
    adapted = peft.get_peft_model(base, SmoaConfig(task_type="CAUSAL_LM"))
    for name in ("tiny-opt-lora-revision", "tiny-OPTForCausalLM-lora"):
        adapted.save_pretrained(folder / "peft-internal-testing" / name)


def _models() -> dict[str, Callable[[], Any]]:
    """Builders of the models by their names on the Hub."""
    from tests.support import tiny

    sizes = {"vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 37, "max_position_embeddings": 512, "initializer_range": 0.1}
    grouped = {**sizes, "num_key_value_heads": 2}

    def of(name: str, head: str, **settings: Any) -> Callable[[], Any]:
        config = getattr(transformers, f"{name}Config")
        return lambda: getattr(transformers, f"{name}{head}")(config(**settings))

    opt = {**sizes, "ffn_dim": 37, "word_embed_proj_dim": 32, "num_hidden_layers": 5}
    deep = {**opt, "num_hidden_layers": 6}
    gpt = {"vocab_size": 1024, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.1}
    bart = {"vocab_size": 1024, "d_model": 32, "max_position_embeddings": 512, "init_std": 0.1}
    bart |= {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in _SIDES.items()}
    mamba = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
    bert = of("Bert", "Model", **sizes)
    return {
        "peft-internal-testing/tiny-random-OPTForCausalLM": of("OPT", "ForCausalLM", **opt),
        "peft-internal-testing/opt-125m": of("OPT", "ForCausalLM", **deep),
        "peft-internal-testing/tiny-random-GPT2LMHeadModel hf-internal-testing/tiny-random-gpt2 "
        "peft-internal-testing/tiny-random-gpt2 gpt2": of("GPT2", "LMHeadModel", **gpt),
        "peft-internal-testing/tiny-random-GPTJForCausalLM": of("GPTJ", "ForCausalLM", **gpt, rotary_dim=4),
        "trl-internal-testing/tiny-random-LlamaForCausalLM hf-internal-testing/tiny-random-LlamaForCausalLM": of(
            "Llama", "ForCausalLM", **grouped
        ),
        "peft-internal-testing/tiny-dummy-qwen2": of("Qwen2", "ForCausalLM", **grouped),
        "hf-internal-testing/tiny-random-MistralForCausalLM": of("Mistral", "ForCausalLM", **grouped),
        "hf-internal-testing/tiny-random-Gemma3ForCausalLM": tiny.gemma3,
        "trl-internal-testing/tiny-Llama4ForCausalLM": lambda: tiny.llama4(num_hidden_layers=2),
        "trl-internal-testing/tiny-GptOssForCausalLM": lambda: tiny.gpt_oss(num_hidden_layers=2),
        "peft-internal-testing/tiny-random-BartForConditionalGeneration": of(
            "Bart", "ForConditionalGeneration", **bart
        ),
        "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": tiny.t5,
        "peft-internal-testing/tiny-random-t5": tiny.t5,
        "peft-internal-testing/tiny-random-BertModel": bert,
        "peft-internal-testing/tiny-random-RobertaModel": of("Roberta", "Model", **sizes),
        "peft-internal-testing/tiny-random-DebertaModel": of("Deberta", "Model", **sizes),
        "peft-internal-testing/tiny-random-DebertaV2Model": of("DebertaV2", "Model", **sizes),
        "peft-internal-testing/tiny-random-BertForSequenceClassification bert-base-uncased": of(
            "Bert", "ForSequenceClassification", **sizes
        ),
        "peft-internal-testing/tiny-random-RobertaForSequenceClassification": of(
            "Roberta", "ForSequenceClassification", **sizes
        ),
        "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": of(
            "Llama", "ForSequenceClassification", **grouped, pad_token_id=0
        ),
        "tiiuae/falcon-mamba-tiny-dev": of("FalconMamba", "ForCausalLM", **mamba, state_size=4),
        "trl-internal-testing/tiny-NemotronHForCausalLM-nano": of(
            *("NemotronH", "ForCausalLM"),
            **mamba,
            layers_block_type=["mamba", "attention"],
            head_dim=8,
            mamba_head_dim=8,
        ),
        "peft-internal-testing/tiny-clip-text-2": of("CLIPText", "Model", **sizes),
    }


_SIDES = {"layers": 2, "attention_heads": 4, "ffn_dim": 37}


def pytest_configure(config: Any) -> None:
    """Give PEFT the names that the tests import."""
    from smoa import SmoaConfig, SmoaModel
    from smoa.experts import ParamWrapper
    from smoa.layer import SmoaLayer

    original = SmoaConfig.__init__

    @wraps(original)
    def with_names_of_lora(self: Any, *args: Any, init_lora_weights: Any = None, **settings: Any) -> None:
        if init_lora_weights is not None:
            settings["init_weights"] = init_lora_weights
        original(self, *args, **settings)

    SmoaConfig.__init__ = with_names_of_lora  # type: ignore[method-assign]
    found: Any = peft
    for module in (found, found.tuners, found.tuners.lora, found.tuners.lora.layer, found.tuners.lora.config):
        module.SmoaConfig, module.SmoaModel, module.SmoaLayer = SmoaConfig, SmoaModel, SmoaLayer
        module.ParamWrapper = ParamWrapper
    config.left_out = Counter()


def pytest_collectstart(collector: Any) -> None:
    """Keep SMoA's cases in the lists of a test module, each once, before its tests are collected."""
    from smoa import SmoaConfig

    if isinstance(collector, pytest.Class | pytest.Module):
        short = os.environ.get("PEFT_SUITE") == "short"
        for name in [name for name in vars(collector.obj) if name in LISTS or name.endswith("MODELS_TO_TEST")]:
            cases: list[Any] = getattr(collector.obj, name)
            if name in LISTS:
                cases[:] = {str(case): case for case in cases if any(part is SmoaConfig for part in case)}.values()
            if short:
                wanted = SHORT.get(name, ())
                cases[:] = [case for case in cases if case[0] in wanted] if wanted else cases[:1]


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Keep the tests of SMoA, less those in `LEFT_OUT`; with --short, one of each kind of model."""
    kept, once = [], {(item.nodeid.partition("[")[0], str(_values(item))): item for item in items if _is_ours(item)}
    for item in once.values():
        reason = next((why for pattern, why in LEFT_OUT.items() if re.search(pattern, item.nodeid)), None)
        if reason is None:
            kept.append(item)
        else:
            config.left_out[reason] += 1
    items[:] = kept


def _is_ours(item: Any) -> bool:
    """Whether a test is of SMoA's config: it is among the values of its case, or in its source or that of its class."""
    from peft import PeftConfig

    from smoa import SmoaConfig

    configs = [
        v for v in _values(item) if isinstance(v, PeftConfig) or (isinstance(v, type) and issubclass(v, PeftConfig))
    ]
    if configs:
        return any(v is SmoaConfig or isinstance(v, SmoaConfig) for v in configs)
    for owner in (item.function, item.cls):
        if owner is not None and (named := _configs_in(owner)):
            return "SmoaConfig" in named
    return False


@cache
def _configs_in(owner: Any) -> set[str]:
    return set(re.findall(r"\b\w+Config\b", inspect.getsource(owner)))


def _values(item: Any) -> list[Any]:
    case = getattr(item, "callspec", None)
    return [] if case is None else list(case.params.values())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: Any) -> Iterator[None]:
    """Leave out a test that sets what LoRA alone has."""
    try:
        return (yield)
    except Exception as error:
        found = ONLY_LORA.search(str(error))
        if found is None:
            raise
        item.config.left_out[f"sets {found[1] or found[2]}, which LoRA alone has"] += 1
        pytest.skip("LoRA alone")


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    """Print the table, in Markdown."""
    alone = sum(count for why, count in config.left_out.items() if why.endswith("LoRA alone has"))
    found = {name: len(terminalreporter.stats.get(name, ())) for name in ("passed", "failed", "error", "skipped")}
    found["skipped"] -= alone  # by PEFT: what does not apply to a method, a model or this machine
    rows = [*found.items(), *sorted((f"left out: {why}", count) for why, count in config.left_out.items())]
    terminalreporter.write_line("\n| tests | number |\n|---|---|")
    for name, count in rows:
        terminalreporter.write_line(f"| {name} | {count} |")


if __name__ == "__main__":
    sys.exit(main())
