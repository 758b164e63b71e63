import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload, disk_offload
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM

from smoa import SmoaConfig, UnsupportedModuleError, make_partition, merged
from tests.support import tiny
from tests.support.layers import (
    KINDS,
    Wrapper,
    adapted_layer,
    assert_close,
    base_layer,
    input_of,
    kind_of_layer,
    labels,
)
from tests.support.tiny import build


class Branch(nn.Module):
    """A part of a model that FSDP can shard as a unit."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(10, 12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


def with_biases(seed: int, bias: str) -> PeftModel:
    """An adapted model whose trained biases hold random numbers."""
    base = branches()
    torch.manual_seed(seed)
    config = SmoaConfig(r=4, num_blocks=2, target_modules=["up"], bias=bias, init_weights=False)  # type: ignore[arg-type]
    model = get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def branches() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(Branch(), Branch()).eval()


one_rank_shards_nothing = pytest.mark.filterwarnings(
    "ignore:FSDP is switching to use `NO_SHARD`",
    "ignore:When using ``NO_SHARD``",
    "ignore:.* has both parameters with requires_grad=True and False",
)


def under_fsdp(model: nn.Module) -> FullyShardedDataParallel:
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


@pytest.fixture
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_rank")
def test_a_sharded_weight_is_gathered_before_it_is_decomposed() -> None:
    base = nn.Linear(12, 18)
    expected = make_partition(base.weight, 3)
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("fsdp",))
    layer = adapted_layer(fully_shard(base, mesh=mesh), num_blocks=3)
    assert isinstance(layer.base_layer.weight, DTensor)
    model = get_peft_model(Wrapper(nn.Linear(12, 18)), SmoaConfig(r=4, num_blocks=2, target_modules=["layer"]))
    fully_shard(model, mesh=mesh)
    model.add_adapter("of a root that is sharded", SmoaConfig(r=4, num_blocks=2, target_modules=["layer"]))
    assert torch.equal(layer.smoa_row_labels["default"], expected.row_labels)
    assert torch.equal(layer.smoa_col_labels["default"], expected.col_labels)


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("is_old", [False, True], ids=["DTensor", "an older transformers"])
def test_a_weight_of_which_each_process_has_a_piece_is_refused(is_old: bool) -> None:
    model = tiny.llama()
    attention = model.model.layers[0].self_attn
    if is_old:
        attention.o_proj._hf_tp_plan = "rowwise"
    else:
        parallelize_module(attention, init_device_mesh("cpu", (1,)), {"o_proj": RowwiseParallel()})
    with pytest.raises(UnsupportedModuleError, match=r"0\.self_attn\.o_proj: tensor parallelism gives each process"):
        get_peft_model(model, SmoaConfig(r=4, num_blocks=2, target_modules=["q_proj", "o_proj"]))


@pytest.mark.usefixtures("_one_rank")
def test_experts_of_which_each_process_has_a_piece_are_refused() -> None:
    model = build("qwen3_moe")
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(
        distribute_tensor(experts.down_proj.detach(), init_device_mesh("cpu", (1,)), [Shard(0)])
    )
    experts.register_forward_hook(lambda *_: None)  # which would sum what processes have
    with pytest.raises(UnsupportedModuleError, match="down_proj: tensor parallelism gives each process"):
        get_peft_model(model, SmoaConfig(r=4, num_blocks=2, target_parameters=["mlp.experts.down_proj"]))


@one_rank_shards_nothing
@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("bias", ["smoa_only", "all"])
def test_biases_that_were_trained_under_fsdp_are_saved_and_loaded(bias: str, tmp_path: Path) -> None:
    sharded = under_fsdp(with_biases(2, bias))
    x = torch.randn(7, 10)
    with torch.no_grad():
        expected = sharded(x)
    sharded.module.save_pretrained(tmp_path, state_dict=sharded.state_dict())
    assert_close(PeftModel.from_pretrained(branches(), tmp_path)(x), expected)
    other = with_biases(3, bias)
    set_peft_model_state_dict(other, get_peft_model_state_dict(sharded))
    assert_close(other(x), expected)


@one_rank_shards_nothing
@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("bias", ["none", "all", "smoa_only"])
def test_an_adapter_with_biases_is_loaded_into_a_model_under_fsdp(bias: str) -> None:
    model, sharded = with_biases(2, bias), under_fsdp(with_biases(3, bias))
    saved = get_peft_model_state_dict(model)
    sharded.state_dict()  # FSDP takes for the root whatever is asked for its state dict, or called, first
    set_peft_model_state_dict(sharded.module, saved)
    x = torch.randn(7, 10)
    with torch.no_grad():
        assert_close(sharded(x), model(x))


@pytest.mark.usefixtures("_one_rank")
def test_sharded_layers_are_not_merged_for_a_while() -> None:
    layer = adapted_layer(nn.Linear(12, 18), num_blocks=3)
    base = layer.get_base_layer()
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("fsdp",))
    base.weight = nn.Parameter(distribute_tensor(base.weight.detach(), mesh, [Shard(0)]), requires_grad=False)
    with pytest.raises(UnsupportedModuleError, match=r"sharded over processes"), merged(layer):
        pass


def _partition(parameter: nn.Parameter, *, whole: bool) -> None:
    """As DeepSpeed's ZeRO-3 would, which leaves a parameter no entries until it gathers them."""
    parameter.ds_id, parameter.ds_shape = 0, parameter.shape
    if not whole:
        parameter.data = torch.empty(0)


