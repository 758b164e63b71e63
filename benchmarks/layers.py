"""Times single adapted layers.

    python benchmarks/layers.py layer_step [--shape 4096x4096] [--dtype float32] [--partition contiguous] [--compile]
    python benchmarks/layers.py whole_step [--hidden 1024] [--bits 4]
    python benchmarks/layers.py layer_kinds_step
    python benchmarks/layers.py sweep

A step is forward and backward, with the gradient of x. Times are taken in turn in one process.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from _common import bfloat16_instructions, drawn, interleaved, lower_quartile, run, saved_bytes, trainable
from peft import HiraConfig, LoraConfig, PeftConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from smoa import SmoaConfig
from smoa.partition import Blocks, block_sizes
from smoa.spectrum import make_partition

METHODS = ("frozen", "smoa", "lora", "hira", "released")
SWEPT = {
    "tokens": (1, 16, 64, 256, 1024, 4096, 16384),
    "width": (512, 1024, 2048, 4096, 8192),
    "num_blocks": (1, 2, 4, 8, 16, 32, 64),
    "r": (8, 16, 32, 64, 128, 256),
}
SWEEP_START = {"tokens": 1024, "width": 2048, "num_blocks": 4, "r": 32}
SECONDS_A_POINT = 4.0
KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "conv 256 → 256, 3×3, on 4 × 28 × 28": (
        lambda: nn.Conv2d(256, 256, 3, padding=1),
        lambda: torch.randn(4, 256, 28, 28),
    ),
    "patches 3 → 768, 16×16, of 8 × 224 × 224": (
        lambda: nn.Conv2d(3, 768, 16, 16),
        lambda: torch.randn(8, 3, 224, 224),
    ),
    "embedding 50,000 × 1024, of 4 × 512 tokens": (
        lambda: nn.Embedding(50_000, 1024),
        lambda: torch.randint(0, 50_000, (4, 512)),
    ),
}


class ReleasedLinear(nn.Module):
    """A frozen `nn.Linear` with the form of SMoA that its authors released, rewritten from its description.

    Each layer keeps float32 copies of its anchors as buffers. Every forward scatters the modulated blocks into a dense
    ΔW, which autograd keeps, and multiplies the inputs with it in a second full product, in float32.
    """

    def __init__(self, base: nn.Linear, r: int, partition: Blocks) -> None:
        super().__init__()
        self.base = base
        self.rows = [partition.rows(k) for k in range(partition.num_blocks)]
        self.cols = [partition.cols(k) for k in range(partition.num_blocks)]
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        for k, rank in enumerate(block_sizes(r, partition.num_blocks)):
            anchor = base.weight.detach()[self.rows[k][:, None], self.cols[k]]
            self.register_buffer(f"anchor_{k}", anchor.float())
            width = len(self.cols[k])
            self.A.append(torch.empty(rank, width, device=anchor.device).uniform_(-(width**-0.5), width**-0.5))
            self.B.append(0.01 * torch.randn(len(self.rows[k]), rank, device=anchor.device))

    def forward(self, x: Tensor) -> Tensor:
        delta = self.A[0].new_zeros(self.base.weight.shape)
        for k, (rows, cols) in enumerate(zip(self.rows, self.cols, strict=True)):
            delta[rows[:, None], cols] = self.B[k] @ self.A[k] * self.get_buffer(f"anchor_{k}")
        return self.base(x) + nn.functional.linear(x.float(), delta).to(x.dtype)


class OneLayer(nn.Module):
    """A frozen linear layer without bias, with weights as large as in trained layers (rms 0.02)."""

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False, dtype=dtype, device=device)
        nn.init.normal_(self.linear.weight, std=0.02).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def adapted(method: str, base: OneLayer, r: int, num_blocks: int, partition: str = "random") -> nn.Module:
    """`base` with a method. All except "frozen" train as many parameters as SMoA of rank r with K blocks.

    The partition is random or contiguous, because decomposing the weight would not change the cost of a step.
    """
    weight = base.linear.weight
    layer = OneLayer(*weight.shape, weight.dtype, weight.device)
    layer.linear.weight = weight
    if method == "frozen":
        return layer
    if method == "released":
        return ReleasedLinear(layer.linear, r, make_partition(weight, num_blocks, partition))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(layer, drawn(method, max(1, r // num_blocks), num_blocks, partition, ["linear"]))


def inputs(base: OneLayer, tokens: int) -> tuple[Tensor, Tensor]:
    """An input, and a gradient of the output."""
    weight = base.linear.weight
    x, grad = (torch.randn(tokens, size, dtype=weight.dtype, device=weight.device) for size in reversed(weight.shape))
    return x, grad


def training_step(model: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    """A step of forward and backward that computes the gradient of the input too."""
    parameters = list(model.parameters())

    def step() -> None:
        leaf = x.detach().requires_grad_(True)
        model(leaf).backward(grad)
        for parameter in parameters:
            parameter.grad = None

    return step


def floor(num_blocks: int) -> float:
    """Lower bound of a step's cost, in steps of the frozen layer: matrix products only, no passes over the weight."""
    return (2 + 1 / num_blocks) / 2


