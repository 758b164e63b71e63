"""Uses transformers' own adapter methods, without PeftModel.

They are add_adapter, save_pretrained, load_adapter and disable_adapters.
Shows: the model remains a transformers model, and `save_pretrained` saves only the adapter.
Printed when last run: loss 5.75 -> 0.003; disabled 5.75; loaded 0.003; saved
adapter_config.json, adapter_model.safetensors, generation_config.json
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from _tiny import ADAPTER, CAPITALS, fit, load, loss_of

from smoa import SmoaConfig


def main() -> None:
    model, tokenizer = load()
    before = loss_of(model, tokenizer, CAPITALS)
    model.add_adapter(SmoaConfig(**ADAPTER), adapter_name="capitals")
    fit(model, tokenizer, CAPITALS)
    after = loss_of(model, tokenizer, CAPITALS)
    model.disable_adapters()
    disabled = loss_of(model, tokenizer, CAPITALS)
    model.enable_adapters()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        files = sorted(path.name for path in Path(folder).iterdir())
        again, _ = load()
        again.load_adapter(folder, adapter_name="capitals")
    loaded = loss_of(again, tokenizer, CAPITALS)
    print(f"loss {before:.2f} -> {after:.3f}; disabled {disabled:.2f}; loaded {loaded:.3f}; saved {', '.join(files)}")
    assert disabled == before
    assert abs(loaded - after) < 1e-4


if __name__ == "__main__":
    main()
