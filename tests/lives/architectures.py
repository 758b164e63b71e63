"""Adapts a tiny model of every causal language model that the installed transformers has: `make architectures`.

    python -m tests.lives.architectures [NAME …]

Of each, all linear layers and the experts get a random update: merged it has to give the same output, switched off the
base's. LoRA's numbers stand beside those that are wrong. A model whose small config can't be guessed is named.
"""

import copy
import sys
import warnings
from contextlib import suppress
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from smoa import SmoaConfig

WIDTHS = "hidden_size d_model n_embd dim embedding_size"
INNER = "intermediate_size ffn_dim n_inner d_ff ffn_hidden_size mlp_hidden_size encoder_ffn_dim decoder_ffn_dim"
LAYERS = "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers"
HEADS = "num_attention_heads n_head num_heads encoder_attention_heads decoder_attention_heads mamba_num_heads"
EXPERTS = "num_experts num_local_experts n_routed_experts moe_num_experts"
NARROW = "moe_intermediate_size shared_expert_intermediate_size expert_intermediate_size"
RANKS = "q_lora_rank kv_lora_rank mamba_head_dim mamba_d_head sliding_window attention_window"
STATES = "head_dim state_size mamba_d_state linear_key_head_dim linear_value_head_dim num_buckets"
SMALL: dict[str, int] = {
    **dict.fromkeys(WIDTHS.split(), 32),
    **dict.fromkeys(INNER.split(), 48),
    **dict.fromkeys([*LAYERS.split(), "num_key_value_heads", "num_experts_per_tok", "linear_num_key_heads"], 2),
    **dict.fromkeys([*HEADS.split(), *EXPERTS.split(), "linear_num_value_heads", "mamba_n_heads", "rotary_dim"], 4),
    **dict.fromkeys(NARROW.split(), 24),
    **dict.fromkeys(RANKS.split(), 16),
    **dict.fromkeys(STATES.split(), 8),
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "n_group": 1,
    "topk_group": 1,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KNOWN = dict.fromkeys(
    ("falcon_mamba", "jamba", "mamba"), "reads the weight of dt_proj and never calls it: docs/what-works.md"
)
"""Models whose merged output is another one by their own design, of a LoRA too."""
LARGEST = 4_000_000
"""Parameters."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))


def tiny(kind: str) -> Any:
    """A small model of this kind, with random weights; whatever its config raises."""
    known = CONFIG_MAPPING[kind]().to_dict()
    sizes: dict[str, Any] = {key: size for key, size in SMALL.items() if isinstance(known.get(key), int)}
    if "qk_rope_head_dim" in known:  # of MLA, whose heads have several sizes
        sizes |= dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8)
        sizes["num_key_value_heads"] = 4
    config = CONFIG_MAPPING[kind](**sizes)
    for key in ("layer_types", "mlp_layer_types", "layers_block_type"):
        if isinstance(kinds := getattr(config, key, None), list):
            with suppress(AttributeError):  # a property
                setattr(config, key, (list(dict.fromkeys(kinds)) * 2)[:2])
    config._attn_implementation = "eager"
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
    return model.eval()


def experts_of(model: nn.Module) -> list[str]:
    """What `target_parameters` takes: ends of the names of stacks of experts' matrices."""
    stacks = (name for name, each in model.named_parameters() if each.dim() == 3 and min(each.shape) > 1)
    return sorted({".".join(name.split(".")[-3:]) for name in stacks if "expert" in name or "moe" in name})


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits  # type: ignore[no-any-return]


def errors(base: Any, config: PeftConfig) -> tuple[float, float, float]:
    """By how much the adapter changes the output, merged another one than unmerged, and switched off than the base."""
    before, dtype = output(base), next(base.parameters()).dtype
    model = get_peft_model(copy.deepcopy(base), config).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    unmerged = output(model)
    model.merge_adapter()
    merged = output(model)
    model.unmerge_adapter()
    with model.disable_adapter():
        off = output(model)
    changed, wrong, left = (float((a - b).abs().max() / before.abs().max()) for a, b in (
        (unmerged, before), (merged, unmerged), (off, before)
    ))  # fmt: skip
    return changed, wrong, left


def main(kinds: list[str]) -> int:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    right, unknown, wrong = list[str](), dict[str, str](), dict[str, str]()
    for kind in kinds or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            base = tiny(kind)
            stacks = experts_of(base)
            base = base if stacks else base.double()  # PyTorch's grouped products take no float64
            assert output(base).isfinite().all()
        except Exception as error:
            unknown[kind] = f"{type(error).__name__}: {error}"[:100]
            continue
        ours = SmoaConfig(r=4, num_blocks=2, init_weights=False, target_modules="all-linear", target_parameters=stacks)
        lora = LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear")
        limit, found = TOLERANCE[next(base.parameters()).dtype], list[Any]()
        for config in (ours, lora):
            try:
                found.append(errors(base, config))
            except Exception as error:
                found.append(f"{type(error).__name__}: {error}"[:100])
        is_right = not isinstance(found[0], str) and found[0][0] > limit > max(found[0][1:])
        if is_right:
            right.append(kind)
        else:
            wrong[kind] = f"{found[0]}; LoRA: {found[1]}{f' ({KNOWN[kind]})' if kind in KNOWN else ''}"
        print(f"{kind}: {'right' if is_right else wrong[kind]}", flush=True)  # noqa: T201
    print(f"{len(right)} right; {len(unknown)} can't be made small: {unknown}")  # noqa: T201
    print(f"{len(wrong)} wrong: {wrong}")  # noqa: T201
    return int(not right or not wrong.keys() <= KNOWN.keys())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
