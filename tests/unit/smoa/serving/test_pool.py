"""A pool gives each row what its adapter alone gives, trains each as if it were alone, and holds many."""

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BitsAndBytesConfig, XLNetConfig, XLNetLMHeadModel

from smoa import AdapterPool
from smoa.errors import AdapterFileError, ConfigError, MergeError, UnsupportedModuleError
from tests.support.adapters import KINDS, base, config, saved
from tests.support.quantized import quantized_model
from tests.support.tolerance import assert_close

ROWS = ["ben", "__base__", "anna", "cleo", "dora", "emil"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("adapters"))


def ids(rows: int = len(ROWS), length: int = 5) -> Tensor:
    return torch.randint(3, 20, (rows, length), generator=torch.Generator().manual_seed(0))


def alone(folder: Path, name: str, row: Tensor, **options: Any) -> Any:
    model = base() if name == "__base__" else PeftModel.from_pretrained(base(), str(folder / name))
    with torch.no_grad():
        return model.generate(input_ids=row, **options) if options else model(input_ids=row).logits


@pytest.mark.parametrize("length", [1, 5, 40])  # for 40 tokens it pays to form ΔW
@torch.no_grad()
def test_each_row_gets_what_its_adapter_alone_gives(folder: Path, length: int) -> None:
    model, batch = base(), ids(length=length)
    pool = AdapterPool(model, folder=folder)
    with pool.use(ROWS):
        found = model(input_ids=batch).logits
    for row, name in enumerate(ROWS):
        assert_close(found[row : row + 1], alone(folder, name, batch[row : row + 1]))
    assert torch.equal(model(input_ids=batch).logits, base()(input_ids=batch).logits)


