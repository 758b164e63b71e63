import copy
import gc
import inspect
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn

from smoa import ConfigError, SmoaConfig, keep_in_generate, kept
from smoa.generation import computing_merged, keeping
from smoa.kernels.blocks import Deltas, block_deltas, diagonal_blocks
from smoa.kernels.factors import BlockRun
from smoa.kernels.one_product import Update
from smoa.partition import Blocks
from tests.support import tiny
from tests.support.layers import Wrapper, assert_close, layers_of, take_route
from tests.support.tiny import SETTINGS, adapted, add_adapter

TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "gemma3": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
TARGETS = {"gpt2": ["c_attn"], "t5": ["q", "v"]}


def model_of(family: str = "llama", dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    settings = {"task_type": TASKS[family], "r": 5, "alpha": 3.0, "num_blocks": 3} | config
    settings["target_modules"] = TARGETS.get(family, ["q_proj", "v_proj", "up_proj"])
    return adapted(tiny.build(family, dtype), **settings)


def prompts() -> Tensor:
    return tiny.batch("llama", size=2, length=5)["input_ids"].clamp_min(3)


def answer(model: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Tokens and logits of six greedy steps."""
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | options
    found = model.generate(input_ids=prompts(), output_logits=True, return_dict_in_generate=True, **settings)
    return found.sequences, torch.stack(found.logits)


def plain_answer(model: Any, **options: Any) -> tuple[Tensor, Tensor]:
    keep_in_generate(model, "off")
    found = answer(model, **options)
    keep_in_generate(model, "blocks")
    return found


class Spy:
    """What was computed: the blocks that layers keep, and the updates applied without."""

    def __init__(self) -> None:
        self.kept: list[weakref.ref[Tensor]] = []
        self.fills = 0
        self.plain = 0


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    seen = Spy()
    fill, apply, fused, few = block_deltas, Update.apply, Update.apply_with_base, Update.apply_to_few

    def of(*args: Any) -> Deltas:
        found = fill(*args)
        seen.fills += 1
        seen.kept += [weakref.ref(entries) for _, entries in found]
        return found

    def counted(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            seen.plain += 1
            return original(*args)

        return call

    monkeypatch.setattr(kept, "block_deltas", of)
    monkeypatch.setattr(Update, "apply", counted(apply))
    monkeypatch.setattr(Update, "apply_with_base", counted(fused))
    monkeypatch.setattr(Update, "apply_to_few", counted(few))
    return seen


def assert_nothing_kept(spy: Spy) -> None:
    assert not [entries for entries in spy.kept if entries() is not None]


class During:
    """A logits processor that calls a function before one of the tokens."""

    def __init__(self, call: Callable[[], Any], token: int = 2) -> None:
        self.call, self.token, self.seen = call, token, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen += 1
        if self.seen == self.token + 1:
            self.call()
        return scores


# the same text


@pytest.mark.parametrize(
    ("family", "partition"),
    [("llama", "contiguous"), ("gpt2", "spectral"), ("t5", "spectral")],
)
def test_in_float32_logits_are_those_of_the_plain_route_to_the_last_bit(
    family: str, partition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smoa.kernels.shared.FEW_PRODUCTS", 0)  # the plain route forms ΔW too
    model = model_of(family, partition=partition)
    take_route("apart")  # the same products
    (tokens, logits), (plain_tokens, plain_logits) = answer(model), plain_answer(model)
    assert torch.equal(tokens, plain_tokens)
    assert torch.equal(logits, plain_logits)


DOORS: dict[str, Callable[[], Any]] = {
    "a task": model_of,
    "no task": lambda: adapted(tiny.build("llama"), r=5, num_blocks=3),
    "the base model": lambda: model_of().get_base_model(),
    "injected": lambda: inject_adapter_in_model(SmoaConfig(**SETTINGS, init_weights=False), tiny.build("llama")),
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_to_generate_computes_each_layers_blocks_once(door: str, spy: Spy) -> None:
    model = DOORS[door]()
    for calls in (1, 2):
        answer(model)
        assert spy.fills == calls * len(layers_of(model))
        assert_nothing_kept(spy)
    assert spy.plain == 0


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 2}, {"use_cache": False}, {"do_sample": True}, {"cache_implementation": "static"}],
    ids=str,
)
def test_every_way_of_decoding_does(options: dict[str, Any], spy: Spy) -> None:
    model = model_of()
    model.generate(input_ids=prompts(), max_new_tokens=6, pad_token_id=0, **options)
    assert (spy.fills, spy.plain) == (len(layers_of(model)), 0)
    assert_nothing_kept(spy)


# several adapters


def two_adapters(**config: Any) -> Any:
    model = model_of(**config)
    add_adapter(model, "other", r=4, num_blocks=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return model


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_a_mixed_batch_forms_no_update_and_gathers_the_blocks_of_each_weight_once(
    options: dict[str, int], spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered: list[Tensor] = []

    def gather(blocks: Blocks, run: BlockRun, anchor: Tensor) -> Tensor:
        gathered.append(diagonal_blocks(blocks, run, anchor))
        return gathered[-1]

    monkeypatch.setattr("smoa.kernels.shared.diagonal_blocks", gather)
    model = two_adapters()
    names = {"adapter_names": ["default", "other"]}
    tokens = model.generate(input_ids=prompts()[:, :4], max_new_tokens=5, pad_token_id=0, **names, **options)
    once = len(gathered)
    assert (spy.fills, spy.plain) == (0, 0)
    keep_in_generate(model, "off")
    off = model.generate(input_ids=prompts()[:, :4], max_new_tokens=5, pad_token_id=0, **names, **options)
    assert torch.equal(tokens, off)
    assert len(gathered) - once > 2 * once
    assert_nothing_kept(spy)


def test_two_active_adapters_are_both_kept(spy: Spy) -> None:
    model = two_adapters()
    model.base_model.set_adapter(["default", "other"])
    tokens, logits = answer(model)
    assert (spy.fills, spy.plain) == (6 + 4, 0)
    plain_tokens, plain_logits = plain_answer(model)
    assert torch.equal(tokens, plain_tokens)
    assert_close(logits, plain_logits)


# what changes


CHANGES: dict[str, Callable[[Any], Any]] = {
    "set_adapter": lambda model: model.set_adapter("other"),
    "merge": lambda model: model.merge_adapter(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_while_it_generates_is_seen_then_and_in_the_next_call(change: str, spy: Spy) -> None:
    found, original = [], two_adapters()
    for choice in ("blocks", "off"):
        model = copy.deepcopy(original)
        keep_in_generate(model, choice)  # type: ignore[arg-type]
        during = answer(model, logits_processor=[During(lambda model=model: CHANGES[change](model))])
        found.append((*during, *answer(model)))
        assert_nothing_kept(spy)
    own, plain = found
    assert torch.equal(own[0], plain[0])
    for one, other in zip(own[1:], plain[1:], strict=True):
        assert_close(one, other, torch.float32)


@pytest.mark.parametrize("unload", ["unload", "merge_and_unload"])
def test_an_unloaded_model_generates_as_its_class_does(unload: str, spy: Spy) -> None:
    model = model_of()
    base = model.get_base_model()
    getattr(model, unload)()
    assert "generate" not in base.__dict__
    answer(base)
    assert (spy.fills, spy.plain) == (0, 0)


def test_the_method_is_pickled_by_its_place_in_the_class() -> None:
    kind = type(model_of().get_base_model())
    assert pickle.loads(pickle.dumps(kind.generate)) is kind.generate


# how it ends


def test_an_exception_frees_everything(spy: Spy) -> None:
    model = model_of()
    with pytest.raises(ZeroDivisionError):
        answer(model, logits_processor=[During(lambda: 1 / 0)])
    assert spy.fills
    assert_nothing_kept(spy)
    answer(model)


def test_threads_may_generate_at_once(spy: Spy) -> None:
    model = model_of()
    expected, _ = plain_answer(model)
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(answer(model)[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(tokens, expected) for tokens in found)
    assert_nothing_kept(spy)


def test_if_memory_runs_out_it_warns_once_and_goes_on_without(spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    expected, _ = plain_answer(model)
    fill, calls = kept.block_deltas, []

    def of(*args: Any) -> Deltas:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return fill(*args)

    monkeypatch.setattr(kept, "block_deltas", of)
    with pytest.warns(RuntimeWarning, match=r"no memory to keep ΔW.*2\.00 GiB") as warned:
        tokens, _ = answer(model)
    assert len(warned) == 1
    assert len(calls) == 3
    assert_nothing_kept(spy)
    assert torch.equal(tokens, expected)
    answer(model)  # the next call tries again
    assert len(calls) == 3 + len(layers_of(model))


# who keeps nothing


def under_zero_3(model: Any) -> None:
    for layer in layers_of(model):
        layer.stored_weight().ds_id = 1


def off(model: Any) -> None:
    keep_in_generate(model, "off")


@pytest.mark.parametrize("state", [off, under_zero_3])
def test_it_goes_the_plain_route_in_silence(state: Callable[[Any], None], spy: Spy) -> None:
    model = model_of()
    state(model)
    answer(model)
    assert spy.fills == 0
    assert spy.plain == 6 * len(layers_of(model))


def test_flat_shards_keep_nothing() -> None:
    model = model_of()
    for layer in layers_of(model):
        layer.stored_weight().data = layer.stored_weight().data.flatten()
    with keeping(model) as snapshot:
        assert not snapshot.layers


def test_dropout_acts_in_training_mode(spy: Spy) -> None:
    model = model_of(smoa_dropout=0.5)
    answer(model.train())
    assert spy.fills == 0
    assert spy.plain == 6 * len(layers_of(model))
    answer(model.eval())
    assert spy.plain == 6 * len(layers_of(model))


def test_disabled_adapters_are_not_merged() -> None:
    model = model_of()
    keep_in_generate(model, "merged")
    with model.disable_adapter(), computing_merged(model):
        assert not any(layer.merged for layer in layers_of(model))
    with computing_merged(model):
        assert all(layer.merged for layer in layers_of(model))


def test_a_setting_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'all' must be one of 'blocks', 'merged', 'off'"):
        keep_in_generate(model_of(), "all")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no SMoA adapter"):
        keep_in_generate(tiny.build("llama"), "off")


# the method


def test_a_class_that_cannot_generate_gets_no_method() -> None:
    model = inject_adapter_in_model(SmoaConfig(target_modules=["layer"]), Wrapper(nn.Linear(8, 8)))
    assert not hasattr(model, "generate")


def test_the_method_outlives_the_name_of_its_model() -> None:
    config = SmoaConfig(**SETTINGS, init_weights=False)
    generate = inject_adapter_in_model(config, tiny.build("llama")).generate
    gc.collect()
    assert generate(input_ids=prompts(), max_new_tokens=3).shape[1] > prompts().shape[1]


def test_a_generate_of_the_models_own_stays() -> None:
    base = tiny.build("llama")
    base.generate = lambda *args, **kwargs: "its own"
    model = adapted(base, task_type="CAUSAL_LM")
    assert model.generate() == "its own"
    model.unload()
    assert base.generate() == "its own"


def test_what_others_look_up_on_the_method_is_there() -> None:
    base = model_of().get_base_model()
    assert base.generate.__self__ is base
    assert next(iter(inspect.signature(base.generate).parameters)) != "self"


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deep", "pickle"]
)
def test_a_copy_generates_by_itself(copied: Callable[[Any], Any], spy: Spy) -> None:
    model = model_of()
    expected, _ = answer(model)
    other = copied(model)
    del model
    gc.collect()
    spy.fills = 0
    assert torch.equal(answer(other)[0], expected)
    assert (spy.fills, spy.plain) == (len(layers_of(other)), 0)


def test_a_deleted_model_is_freed_at_once() -> None:
    model = model_of()
    answer(model)
    gc.collect()
    base = weakref.ref(model.get_base_model())
    gc.disable()
    try:
        del model
        assert base() is None
    finally:
        gc.enable()
