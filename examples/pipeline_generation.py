"""Gives pipeline("text-generation") the folder of a SMoA adapter, which names its base model.

Shows: once smoa is imported, transformers loads base and adapter from the adapter's folder, and generates with both.
Printed when last run: Italy: 'Rome' with the adapter, and seven unreadable characters without.
"""

from __future__ import annotations

import tempfile

from _tiny import ADAPTER, CAPITALS, base_model, fit, load
from peft import get_peft_model
from transformers import pipeline

from smoa import SmoaConfig


def main() -> None:
    model, tokenizer = load()
    model = get_peft_model(model, SmoaConfig(**ADAPTER))
    fit(model, tokenizer, CAPITALS)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        adapted = pipeline("text-generation", model=folder, device="cpu")
    plain = pipeline("text-generation", model=base_model(), device="cpu")
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    said = {name: pipe("Italy: ", **options)[0]["generated_text"] for name, pipe in (("a", adapted), ("b", plain))}
    print(f"Italy: {said['a']!r} with the adapter, {said['b']!r} without")
    assert said["a"] == "Rome" != said["b"]


if __name__ == "__main__":
    main()
