"""Trains 64 adapters at once with the Trainer, each on one person's facts, saves them, and asks all in one batch.

    python many_adapters.py MODEL      a folder or a name on the Hub, by default SmolLM2-135M-Instruct
Shows: several adapters at once over one base; each row of a step names its adapter, and each is clipped by itself.
Printed when last run: 14 steps: 1043 s (on a busy machine); 64 of 64 recall their facts in one batch
"""

import sys
import tempfile

from peft import PeftModel, get_peft_model
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from smoa import SmoaConfig

TOWNS = ["Lutz", "Birken", "Oslo", "Quito", "Perth", "Cadiz", "Lagos", "Turin"]
PETS = ["goat", "newt", "mule", "toad", "lynx", "swan", "moth", "carp"]
PEOPLE = {f"person-{n}": f"I live in {TOWNS[n % 8]} with a {PETS[n // 8]}." for n in range(64)}
TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
ADAPTER = {"r": 8, "num_blocks": 8, "target_modules": TARGETS, "layers_to_transform": list(range(22, 30))}


class ClippedAlone(TrainerCallback):
    def on_pre_optimizer_step(self, *_: object, model: PeftModel, **__: object) -> None:
        for person in PEOPLE:  # the loss is the mean of 64
            clip_grad_norm_([p for name, p in model.named_parameters() if f".{person}." in name], 1 / 64)


def main(steps: int = 14) -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
    base, tokenizer = AutoModelForCausalLM.from_pretrained(name, dtype="float32"), AutoTokenizer.from_pretrained(name)
    model = get_peft_model(base, SmoaConfig(**ADAPTER), "person-0")
    for person in list(PEOPLE)[1:]:
        model.add_adapter(person, SmoaConfig(**ADAPTER))
    model.set_requires_grad(list(PEOPLE))

    def collate(people: list[str]) -> dict[str, object]:
        facts = tokenizer([PEOPLE[who] for who in people], return_tensors="pt", padding=True, padding_side="right")
        labels = facts.input_ids.masked_fill(facts.attention_mask == 0, -100)
        return {**facts, "labels": labels, "adapter_names": people}

    with tempfile.TemporaryDirectory() as folder:
        settings = {"per_device_train_batch_size": 64, "max_steps": steps, "learning_rate": 1e-2, "report_to": "none"}
        settings |= {"lr_scheduler_type": "constant", "max_grad_norm": 0, "save_strategy": "no", "use_cpu": True}
        settings = TrainingArguments(folder, remove_unused_columns=False, **settings)
        trained = Trainer(model, settings, collate, list(PEOPLE), callbacks=[ClippedAlone()]).train()
        model.save_pretrained(folder, selected_adapters=list(PEOPLE))
        model = PeftModel.from_pretrained(model.unload(), f"{folder}/person-0", "person-0")
        for person in list(PEOPLE)[1:]:
            model.load_adapter(f"{folder}/{person}", person)
    tokens = tokenizer(["I live in"] * 64, return_tensors="pt")
    tokens = model.eval().generate(**tokens, adapter_names=list(PEOPLE), max_new_tokens=7, do_sample=False)
    recalled = sum(map(str.__contains__, tokenizer.batch_decode(tokens), PEOPLE.values()))
    print(f"{steps} steps: {trained.metrics['train_runtime']:.0f} s; {recalled} of 64 recall their facts in one batch")
    assert recalled >= 58


if __name__ == "__main__":
    main()
