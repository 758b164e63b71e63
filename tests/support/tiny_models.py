"""Random models of two layers, shaped like the families that SMoA is used on. Built from configs: nothing is loaded."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

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
        return BUILDERS[family]().eval().to(dtype)


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
