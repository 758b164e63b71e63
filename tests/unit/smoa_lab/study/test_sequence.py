"""Studies of tasks in turn: the first task's model, where entries start, what is scored, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import LNTuningConfig, LoraConfig, OSFConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from smoa import SmoaConfig
from smoa.errors import ConfigError
from smoa_lab.cli.main import app
from smoa_lab.study import sequence as sequence_module
from smoa_lab.study.comparison import Comparison
from smoa_lab.study.report import report
from smoa_lab.study.runner import Runner
from smoa_lab.study.sequence import EarlierTask, SequenceRunner, weight_changes
from smoa_lab.study.study import Study
from smoa_lab.study.trials import TrialStore, Untouched
from smoa_lab.training.loaded_run import LoadedRun
from tests.support import lab, tiny_models

# Not ours: a deprecation between transformers and peft.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.usefixtures("few_resamples"),
]


def made(values: dict[str, Any]) -> tuple[EarlierTask, dict[str, Any]]:
    """The first stage and its scores, which are only the sum of the model's weights."""
    own = SequenceRunner(Study.model_validate(values))
    return own._first_task, own._first_task.scores(own.earlier_records[0], lambda model, _: {"sum": total(model)}, {})


def total(model: torch.nn.Module) -> float:
    return float(sum(parameter.detach().double().abs().sum() for parameter in model.parameters()))


