"""Each call has its own names, in inference and training, in every thread, and in what a checkpoint computes again."""

import copy
import functools
import threading
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.utils.checkpoint import CheckpointError
from transformers import LlamaConfig, LlamaForCausalLM

from smoa import SmoaConfig
from smoa.kernels.plan import RowsBySlot
from tests.support import tiny
from tests.support.layers import assert_close
from tests.support.tiny import add_adapter

KINDS = [{"r": 4, "num_blocks": 2}, {"r": 6, "num_blocks": 3, "modulation": "none"}, {"r": 3, "num_blocks": 3}]
NAMES = ["a0", "__base__", "a2", "a1", "a0", "a4"]
"""Nobody asks a3."""


def gang(count: int = 5, reentrant: bool | None = None, **settings: Any) -> Any:
    """A small Llama in training with adapters of three kinds, checkpointed if `reentrant` is given."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32)).double()
    given = {"target_modules": "all-linear", "init_weights": False} | settings
    model: Any = get_peft_model(base, SmoaConfig(**KINDS[0] | given), "a0", autocast_adapter_dtype=False)
    for number in range(1, count):
        config = SmoaConfig(**KINDS[number % 3] | given)
        model.add_adapter(f"a{number}", config, autocast_adapter_dtype=False)
    if reentrant is not None:
        base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        base.enable_input_require_grads()
    model.set_requires_grad([f"a{number}" for number in range(count)])
    return model.train()


def ids(rows: int = len(NAMES), tokens: int = 5) -> Tensor:
    return torch.randint(3, 32, (rows, tokens), generator=torch.Generator().manual_seed(1))


def loss_of(model: Any, names: list[str], tokens: int = 5) -> Tensor:
    loss: Tensor = model(input_ids=ids(len(names), tokens), adapter_names=names).logits.square().sum()
    return loss


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@functools.cache
def each_alone(tokens: int = 5) -> dict[str, Tensor]:
    """The gradients of each adapter that is alone with its rows."""
    model, found = gang(), {}
    for name in sorted({*NAMES} - {"__base__"}):
        model.set_adapter(name)
        own = torch.tensor([row for row, other in enumerate(NAMES) if other == name])
        model(input_ids=ids(tokens=tokens)[own]).logits.square().sum().backward()
        found |= gradients(model)
    return found


def assert_those_of_each_alone(found: dict[str, Tensor], tokens: int = 5) -> None:
    assert found.keys() == each_alone(tokens).keys()
    for name, gradient in found.items():
        assert_close(gradient, each_alone(tokens)[name])


# training


def test_a_plan_is_of_so_many_tokens() -> None:
    rows = RowsBySlot([0, 1])
    plans = [rows.plan(frozenset({(0, 0), (1, 1)}), 2, tokens, torch.device("cpu")) for tokens in (1000, 1, 1000)]
    assert [[part.forms for part in plan.parts] for plan in plans] == [[True, True], [False], [True, True]]
    assert plans[0] is plans[2]


@pytest.mark.parametrize("tokens", [5, 140])  # for 140 it pays to form ΔW
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_each_adapter_gets_its_own_gradients_and_one_without_rows_none(reentrant: bool | None, tokens: int) -> None:
    model = gang(reentrant=reentrant)
    loss_of(model, NAMES, tokens).backward()
    assert_those_of_each_alone(gradients(model), tokens)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_backward_may_run_in_another_thread_and_after_another_forward(reentrant: bool | None) -> None:
    model = gang(reentrant=reentrant)
    loss = loss_of(model, NAMES)
    loss_of(model, NAMES[::-1])
    model(input_ids=ids())
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert_those_of_each_alone(gradients(model))


def test_a_model_that_is_checkpointed_anew_or_no_more_takes_the_names_along_too() -> None:
    model = gang(reentrant=True)
    for change in (lambda: None, model.base_model.model.gradient_checkpointing_disable):
        change()
        loss_of(model, NAMES).backward()
        assert_those_of_each_alone(gradients(model))
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    loss_of(model, NAMES).backward()
    assert_those_of_each_alone(gradients(model))
    model.set_adapter("a1")
    model(input_ids=ids()).logits.square().sum().backward()  # without names it does what it did
    assert all(".a1." in name for name in gradients(model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_takes_the_names_along_in_whatever_mode_the_model_is(reentrant: bool) -> None:
    model = gang(reentrant=reentrant).eval()
    for layer in model.base_model.model.model.layers:
        layer.training = True  # what transformers asks before it checkpoints
    loss_of(model, NAMES).backward()
    assert_those_of_each_alone(gradients(model))


@pytest.mark.parametrize(
    "names", [NAMES, ["a0"] * 6, ["a1"] * 6, ["a1"] * 3 + ["a4"] * 3, ["a2"] * 5 + ["__base__"], ["__base__"] * 6]
)
@pytest.mark.parametrize(("reentrant", "error"), [(True, ValueError), (False, CheckpointError)])
def test_a_checkpoint_that_would_lose_the_names_is_an_error(
    names: list[str], reentrant: bool, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smoa.adapter_names.take_names_along", lambda model: None)  # as if it were another's
    for tokens in (1, 5, 140):
        model = gang(reentrant=reentrant)
        with pytest.raises(error, match="checkpoint"):
            loss_of(model, names, tokens).backward()


@pytest.mark.parametrize("r", [2, 4])  # at rank 1 of a block inference never forms ΔW
def test_a_checkpoint_draws_the_same_dropout_again(r: int) -> None:
    found = []
    for reentrant in (None, False, True):
        model = gang(2, reentrant, smoa_dropout=0.5, num_blocks=2, r=r, modulation="hadamard")
        torch.manual_seed(1)
        loss_of(model, ["a0", "a1", "a0", "a1"], 140).backward()
        found.append(gradients(model))
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, gradient in other.items():
            assert_close(gradient, found[0][name])


def test_a_checkpoint_takes_the_same_route_again(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, plan = list[Any](), RowsBySlot.plan
    monkeypatch.setattr(RowsBySlot, "plan", lambda *args: taken.append(plan(*args)) or taken[-1])
    model = gang(2, True, num_blocks=2, r=2, modulation="hadamard")
    loss = loss_of(model, ["a0", "a1", "a0", "a1"], 140)
    first = set(taken)
    taken.clear()
    loss.backward()
    assert set(taken) == first


def test_a_backward_within_a_call_with_names_computes_a_plain_call_again_without_them() -> None:
    model = gang(2, reentrant=True)
    loss_of(model, ["a0", "a1"])  # its checkpoints take names along from now on
    model.zero_grad()
    model(input_ids=ids()).logits.square().sum().backward()
    expected = gradients(model)
    loss = model(input_ids=ids()).logits.square().sum()
    handle = model.base_model.model.lm_head.register_forward_hook(lambda *_: loss.backward())
    with torch.no_grad():
        model(input_ids=ids(2), adapter_names=["a1", "a1"])
    handle.remove()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert_close(gradient, expected[name])


def test_autocast_multiplies_a_mixed_batch_in_its_dtype() -> None:
    model, names = gang().float(), [*NAMES[:4]]
    loss_of(model, names).backward()
    exact = gradients(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=ids(len(names)), adapter_names=names).logits.float().square().sum()
    loss.backward()
    for name, gradient in gradients(model).items():
        assert (gradient - exact[name]).norm() < 0.1 * exact[name].norm()  # 0.085 on CPUs without its instructions


def test_modules_trained_tokens_embeddings_and_heads_train_beside_the_factors() -> None:
    settings = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"], "modulation": "hadamard"}
    expected, names = {}, ["a1", "a0", "a0"]
    for name in ("a0", "a1"):
        model = gang(2, **settings)
        model.set_adapter(name)
        own = torch.tensor([row for row, other in enumerate(names) if other == name])
        model(input_ids=ids(3)[own]).logits.square().sum().backward()
        expected |= gradients(model)
    model = gang(2, **settings)
    for wrapper in (model.base_model.model.lm_head,):
        wrapper.requires_grad_(True)
        wrapper.original_module.requires_grad_(False)
    loss_of(model, names).backward()
    found = gradients(model)
    assert any("modules_to_save" in name for name in found)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert_close(gradient, expected[name])


# threads


def test_a_plain_forward_beside_and_inside_a_generate_with_names_takes_the_active_adapter() -> None:
    model = gang(3).eval()
    model.set_adapter("a2")
    x, found, inside = ids(2, 3), list[Tensor](), threading.Event()
    with torch.no_grad():
        expected = model(input_ids=x).logits

    def during(tokens: Tensor, scores: Tensor) -> Tensor:
        found.append(model(input_ids=x).logits)
        inside.set()
        return scores

    def stream() -> None:
        settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        model.generate(input_ids=x, adapter_names=["a0", "a1"], logits_processor=[during], **settings)

    thread = threading.Thread(target=stream)
    thread.start()
    inside.wait(60)
    with torch.no_grad():
        while thread.is_alive():
            found.append(model(input_ids=x).logits)
    thread.join()
    assert len(found) > 12
    for logits in found:
        assert_close(logits, expected)


@pytest.mark.parametrize("beams", [1, 3])
def test_adapters_with_one_number_of_blocks_and_other_ranks_generate_in_one_batch(beams: int) -> None:
    model: Any = gang(1, num_blocks=2, r=4).eval()
    for name, r in (("a1", 5), ("a2", 8), ("a3", 7)):
        add_adapter(model, name, r=r, num_blocks=2, target_modules="all-linear")
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
    names = ["a0", "a1", "a2", "a3"]
    mixed = model.generate(input_ids=ids(4), adapter_names=names, **settings)
    for row, name in enumerate(names):
        model.set_adapter(name)
        assert torch.equal(mixed[row], model.generate(input_ids=ids(4)[row : row + 1], **settings)[0])


# what is refused


@torch.no_grad()
def test_adapted_experts_are_those_of_no_adapter_that_a_batch_names() -> None:
    settings = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"], "init_weights": False}
    model: Any = get_peft_model(tiny.build("qwen3_moe"), SmoaConfig(r=4, num_blocks=2, **settings))
    add_adapter(model.eval(), "other", target_modules=["q_proj"])
    with pytest.raises(ValueError, match="'default' has adapted experts"):
        model(input_ids=ids(2), adapter_names=["default", "other"])
    mixed = model(input_ids=ids(2), adapter_names=["other", "__base__"]).logits
    model.set_adapter("other")
    assert_close(mixed[0], model(input_ids=ids(2)).logits[0])


@torch.no_grad()
def test_a_module_that_only_some_adapters_save_is_the_base_models_for_the_others() -> None:
    model = gang(1, target_modules=["q_proj"], modules_to_save=["lm_head"]).eval()
    add_adapter(model, "plain", target_modules=["q_proj"])
    model.base_model.model.lm_head.modules_to_save["a0"].weight.mul_(2)
    x, alone = ids(2), {}
    for name in ("plain", "a0"):
        model.set_adapter(name)
        alone[name] = model(input_ids=x).logits
    for name in ("a0", "plain"):
        model.set_adapter(name)
        if model.base_model.model.lm_head.disable_adapters:  # as PEFT 0.18 leaves it for "plain"
            with pytest.raises(
                ValueError, match=r"the active adapter has no ModulesToSaveWrapper.*\['a0'\].*set_adapter"
            ):
                model(input_ids=x, adapter_names=["plain", "a0"])
            continue
        mixed = model(input_ids=x, adapter_names=["plain", "a0"]).logits
        assert_close(mixed[0], alone["plain"][0])
        assert_close(mixed[1], alone["a0"][1])
    with model.disable_adapter():
        assert_close(model(input_ids=x, adapter_names=["plain", "a0"]).logits, model(input_ids=x).logits)


def test_names_may_come_one_by_one() -> None:
    model = gang(2).eval()
    with torch.no_grad():
        given = model(input_ids=ids(2), adapter_names=(name for name in ("a0", "a1"))).logits
        assert_close(given, model(input_ids=ids(2), adapter_names=["a0", "a1"]).logits)


@pytest.mark.parametrize("names", ["a0", [None, "a0"], [0, 1], []])
def test_names_that_are_no_list_of_names_are_refused(names: Any) -> None:
    with pytest.raises(ValueError, match="adapter"):
        gang(1).eval()(input_ids=ids(2), adapter_names=names)


def test_a_copy_made_in_a_call_with_names_has_none(tmp_path: Any) -> None:
    model, made = gang(2).eval(), list[PeftModel]()
    handle = model.base_model.model.model.layers[0].register_forward_hook(lambda *_: made.append(copy.deepcopy(model)))
    with torch.no_grad():
        loss_of(model, ["a1", "a1"])
        handle.remove()
        for layer in made[0].base_model.model.model.layers:
            layer._forward_hooks.clear()
        assert_close(made[0](input_ids=ids(2)).logits, model(input_ids=ids(2)).logits)
    torch.save(model, tmp_path / "model")
