from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path

import pytest
from huggingface_hub import constants

from smoa_lab.basics.plain import Unsaved, finite, json_text, names_secret, portable, without_secrets


def test_what_is_not_finite_becomes_none_wherever_it_is() -> None:
    values = {"loss": math.nan, "rows": [1.5, -math.inf, {"deep": (math.inf, "nan", None, True)}]}
    assert finite(values) == {"loss": None, "rows": [1.5, None, {"deep": [None, "nan", None, True]}]}


def test_the_text_is_json_that_others_can_read() -> None:
    text = json_text({"loss": math.nan, "name": "ü"})
    assert json.loads(text, parse_constant=pytest.fail) == {"loss": None, "name": "ü"}
    assert text == '{\n  "loss": null,\n  "name": "ü"\n}'


def test_of_absolute_paths_only_the_last_name_is_left() -> None:
    values = {"name": "/home/me/base", "files": {"mine": ["~/data/train.jsonl", "C:\\data\\test.csv"]}}
    assert portable(values) == {"name": "base", "files": {"mine": ["train.jsonl", "test.csv"]}}


def test_everything_else_stays() -> None:
    values = {
        "name": "org/base",
        "folder": "runs/demo",
        "rates": [1e-3, None, True],
        "pattern": r".*\.q_proj",
        "~": "~",
    }
    assert portable(values) == values


@pytest.mark.parametrize(
    "key",
    [
        *("token", "hub_token", "HF_TOKEN", "use_auth_token", "password", "secret", "client_secret", "Authorization"),
        *("api_key", "apikey", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "private-key", "credentials"),
    ],
)
def test_a_text_that_is_named_like_a_secret_is_left_out(key: str) -> None:
    values = {"model": {"options": [{key: "x", "revision": "v2"}]}, "seed": 1}
    assert without_secrets(values) == {"model": {"options": [{"revision": "v2"}]}, "seed": 1}


def test_counts_of_tokens_and_a_tokenizers_own_tokens_are_no_secrets() -> None:
    values = {
        "tokens": 2048,
        "token": True,
        "num_tokens": 1.0,
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "monkey": "x",
    }
    assert without_secrets(values) == values
    assert not names_secret("tokenizer")


def test_the_tokens_of_this_machine_are_masked_wherever_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = tmp_path / "token"
    stored.write_text("hf_stored-one\n")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(stored))
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    monkeypatch.setenv("MY_TOKEN", "short")
    values = {"url": "https://me:hf_environment@host", "rows": ["a hf_stored-one b", "short"]}
    assert without_secrets(values) == {"url": "https://me:***@host", "rows": ["a *** b", "short"]}


def test_an_unsaved_token_can_be_used_and_copied_and_is_empty_once_it_was_pickled() -> None:
    token = Unsaved("hf_one")
    assert token == copy.deepcopy(token) == "hf_one"
    assert pickle.loads(pickle.dumps(token)) == ""