@torch.no_grad()
def test_a_layers_output_is_left_to_others_who_have_it(folder: Path) -> None:
    model, seen = base(), list[Tensor]()
    layer, expected = model.model.layers[0].self_attn.q_proj, list[Tensor]()
    with AdapterPool(model, folder=folder).use(["anna"] * len(ROWS)):
        logits = model(input_ids=ids()).logits
        layer.register_forward_hook(lambda module, args, output: seen.append(output), prepend=True)
        layer.register_forward_pre_hook(lambda module, args: expected.append(args[0] @ module.weight.T))
        assert_close(model(input_ids=ids()).logits, logits)
    assert_close(seen[0], expected[0])


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_generate_repeats_the_rows(folder: Path, options: dict[str, Any]) -> None:
    model, settings = base(), {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with AdapterPool(model, folder=folder).use(ROWS):
        found = model.generate(input_ids=ids(), **settings, **options)
    for row, name in enumerate(ROWS):
        assert torch.equal(found[row : row + 1], alone(folder, name, ids()[row : row + 1], **settings, **options))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_is_dequantized_once_for_all(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    options = {"quantization_config": BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)}
    model: Any = quantized_model(tmp_path / "base", **options).eval()
    names, expected = ["a", "b"], []
    for name in names:
        (adapter := get_peft_model(model, config(r=4, num_blocks=2))).save_pretrained(tmp_path / name)
        expected.append(adapter(input_ids=ids(2)).logits[len(expected)].detach())
        model = adapter.unload()
    with AdapterPool(model, folder=tmp_path).use(names), torch.no_grad():
        found = model(input_ids=ids(2)).logits
    for row, wanted in enumerate(expected):
        assert (found[row] - wanted).norm() < 2e-2 * wanted.norm()


def test_the_least_recently_used_adapter_leaves(folder: Path) -> None:
    pool = AdapterPool(base(), slots=2, folder=folder)
    for names in (["anna", "ben"], ["anna"]):
        with pool.use(names):
            pass
    pool.load("cleo", folder / "cleo")
    assert pool.names == ["anna", "cleo"]
    with pool.use(["anna"]):
        with pool.use(["cleo"]):
            pass
        pool.load("ben", folder / "ben")  # the older one is in use
        assert pool.names == ["anna", "ben"]
        with pool.use(["ben"]), pytest.raises(ConfigError, match="2 slots are in use"):
            pool.load("dora", folder / "dora")
        with pytest.raises(ConfigError, match="in use"):
            pool.unload("anna")
    with pytest.raises(ConfigError, match=r"3 adapters.*2 slots"), pool.use(["anna", "ben", "dora"]):
        pass
    pool.unload("anna")
    assert pool.names == ["ben"]


def test_what_is_not_saved_never_leaves_by_itself(folder: Path, tmp_path: Path) -> None:
    model = base()
    pool = AdapterPool(model, slots=2, folder=folder)
    pool.add("mine", config())
    pool.load("ben", folder / "ben")
    pool.load("emil", folder / "emil")
    assert pool.names == ["mine", "emil"]
    step = torch.optim.SGD(pool.parameters(), 1e-3)
    with pool.use(["emil", "mine"]):
        model(input_ids=ids(2)).logits.sum().backward()
    step.step()
    with pytest.raises(ConfigError, match=r"no slot for 'anna', since emil, mine would be lost: .*save or unload one"):
        pool.load("anna", folder / "anna")
    pool.save("emil", tmp_path / "emil")
    pool.load("anna", folder / "anna")
    assert pool.names == ["mine", "anna"]
    pool.unload("mine")
    pool.load("ben", folder / "ben")
    pool.load("cleo", folder / "cleo")
    assert pool.names == ["ben", "cleo"]


@pytest.mark.parametrize("case", ["saved before the step", "saved and trained on", "gradients within no_grad"])
def test_an_adapter_that_was_changed_since_its_save_stays(case: str, folder: Path, tmp_path: Path) -> None:
    model = base()
    pool = AdapterPool(model, slots=1, folder=folder)
    pool.load("anna", folder / "anna")
    optimizer = torch.optim.AdamW(pool.parameters(), 1e-3, fused=True)  # which version counters don't notice
    with torch.set_grad_enabled(case != "gradients within no_grad"), pool.use(["anna"]):
        for number in range(2):
            with torch.enable_grad():
                model(input_ids=ids(1)).logits.sum().backward()
            if number == 1 and case == "saved before the step":
                pool.save("anna", tmp_path)
            optimizer.step()
            if number == 0 and case == "saved and trained on":
                pool.save("anna", tmp_path)
    with pytest.raises(ConfigError, match="anna would be lost"):
        pool.load("ben", folder / "ben")
    pool.save("anna", tmp_path)
    pool.load("ben", folder / "ben")
    assert not any(factor.grad[0].any() for factor in pool.parameters() if factor.grad is not None)  # of anna


def test_a_model_that_puts_tokens_first_is_refused() -> None:
    settings = XLNetConfig(vocab_size=20, d_model=16, n_layer=1, n_head=2, d_inner=16)
    with pytest.raises(UnsupportedModuleError, match="xlnet gives its layers tokens first"):
        AdapterPool(XLNetLMHeadModel(settings))


def test_the_tensors_of_adapters_that_left_are_freed(folder: Path) -> None:
    pool, only = (AdapterPool(base(), slots=1, folder=folder) for _ in range(2))
    for name in KINDS:
        with pool.use([name]):
            pass
    with only.use([name]):
        assert pool.nbytes() == only.nbytes()


def test_adapters_that_came_in_inference_mode_can_be_replaced_and_trained(folder: Path) -> None:
    model = base()
    pool = AdapterPool(model, folder=folder)
    with torch.inference_mode(), pool.use(["anna"]):
        model(input_ids=ids(1))
    pool.load("ben", folder / "ben")
    with pool.use(["anna"]):
        model(input_ids=ids(1)).logits.sum().backward()
    assert all(part.grad is not None for part in pool.parameters()[:2])


@pytest.mark.parametrize("name", ["anne", "../anna", "..", ""])
def test_an_unknown_name_is_refused_with_the_nearest(folder: Path, name: str) -> None:
    pool = AdapterPool(base(), folder=folder)
    pool.load("ben", folder / "ben")
    with pytest.raises(ConfigError, match="anna" if name == "anne" else "no adapter"), pool.use(["ben", name]):
        pass
    pool.unload("ben")  # nothing is in use


def test_what_is_saved_is_an_ordinary_adapter(folder: Path, tmp_path: Path) -> None:
    pool = AdapterPool(base())
    for name in KINDS:
        pool.load(name, folder / name)
    for name in KINDS:
        pool.save(name, tmp_path / name)
        ours, before = (load_file(place / name / "adapter_model.safetensors") for place in (tmp_path, folder))
        assert ours.keys() == before.keys()
        assert all(torch.equal(ours[key], before[key]) for key in ours)
        assert_close(alone(tmp_path, name, ids(1)), alone(folder, name, ids(1)))


def test_a_gang_trains_each_adapter_as_if_it_were_alone() -> None:
    model = base().double()
    pool = AdapterPool(model)
    names = ["a", "b", "c"]
    start = config(r=4, num_blocks=2)
    for name in names:
        pool.add(name, start)
    with torch.random.fork_rng():
        before = {name: pool._adapter(name).tensors() for name in names}
    optimizer = torch.optim.AdamW(pool.parameters(), lr=1e-2)
    for _ in range(3):
        with pool.use(names):
            model(input_ids=ids(3)).logits.square().sum().backward()
        norms = pool.clip_gradients(1e3)
        optimizer.step()
        optimizer.zero_grad()
    assert len(set(norms.values())) == 3
    for row, name in enumerate(names):
        single: Any = get_peft_model(base().double(), copy.deepcopy(start))
        set_peft_model_state_dict(single, before[name])
        trained = [p for p in single.parameters() if p.requires_grad]
        lone = torch.optim.AdamW(trained, lr=1e-2)
        for _ in range(3):
            single(input_ids=ids(3)[row : row + 1]).logits.square().sum().backward()
            torch.nn.utils.clip_grad_norm_(trained, 1e3)
            lone.step()
            lone.zero_grad()
        found, expected = pool._adapter(name).tensors(), get_peft_model_state_dict(single)
        for key in (key for key in found if key.endswith("weight")):
            assert_close(found[key], expected[key])


def test_what_a_backward_computes_again_in_its_own_thread_is_of_the_batch(folder: Path) -> None:
    def used(pool: AdapterPool) -> None:
        with torch.no_grad(), pool.use(["ben"]):
            pass

    def gradient(**checkpoints: bool) -> Tensor:
        model = base().train()
        if checkpoints:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpoints)
        pool = AdapterPool(model, folder=folder)
        with pool.use(["anna"]):
            loss = model(input_ids=ids(1)).logits.square().sum()
            other = threading.Thread(target=used, args=(pool,))
            other.start()
            other.join()
            backward = threading.Thread(target=loss.backward)  # as on a GPU
            backward.start()
            backward.join()
        adapter = pool._adapter("anna")
        gradient = adapter.group.stacks["model.layers.0.self_attn.q_proj"].parameters[1].grad
        assert gradient is not None
        return gradient[adapter.slot]

    assert_close(gradient(use_reentrant=False), gradient())


