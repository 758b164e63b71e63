"""Studies of tasks in turn: the first task's model, where entries start, what is scored, and what is refused."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, OSFConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from smoa import SmoaConfig
from smoa.errors import ConfigError, DataError
from smoa_lab.study import sequence as sequence_module
from smoa_lab.study.comparison import Comparison
from smoa_lab.study.report import report
from smoa_lab.study.search import Untouched
from smoa_lab.study.sequence import LAYERS, EarlierTask, SequenceRunner, _spread, weight_changes
from smoa_lab.study.study import Study
from smoa_lab.study.trials import TrialStore
from smoa_lab.training.loaded_run import LoadedRun
from tests.support import lab, tiny_models

# Not ours: a deprecation between transformers and peft.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def runner(values: dict[str, Any]) -> SequenceRunner:
    return SequenceRunner(Study.model_validate(values))


def made(values: dict[str, Any]) -> tuple[EarlierTask, dict[str, Any]]:
    """The first stage and its scores, which are only the sum of the model's weights."""
    own = runner(values)
    return own._first_task, own._first_task.scores(own.earlier_records[0], lambda model, _: {"sum": total(model)}, {})


def total(model: torch.nn.Module) -> float:
    return float(sum(parameter.detach().double().abs().sum() for parameter in model.parameters()))


def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoadedRun, "fit", lambda *_: pytest.fail("it was trained already"))