def layer_step(
    device: torch.device,
    shape: str = "4096x4096",
    dtype: str = "float32",
    tokens: int = 1024,
    num_blocks: tuple[int, ...] = (2, 4, 8),
    r: int = 32,
    repeats: int = 8,
    methods: tuple[str, ...] = METHODS,
    partition: str = "random",
    compile: bool = False,
) -> dict[str, Any]:
    """A step of one linear layer with each method, as a ratio to the frozen layer's time and to the floor, (2 + 1/K)/2.

    All methods train as many parameters as SMoA, whose blocks are spread ("random") or contiguous.
    """
    base = OneLayer(*map(int, shape.split("x")), getattr(torch, dtype), device)
    x, grad = inputs(base, tokens)
    results = []
    for blocks in num_blocks:
        models = {name: adapted(name, base, r, blocks, partition) for name in methods}
        parameters = {name: trainable(model) for name, model in models.items()}
        if compile:
            models = {name: torch.compile(model, fullgraph=name != "released") for name, model in models.items()}
        steps = {name: training_step(model, x, grad) for name, model in models.items()}
        interleaved(steps, 1, device)
        times = interleaved(steps, repeats, device)
        frozen = times["frozen"]
        results.append(
            {
                "num_blocks": blocks,
                "floor": floor(blocks),
                "trainable": parameters,
                "seconds": times,
                "ratio": {name: lower_quartile(times[name]) / lower_quartile(frozen) for name in times},
                "ratio_of_fastest": {name: min(times[name]) / min(frozen) for name in times},
            }
        )
        print(f"K={blocks}", {name: round(ratio, 3) for name, ratio in results[-1]["ratio"].items()}, flush=True)
    marks = ["" if tokens == 1024 else f"_{tokens}", "" if partition == "random" else f"_{partition}"]
    name = f"layer_step_{shape}_{dtype}{''.join(marks)}{'_compiled' if compile else ''}"
    return {"name": name, "results": results}