def test_what_comes_after_the_parameters_is_refused_and_changes_nothing(folder: Path) -> None:
    pool = AdapterPool(base(), folder=folder)
    for number in range(8):
        pool.load(f"{number}", folder / "anna")
    pool.load("cleo", folder / "cleo")
    pool.parameters()
    names = pool.names
    with pytest.raises(ConfigError, match="add all adapters"):
        pool.load("cleo", folder / "anna")  # whose tensors are full
    with pytest.raises(ConfigError, match="add all adapters"):
        pool.add("another", config(r=8, num_blocks=4))  # whose tensors no optimizer would have
    assert pool.names == names
    pool.load("0", folder / "anna")
    pool.load("dora", folder / "dora")  # to be served


def test_a_new_adapter_changes_nothing_at_first() -> None:
    model = base()
    expected = model(input_ids=ids(2)).logits
    pool = AdapterPool(model)
    for name in ("a", "b"):
        pool.add(name, config(init_weights=True))
    with pool.use(["a", "b"]):
        assert torch.equal(model(input_ids=ids(2)).logits, expected)
    own = pool._adapter("a").group.stacks["model.layers.0.self_attn.q_proj"].parameters[0]
    assert not torch.equal(own[0], own[1])
    for number in range(6):
        pool.add(str(number), config(init_weights=True))
    pool.parameters()
    with pytest.raises(ConfigError, match="before"):
        pool.add("beyond the eight that there is room for", config(init_weights=True))


