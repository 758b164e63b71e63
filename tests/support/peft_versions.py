"""What tests can't expect of some versions of PEFT and transformers: docs/versions.md has the list."""

import re

import peft
import pytest
import transformers
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from peft.utils import save_and_load
from transformers import T5ForConditionalGeneration, TrainingArguments
from transformers.integrations.peft import MIN_PEFT_VERSION

CONVERTS = "test_convert_|merged_model_and_lora_say|a_lora_that_lost_much|merged_and_converted"
SKIPPED = [
    ("<0.19", CONVERTS, "has no convert_to_lora"),
    ("<0.19", r"output_layer_that_was_tied_gets_a_weight_of_its_own\[config1", "says tied after a merge that unties"),
    ("<0.20", "test_adapters_that_came_and_went", "lets one adapter of a model have target_parameters"),
    ("<0.20", "peft_hira|Llama-2-7B HiRA", "has no HiRA"),
    ("<0.20", "test_an_adapter_is_loaded_into_an_injected_model", "looks for names of a PeftModel there, of LoRA too"),
    ("<0.20", "test_a_list_may_stand_for_a_tuple_a_block_for_a_class", "has no setting that is a class"),
    ("<0.21", "test_a_second_adapter_of_the_same_name_is_refused", "replaces an adapter of the same name"),
]
"""(versions of PEFT, regular expression of test names, reason)."""
OF_NEWER_PEFT = {"gralora": "0.19", "hira": "0.20"}
"""Methods that have a color in charts and that the oldest PEFT lacks, and the PEFT that has them."""
NEEDS_TRANSFORMERS_OWN_METHODS = (
    r"own_adapter_interface_takes_smoa|test_an_example_runs\[(transformers_add_adapter|sentence_embeddings)"
)
"""Tests of `model.add_adapter`, for which transformers demands a newer PEFT from release to release."""
OF_T5 = r"(generates_what_each_adapter_generates_alone|the_merged_model_gives_the_adapters_outputs)\[t5"
"""Tests of T5 with a task type, of which PEFT up to 0.21.0 calls a method that transformers dropped in 5.18."""
NEEDS_TRANSFORMERS_LOADER = (
    r"by_transformers|test_transformers_loads|test_a_refused_file_leaves|test_an_adapter_of_the_hub_comes|"
    "test_the_revision_that_is_asked|test_an_adapter_of_another_method_costs_no_request"
)
"""Tests of `model.load_adapter`, which from transformers 5.6 on imports what PEFT 0.18 does not have."""
SAMPLES_BY_STRATEGY = r"test_a_ready_config_is_valid.*\[demo|refused\[train_sampling_strategy"
"""Tests of a training argument that transformers had as `group_by_length` in 5.0."""
WHOLE_MODULES = "test_transformers_loads_modules_that_were_trained_whole"
"""A test of `model.load_adapter`, which before transformers 5.19 leaves out `modules_to_save`, of LoRA too."""
IGNORED = [
    ("<0.19", "ignore:Unsupported layer type:UserWarning"),  # of LoRA, for experts
    ("<0.19", "ignore:Already found a `peft_config` attribute:UserWarning"),  # `unload` leaves it on the model
    ("<0.20", "ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning"),  # not from 0.20 on
]
"""(versions of PEFT, warning)."""


def installed() -> Version:
    """The installed PEFT, a development version as the release that it leads to."""
    return Version(Version(peft.__version__).base_version)


def adapt_to_peft(items: list[pytest.Item]) -> None:
    """Skip what the installed PEFT can't do, and ignore warnings of its own."""
    version = installed()
    demand = (f"<{MIN_PEFT_VERSION}", NEEDS_TRANSFORMERS_OWN_METHODS, "is too old for this transformers' add_adapter")
    dropped = not hasattr(T5ForConditionalGeneration, "_prepare_encoder_decoder_kwargs_for_generation")
    t5 = [("<=0.21.0", OF_T5, "calls a method of T5 that this transformers dropped")] if dropped else []
    lacking = not hasattr(save_and_load, "_maybe_shard_state_dict_for_tp") and version in SpecifierSet(demand[0])
    loader = [("<0.19", NEEDS_TRANSFORMERS_LOADER, "lacks what this load_adapter imports")] if lacking else []
    samples = [("", SAMPLES_BY_STRATEGY, "is beside a transformers without train_sampling_strategy")]
    samples = [] if hasattr(TrainingArguments, "train_sampling_strategy") else samples
    is_old = Version(transformers.__version__) < Version("5.19")
    whole = [("", WHOLE_MODULES, "is beside a transformers that loads no modules_to_save")] if is_old else []
    for versions, names, reason in [*SKIPPED, demand, *t5, *loader, *samples, *whole]:
        for item in items if version in SpecifierSet(versions) else []:
            if re.search(names, item.name):
                item.add_marker(pytest.mark.skip(reason=f"PEFT {versions} {reason}"))
    for versions, warning in IGNORED:
        for item in items if version in SpecifierSet(versions) else []:
            item.add_marker(pytest.mark.filterwarnings(warning))
