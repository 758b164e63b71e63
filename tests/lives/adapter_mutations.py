"""Ways to spoil a saved adapter on disk. Each takes a source of randomness, the folder and the corpus it came from."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
Corpus = dict[str, Path]
Mutation = Callable[[random.Random, Path, Corpus], object]


def _flip(rng: random.Random, file: Path, start: int = 0, stop: int | None = None) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        content[rng.randrange(start, stop or len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def _header_size(folder: Path) -> int:
    return 8 + struct.unpack("<Q", (folder / WEIGHTS).read_bytes()[:8])[0]


def truncated(rng: random.Random, folder: Path, corpus: Corpus) -> None:
    file = folder / rng.choice([CONFIG, WEIGHTS, WEIGHTS])
    os.truncate(file, rng.randrange(file.stat().st_size))


def longer(rng: random.Random, folder: Path, corpus: Corpus) -> None:
    with (folder / rng.choice([CONFIG, WEIGHTS])).open("ab") as file:
        file.write(rng.randbytes(rng.choice([1, 100, 10_000])))


def _edit_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content, size = (folder / WEIGHTS).read_bytes(), _header_size(folder)
    header = json.loads(content[8:size])
    change(header)
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[size:])


def header_value(key: str, values: list[Any]) -> Mutation:
    """One of the values for the key of a tensor, with the bytes left as they were."""

    def mutation(rng: random.Random, folder: Path, corpus: Corpus) -> None:
        def change(header: dict[str, Any]) -> None:
            header[rng.choice([name for name in header if name != "__metadata__"])][key] = rng.choice(values)

        _edit_header(folder, change)

    return mutation


def header_names(rng: random.Random, folder: Path, corpus: Corpus) -> None:
    """Path tricks, controls and lengths in names."""
    tricks = [
        "../../etc/passwd",
        "/abs",
        "\x00",
        "a" * 100_000,
        "",
        "..",
        "smoa_A",
        "\ud800".encode("utf-8", "replace"),
    ]

    def change(header: dict[str, Any]) -> None:
        key = rng.choice([key for key in header if key != "__metadata__"])
        trick = rng.choice(tricks)
        other = key.replace("up", "down") if rng.random() < 0.3 else str(trick)
        header[other if rng.random() < 0.7 else f"{key}.{trick}"] = header.pop(key)

    _edit_header(folder, change)


def header_bomb(rng: random.Random, folder: Path, corpus: Corpus) -> None:
    """A header that nests deeply or claims to be huge."""
    depth = rng.choice([200, 100_000])
    text = rng.choice([b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth])
    size = rng.choice([len(text), 2**63 - 1, 2**40, 99_999_999])
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", size) + text)


def sparse(rng: random.Random, folder: Path, corpus: Corpus) -> None:
    """A terabyte of nothing, with the header to it."""
    rows = 2**36
    key = "base_model.model.up.smoa_A.weight"
    text = json.dumps({key: {"dtype": "F32", "shape": [rows, 4], "data_offsets": [0, 16 * rows]}}).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(folder / WEIGHTS, 8 + len(text) + 16 * rows)


def _edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, folder / WEIGHTS)


def tensor_missing(rng: random.Random, folder: Path, corpus: Corpus) -> None:
    _edit_tensors(folder, lambda tensors: [tensors.pop(key) for key in rng.sample(sorted(tensors), rng.randint(1, 3))])


def tensor_extra(rng: random.Random, folder: Path, corpus: Corpus) -> None:
    """Also those of the base, which are written over it."""
    names = ["up.base_layer.weight", "down.base_layer.bias", "up.lora_A.weight", "left.smoa_A.weight", "head.weight"]
    names += ["up.smoa_C.weight", "up.weight", "head.original_module.weight", "up.smoa_A.other.weight"]
    shape = rng.choice([(10, 12), (12,), (4, 6), (3, 12)])
    _edit_tensors(folder, lambda tensors: tensors.update({f"base_model.model.{rng.choice(names)}": torch.ones(shape)}))


def tensor_shape(rng: random.Random, folder: Path, corpus: Corpus) -> None:

    def change(tensors: dict[str, Tensor]) -> None:
        key = rng.choice(sorted(tensors))
        tensor = tensors[key]
        tensors[key] = rng.choice(
            [tensor[:-1], torch.cat([tensor, tensor]), tensor[None], tensor.flatten()[:0], tensor.flip(0)]
        )

    _edit_tensors(folder, change)


def tensor_dtype(rng: random.Random, folder: Path, corpus: Corpus) -> None:
    dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.bool, torch.float8_e4m3fn, torch.int8]

    def change(tensors: dict[str, Tensor]) -> None:
        for key in rng.sample(sorted(tensors), rng.randint(1, len(tensors))):
            tensors[key] = tensors[key].to(rng.choice(dtypes))

    _edit_tensors(folder, change)


def tensor_values(rng: random.Random, folder: Path, corpus: Corpus) -> None:
    """NaN, infinities, and what overflows when the factor is cast."""

    def change(tensors: dict[str, Tensor]) -> None:
        key = rng.choice(sorted(key for key, tensor in tensors.items() if tensor.is_floating_point()))
        tensor = tensors[key] = tensors[key].double() if rng.random() < 0.3 else tensors[key]
        tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice([float("nan"), float("inf"), -float("inf"), 1e38])
        if tensor.dtype == torch.float64:
            tensor.view(-1)[0] = 1e300

    _edit_tensors(folder, change)


def labels(rng: random.Random, folder: Path, corpus: Corpus) -> None:
    """Beyond the last block, of the wrong sizes, swapped, all one."""

    def change(tensors: dict[str, Tensor]) -> None:
        found = sorted(key for key in tensors if key.endswith("_labels"))
        if not found:
            return
        key = rng.choice(found)
        value = tensors[key]
        value[rng.randrange(len(value))] = rng.choice([0, 1, 2, 3, 254, 255])
        if rng.random() < 0.3:
            tensors[key] = value.flip(0) if rng.random() < 0.5 else torch.zeros_like(value)

    _edit_tensors(folder, change)


VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 3, 2**31, 10**12, 1.5, 1e308, "", "x", "(", "../..", "all-linear", ".*", "up"),
    *([], [1], ["up"], [[]], [None], [-1], [10**12], {}, {"a": 1}, {"up": 10**9}, {"": {}}, {"up": [0]}),
]


def config_value(rng: random.Random, folder: Path, corpus: Corpus) -> None:
    """A value of a wrong type, range or meaning for one of the keys."""
    config = json.loads((folder / CONFIG).read_text())
    config[rng.choice(sorted(config))] = rng.choice(VALUES)
    (folder / CONFIG).write_text(json.dumps(config))


def config_keys(rng: random.Random, folder: Path, corpus: Corpus) -> None:
    """Keys missing, unknown, or of Python's own."""
    config = json.loads((folder / CONFIG).read_text())
    config.pop(rng.choice(sorted(config)))
    if rng.random() < 0.5:
        config[rng.choice(["__class__", "self", "runtime_config", "num_block"])] = "x"
    (folder / CONFIG).write_text(json.dumps(config))


