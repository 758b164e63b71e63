"""Saves a folder for upload to a model hub: the adapter, its config and a model card.

Shows: `save_adapter` with the base model's name on the hub and the metrics; the card's front matter as a hub reads it;
no path of this machine in the folder; loading from the folder. To upload, add one line:
`huggingface_hub.upload_folder(repo_id="your-name/capitals-smoa", folder_path=folder)`.
Printed when last run: the card, with loss before 5.75 and after 0.002844, below

    README.md                     1,422 bytes
    adapter_config.json           1,426 bytes
    adapter_model.safetensors   144,176 bytes
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from _tiny import ADAPTER, CAPITALS, base_model, fit, load, loss_of
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model

from smoa import SmoaConfig, save_adapter


def main() -> None:
    model, tokenizer = load()
    model = get_peft_model(model, SmoaConfig(**ADAPTER))
    metrics = {"loss before": loss_of(model, tokenizer, CAPITALS)}
    fit(model, tokenizer, CAPITALS)
    metrics["loss after"] = loss_of(model, tokenizer, CAPITALS)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "capitals-smoa")
        save_adapter(model, folder, base_model_name="your-name/tiny-llama", metrics=metrics)
        for file in sorted(folder.iterdir()):
            print(f"{file.name:27} {file.stat().st_size:7,} bytes")
            assert base_model().encode() not in file.read_bytes()
        card = ModelCard.load(folder / "README.md")
        loaded = PeftModel.from_pretrained(load()[0], folder)
    print(card.content)
    assert card.data.base_model == "your-name/tiny-llama"
    assert abs(loss_of(loaded, tokenizer, CAPITALS) - metrics["loss after"]) < 1e-5


if __name__ == "__main__":
    main()
