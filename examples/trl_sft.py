"""Runs TRL's SFTTrainer with a SmoaConfig instead of a LoraConfig.

Shows: supervised fine-tuning on prompts and completions, and an answer afterwards.
Printed when last run: loss 5.75 -> 0.003; Japan: Tokyo
"""

from __future__ import annotations

import tempfile

from _tiny import ADAPTER, CAPITALS, load
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from smoa import SmoaConfig


def main() -> None:
    model, tokenizer = load()
    data = Dataset.from_list([{"prompt": f"{country}: ", "completion": city} for country, city in CAPITALS])
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder,
            max_steps=60,
            learning_rate=1e-2,
            per_device_train_batch_size=5,
            gradient_checkpointing=False,
            bf16=False,
            logging_steps=20,
            logging_first_step=True,
            disable_tqdm=True,
            save_strategy="no",
            report_to=[],
        )
        trainer = SFTTrainer(
            model, arguments, train_dataset=data, processing_class=tokenizer, peft_config=SmoaConfig(**ADAPTER)
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    prompt = tokenizer("Japan: ", return_tensors="pt")
    answer = trainer.model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt.input_ids.shape[1] :]
    said = tokenizer.decode(answer, skip_special_tokens=True)
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.3f}; Japan: {said}")
    assert said == "Tokyo"


if __name__ == "__main__":
    main()
