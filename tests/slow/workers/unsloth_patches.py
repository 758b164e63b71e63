"""Trains, saves and loads SMoA in a process where Unsloth has changed transformers and PEFT.

python unsloth_patches.py BASE ADAPTER
"""

import sys

import unsloth  # type: ignore[import-not-found]  # noqa: F401  # isort: skip  # first, as its manual says
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from smoa import SmoaConfig

base, folder = sys.argv[1:]
inputs = torch.arange(3, 40)[None]
torch.manual_seed(0)
config = SmoaConfig(r=4, num_blocks=2, alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
losses = []
for _ in range(10):
    loss = model(input_ids=inputs, labels=inputs).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
model.save_pretrained(folder)
again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
with torch.no_grad():
    torch.testing.assert_close(again(input_ids=inputs).logits, model(input_ids=inputs).logits)
