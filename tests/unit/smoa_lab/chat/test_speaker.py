from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from smoa.errors import ConfigError, DataError, SmoaError
from smoa_lab.chat.speaker import Speaker, Writing
from tests.support.chats import chat_base, saved_adapter, speaker_of, written
from tests.support.lab import byte_tokenizer

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return chat_base(tmp_path / "base")


@pytest.fixture
def first(tmp_path: Path, base: Path) -> Path:
    return saved_adapter(tmp_path / "first", base, seed=1)


@pytest.fixture
def second(tmp_path: Path, base: Path) -> Path:
    """On other layers than the first."""
    return saved_adapter(tmp_path / "second", base, seed=2, target_modules=["o_proj", "up_proj"])


def said(speaker: Speaker, **options: Any) -> str:
    pieces: list[str] = []
    speaker.write(HELLO, pieces.append, **options)
    return "".join(pieces)


def plain(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base)


def by_generate(base: Path, adapter: Path | None = None) -> str:
    """Without a cache of weights."""
    model = plain(base) if adapter is None else PeftModel.from_pretrained(plain(base), str(adapter))
    return written(model, base, HELLO)


def test_the_streamed_text_is_the_text_that_generate_writes(base: Path) -> None:
    pieces: list[str] = []
    speaker_of(base).write(HELLO, pieces.append)
    assert len(pieces) > 1
    assert "".join(pieces) == by_generate(base)


def test_an_adapter_a_base_and_another_adapter_each_write_their_own_text(base: Path, first: Path, second: Path) -> None:
    texts = {"base": by_generate(base), "first": by_generate(base, first), "second": by_generate(base, second)}
    assert len(set(texts.values())) == 3
    speaker = speaker_of(first)
    assert (speaker.name, said(speaker)) == ("first", texts["first"])
    speaker.toggle()
    assert (speaker.name, said(speaker)) == ("base", texts["base"])
    assert said(speaker, adapted=True) == texts["first"]
    speaker.load(str(second))
    assert (speaker.name, said(speaker)) == ("second", texts["second"])
    assert said(speaker, adapted=False) == texts["base"]
    speaker.use("first")
    assert said(speaker) == texts["first"]
    speaker.toggle()
    speaker.toggle()
    assert said(speaker) == texts["first"]


def test_a_base_in_half_precision_writes_its_own_text_again_after_an_adapter(base: Path, first: Path) -> None:
    speaker = speaker_of(first, dtype="bfloat16")
    said(speaker)
    speaker.toggle()
    half = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    assert said(speaker) == written(half, base, HELLO)


def test_an_adapter_is_loaded_on_a_plain_model(base: Path, first: Path) -> None:
    speaker = speaker_of(base)
    with pytest.raises(DataError, match="no adapter is loaded"):
        speaker.toggle()
    assert said(speaker) == by_generate(base)
    speaker.load(str(first))
    assert said(speaker) == by_generate(base, first)


def test_adapters_of_other_methods_talk_too(tmp_path: Path, base: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(plain(base), config).save_pretrained(tmp_path / "lora")
    speaker = speaker_of(tmp_path / "lora")
    assert said(speaker) == by_generate(base, tmp_path / "lora") != by_generate(base)


def damage(adapter: Path) -> None:
    """Give its factors a shape that fits no layer."""
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: torch.cat([one, one], -1) if "smoa_B" in name else one for name, one in tensors.items()}, file)


def test_a_load_that_fails_leaves_the_model_as_it_was(base: Path, first: Path, second: Path) -> None:
    damage(second)
    speaker = speaker_of(base)
    for expected in (by_generate(base), by_generate(base, first)):
        with pytest.raises(SmoaError):
            speaker.load(str(second))
        assert said(speaker) == expected
        speaker.load(str(first))
        assert said(speaker) == by_generate(base, first)


def test_a_load_that_peft_refuses_is_an_error_of_ours(tmp_path: Path, base: Path, first: Path) -> None:
    config = LoraConfig(r=2, target_modules=["nothing"], base_model_name_or_path=str(base))
    config.save_pretrained(tmp_path / "lora")
    speaker = speaker_of(first)
    with pytest.raises(DataError, match="lora: cannot be loaded"):
        speaker.load(str(tmp_path / "lora"))
    with pytest.raises(ConfigError, match="contains no adapter"):
        speaker.load(str(tmp_path))
    assert said(speaker) == by_generate(base, first)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path, base: Path, first: Path) -> None:
    other = saved_adapter(tmp_path / "other", chat_base(tmp_path / "another-base"))
    with pytest.raises(DataError, match=r"is an adapter of .*another-base, this model is .*base; .*--base"):
        speaker_of(first).load(str(other))


def test_a_base_that_was_moved_is_known_by_both_names(tmp_path: Path, base: Path, first: Path, second: Path) -> None:
    moved = base.rename(tmp_path / "moved")
    speaker = speaker_of(first, name=str(moved))
    speaker.load(str(second))
    assert list(speaker.adapters) == ["first", "second"]


def test_adapters_are_named_after_their_runs_and_numbered_if_those_have_one_name(tmp_path: Path, base: Path) -> None:
    """Also after runs whose names PyTorch refuses for a module: with a dot, or of a method."""
    places = [saved_adapter(tmp_path / name / "adapter", base) for name in ("lr-0.1", "a/train", "b/train")]
    speaker = speaker_of(base)
    for place in places:
        speaker.load(str(place.parent))
    assert list(speaker.adapters) == ["lr-0.1", "train", "train-2"]
    with pytest.raises(DataError, match=r"no adapter 'trian' is loaded; did you mean 'train'\?"):
        speaker.use("trian")


def test_a_run_whose_name_ends_in_a_number_leaves_others_their_own(tmp_path: Path, base: Path) -> None:
    places = [saved_adapter(tmp_path / name / "adapter", base) for name in ("demo-2", "demo", "a/demo", "b/demo-2")]
    speaker = speaker_of(base)
    for place in places:
        speaker.load(str(place))
    assert list(speaker.adapters) == ["demo-2", "demo", "demo-3", "demo-2-2"]


def test_the_template_saved_with_one_adapter_and_its_end_of_turn_are_not_another_ones(
    base: Path, first: Path, second: Path
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens("<over>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<over>{% endfor %}"
    tokenizer.save_pretrained(first)
    speaker = speaker_of(second)
    before = [speaker.tokens(HELLO)["input_ids"].tolist(), speaker.base.generation_config.eos_token_id]
    speaker.load(str(first))
    assert "<over>" in speaker.tokenizer.chat_template
    speaker.use("second")
    assert [speaker.tokens(HELLO)["input_ids"].tolist(), speaker.base.generation_config.eos_token_id] == before
    again = speaker_of(first)
    again.load(str(second))
    assert [again.tokens(HELLO)["input_ids"].tolist(), again.base.generation_config.eos_token_id] == before


def test_a_temperature_samples(base: Path) -> None:
    speaker = speaker_of(base, Writing(max_new_tokens=12, temperature=5.0))
    assert len({said(speaker) for _ in range(3)}) > 1


def test_what_the_chat_template_refuses_is_an_error_of_ours(base: Path) -> None:
    with pytest.raises(DataError, match="chat template refuses this: no such prompt"):
        speaker_of(base).tokens([{"role": "system", "content": "forbidden"}, *HELLO])
