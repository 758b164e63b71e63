"""Runs TRL's SFTTrainer, DPOTrainer and GRPOTrainer with a SmoaConfig instead of a LoraConfig.

Shows: supervised fine-tuning; preferences, whose reference is the adapter that training starts from, so that the first
loss is ln 2; and reinforcement learning with a reward of one's own, the share of vowels in an answer. As for a sampler
the adapter is merged, the weights are sent, and the merge is undone: on whole sequences a plain model with them has the
bits of the trainer, and the base in bfloat16 gets every bit of its own back.
Printed when last run: sft: Japan: Tokyo; dpo: loss 0.693 -> 0.003, the reference is the start: True
grpo: reward 0.03 -> 1.00, what was sent computes the trainer's bits: True, the base is as before: True
"""

import math
import tempfile

import torch
from _tiny import ADAPTER, CAPITALS, load
from datasets import Dataset
from peft import get_peft_model_state_dict
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from smoa import SmoaConfig

COMMON = {"bf16": False, "gradient_checkpointing": False, "save_strategy": "no", "report_to": [], "logging_steps": 5}
COMMON |= {"logging_first_step": True, "disable_tqdm": True, "per_device_train_batch_size": 5}


def share_of_vowels(completions: list[str], **_: object) -> list[float]:
    return [sum(text.count(vowel) for vowel in "aeiou") / max(len(text), 1) for text in completions]


def main(folder: str) -> None:
    model, tokenizer = load()
    rows = Dataset.from_list([{"prompt": f"{country}: ", "completion": city} for country, city in CAPITALS])
    given = {"processing_class": tokenizer, "peft_config": SmoaConfig(**ADAPTER)}  # before: LoraConfig(…)
    sft = SFTTrainer(model, SFTConfig(folder, max_steps=60, learning_rate=1e-2, **COMMON), train_dataset=rows, **given)
    sft.train()
    prompt = tokenizer("Japan: ", return_tensors="pt")
    said = tokenizer.decode(sft.model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, 7:], True)
    start = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(sft.model).items()}
    pairs = rows.rename_column("completion", "rejected").add_column("chosen", ["no idea"] * len(rows))
    arguments = DPOConfig(folder, max_steps=20, learning_rate=1e-3, **COMMON)
    dpo = DPOTrainer(sft.model, args=arguments, train_dataset=pairs, processing_class=tokenizer)
    dpo.train()
    kept = get_peft_model_state_dict(dpo.model, adapter_name="ref")
    same = all(start[name].equal(tensor) for name, tensor in kept.items())
    losses = [entry["loss"] for entry in dpo.state.log_history if "loss" in entry]
    print(f"sft: Japan: {said}; dpo: loss {losses[0]:.3f} -> {losses[-1]:.3f}, the reference is the start: {same}")
    assert (said, same, abs(losses[0] - math.log(2)) < 1e-3) == ("Tokyo", True, True)

    policy, engine = (load()[0].to(torch.bfloat16) for _ in range(2))
    settings = COMMON | {"per_device_train_batch_size": 8, "num_generations": 8, "max_completion_length": 8}
    arguments = GRPOConfig(folder, max_steps=40, learning_rate=1e-2, **settings)
    grpo = GRPOTrainer(policy, share_of_vowels, arguments, rows.select_columns("prompt"), **given)
    grpo.train()
    base = {name: tensor.clone() for name, tensor in engine.state_dict().items()}
    trained, ids = grpo.model.eval(), torch.randint(3, 250, (4, 32))
    own = {name.replace(".base_layer", ""): weight for name, weight in trained.get_base_model().state_dict().items()}
    trained.merge_adapter()
    engine.load_state_dict({name: own[name] for name in base})  # what a trainer sends
    trained.unmerge_adapter()
    bits = trained(ids).logits.equal(engine(ids).logits)
    back = all(own[name].equal(tensor) for name, tensor in base.items())
    rewards = [entry["reward"] for entry in grpo.state.log_history if "reward" in entry]
    print(
        f"grpo: reward {rewards[0]:.2f} -> {rewards[-1]:.2f}, what was sent computes the trainer's bits: {bits}, "
        f"the base is as before: {back}"
    )
    assert bits
    assert back
    assert rewards[-1] > 2 * rewards[0]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as room:
        main(room)
