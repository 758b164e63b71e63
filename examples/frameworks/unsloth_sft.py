"""Unsloth: its model, and PEFT's own `get_peft_model`. Needs a GPU; not run by the tests."""

from unsloth import FastLanguageModel  # first: it changes transformers, PEFT and TRL

from datasets import load_dataset  # isort: skip
from peft import get_peft_model  # isort: skip
from trl import SFTConfig, SFTTrainer  # isort: skip

from smoa import SmoaConfig  # isort: skip

model, tokenizer = FastLanguageModel.from_pretrained("google/gemma-3-270m", max_seq_length=1024, load_in_4bit=True)
# Unsloth's own get_peft_model makes LoRA and its fused kernels. SMoA's layers compute by themselves.
model.gradient_checkpointing_enable()
model.enable_input_require_grads()
model = get_peft_model(model, SmoaConfig(r=32, num_blocks=4, alpha=64, task_type="CAUSAL_LM"))
texts = load_dataset("tatsu-lab/alpaca", split="train[:1000]").select_columns("text")
arguments = SFTConfig(output_dir="runs/unsloth", learning_rate=3e-3, max_steps=60, dataset_text_field="text")
SFTTrainer(model=model, processing_class=tokenizer, train_dataset=texts, args=arguments).train()
model.save_pretrained("runs/unsloth")
