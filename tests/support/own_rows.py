"""A tiny model whose byte tokenizer knows the special tokens of well-known chat templates, and rows to train it on."""

from importlib import resources
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from smoa_lab.config.run import RunConfig, check_config
from tests.support.lab import byte_tokenizer, made_once, saved, tiny_llama
from tests.support.lab import write_rows as write_rows

SPECIALS = [
    *("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>"),
]
PLAIN = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""No marks, and no template that TRL knows."""
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMED = (
    "{% for message in messages %}{{ message.role + ': ' + message.content | trim + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
"""Nothing closes a turn but the line's end."""
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + PLAIN


def trl_template(name: str) -> str:
    """The text of a template that TRL has."""
    return (resources.files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def tokenizer_with(template: str | None) -> PreTrainedTokenizerFast:
    """One token per byte, the special tokens, and a chat template or none."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS})
    tokenizer.chat_template = template
    return tokenizer


def tiny_chat_model() -> LlamaForCausalLM:
    """A Llama of two layers for that tokenizer, with room for the rows of examples/data."""
    return tiny_llama(len(tokenizer_with(None)), positions=1024)


def _rows_base(folder: Path, template: str | None) -> Path:
    return saved(tiny_chat_model(), tokenizer_with(template), folder)


def rows_base(folder: Path, template: str | None = MARKED) -> Path:
    """Both, saved as a base model."""
    return made_once(folder, _rows_base, template)


def chats(number: int) -> list[dict[str, Any]]:
    """Rows of one question and one answer, every one different."""
    return [{"messages": chat(f"What is {i} plus one?", f"It is {i + 1}.")} for i in range(number)]


def pairs(number: int) -> list[dict[str, Any]]:
    """Preferences."""
    return [
        {"prompt": f"{i} plus one is", "chosen": f" {i + 1}, I think.", "rejected": f" {i}, surely."}
        for i in range(number)
    ]


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Turns of user and assistant in alternation."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def rows_values(room: Path, rows: Path, base: Path, *, data: Any = None, training: Any = None, **sections: Any) -> Any:
    """The plain config of a run of two steps in `room`/run."""
    return {
        "model": {"name": str(base), "dtype": "float32"},
        "adapter": {"r": 4, "num_blocks": 2, "target_modules": ["q_proj", "v_proj"]},
        "data": {"train": str(rows), "samples": 1, **(data or {})},
        "training": {
            "output_dir": str(room / "run"),
            "use_cpu": True,
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            **(training or {}),
        },
        **sections,
    }


def rows_config(room: Path, rows: Path, base: Path, **changes: Any) -> RunConfig:
    """The same, checked."""
    return check_config(rows_values(room, rows, base, **changes))


def losses(metrics: dict[str, Any]) -> list[float]:
    """The training losses of a run."""
    return [entry["loss"] for entry in metrics["history"] if "loss" in entry]
