"""Random models of two layers, shaped like the families that SMoA is used on. Built from configs: nothing is loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from smoa import SmoaConfig
from smoa.experts import ParamWrapper
from tests import oracle
from tests.support.layers import randomise, smoa_layers

# Random models of two layers, shaped like the families that SMoA is used on. Built from configs: nothing is loaded.


VOCAB_SIZE = 64
SEED = 20_260_521
# The usual 0.02 would leave so narrow a model nearly linear and its logits nearly equal.
INITIALIZER_RANGE = 0.2


def llama() -> PreTrainedModel:
    """Grouped-query attention (k and v narrower than q) and a gated MLP."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=INITIALIZER_RANGE,
            pad_token_id=0,
        )
    )


def gemma3() -> PreTrainedModel:
    """One key-value head, an attention wider than the hidden size, one sliding and one full layer, tied embeddings."""
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=20,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
            max_position_embeddings=64,
            initializer_range=INITIALIZER_RANGE,
        )
    )


def gpt2() -> PreTrainedModel:
    """Projections are Conv1D, whose weight is (in_features, out_features)."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB_SIZE,
            n_embd=24,
            n_layer=2,
            n_head=4,
            n_positions=64,
            initializer_range=INITIALIZER_RANGE,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=1,
            pad_token_id=0,
        )
    )


def bert() -> PreTrainedModel:
    """An encoder with a classification head of three labels, all linear layers with a bias."""
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            num_labels=3,
            initializer_range=INITIALIZER_RANGE,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def t5() -> PreTrainedModel:
    """An encoder and a decoder, whose inner width (4 x 6) is not the model's (32)."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB_SIZE,
            d_model=32,
            d_kv=6,
            d_ff=40,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )


BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "gemma3": gemma3,
    "gpt2": gpt2,
    "bert": bert,
    "t5": t5,
}


def build(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of the family in evaluation mode: the same weights every time, whatever was drawn before."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return (BUILDERS | MIXTURES)[family]().eval().to(dtype)


def batch(family: str, size: int = 3, length: int = 11) -> dict[str, Tensor]:
    """Inputs with labels, the last row padded on the right; `model(**batch)` returns a loss."""
    generator = torch.Generator().manual_seed(SEED)
    input_ids = torch.randint(3, VOCAB_SIZE, (size, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[-1, length // 2 :] = 0
    input_ids = input_ids.masked_fill(attention_mask == 0, 0)
    labels = torch.arange(size) % 3 if family == "bert" else input_ids.masked_fill(attention_mask == 0, -100)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


@torch.no_grad()
def logits(model: nn.Module, family: str = "llama", **kwargs: Any) -> Tensor:
    """What a model of the family, adapted or not, says to `batch`, in float32."""
    inputs = {name: tensor for name, tensor in batch(family).items() if family == "t5" or name != "labels"}
    found: Tensor = model(**inputs, **kwargs).logits
    return found.float()


# Random mixtures of experts with one or two layers, built from configs: nothing is loaded.


COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "intermediate_size": 16,  # grouped_mm wants rows of a multiple of 16 bytes
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": INITIALIZER_RANGE,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}


def qwen3_moe(num_experts: int = 5) -> PreTrainedModel:
    """Gate above up."""
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**COMMON, moe_intermediate_size=16, num_experts=num_experts, head_dim=6))


def mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**COMMON, num_local_experts=5))


def olmoe() -> PreTrainedModel:
    return OlmoeForCausalLM(OlmoeConfig(**COMMON, num_experts=5))


def deepseek_v3() -> PreTrainedModel:
    """A dense layer first, and a shared expert, which is a module of linear layers."""
    settings = COMMON | {"num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 4}
    heads = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6}
    config = DeepseekV3Config(**settings, **heads, moe_intermediate_size=16, n_group=2, topk_group=1)
    return DeepseekV3ForCausalLM(config)


def gpt_oss(**changed: Any) -> PreTrainedModel:
    """Transposed, gate and up by turns, with biases."""
    return GptOssForCausalLM(GptOssConfig(**COMMON | changed, num_local_experts=5, head_dim=6))


def llama4(**changed: Any) -> PreTrainedModel:
    """Transposed, and outside transformers' experts interface: every expert computes every token."""
    settings = COMMON | {"num_experts_per_tok": 1, "intermediate_size_mlp": 20, "interleave_moe_layer_step": 1}
    heads = {"head_dim": 6, "attention_chunk_size": 32}
    return Llama4ForCausalLM(Llama4TextConfig(**settings | changed, **heads, num_local_experts=5))


MIXTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3_moe": qwen3_moe,
    "mixtral": mixtral,
    "olmoe": olmoe,
    "deepseek_v3": deepseek_v3,
    "gpt_oss": gpt_oss,
    "llama4": llama4,
}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


EXPERT_SETTINGS: dict[str, Any] = {"r": 7, "num_blocks": 3, "alpha": 4.0, "init_weights": False}
FAMILIES = ["qwen3_moe", "gpt_oss", "llama4"]
"""One for each layout: (E, out, in), transposed and interleaved, transposed."""