def config_bomb(rng: random.Random, folder: Path, corpus: Corpus) -> None:
    """Deep nesting, numbers of many digits, long lists, and JSON that is no object."""
    depth = rng.choice([500, 100_000])
    config = json.loads((folder / CONFIG).read_text())
    bombs = ["[" * depth, '{"a":' * depth, "9" * 100_000, "[]", "1", "null", '"smoa"', "", "\x00", "NaN", "\ufeff{}"]
    bombs.append(json.dumps(config | {"target_modules": ["up"] * 200_000}))
    bombs.append(json.dumps(config)[:-1] + f', "r": {"9" * 4000}}}')
    bombs.append(json.dumps(config)[:-1] + f', "alpha_pattern": {"[" * 900 + "]" * 900}}}')
    (folder / CONFIG).write_text(rng.choice(bombs))


def nothing(rng: random.Random, folder: Path, corpus: Corpus) -> None:
    """The control."""


def files_swapped(rng: random.Random, folder: Path, corpus: Corpus) -> None:
    """The config or the weights of another adapter, also of another method."""
    shutil.copy(corpus[rng.choice(sorted(corpus))] / rng.choice([CONFIG, WEIGHTS]), folder)


def file_missing(rng: random.Random, folder: Path, corpus: Corpus) -> None:
    (folder / rng.choice([CONFIG, WEIGHTS])).unlink()


class Payload:
    """What unpickling would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('code ran')",)


def pickled(rng: random.Random, folder: Path, corpus: Corpus) -> None:
    """Weights as a pickle, harmless or not."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    if rng.random() < 0.5:
        torch.save(tensors, folder / PICKLE)
    else:
        (folder / PICKLE).write_bytes(pickle.dumps(Payload()))


def linked(rng: random.Random, folder: Path, corpus: Corpus) -> None:
    """Links to the file itself, to a device, in a circle, to nowhere; a folder."""
    file = folder / rng.choice([CONFIG, WEIGHTS])
    kept = file.rename(folder / "kept")
    kind = rng.randrange(5)
    if kind == 4:
        file.mkdir()
    else:
        file.symlink_to([kept, "/dev/zero", file, "/nowhere/at/all"][kind])


def code_beside(rng: random.Random, folder: Path, corpus: Corpus) -> None:
    """Code that nobody asked for, under names that loaders of models know."""
    for name in ("modeling.py", "__init__.py", "smoa.py", "adapter_model.py", "config.json"):
        (folder / name).write_text('raise SystemExit("code ran")')
    if rng.random() < 0.5:
        config = json.loads((folder / CONFIG).read_text())
        config["auto_mapping"] = {"base_model_class": "Base", "parent_library": "antigravity"}
        (folder / CONFIG).write_text(json.dumps(config))


MUTATIONS: dict[str, Mutation] = {
    "flipped_header": lambda rng, folder, _: _flip(rng, folder / WEIGHTS, 0, _header_size(folder)),
    "flipped_values": lambda rng, folder, _: _flip(rng, folder / WEIGHTS, _header_size(folder)),
    "flipped_config": lambda rng, folder, _: _flip(rng, folder / CONFIG),
    "header_shape": header_value(
        "shape", [[2**62, 2], [-1, 4], [2**63 - 1], [0, 0], [1] * 1000, "ab", None, [1.5], [2**40, 2**40]]
    ),
    "header_offsets": header_value("data_offsets", [[0, 2**62], [-8, 8], [8, 0], [0, 8], [2**64 - 8, 2**64 - 1], []]),
    "header_dtype": header_value("dtype", ["I32", "U32", "BF16", "F64", "BOOL", "F8_E4M3", "C64", "X9", 3, None]),
} | {
    function.__name__: function
    for function in (
        *(truncated, longer, header_names, header_bomb, sparse),
        *(tensor_missing, tensor_extra, tensor_shape, tensor_dtype, tensor_values, labels),
        *(config_value, config_keys, config_bomb, nothing),
        *(files_swapped, file_missing, pickled, linked, code_beside),
    )
}
