"""Unsloth's model with PEFT's own `get_peft_model`, trained by TRL. Needs a GPU; not run by the tests."""

from unsloth import FastLanguageModel  # isort: skip  # first: it changes transformers, PEFT and TRL

from datasets import load_dataset
from peft import get_peft_model
from trl import SFTConfig, SFTTrainer

from smoa import SmoaConfig

model, tokenizer = FastLanguageModel.from_pretrained("google/gemma-3-270m", max_seq_length=1024, load_in_4bit=True)
# Unsloth's own get_peft_model makes LoRA only, with fused kernels.
model = get_peft_model(model, SmoaConfig(r=32, num_blocks=4, alpha=64, task_type="CAUSAL_LM"))
texts = load_dataset("tatsu-lab/alpaca", split="train[:1000]").select_columns("text")
arguments = SFTConfig(
    output_dir="runs/unsloth", learning_rate=2e-3, max_steps=60, dataset_text_field="text", gradient_checkpointing=True
)
SFTTrainer(model=model, processing_class=tokenizer, train_dataset=texts, args=arguments).train()
model.save_pretrained("runs/unsloth")
