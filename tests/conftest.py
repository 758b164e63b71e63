"""What every test may ask for. Nothing is downloaded: models are built from configs (tests/support/tiny.py)."""

import gc
import os
import re
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

# Before transformers is imported: a test that would reach for a hub fails at once instead of waiting for it.
os.environ["HF_HUB_OFFLINE"] = "1"
# No test reads what another one, or the one who runs them, has kept. What tests start inherits it.
os.environ["SMOA_SPECTRUM_CACHE"] = "off"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--renew", action="store_true", help="write whole reports that are compared with approved ones anew"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what the installed PEFT and transformers can't do (docs/what-works.md), and ignore warnings of their own."""
    import peft
    from packaging.version import Version
    from peft.utils import save_and_load
    from transformers import T5ForConditionalGeneration, TrainingArguments
    from transformers import __version__ as transformers
    from transformers.integrations.peft import MIN_PEFT_VERSION

    own = Version(Version(peft.__version__).base_version)
    old = {minor: own < Version(f"0.{minor}") for minor in (19, 20)}
    too_old = own < Version(MIN_PEFT_VERSION)
    lacks_loader = old[19] and too_old and not hasattr(save_and_load, "_maybe_shard_state_dict_for_tp")
    new_t5 = not hasattr(T5ForConditionalGeneration, "_prepare_encoder_decoder_kwargs_for_generation")
    converts = "test_convert_|merged_model_and_lora_say|a_lora_that_lost_much"
    skipped = {
        converts: (old[19], "PEFT < 0.19 has no convert_to_lora"),
        r"output_layer_that_was_tied.*\[config1": (old[19], "PEFT < 0.19 says tied after a merge that unties"),
        "adapters_that_came_and_went": (old[20], "PEFT < 0.20 lets one adapter of a model have target_parameters"),
        "peft_hira|Llama-2-7B HiRA": (old[20], "PEFT < 0.20 has no HiRA"),
        "loaded_into_an_injected_model": (old[20], "PEFT < 0.20 looks for names of a PeftModel there, of LoRA too"),
        "a_list_may_stand_for_a_tuple": (old[20], "PEFT < 0.20 has no setting that is a class"),
        r"own_adapter_interface|test_an_example_runs\[(transformers_add_adapter|sentence_embeddings)": (
            too_old,
            f"transformers demands PEFT {MIN_PEFT_VERSION} for its own model.add_adapter",
        ),
        r"what_each_adapter_generates_alone\[t5|the_merged_model_gives_the_adapters_outputs\[t5": (
            new_t5 and own <= Version("0.21.0"),
            "PEFT calls a method of T5 that this transformers dropped",
        ),
        "by_transformers|test_transformers_loads": (lacks_loader, "PEFT < 0.19 lacks what this load_adapter imports"),
        r"test_a_ready_config_is_valid.*\[demo": (
            not hasattr(TrainingArguments, "train_sampling_strategy"),
            "this transformers calls it group_by_length",
        ),
        "test_transformers_loads_modules": (
            Version(transformers) < Version("5.19"),
            "this transformers loads no modules_to_save, of LoRA neither",
        ),
    }
    ignored = {
        "ignore:Unsupported layer type:UserWarning": old[19],  # of LoRA, for experts
        "ignore:Already found a `peft_config` attribute:UserWarning": old[19],  # `unload` leaves it on the model
        "ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning": old[20],
    }
    for item in items:
        for names, (lacking, reason) in skipped.items():
            if lacking and re.search(names, item.name):
                item.add_marker(pytest.mark.skip(reason=reason))
        for warning in (each for each, applies in ignored.items() if applies):
            item.add_marker(pytest.mark.filterwarnings(warning))


def pytest_collection_finish() -> None:
    """What is imported stays: a collection of garbage, as each training ends with one, needs not walk through it. And
    models this small lose more to starting threads than they gain from them."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test draws the same numbers, alone or among others."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _float32_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose config names no dtype has the same one on every CPU."""
    if config := sys.modules.get("smoa_lab.config.run"):  # a test of the library needs nothing of the lab
        monkeypatch.setattr(config, "cpu_multiplies_bfloat16", lambda: False)


@pytest.fixture(autouse=True)
def _route_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test chooses (`take_route`) holds for no other one."""
    from smoa.conv import Convolution
    from smoa.embedding import Embedding
    from smoa.kernels import blocks as by_blocks
    from smoa.kernels import one_product

    monkeypatch.setattr(by_blocks, "FEW_ENTRIES", 0)  # the least of tensors is in a buffer that the next one overwrites
    monkeypatch.setattr(one_product, "MIN_TOKENS", one_product.MIN_TOKENS)
    for kind in (Convolution, Embedding):
        monkeypatch.setattr(kind, "fits_one_product", kind.fits_one_product)


@pytest.fixture
def multiplies_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with instructions for bfloat16. On others smoa multiplies in float32: the weights are the merged ones, and
    the outputs differ by a rounding."""
    import torch

    own = SimpleNamespace(_is_mkldnn_bf16_supported=lambda: True, _is_mkldnn_fp16_supported=lambda: False)
    monkeypatch.setitem(torch.ops.__dict__, "mkldnn", own)


@pytest.fixture(params=["whole", "cut"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of blocks as a GPU multiplies them, and cut into the smallest pieces, of 16 rows, that are copied."""
    from smoa.kernels import blocks as by_blocks
    from smoa.kernels import one_product

    monkeypatch.setattr(by_blocks, "PIECE", 1 << 60 if request.param == "whole" else 1)
    monkeypatch.setattr(by_blocks, "_pieces_of", by_blocks._pieces_of.__wrapped__)  # without its cache
    monkeypatch.setattr(by_blocks, "LARGE_BLOCK", 1 << 60 if request.param == "whole" else 0)
    monkeypatch.setattr(one_product, "PIECE", 1 << 60 if request.param == "whole" else 1)


@pytest.fixture(params=["llama", "gemma3", "gpt2", "bert", "t5"])
def family(request: pytest.FixtureRequest) -> str:
    """Each family of models in turn."""
    name: str = request.param
    return name


@pytest.fixture
def tiny_llama() -> Any:
    """A decoder with grouped-query attention."""
    from tests.support import tiny

    return tiny.build("llama")


@pytest.fixture
def tiny_gemma3() -> Any:
    """A decoder with one key-value head and tied embeddings."""
    from tests.support import tiny

    return tiny.build("gemma3")


@pytest.fixture(scope="module")
def quick_pictures() -> Iterator[None]:
    """The file of a picture is empty: drawing one takes longer than training a tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("training.train", "study.report"):
            patch.setattr(f"smoa_lab.{module}.save_picture", lambda chart, file: file.touch())
        yield
