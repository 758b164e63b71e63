"""Two processes of FSDP2: rank 0 prints how many layers took one product, and whether logits are the merged model's."""

import copy
import sys

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.distributed.fsdp import fully_shard

from smoa import SmoaConfig
from smoa.kernels.one_product import OneProduct
from tests.support import tiny


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    config = SmoaConfig(
        r=8, num_blocks=2, init_weights=False, task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"]
    )
    model = get_peft_model(tiny.build("llama", torch.bfloat16), config, autocast_adapter_dtype=False)
    ids = tiny.batch("llama", size=8, length=16)["input_ids"]
    with torch.no_grad():
        expected = copy.deepcopy(model).merge_and_unload()(input_ids=ids).logits
    products, original = [], OneProduct.forward

    def counted(*args: object) -> torch.Tensor:
        products.append(1)
        return original(*args)  # type: ignore[arg-type]

    OneProduct.forward = counted  # type: ignore[assignment, method-assign]
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    if dist.get_rank() == 0:
        sys.stdout.write(f"{len(products)} {torch.equal(output.logits, expected)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
