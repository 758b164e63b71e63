"""A UNet and a diffusion transformer of diffusers: their convolutions, embeddings and linear layers are adapted."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from smoa import SmoaConfig
from smoa.layers.kinds import Convolution, Embedding
from smoa.layers.linear import Linear
from tests.support.layers import layers_of
from tests.support.tolerance import assert_close

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:num_blocks=4 is larger than a side")


def unet() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def dit() -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        norm_num_groups=4,
        num_embeds_ada_norm=10,
    )


def unet_output(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 3, 8, generator=generator)
    return model(noise, torch.tensor([3, 7]), text).sample


def dit_output(model: nn.Module) -> Tensor:
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return model(noise, timestep=torch.tensor([3, 7]), class_labels=torch.tensor([1, 4])).sample


MODELS = {
    "unet": (unet, unet_output, ["conv1", "conv2", "conv_in", "conv_shortcut", "conv", "to_q", "to_v"]),
    "dit": (dit, dit_output, ["pos_embed.proj", "embedding_table", "to_q", "to_v", "linear"]),
}
KINDS = {"unet": {Convolution, Linear}, "dit": {Convolution, Embedding, Linear}}


def built(name: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor], SmoaConfig]:
    build, output, targets = MODELS[name]
    torch.manual_seed(0)
    return build().eval(), output, SmoaConfig(r=8, num_blocks=4, target_modules=targets)


@pytest.mark.parametrize("name", MODELS)
def test_a_diffusion_model_learns_is_saved_loaded_merged_and_unmerged(name: str, tmp_path: Path) -> None:
    base, output, config = built(name)
    before = output(base).detach()
    model = get_peft_model(base, config)
    assert {type(layer) for layer in layers_of(model)} == KINDS[name]
    assert_close(output(model), before)

    target = before + 0.1
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(5):
        loss = nn.functional.mse_loss(output(model), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = output(model).detach()
    assert nn.functional.mse_loss(trained, target) < 0.009

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(built(name)[0], tmp_path)
    assert torch.equal(output(loaded), trained)
    weights = copy.deepcopy(built(name)[0].state_dict())
    loaded.merge_adapter(safe_merge=True)
    assert_close(output(loaded), trained)
    loaded.unmerge_adapter()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in loaded.unload().state_dict().items())