def experts_of(family: str, adapter: str = "default", dtype: torch.dtype = torch.float64, **settings: Any) -> nn.Module:
    """The experts of one layer, as a child of another module, with an adapter on both parameters."""
    model = build(family).to(dtype)
    found = next(module for name, module in model.named_modules() if name.endswith("experts"))
    if hasattr(found, "config"):
        found.config._experts_implementation = "eager"
    config = SmoaConfig(target_modules=[], target_parameters=EXPERTS, **EXPERT_SETTINGS | settings)
    return inject_adapter_in_model(config, nn.ModuleDict({"experts": found}), adapter)


def add_second_adapter(experts: nn.Module) -> None:
    """Another adapter, of two blocks, on what `experts_of` returned; it is not active."""
    config = SmoaConfig(target_modules=[], target_parameters=EXPERTS, **EXPERT_SETTINGS | {"num_blocks": 2, "r": 4})
    inject_adapter_in_model(config, nn.ModuleDict({"experts": experts["experts"]}), "second")


def tokens(length: int = 9) -> Tensor:
    return torch.randint(3, VOCAB_SIZE, (2, length), generator=torch.Generator().manual_seed(SEED))


def wrappers(model: nn.Module) -> dict[str, ParamWrapper]:
    """The adapted parameters by their names, of the last layer of the model."""
    return {m.parameter_name: m for m in model.modules() if isinstance(m, ParamWrapper)}


def matrix_of(wrapper: ParamWrapper, expert: int, half: int) -> Tensor:
    """One expert's matrix (out_features, in_features), picked from the parameter by the names of the models."""
    stored = wrapper.stored_weight().detach()
    stored = stored[expert] if wrapper.layout.is_stack else stored
    stored = stored.T if wrapper.layout.transposed else stored
    if wrapper.layout.halves == 1:
        return stored
    if wrapper.layout.interleaved:
        return stored[half::2]
    return stored[: len(stored) // 2] if half == 0 else stored[len(stored) // 2 :]


def oracle_deltas(wrapper: ParamWrapper, A: Tensor | None = None, B: Tensor | None = None) -> list[Tensor]:
    """The oracle's delta W (m, n) of each expert's matrices, in float64, in the order of the factors."""
    own_A, own_B = wrapper.factors("default")
    A, B = (own.detach() if given is None else given for own, given in ((own_A, A), (own_B, B)))
    ranks, halves = wrapper.adapters["default"].ranks, wrapper.layout.halves
    rows, cols = wrapper.smoa_row_labels["default"].tolist(), wrapper.smoa_col_labels["default"].tolist()
    r, scales = sum(ranks), wrapper.decided("default").block_scale.tolist()
    return [
        oracle.delta_weight(
            matrix_of(wrapper, number // halves, number % halves).double(),
            A[number * r : (number + 1) * r].double(),
            B[:, number * r : (number + 1) * r].double(),
            rows[number % len(rows)],
            cols[number % len(cols)],
            ranks,
            [wrapper.scaling["default"] * scale for scale in scales[number]],
            wrapper.adapters["default"].modulation,
        )
        for number in range(wrapper.layout.count)
    ]


# A random model of an embedding, a convolution and a head, which takes token ids and labels as transformers' do.


WIDTH = 24
READER_TARGETS = ["embed", "conv"]


class ReaderBlock(nn.Module):
    """A convolution over the tokens so far; what FSDP shards as one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, kernel_size=3, padding=2, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x.mT).mT[:, : x.shape[1]].tanh()


class Reader(nn.Module):
    """Predicts the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB_SIZE, WIDTH)
        self.block = ReaderBlock()
        self.head = nn.Linear(WIDTH, VOCAB_SIZE)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.block(self.embed(input_ids)))
        loss = None if labels is None else cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(logits=logits, loss=loss)


def build_reader() -> Reader:
    """The same weights every time, whatever was drawn before."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return Reader()


# Models with adapters of random factors.


QV = ["q_proj", "v_proj"]
SETTINGS: dict[str, Any] = {"r": 4, "num_blocks": 2, "target_modules": QV}


def adapted(base: nn.Module, adapter: str = "default", **config: Any) -> PeftModel:
    """`base` in evaluation with an adapter, by default on query and value projections."""
    model = get_peft_model(base, SmoaConfig(**SETTINGS | config), adapter)
    _randomise(model, adapter)
    return model.eval()


def add_adapter(model: PeftModel, adapter: str, **config: Any) -> None:
    """Another adapter on the same model, not active yet."""
    model.add_adapter(adapter, SmoaConfig(**SETTINGS | config))
    _randomise(model, adapter)


def _randomise(model: PeftModel, adapter: str) -> None:
    for layer in smoa_layers(model).values():
        if adapter in layer.smoa_A:
            randomise(layer, adapter)


# Saved adapters, changed on disk.


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """The folder after its tensors were changed."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return folder


def with_settings(folder: Path, **settings: Any) -> Path:
    """The folder after its config was edited."""
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | settings
    file.write_text(json.dumps(config), encoding="utf-8")
    return folder


def quantized_model(folder: Path, family: str = "llama", **options: Any) -> PreTrainedModel:
    """The tiny model of the family, loaded by bitsandbytes with `options` of BitsAndBytesConfig, by default in NF4."""
    if not (folder / "config.json").is_file():
        build(family).save_pretrained(folder)
    options = options or {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    quantization_config = BitsAndBytesConfig(**options)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization_config, dtype=torch.float32)