@pytest.mark.parametrize("whole", [True, False])
def test_weights_that_zero3_partitions_are_not_merged_for_a_while(whole: bool) -> None:
    layer = adapted_layer(nn.Linear(12, 18), num_blocks=3)
    _partition(layer.base_layer.weight, whole=whole)
    with pytest.raises(UnsupportedModuleError, match=r"sharded over processes"), merged(layer):
        pass


# accelerate's offloading


@pytest.mark.parametrize("kind", KINDS)
def test_an_offloaded_layer_computes_as_before_and_is_offloaded_again(kind: str) -> None:
    offload_buffers = kind in ("linear", "embedding")
    model = Wrapper(adapted_layer(kind_of_layer(kind), r=7, num_blocks=3)).eval()
    x = input_of(kind)
    with torch.no_grad():
        expected = model(x), model.layer(x, adapter_names=["default", "__base__"])
        cpu_offload(model, torch.device("cpu"), offload_buffers=offload_buffers)
        for _ in range(2):
            assert_close(model(x), expected[0])
            assert_close(model.layer(x, adapter_names=["default", "__base__"]), expected[1])
            assert all(parameter.is_meta for parameter in model.parameters())


def test_the_partition_of_an_offloaded_weight_is_decided_by_its_numbers() -> None:
    base = Wrapper(base_layer(12, 8))
    expected = adapted_layer(copy.deepcopy(base.layer), trained=False, r=4, num_blocks=2)
    cpu_offload(base, torch.device("cpu"))
    layer = get_peft_model(base, SmoaConfig(r=4, num_blocks=2, target_modules=["layer"])).base_model.model.layer
    assert labels(layer) == labels(expected)
    assert torch.equal(layer.decided("default").block_scale, expected.decided("default").block_scale)


@pytest.mark.parametrize("kind", KINDS)
def test_an_offloaded_layer_is_merged_and_unmerged_in_a_forward(kind: str, tmp_path: Path) -> None:
    model = Wrapper(adapted_layer(kind_of_layer(kind), r=7, num_blocks=3)).eval()
    x = input_of(kind)
    with torch.no_grad():
        adapted, plain = model(x), model.layer.base_layer(x)
        disk_offload(model, str(tmp_path), torch.device("cpu"))
        model.layer.merge()
        assert_close(model(x), adapted)
        model.layer.enable_adapters(False)
        assert_close(model(x), plain)
        assert all(parameter.is_meta for parameter in model.parameters())


def test_an_offloaded_model_generates_as_before(tmp_path: Path) -> None:
    model = get_peft_model(tiny.build("llama"), SmoaConfig(init_weights=False, target_modules="all-linear"))
    ids = tiny.batch("llama")["input_ids"]
    expected = model.eval().generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    disk_offload(model, str(tmp_path), torch.device("cpu"))
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=4, do_sample=False), expected)


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta:UserWarning")  # of PEFT, also with LoRA
def test_an_adapter_is_loaded_onto_a_base_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # PEFT writes beside the working directory too
    base, folder, batch = tmp_path / "models--base", tmp_path / "adapter", tiny.batch("llama")
    model = get_peft_model(tiny.build("llama"), SmoaConfig(init_weights=False, target_modules=["q_proj"])).eval()
    model.save_pretrained(folder)
    tiny.build("llama").save_pretrained(base)
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {"model.layers.1": "disk"}
    offloaded = AutoModelForCausalLM.from_pretrained(base, device_map=places, offload_folder=tmp_path / "base")
    assert offloaded.model.layers[1].self_attn.q_proj.weight.is_meta
    loaded = PeftModel.from_pretrained(
        offloaded,
        folder,
        device_map={f"base_model.model.{name}": place for name, place in places.items()},
        offload_dir=str(tmp_path / "loaded"),
    )
    with torch.no_grad():
        assert_close(loaded(**batch).logits, model(**batch).logits)