def test_the_first_task_is_trained_once_and_a_kill_before_scoring_loses_only_the_scores(
    sequence: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, scores = made(sequence)
    stored = AutoModelForCausalLM.from_pretrained(stage.model.name)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert scores == {"sum": total(stored), "start": {"sum": total(base)}}
    assert total(stored) != total(base)
    monkeypatch.setattr(LoadedRun, "fit", lambda *_: pytest.fail("it was trained already"))
    again, same = made(sequence)
    assert (again.folder, same) == (stage.folder, scores)
    next(stage.folder.glob("scores-*.json")).unlink()
    assert made(sequence)[1] == scores


def test_an_interrupted_training_goes_on_from_its_checkpoint(
    sequence: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence["first"]["training"] = {"save_strategy": "steps", "save_steps": 1}
    real_folder = sequence_module.new_folder
    monkeypatch.setattr(sequence_module, "new_folder", lambda _: pytest.fail("killed before the model is stored"))
    with pytest.raises(pytest.fail.Exception):
        made(sequence)
    monkeypatch.setattr(sequence_module, "new_folder", real_folder)
    checkpoints = []
    real_fit = LoadedRun.fit

    def fit(*arguments: Any) -> Any:
        checkpoints.append(Path(arguments[-1]).name)
        return real_fit(*arguments)

    monkeypatch.setattr(LoadedRun, "fit", fit)
    stage, _ = made(sequence)
    assert checkpoints == ["checkpoint-2"]
    *others, scores = sorted(file.name for file in stage.folder.iterdir())
    assert (others, scores[:7]) == (["lock", "model"], "scores-")


def test_an_adapter_is_merged_and_stored_in_the_models_dtype(sequence: dict[str, Any], tmp_path: Path) -> None:
    sequence["shared"]["model"]["dtype"] = "bfloat16"
    adapter = {"r": 4, "num_blocks": 2, "target_modules": ["q_proj"]}
    sequence["first"] |= {"method": "smoa", "adapter": adapter, "learning_rate": 0.1, "model": {"dtype": "float32"}}
    stage, _ = made(sequence)
    stored = AutoModelForCausalLM.from_pretrained(stage.model.name, dtype="auto")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    assert stored.dtype == torch.bfloat16
    changed = {
        name
        for (name, new), (_, old) in zip(stored.named_parameters(), base.named_parameters(), strict=True)
        if not torch.equal(new, old)
    }
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}


def test_a_training_that_diverges_is_not_stored(sequence: dict[str, Any]) -> None:
    sequence["first"]["learning_rate"] = 1e38
    with pytest.raises(ConfigError, match=r"first\.learning_rate: the first task's training diverged"):
        made(sequence)
    assert not Path(SequenceRunner(Study.model_validate(sequence))._first_task.model.name).exists()


RUNS = ["final/full/lr-0.001-seed-0", "final/ours/lr-0.003-seed-0", "final/ours/lr-0.01-seed-0"]


def loss(questions: dict[str, Any]) -> float:
    return float(sum(questions["nll"]) / sum(questions["tokens"]))


def test_a_study_is_run_reported_packed_and_never_run_twice(
    sequence: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rate is a run that starts from the first task."""
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(sequence, sort_keys=False))
    ran = CliRunner().invoke(app, ["compare", str(file), "--json", "--pack"], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    assert [(run["entry"], run["learning_rate"]) for run in json.loads(ran.stdout)["runs"]] == [
        *(("ours", 0.003), ("ours", 0.01), ("full", 0.001))
    ]
    store = TrialStore(tmp_path / "study")
    assert store.names() == [*RUNS, "untouched"]
    before = store.find("untouched")
    assert before is not None
    assert before["first"]["questions"]["task"] == ["arc_easy"] * 3
    assert before["questions"]["task"] == ["piqa"] * 3
    assert before["start"]["questions"]["nll"] != before["questions"]["nll"]
    for name in RUNS:
        run = store.find(name)
        assert run is not None
        assert run["forgot"]["first"]["mean"] == pytest.approx(
            loss(run["first"]["questions"]) - loss(before["first"]["questions"])
        )
        assert run["forgot"]["elsewhere"]["mean"] == pytest.approx(run["elsewhere"] - before["elsewhere"])
        assert loss(run["texts"]) == run["elsewhere"]
        assert run["change"]["layers"] == (14 if "full" in name else 4)
        assert run["change"]["relative_norm"]["max"] > 0
    assert len(list((store.folder / "work" / "first").iterdir())) == 1

    monkeypatch.setattr(Runner, "run", lambda *args: pytest.fail("a finished trial is run again"))
    again = CliRunner().invoke(app, ["compare", str(file)], catch_exceptions=False)
    assert again.exit_code == 0, again.output
    assert "loss kept" in again.stdout


def only_ours(values: dict[str, Any], **changes: Any) -> Study:
    """The study with one entry at one rate."""
    entries = {"ours": values["entries"]["ours"]}
    return Study.model_validate({**values, "entries": entries, "tuning": {"sweep": [0.01, 0.01]}, **changes})


def test_a_stored_first_model_is_scored_anew_on_other_questions_and_never_mixed_with_another(
    sequence: dict[str, Any],
) -> None:
    study = only_ours(sequence)
    Comparison(study).run()
    with pytest.raises(ConfigError, match=r"untouched\.json: was run with other values of first"):
        Comparison(only_ours(sequence, first={**sequence["first"], "seed": 1})).run()
    for file in (study.folder / "untouched.json", *study.folder.glob("final/*/*.json")):
        file.unlink()
    sequence["shared"]["data"]["test_examples"] = 1
    sequence["other_domain"]["test_examples"] = 1
    study = only_ours(sequence)
    Comparison(study).run()
    before = TrialStore(study.folder).find("untouched")
    assert before is not None
    assert (len(before["questions"]["nll"]), len(before["texts"]["nll"])) == (1, 1)
    assert len(list((study.folder / "work" / "first").iterdir())) == 1


def test_rows_of_the_first_task_are_replayed(sequence: dict[str, Any]) -> None:
    study = only_ours(sequence, replay=5)
    runner = SequenceRunner(study)
    assert [record.task for record in runner.records.train] == ["piqa"] * 12 + ["arc_easy"] * 5
    assert {record.task for record in runner.records.test} == {"piqa"}
    Comparison(study).perform(Untouched())
    with pytest.raises(ConfigError, match=r"untouched\.json: was run with other values of replay"):
        Comparison(only_ours(sequence)).run()


def test_what_cannot_be_run_is_refused_before_any_work(
    sequence: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"replay: must be at most the 12 training rows of first\.data, got 13"):
        Comparison(only_ours(sequence, replay=13)).run()
    for data, error, message in (
        ({**sequence["first"]["data"], "test_examples": 0}, ConfigError, r"first\.data\.test_examples: .* test part"),
    ):
        with pytest.raises(error, match=message):
            Comparison(only_ours(sequence, first={**sequence["first"], "data": data})).run()
    assert not (Path(sequence["folder"]) / "work" / "first").exists()


def test_a_killed_study_goes_on_from_the_stored_first_task(
    sequence: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = only_ours(sequence)
    Comparison(study).perform(Untouched())
    scores = json.loads((study.folder / "untouched.json").read_text())["scores"]
    monkeypatch.setattr("smoa_lab.study.sequence.load_run", lambda *_: pytest.fail("it was trained already"))
    Comparison(study).run()
    assert Comparison(study).perform(Untouched())["scores"] == scores
    assert TrialStore(study.folder).names("final/") == RUNS[2:]


def chain(values: dict[str, Any], tmp_path: Path) -> Study:
    """With a third task between the two, one rate, and our entry only."""
    parts = (lab.questions(number, f"hellaswag {part}", "hellaswag") for part, number in (("train", 12), ("test", 3)))
    lab.fill_cache(tmp_path / "cache", *parts, "hellaswag")
    between = {"data": {"tasks": ["hellaswag"], "validation_examples": 0}, "training": {"max_steps": 3}}
    return only_ours(values, between=[between])


def test_tasks_between_are_trained_by_the_entrys_own_method(
    sequence: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    real_fit = LoadedRun.fit

    def fit(run: LoadedRun, *arguments: Any) -> Any:
        trained.append((run.title, run.config.method, run.config.training["max_steps"]))
        return real_fit(run, *arguments)

    monkeypatch.setattr(LoadedRun, "fit", fit)
    study = chain(sequence, tmp_path)
    Comparison(study).run()
    assert trained == [("arc_easy", "full", 2), ("hellaswag", "smoa", 3), ("piqa", "smoa", 2)]
    store = TrialStore(study.folder)
    before, found = store.find("untouched"), store.find("final/ours/lr-0.01-seed-0")
    assert before is not None
    assert found is not None
    for run in (before, found):
        assert run["first"]["questions"]["task"] == ["arc_easy"] * 3 + ["hellaswag"] * 3
    assert found["forgot"]["first"]["mean"] != pytest.approx(
        loss(found["first"]["questions"]) - loss(before["first"]["questions"])
    )  # it is the rise by the last task alone
    assert not list((study.folder / "work").rglob("between"))
    assert report(study).summary["runs"][0]["first_loss"] == found["first"]["scores"]["all"]["gold_loss"]
    assert "# study: arc_easy, then hellaswag, then piqa, with" in (study.folder / "README.md").read_text()


def sizes(weight: torch.Tensor, update: torch.Tensor) -> tuple[float, float, float]:
    """Both relative norms and the stable rank, by numpy."""
    of_weight, of_update = (np.linalg.svd(one.detach().double().numpy(), compute_uv=False) for one in (weight, update))
    norm, spectral_norm = np.linalg.norm(of_update), of_update[0]
    return norm / np.linalg.norm(of_weight), spectral_norm / of_weight[0], (norm / spectral_norm) ** 2


def test_full_fine_tuning_is_measured_against_the_base() -> None:
    base = tiny_models.build("llama")
    model = copy.deepcopy(base)
    linear = {path for path, one in model.named_modules() if isinstance(one, nn.Linear) and one is not model.lm_head}
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    found = weight_changes(model, base)
    assert found is not None
    before, after = dict(base.named_modules()), dict(model.named_modules())
    expected = [sizes(before[path].weight, after[path].weight - before[path].weight) for path in linear]
    for place, name in enumerate(("relative_norm", "relative_spectral_norm", "stable_rank")):
        values = [one[place] for one in expected]
        assert found[name] == pytest.approx({"mean": np.mean(values), "max": max(values)}, rel=1e-3)
    assert found["layers"] == len(linear)
    assert found["intruders"]["max"] == 0


CONFIGS = [
    SmoaConfig(r=4, num_blocks=2, target_modules=["q_proj"], init_weights=False),
    LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights="pissa"),
    OSFConfig(effective_rank=4, target_modules=["q_proj"]),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: str(config.peft_type.value))
def test_an_adapter_is_measured_by_what_merging_it_changes(config: PeftConfig) -> None:
    """PiSSA and OSF split W when they start, which is no change yet."""
    base = tiny_models.build("llama")
    model = get_peft_model(copy.deepcopy(base), config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    found = weight_changes(model, base)
    merged = model.merge_and_unload()
    pairs = [
        (old.self_attn.q_proj.weight, new.self_attn.q_proj.weight)
        for old, new in zip(base.model.layers, merged.model.layers, strict=True)
    ]
    expected = [sizes(old, new - old)[0] for old, new in pairs]
    assert found is not None
    assert found["layers"] == 2
    assert found["relative_norm"] == pytest.approx({"mean": np.mean(expected), "max": max(expected)}, rel=1e-3)


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT's, of norms
def test_a_run_that_diverged_or_changed_no_matrix_has_no_figures() -> None:
    base = tiny_models.build("llama")
    assert weight_changes(get_peft_model(copy.deepcopy(base), LNTuningConfig()), base) is None
    model = copy.deepcopy(base)
    model.model.layers[1].self_attn.q_proj.weight.data.fill_(float("nan"))
    assert weight_changes(model, base) is None