def test_the_first_task_is_trained_once_and_stored(
    sequence: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, found = made(sequence)
    stored = AutoModelForCausalLM.from_pretrained(stage.model.name)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert found == {"sum": total(stored), "start": {"sum": total(base)}}
    assert total(stored) != total(base)
    no_training(monkeypatch)
    again, same = made(sequence)
    assert (again.folder, same) == (stage.folder, found)


def test_a_kill_between_training_and_scoring_loses_only_the_scores(
    sequence: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, found = made(sequence)
    next(stage.folder.glob("scores-*.json")).unlink()
    no_training(monkeypatch)
    assert made(sequence)[1] == found


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
    assert not Path(runner(sequence)._first_task.model.name).exists()


RUNS = ["final/full/lr-0.001-seed-0", "final/ours/lr-0.003-seed-0", "final/ours/lr-0.01-seed-0"]


def loss(questions: dict[str, Any]) -> float:
    return float(sum(questions["nll"]) / sum(questions["tokens"]))


def test_every_rate_is_a_run_that_starts_from_the_first_task(sequence: dict[str, Any]) -> None:
    study = Study.model_validate(sequence)
    Comparison(study).run()
    store = TrialStore(study.folder)
    assert store.names("final/") == RUNS
    assert store.names("tuning/") == []
    before = store.find("untouched")
    assert before is not None
    assert before["first"]["questions"]["task"] == ["arc_easy"] * 3
    assert before["questions"]["task"] == ["piqa"] * 3
    assert before["start"]["questions"]["nll"] != before["questions"]["nll"]
    for name in RUNS:
        found = store.find(name)
        assert found is not None
        assert found["forgot"]["first"]["mean"] == pytest.approx(
            loss(found["first"]["questions"]) - loss(before["first"]["questions"])
        )
        assert found["forgot"]["elsewhere"]["mean"] == pytest.approx(found["elsewhere"] - before["elsewhere"])
        assert loss(found["texts"]) == found["elsewhere"]
        assert found["change"]["layers"] == (14 if "full" in name else 4)
        assert found["change"]["relative_norm"]["max"] > 0
    assert len(list((study.folder / "work" / "first").iterdir())) == 1


def test_runs_of_another_first_task_are_not_mixed_in(sequence: dict[str, Any]) -> None:
    sequence["entries"] = {"ours": sequence["entries"]["ours"]}
    Comparison(Study.model_validate(sequence)).run()
    sequence["first"]["seed"] = 1
    with pytest.raises(ConfigError, match=r"untouched\.json: was run with other values of first"):
        Comparison(Study.model_validate(sequence)).run()


def test_a_stored_first_model_is_scored_anew_on_other_questions(sequence: dict[str, Any]) -> None:
    sequence["entries"] = {"ours": sequence["entries"]["ours"]}
    Comparison(Study.model_validate(sequence)).run()
    folder = Path(sequence["folder"])
    for file in (folder / "untouched.json", *folder.glob("final/*/*.json")):
        file.unlink()
    sequence["shared"]["data"]["test_examples"] = 1
    sequence["elsewhere"]["test_examples"] = 1
    study = Study.model_validate(sequence)
    Comparison(study).run()
    before = TrialStore(study.folder).find("untouched")
    assert before is not None
    assert (len(before["questions"]["nll"]), len(before["texts"]["nll"])) == (1, 1)
    assert len(list((folder / "work" / "first").iterdir())) == 1


def test_rows_of_the_first_task_are_replayed(sequence: dict[str, Any]) -> None:
    sequence["entries"] = {"ours": sequence["entries"]["ours"]}
    study = Study.model_validate({**sequence, "replay": 5})
    bench = SequenceRunner(study)
    assert [record.task for record in bench.records.train] == ["piqa"] * 12 + ["arc_easy"] * 5
    assert {record.task for record in bench.records.test} == {"piqa"}
    Comparison(study).run()
    with pytest.raises(ConfigError, match=r"untouched\.json: was run with other values of replay"):
        Comparison(Study.model_validate(sequence)).run()


def test_more_rows_than_the_first_task_has_are_refused_before_any_work(sequence: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"replay: must be at most the 12 training rows of first\.data, got 13"):
        Comparison(Study.model_validate({**sequence, "replay": 13})).run()
    assert not (Path(sequence["folder"]) / "work" / "first").exists()


def test_a_first_task_without_test_questions_is_refused(sequence: dict[str, Any]) -> None:
    sequence["first"]["data"]["test_examples"] = 0
    with pytest.raises(ConfigError, match=r"first\.data\.test_examples: a study needs a test part"):
        Comparison(Study.model_validate(sequence)).run()


def test_a_package_that_the_first_task_needs_is_named_before_any_work(
    sequence: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    sequence["first"]["data"] = {"tasks": ["chain_sum"]}
    with pytest.raises(DataError, match=r"data\.tasks: chain_sum: needs reasoning-gym"):
        Comparison(Study.model_validate(sequence)).run()


def test_a_killed_study_goes_on_from_the_stored_first_task(
    sequence: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study.model_validate(sequence)
    Comparison(study).perform(Untouched())
    scores = json.loads((study.folder / "untouched.json").read_text())["scores"]
    monkeypatch.setattr("smoa_lab.study.sequence.load_run", lambda *_: pytest.fail("it was trained already"))
    Comparison(study).run(["ours"])
    assert Comparison(study).perform(Untouched())["scores"] == scores
    assert TrialStore(study.folder).names("final/") == RUNS[1:]


def chain(values: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """With a third task between the two, one rate, and our entry only."""
    parts = (lab.questions(number, f"hellaswag {part}", "hellaswag") for part, number in (("train", 12), ("test", 3)))
    lab.fill_cache(tmp_path / "cache", *parts, "hellaswag")
    between = {"data": {"tasks": ["hellaswag"], "validation_examples": 0}, "training": {"max_steps": 3}}
    entries = {"ours": values["entries"]["ours"]}
    return {**values, "between": [between], "entries": entries, "tuning": {"sweep": [0.01, 0.01], "per_decade": 2}}


def test_tasks_between_are_trained_by_the_entrys_own_method(
    sequence: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    real_fit = LoadedRun.fit

    def fit(lesson: LoadedRun, *arguments: Any) -> Any:
        trained.append((lesson.title, lesson.config.method, lesson.config.training["max_steps"]))
        return real_fit(lesson, *arguments)

    monkeypatch.setattr(LoadedRun, "fit", fit)
    study = Study.model_validate(chain(sequence, tmp_path))
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


def test_a_run_that_diverged_has_no_figures() -> None:
    base = tiny_models.build("llama")
    model = copy.deepcopy(base)
    model.model.layers[1].self_attn.q_proj.weight.data.fill_(float("nan"))
    assert weight_changes(model, base) is None


@pytest.mark.parametrize("number", [1, LAYERS + 1, 90])
def test_the_layers_are_spread_over_the_model(number: int) -> None:
    layers = [(str(i), None) for i in range(number)]
    chosen = [int(path) for path, _ in _spread(layers)]
    assert len(set(chosen)) == min(number, LAYERS)
    assert (chosen[0], chosen[-1]) == (0, number - 1)
    assert max(np.diff([*chosen]), default=1) - min(np.diff([*chosen]), default=1) <= 1
