from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from smoa import UnsupportedModuleError, cached_weights, make_partition
from tests.layers import adapted_layer


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
    base.weight = nn.Parameter(distribute_tensor(base.weight.detach(), mesh, [Shard(0)]))
    layer = adapted_layer(base, num_blocks=3)
    assert torch.equal(layer.smoa_row_labels["default"], expected.row_labels)
    assert torch.equal(layer.smoa_col_labels["default"], expected.col_labels)


@pytest.mark.usefixtures("_one_rank")
def test_sharded_layers_keep_no_weights() -> None:
    layer = adapted_layer(nn.Linear(12, 18), num_blocks=3)
    factor = layer.smoa_A["default"]
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("fsdp",))
    factor.weight = nn.Parameter(distribute_tensor(factor.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(UnsupportedModuleError, match=r"sharded over processes"), cached_weights(layer):
        pass
    assert layer.smoa_weight_cache is None
