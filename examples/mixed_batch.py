"""Runs one batch with several adapters.

`adapter_names` has the name of an adapter for each sample, or `__base__` for none.
Shows: logits and generated tokens are those of each adapter alone. docs/performance.md has the cost.
Printed when last run: Spain: Madrid, cow: moo, Kenya: Nairobi; logits differ from alone by at most 8e-06
"""

from __future__ import annotations

import torch
from _tiny import ADAPTER, CAPITALS, SOUNDS, fit, load
from peft import get_peft_model

from smoa import SmoaConfig


@torch.no_grad()
def main() -> None:
    base, tokenizer = load()
    tokenizer.padding_side = "left"
    model = get_peft_model(base, SmoaConfig(**ADAPTER), adapter_name="capitals")
    model.add_adapter("sounds", SmoaConfig(**ADAPTER))
    for name, pairs in (("capitals", CAPITALS), ("sounds", SOUNDS)):
        model.set_adapter(name)
        with torch.enable_grad():
            fit(model, tokenizer, pairs)
    asked = {"Spain: ": "capitals", "cow: ": "sounds", "Kenya: ": "capitals", "dog: ": "__base__"}
    inputs = tokenizer(list(asked), return_tensors="pt", padding=True)
    mixed = model(**inputs, adapter_names=list(asked.values())).logits
    worst = 0.0
    for row, name in enumerate(asked.values()):
        alone = {key: value[row : row + 1] for key, value in inputs.items()}
        real = alone["attention_mask"][0].bool()
        worst = max(worst, float((mixed[row] - run_alone(model, alone, name)[0])[real].abs().max()))
    tokens = model.generate(**inputs, adapter_names=list(asked.values()), max_new_tokens=8, do_sample=False)
    answers = tokenizer.batch_decode(tokens[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    print(f"{', '.join(map(str.__add__, asked, answers[:3]))}; logits differ from alone by at most {worst:.0e}")
    assert answers[:3] == ["Madrid", "moo", "Nairobi"]
    assert worst < 1e-3


def run_alone(model: object, inputs: dict, name: str) -> torch.Tensor:
    if name == "__base__":
        with model.disable_adapter():
            return model(**inputs).logits
    model.set_adapter(name)
    return model(**inputs).logits


if __name__ == "__main__":
    main()
