"""What a study's file may have."""

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import yaml

from smoa.errors import ConfigError
from smoa_lab.config.methods import find_method
from smoa_lab.study.study import Job, Study, edit, load_study
from tests.support.studies import tiny_study

LORA = {"method": "lora", "learning_rate": 0.01}
SHARED = {"model": {"name": "base"}, "data": {"train": "rows.jsonl"}}


def load(folder: Path, /, **changes: Any) -> Study:
    values = {"shared": SHARED, "entries": {"ours": {"method": "smoa", "learning_rate": 0.01}, "lora": LORA}}
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(values | changes, sort_keys=False))
    return load_study(file)


def with_shared(**blocks: Any) -> dict[str, Any]:
    return {"shared": {**SHARED, **blocks}}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"seeds": [0, 1, 0]}, "seeds: name each once"),
    ({"seeds": [1, 100]}, "seeds: .*tuning.seed"),
    ({"entries": {}}, "entries"),
    ({"entries": {"..": LORA}}, r"entries: '\.\.' can't name a folder"),
    ({"entries": {"untouched": LORA}}, "entries: 'untouched' can't name a folder"),
    (
        {"entries": {"ours": {"method": "smoa", "learning_rate": 0.01, "adapter": {"num_block": 2}}}},
        r"entries\.ours(.|\n)*num_block(.|\n)*did you mean 'num_blocks'",
    ),
    ({"tuning": {"max_runs": 1}}, r"tuning\.max_runs"),
    ({"shared": {"data": {"train": "x"}}}, r"shared\.model: is missing"),
    (with_shared(method="lora"), r"shared\.method: belongs to an entry"),
    (with_shared(adapter={"r": 3}), r"shared\.adapter: belongs to an entry"),
    (with_shared(scoring={"part": "test"}), r"shared\.scoring: is set by the study"),
    (with_shared(training={"learning_rate": 0.5}), r"shared\.training\.learning_rate: belongs to an entry"),
    (with_shared(training={"seed": 7}), r"shared\.training\.seed: is set by the study"),
    (with_shared(training={"output_dir": "x"}), r"shared\.training\.output_dir: is set by the study"),
    (with_shared(training={"auto_find_batch_size": True}), "auto_find_batch_size: .*other batches"),
    ({"entries": {"lora": {**LORA, "training": {"seed": 1}}}}, r"entries\.lora\.training\.seed: is set by the study"),
    *(
        (
            {"entries": {"lora": {**LORA, "training": {key: 1}}}},
            rf"entries\.lora\.training\.{key}: .*set it under shared",
        )
        for key in ("max_steps", "num_train_epochs", "assistant_only_loss", "completion_only_loss", "packing")
    ),
    ({"entries": {"lora": {**LORA, "model": {"name": "other"}}}}, r"model\.name: all entries adapt the same base"),
    (with_shared(forgeting={}), "forgeting: unknown key; did you mean 'forgetting'"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_wrong_study_is_one_clear_error(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    load(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **change)


def test_a_study_is_where_its_file_lies_and_all_its_seeds_were_planned_unless_it_says_otherwise(tmp_path: Path) -> None:
    assert load(tmp_path).folder == tmp_path
    assert (load(tmp_path).planned, load(tmp_path, rounds=2).planned, load(tmp_path, seeds=[]).planned) == (3, 2, 0)


def test_edits_keep_comments_and_one_that_is_refused_is_taken_back(tmp_path: Path) -> None:
    load(tmp_path)
    file = tmp_path / "study.yaml"
    file.write_text(f"# Why.\n{file.read_text()}tuning: {{seed: 7}}  # mine\n")
    edit(file, ["seeds=[4, 5]", "entries.lora.added=1"])
    study, text = load_study(file), file.read_text()
    assert (study.seeds, study.entries["lora"].added, study.tuning.seed) == ([4, 5], 1, 7)
    assert text.startswith("# Why.\n")
    assert "{seed: 7}  # mine" in text
    with pytest.raises(ConfigError, match="seeds"):
        edit(file, ["seeds=[7]"])
    assert file.read_text() == text


def test_only_names_entries_and_budgets(tmp_path: Path) -> None:
    study = load_study(tiny_study(tmp_path))
    assert study.budgets() == {"small": ["ours", "lora"], "large": ["full"]}
    assert (study.chosen([]), study.chosen(["small"])) == (["ours", "lora", "full"], ["ours", "lora"])
    assert study.chosen(["full", "lora"]) == ["lora", "full"]
    with pytest.raises(ConfigError, match="--only: dora is neither"):
        study.chosen(["lora", "dora"])


@pytest.mark.parametrize("place", ["shared", "entries.ours"])
def test_no_study_lets_a_repository_run_its_code(place: str, tmp_path: Path) -> None:
    load(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.options: trust_remote_code"):
        edit(tmp_path / "study.yaml", [f"{place}.model.options.trust_remote_code=true"])


def test_all_mistakes_of_keys_are_told_at_once_with_the_nearest_key(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(
        "keep: some\nshared: {}\ntuning:\n  sed: 1\nentries:\n  ours:\n    method: smoa\n    learnin_rate: 0.01\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_study(file)
    first, *lines = str(caught.value).splitlines()
    assert first == f"{file}: 4 problems"
    told = [
        r"entries\.ours\.learning_rate: .*required",
        r"entries\.ours\.learnin_rate: unknown key; did you mean 'learning_rate'",
        r"tuning\.sed: unknown key; did you mean 'seed'",
        r"keep: ",
    ]
    for line, wanted in zip(lines, told, strict=True):
        assert re.match(wanted, line.strip())


def test_a_study_has_one_dtype_on_all_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smoa_lab.config.run.cpu_multiplies_bfloat16", lambda: True)
    assert load_study(tiny_study(tmp_path)).configs["ours"].model.dtype == "float32"


def test_a_search_scores_validation_alone_and_a_final_run_the_test_part(tmp_path: Path) -> None:
    study = load_study(tiny_study(tmp_path))
    search, final = (study.config(Job(stage, "lora", 6.3e-4, 7)) for stage in ("search", "final"))  # type: ignore[arg-type]
    assert (search.scoring.part, search.scoring.before, search.data.samples, search.forgetting.tokens) == (
        *("validation", False, 0, 0),
    )
    assert (final.scoring.part, final.scoring.before, final.data.samples, final.forgetting.tokens) == (
        *("test", False, 10, 2048),
    )
    assert search.folder == final.folder == tmp_path / "lora" / "lr-6.3e-4-seed-7"
    own = {key: final.training[key] for key in ("learning_rate", "seed", "max_steps", "use_cpu")}
    assert own == {"learning_rate": 6.3e-4, "seed": 7, "max_steps": 100, "use_cpu": True}


DRAWS = {
    "shira": "random_seed",
    "vera": "projection_prng_key",
    "waveft": "random_loc_seed",
    "randlora": "projection_prng_key",
}


@pytest.mark.parametrize("method", [name for name in DRAWS if hasattr(peft, find_method(name).config_class.__name__)])
def test_what_a_method_draws_follows_the_runs_seed_unless_the_user_names_it(method: str, tmp_path: Path) -> None:
    """Up to a9f43f17 all seeds of these drew the same."""
    key, entry = DRAWS[method], {"method": method, "learning_rate": 0.01, "adapter": {"target_modules": ["q_proj"]}}

    def drawn(of: Study) -> list[Any]:
        return [of.config(Job("final", "own", 0.01, seed)).adapter.get(key) for seed in (0, 7)]

    assert drawn(load(tmp_path, entries={"own": entry})) == [0, 7]
    named = {**entry, "adapter": {**entry["adapter"], key: 3}}  # type: ignore[dict-item]
    assert drawn(load(tmp_path, entries={"own": named})) == [3, 3]
