"""Tiny models with the traits that adapters meet. Every line of a printed script can be run after `from … import *`."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.pytorch_utils import Conv1D

WORDS = 11
KINDS = ("mini", "llama", "mixture")


class Mini(nn.Module):
    """An embedding, a convolution, a Conv1D, linear layers and a head; no class of transformers'."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(WORDS, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.proj = Conv1D(9, 8)
        self.mix = nn.Linear(9, 9)
        self.again = nn.Linear(9, 9)
        self.down = nn.Linear(9, 6)
        self.lm_head = nn.Linear(6, WORDS, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.embed_tokens(input_ids)
        h = torch.tanh(self.conv(h.mT).mT.contiguous())
        h = torch.tanh(self.proj(h))
        h = torch.tanh(self.again(torch.tanh(self.mix(h))))
        return self.lm_head(torch.tanh(self.down(h)))


def base(kind: str, dtype: str = "float64", tied: bool = False) -> Any:
    """A model of seed 0, in evaluation."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "mini":
            model: Any = Mini(tied)
        else:
            sizes: dict[str, Any] = {"vocab_size": WORDS, "hidden_size": 8, "intermediate_size": 12}
            sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
            sizes |= {"initializer_range": 0.4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
            if kind == "llama":
                model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied))
            else:
                experts = {"moe_intermediate_size": 8, "num_experts": 3, "num_experts_per_tok": 2}
                model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts, tie_word_embeddings=tied))
                if dtype == "float64":
                    model.set_experts_implementation("eager")
        model = model.to(getattr(torch, dtype)).eval()
        model.requires_grad_(True)
    return model


def parted(model: Any) -> Any:
    """A copy in float64 whose layers share no weight, so that each has what the oracle says of it."""
    model = copy.deepcopy(model).double().requires_grad_(False)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in seen:
                module._parameters[name] = nn.Parameter(parameter.clone(), requires_grad=False)
            seen.add(id(module._parameters[name]))
    return model