def test_an_adapter_like_another_is_not_taken_apart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = AdapterPool(base(), folder=folder)
    pool.load("anna", folder / "anna")
    monkeypatch.delattr("smoa.serving.saved.tensors_of")
    pool.load("ben", folder / "ben")
    with pool.use(["ben"]), torch.no_grad():
        assert_close(pool.base(input_ids=ids(1)).logits, alone(folder, "ben", ids(1)))


def spoiled(folder: Path, target: Path, change: Any) -> Path:
    """A copy of anna with other tensors."""
    pool = AdapterPool(base())
    pool.load("anna", folder / "anna")
    pool.save("anna", target)
    file = target / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})  # as PEFT does
    return target


def half(tensors: dict[str, Tensor]) -> None:
    del tensors[next(key for key in tensors if key.endswith("smoa_B.weight"))]


def nan(tensors: dict[str, Tensor]) -> None:
    tensors[next(key for key in tensors if key.endswith("smoa_B.weight"))].fill_(float("nan"))


def bias(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"] = torch.zeros(4)


def other_base(tensors: dict[str, Tensor]) -> None:
    for key in tensors:
        if key.endswith("labels"):
            tensors[key] = (1 - tensors[key].int()).to(torch.uint8)


@pytest.mark.parametrize(
    ("change", "word"), [(half, "smoa_B"), (nan, "NaN"), (bias, "factors only"), (other_base, "another base")]
)
def test_a_damaged_adapter_is_one_error_and_the_rest_goes_on(
    folder: Path, tmp_path: Path, change: Any, word: str
) -> None:
    model = base()
    pool = AdapterPool(model, folder=folder)
    with pool.use(["anna", "ben"]), torch.no_grad():
        expected = model(input_ids=ids(2)).logits
        with pytest.raises((AdapterFileError, ConfigError), match=word):
            pool.load("anna too", spoiled(folder, tmp_path / "copy", change))
        assert torch.equal(model(input_ids=ids(2)).logits, expected)
    assert sorted(pool.names) == ["anna", "ben"]


def test_a_base_that_is_merged_or_wrapped_is_refused() -> None:
    model = get_peft_model(base(), config())
    with pytest.raises(UnsupportedModuleError, match="PEFT"):
        AdapterPool(model)
    model.merge_adapter()
    with pytest.raises(MergeError, match="merged"):
        AdapterPool(model.get_base_model())


def test_adapters_are_loaded_while_batches_run(folder: Path) -> None:
    model = base()
    pool = AdapterPool(model, slots=4, folder=folder)
    expected = {name: alone(folder, name, ids(1)) for name in ("anna", "ben")}
    faults: list[BaseException] = []

    def serve(name: str) -> None:
        try:
            for _ in range(15):
                with pool.use([name]), torch.no_grad():
                    assert_close(model(input_ids=ids(1)).logits, expected[name])
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=serve, args=(name,)) for name in ("anna", "ben")]
    for thread in threads:
        thread.start()
    for number in range(30):
        pool.load(f"other {number}", folder / "anna")
    for thread in threads:
        thread.join()
    assert faults == []