def whole_step(
    device: torch.device,
    hidden: int = 2048,
    layers: int = 2,
    tokens: int = 1024,
    bits: int = 16,
    num_blocks: tuple[int, ...] = (4, 8),
    repeats: int = 9,
) -> dict[str, Any]:
    """A step of a Llama in bfloat16, or on a base in 4 bits, by default with layers as wide as Llama 3.2 1B's: SMoA,
    r = 32, and LoRA of as many parameters with factors in float32 and in bfloat16, ÷ the frozen model's.

    K = 4 is what README recommends beside LoRA r = 8. Spread blocks are random: decomposing changes no step.
    """
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 256}
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers, **heads}
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    ids, results = torch.randint(3, 1900, (tokens // 256, 256)), []

    def model(config: PeftConfig | None, factors_in_float32: bool = True) -> nn.Module:
        torch.manual_seed(0)
        base = LlamaForCausalLM(LlamaConfig(vocab_size=2000, **sizes)).bfloat16().requires_grad_(False)
        base = in_4_bits(base, targets) if bits == 4 else base
        return base if config is None else get_peft_model(base, config, autocast_adapter_dtype=factors_in_float32)

    for blocks in num_blocks:
        chosen: dict[str, Any] = {"target_modules": targets, "task_type": "CAUSAL_LM"}
        lora = {"r": 32 // blocks, "lora_alpha": 64 // blocks, **chosen}
        smoa = {"r": 32, "num_blocks": blocks, "alpha": 64, **chosen}
        models = {
            "frozen": model(None),
            "lora, float32 factors": model(LoraConfig(**lora)),
            "lora, 16-bit factors": model(LoraConfig(**lora), False),
            "smoa, spread": model(SmoaConfig(partition="random", **smoa)),
            "smoa, contiguous": model(SmoaConfig(partition="contiguous", **smoa)),
        }

        def step(model: nn.Module) -> None:
            embeddings = model.get_input_embeddings()(ids).detach().requires_grad_(True)  # type: ignore[operator]
            model.train()(inputs_embeds=embeddings, labels=ids).loss.backward()

        steps = {name: (lambda one=one: step(one)) for name, one in models.items()}
        interleaved(steps, 1, device)
        times = interleaved(steps, repeats, device)
        ratio = {name: lower_quartile(own) / lower_quartile(times["frozen"]) for name, own in times.items()}
        results.append({"num_blocks": blocks, "seconds": times, "ratio": ratio})
        print(f"K={blocks}", {name: round(value, 3) for name, value in ratio.items()}, flush=True)
    return {"name": f"whole_step_{hidden}_{bits}_bits_{bfloat16_instructions()}", "results": results}


def in_4_bits(model: nn.Module, targets: list[str]) -> nn.Module:
    """The model with its target layers in bitsandbytes' nf4."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, layer in list(model.named_modules()):
        if name.rpartition(".")[2] in targets:
            packed = Linear4bit(layer.in_features, layer.out_features, False, torch.bfloat16, quant_type="nf4")
            packed.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            model.set_submodule(name, packed.to("cpu"))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # PEFT's LoRA asks
    return model


def layer_kinds_step(device: torch.device, r: int = 32, num_blocks: int = 4, repeats: int = 9) -> dict[str, Any]:
    """A step of an adapted convolution and embedding, with SMoA, and LoRA and HiRA of r / K, in float32."""
    measured = {}
    for name, (build, draw) in KINDS.items():
        base, x = build().to(device).requires_grad_(False), draw().to(device)
        x = x.requires_grad_() if x.is_floating_point() else x  # the frozen embedding has no backward
        chosen: dict[str, Any] = {"target_modules": ["layer"]}
        configs = {
            "SMoA": SmoaConfig(r=r, num_blocks=num_blocks, partition="random", **chosen),
            "LoRA": LoraConfig(r=r // num_blocks, **chosen),
            "HiRA": HiraConfig(r=r // num_blocks, **chosen),
        }
        layers = {"frozen": base}
        for method, config in configs.items():
            holder = nn.ModuleDict({"layer": copy.deepcopy(base)})
            layers[method] = inject_adapter_in_model(config, holder)["layer"].train()

        def step(layer: nn.Module, x: Tensor = x) -> None:
            y = layer(x)
            if y.requires_grad:
                y.backward(torch.ones_like(y))

        steps = {method: (lambda layer=layer: step(layer)) for method, layer in layers.items()}
        interleaved(steps, 1, device)
        seconds = {method: lower_quartile(times) for method, times in interleaved(steps, repeats, device).items()}
        ratios = {method: round(time / seconds["frozen"], 2) for method, time in seconds.items()}
        measured[name] = {"seconds": seconds, "ratios": ratios}
    return {"layers": measured}


def sweep(device: torch.device, dtype: str = "float32") -> dict[str, Any]:
    """How a step of one SMoA layer grows with tokens, width, K and r: time ÷ floor, and bytes kept for the backward.

    One quantity changes at a time; the others stay at 1,024 tokens, width 2,048, K = 4, r = 32.
    """
    results: dict[str, list[dict[str, Any]]] = {quantity: [] for quantity in SWEPT}
    for quantity, value in ((quantity, value) for quantity, values in SWEPT.items() for value in values):
        point = SWEEP_START | {quantity: value}
        base = OneLayer(point["width"], point["width"], getattr(torch, dtype), device)
        x, grad = inputs(base, point["tokens"])
        models = {name: adapted(name, base, point["r"], point["num_blocks"]) for name in ("frozen", "smoa")}
        steps = {name: training_step(model, x, grad) for name, model in models.items()}
        once = sum(times[0] for times in interleaved(steps, 1, device).values())
        times = interleaved(steps, max(3, min(15, int(SECONDS_A_POINT / once))), device)
        ratio = lower_quartile(times["smoa"]) / lower_quartile(times["frozen"])
        least = floor(point["num_blocks"])
        kept = saved_bytes(models["smoa"], lambda model=models["smoa"], x=x: model(x.detach().requires_grad_(True)))
        costs = {"seconds": times, "ratio": ratio, "floor": least, "over_floor": ratio / least, "kept_bytes": kept}
        sizes = {"input_bytes": x.nbytes, "weight_bytes": base.linear.weight.nbytes}
        results[quantity].append(point | costs | sizes)
        print(f"{quantity}={value}  ÷ floor {ratio / least:.3f}  kept {kept:,} B", flush=True)
    return {"name": f"sweep_{dtype}", "results": results}


if __name__ == "__main__":
    run(__doc__, layer_step=layer_step, whole_step=whole_step, layer_kinds_step=layer_kinds_step, sweep=sweep)
