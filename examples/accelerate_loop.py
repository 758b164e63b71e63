"""Trains a SMoA adapter in a loop on accelerate.

`accelerate launch` runs the same file on several processes or GPUs.
Shows: `prepare`, `backward` and `clip_grad_norm_` without changes; `save_pretrained` in the main process.
Printed when last run: loss 5.75 -> 0.002 in 60 steps; reloaded 0.002
"""

from __future__ import annotations

import tempfile

import torch
from _tiny import ADAPTER, CAPITALS, load, loss_of, rows
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from transformers import default_data_collator

from smoa import SmoaConfig


def main() -> None:
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model, tokenizer = load()
    model = get_peft_model(model, SmoaConfig(**ADAPTER))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loader = torch.utils.data.DataLoader(rows(tokenizer, CAPITALS), batch_size=5, collate_fn=default_data_collator)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _ in range(60):
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with tempfile.TemporaryDirectory() as folder:
            accelerator.unwrap_model(model).save_pretrained(folder)
            loaded = PeftModel.from_pretrained(load()[0], folder)
        reloaded = loss_of(loaded, tokenizer, CAPITALS)
        print(f"loss {losses[0]:.2f} -> {losses[-1]:.3f} in {len(losses)} steps; reloaded {reloaded:.3f}")
        assert reloaded < 0.1 * losses[0]


if __name__ == "__main__":
    main()
