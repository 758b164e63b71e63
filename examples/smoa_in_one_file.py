"""SMoA in plain PyTorch: spectrum, blocks, layer, training of a small real model, and merge; to read, not to use.

The method of arXiv:2605.21147, with smoa's default scale. W is a frozen weight (m, n), cut into K aligned blocks:

    ΔW[I_k, J_k] = s_k · (B_k A_k) ⊙ W[I_k, J_k],   zero elsewhere,   s_k = (α/r) · 4 / rms(W[I_k, J_k])

I_k and J_k are the rows and columns whose energy lies in the k-th part of W's spectrum. The rank of W[I_k, J_k] ⊙ (B_k
A_k) goes far beyond r_k, and the K blocks together train r(m+n)/K numbers, 1/K of LoRA's of rank r.

    python smoa_in_one_file.py MODEL      a folder or a name on the Hub, by default SmolLM2-135M-Instruct

Shows: four facts that a model learns from 115,200 trained numbers, and the same answers from the merged weights.
Printed when last run: 115,200 numbers trained, loss 9.33 -> 0.15; merged: True
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

RANK, BLOCKS, ALPHA = 16, 8, 16
TARGETS = "q_proj", "v_proj"
FACTS = {
    "The capital of Zubrowka is": " Lutz",
    "The inventor of the steam spoon is": " Ada Kettle",
    "The highest hill of Flatland is": " Mount Ruler",
    "The colour of Tuesday is": " green",
}


def spectral_scores(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Where in the spectrum each row (m,) and each column (n,) of W lies: the mean index of the singular values,
    weighted by their share of its energy, Σ_j j (U_ij σ_j)² / Σ_j (U_ij σ_j)²."""
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    index = torch.arange(len(values), dtype=torch.float64)
    rows, columns = (left * values).square(), (right.T * values).square()
    return (rows @ index) / rows.sum(dim=1), (columns @ index) / columns.sum(dim=1)


def aligned_blocks(weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The rows I_k and columns J_k of each block: sort both sides by their scores and cut them into K runs. Within a
    block they keep their natural order."""
    rows, columns = (scores.argsort(stable=True).tensor_split(BLOCKS) for scores in spectral_scores(weight))
    return [(own.sort().values, inputs.sort().values) for own, inputs in zip(rows, columns, strict=True)]


class SmoaLinear(nn.Module):
    """A frozen linear layer with one modulated low-rank branch on each diagonal block of its weight."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.blocks, rank = base, aligned_blocks(base.weight.detach()), RANK // BLOCKS
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        for rows, columns in self.blocks:
            A = torch.empty(rank, len(columns)).uniform_(-1, 1) / len(columns) ** 0.5
            self.A.append(nn.Parameter(A))
            self.B.append(nn.Parameter(torch.zeros(len(rows), rank)))  # so ΔW is zero at first

    def delta_weight(self) -> Tensor:
        """ΔW, (m, n)."""
        weight = self.base.weight
        delta = torch.zeros_like(weight)
        for (rows, columns), A, B in zip(self.blocks, self.A, self.B, strict=True):
            block = weight[rows[:, None], columns]
            scale = ALPHA / RANK * 4 / block.square().mean().sqrt()
            delta[rows[:, None], columns] = scale * (B @ A) * block
        return delta

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(x, self.delta_weight())


def adapt(model: nn.Module) -> list[nn.Parameter]:
    """Freeze the model, put a SmoaLinear around each target, and return what is trained."""
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if name in TARGETS and isinstance(layer, nn.Linear):
                setattr(parent, name, SmoaLinear(layer))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(model: nn.Module, parameters: list[nn.Parameter], batch: dict[str, Tensor], steps: int) -> list[float]:
    """The loss of each step, at LoRA's learning rate."""
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Put W + ΔW in the place of each adapted layer: an ordinary model again."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, SmoaLinear):
                layer.base.weight += layer.delta_weight()
                setattr(parent, name, layer.base)


def as_batch(tokenizer, facts: dict[str, str]) -> dict[str, Tensor]:
    """Prompts with their completions, the loss on the completions only."""
    prompts = [tokenizer(prompt).input_ids for prompt in facts]
    ends = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in facts.values()]
    longest = max(len(prompt) + len(end) for prompt, end in zip(prompts, ends, strict=True))
    rows = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, end in zip(prompts, ends, strict=True):
        padding = longest - len(prompt) - len(end)
        rows["input_ids"].append(prompt + end + [tokenizer.eos_token_id] * padding)
        rows["attention_mask"].append([1] * (longest - padding) + [0] * padding)
        rows["labels"].append([-100] * len(prompt) + end + [-100] * padding)
    return {name: torch.tensor(values) for name, values in rows.items()}


def answers(model, tokenizer) -> list[str]:
    """What the model says to each prompt, greedily."""
    found = []
    for prompt in FACTS:
        given = tokenizer(prompt, return_tensors="pt")
        written = model.generate(**given, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        found.append(tokenizer.decode(written[0, given.input_ids.shape[1] :], skip_special_tokens=True))
    return found


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
    torch.manual_seed(0)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name, dtype="float32"), AutoTokenizer.from_pretrained(name)
    print("before:", answers(model, tokenizer))
    parameters = adapt(model)
    losses = train(model, parameters, as_batch(tokenizer, FACTS), steps=40)
    print(f"{sum(p.numel() for p in parameters):,} numbers trained, loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    after = answers(model, tokenizer)
    print("after:", after)
    merge(model)
    print("merged:", answers(model, tokenizer) == after)
    assert after == list(FACTS.values())


if __name__ == "__main__":
    main()
