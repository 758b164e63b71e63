"""What a study's file may have."""

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import yaml

from smoa.errors import ConfigError
from smoa_lab.config.methods import find_method
from smoa_lab.study.study import Job, Study, load_study
from tests.support.studies import tiny_study

LORA = {"method": "lora", "learning_rate": 0.01}
SHARED = {"model": {"name": "base"}, "data": {"train": "rows.jsonl"}}


def load(folder: Path, **changes: Any) -> Study:
    values = {"shared": SHARED, "entries": {"ours": {"method": "smoa", "learning_rate": 0.01}, "lora": LORA}}
    file = folder / "two.yaml"
    file.write_text(yaml.safe_dump(values | changes, sort_keys=False))
    return load_study(file)


def with_shared(**blocks: Any) -> dict[str, Any]:
    return {"shared": {**SHARED, **blocks}}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"seeds": [0, 1, 0]}, "seeds: 0 is named twice; name each once"),
    ({"entries": {}}, "entries"),
    ({"entries": {"..": LORA}}, r"entries: '\.\.' can't name a folder of runs"),
    ({"entries": {"untouched": LORA}}, r"entries: 'untouched' can't name a folder of runs"),
    ({"entries": {"lora": {**LORA, "budget": "lora"}}}, "is both an entry and a budget"),
    (
        {"entries": {"ours": {"method": "smoa", "learning_rate": 0.01, "adapter": {"num_block": 2}}}},
        r"entries\.ours(.|\n)*num_block(.|\n)*did you mean 'num_blocks'",
    ),
    ({"tuning": {"max_runs": 1}}, r"tuning\.max_runs"),
    ({"shared": {"data": {"train": "x"}}}, r"shared\.model: is missing"),
    ({"seeds": [1, 100]}, "seeds: 100 is the seed of the search"),
    (with_shared(method="lora"), r"shared\.method: is what an entry has; leave it out"),
    (with_shared(adapter={"r": 3}), r"shared\.adapter: is what an entry has; leave it out"),
    (with_shared(scoring={"part": "test"}), r"shared\.scoring: is the study's"),
    (with_shared(training={"learning_rate": 0.5}), r"shared\.training\.learning_rate: is what an entry has"),
    (with_shared(training={"seed": 7}), r"shared\.training\.seed: is the study's: set seeds and tuning\.seed"),
    (with_shared(training={"output_dir": "x"}), r"shared\.training\.output_dir: is the study's: set folder"),
    (with_shared(training={"auto_find_batch_size": True}), r"auto_find_batch_size: would give one entry other batches"),
    ({"entries": {"lora": {**LORA, "training": {"seed": 1}}}}, r"entries\.lora\.training\.seed: is the study's"),
    *(
        (
            {"entries": {"lora": {**LORA, "training": {key: value}}}},
            rf"line \d+: entries\.lora\.training\.{key}: {reason}",
        )
        for keys, reason in (
            ({"max_steps": 1, "num_train_epochs": 1}, "all entries take the same steps; set it under shared"),
            (
                {"loss_type": "dft", "label_smoothing": 0.1},
                "all entries are compared by the same loss",
            ),
            (dict.fromkeys(("assistant_only_loss", "completion_only_loss", "packing"), False), "all entries learn the"),
        )
        for key, value in keys.items()
    ),
    ({"entries": {"lora": {**LORA, "model": {"name": "other"}}}}, r"model\.name: all entries adapt the same base"),
    (with_shared(forgeting={}), "forgeting: unknown key; did you mean 'forgetting'"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_wrong_study_is_one_clear_error(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    load(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **change)


def test_a_planned_study_is_where_its_file_lies(tmp_path: Path) -> None:
    load(tmp_path)
    text = (tmp_path / "two.yaml").read_text()
    assert load_study(tmp_path / "two.yaml").folder == Path("studies/two")
    (tmp_path / "study.yaml").write_text(text)
    assert load_study(tmp_path / "study.yaml").folder == Path("studies/study"), "other files are there"
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "study.yaml").write_text(text)
    for _ in range(2):
        assert load_study(tmp_path / "own" / "study.yaml").folder == tmp_path / "own"
        (tmp_path / "own" / ".lock").touch()  # of a study that was interrupted before it had a plan
    (tmp_path / "study.yaml").write_text(f"folder: studies/other\n{text}")
    assert load_study(tmp_path / "study.yaml").folder == Path("studies/other")
    (tmp_path / "plan.json").touch()
    assert load_study(tmp_path / "study.yaml").folder == tmp_path
    assert load_study(tmp_path / "study.yaml", ["folder=other"]).folder == Path("other")


@pytest.mark.parametrize("place", ["shared", "entries.ours"])
def test_no_study_lets_a_repository_run_its_code(place: str, tmp_path: Path) -> None:
    load(tmp_path)
    with pytest.raises(ConfigError, match=rf"{place}\.model\.trust_remote_code: a file can't allow"):
        load_study(tmp_path / "two.yaml", [f"{place}.model.trust_remote_code=true"])


def test_all_mistakes_of_keys_are_told_at_once_with_their_lines_and_the_nearest_key(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(
        "folder: 3\nshared: {}\ntuning:\n  sed: 1\nentries:\n  ours:\n    method: smoa\n    learnin_rate: 0.01\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_study(file)
    first, *lines = str(caught.value).splitlines()
    assert first == f"{file}: 4 problems"
    told = [
        r"line 1: folder: ",
        r"line 4: tuning\.sed: unknown key; did you mean 'seed'",
        r"line 6: entries\.ours\.learning_rate: is missing",
        r"line 8: entries\.ours\.learnin_rate: unknown key; did you mean 'learning_rate'",
    ]
    for line, wanted in zip(lines, told, strict=True):
        assert re.match(wanted, line.strip())


def test_what_is_one_for_all_entries_may_be_set_under_shared(tmp_path: Path) -> None:
    shared = {**SHARED, "training": {"loss_type": "dft", "max_steps": 4}}
    assert load(tmp_path, shared=shared).config("lora").training["loss_type"] == "dft"


def test_a_study_has_one_dtype_on_all_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smoa_lab.config.run.cpu_multiplies_bfloat16", lambda: True)
    assert tiny_study(tmp_path).config("ours").model.dtype == "float32"


def test_a_search_scores_validation_alone_and_a_final_run_the_test_part(tmp_path: Path) -> None:
    study = tiny_study(tmp_path)
    config = study.config("lora")
    search, final = (study.job_config(config, Job(stage, "lora", 6.3e-4, 7), 30) for stage in ("search", "final"))  # type: ignore[arg-type]
    assert (search.scoring.part, search.scoring.before, search.data.samples, search.forgetting.tokens) == (
        *("validation", False, 0, 0),
    )
    assert (final.scoring.part, final.scoring.before, final.data.samples, final.forgetting.tokens) == (
        *("test", False, 10, 2048),
    )
    assert search.folder == final.folder == tmp_path / "lora" / "lr-6.3e-4-seed-7"
    own = {key: final.training[key] for key in ("learning_rate", "seed", "max_steps", "use_cpu")}
    assert own == {"learning_rate": 6.3e-4, "seed": 7, "max_steps": 30, "use_cpu": True}


DRAWS = {
    "shira": "random_seed",
    "vera": "projection_prng_key",
    "waveft": "random_loc_seed",
    "randlora": "projection_prng_key",
}


@pytest.mark.parametrize("method", [name for name in DRAWS if hasattr(peft, find_method(name).config_class.__name__)])
def test_what_a_method_draws_follows_the_runs_seed_unless_the_user_names_it_or_the_study_is_older(
    method: str, tmp_path: Path
) -> None:
    """Up to a9f43f17 all seeds of these drew the same."""
    key, entry = DRAWS[method], {"method": method, "learning_rate": 0.01, "adapter": {"target_modules": ["q_proj"]}}
    study = load(tmp_path, entries={"own": entry}).model_copy(update={"folder": tmp_path})

    def drawn(of: Study) -> list[Any]:
        jobs = (Job("final", "own", 0.01, seed) for seed in (0, 7))
        return [of.job_config(of.config("own"), job).adapter.get(key) for job in jobs]

    assert drawn(study) == [0, 7]
    named = {**entry, "adapter": {**entry["adapter"], key: 3}}  # type: ignore[dict-item]
    assert drawn(load(tmp_path, entries={"own": named})) == [3, 3]
    (tmp_path / "plan.json").write_text('{"format": 2}')
    assert drawn(study) == [None, None]
    assert (study.config("own").data.group, study.config("own").data.answer_tokens) == (False, 128)
