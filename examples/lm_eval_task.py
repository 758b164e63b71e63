"""Evaluates a SMoA adapter with `smoa exec lm_eval --model hf --model_args pretrained=…,peft=…`.

`smoa exec` imports smoa before lm-eval's own command starts; all options are lm-eval's. The task is a local file, so
that the example runs offline. Shows: accuracy of base model and adapter.
Printed when last run: accuracy 0.20 -> 1.00
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from _tiny import ADAPTER, CAPITALS, base_model, fit, load
from peft import get_peft_model

from smoa import SmoaConfig

TASK = """\
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{country}}}}:"
doc_to_choice: {choices}
doc_to_target: city
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def main() -> None:
    model, tokenizer = load()
    model = get_peft_model(model, SmoaConfig(**ADAPTER))
    fit(model, tokenizer, CAPITALS)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/adapter")
        data = Path(folder, "test.jsonl")
        data.write_text("\n".join(json.dumps({"country": country, "city": city}) for country, city in CAPITALS))
        Path(folder, "capitals.yaml").write_text(TASK.format(data=data, choices=[city for _, city in CAPITALS]))
        base = score(folder, f"pretrained={base_model()},dtype=float32")
        adapted = score(folder, f"pretrained={base_model()},dtype=float32,peft={folder}/adapter")
    print(f"accuracy {base:.2f} -> {adapted:.2f}")
    assert adapted == 1.0


def score(folder: str, model_args: str) -> float:
    command = f"smoa exec lm_eval --model hf --model_args {model_args} --device cpu --tasks capitals"
    where = f"--include_path {folder} --output_path {folder}/scores.json"
    subprocess.run([sys.executable, "-m", *command.split(), *where.split()], check=True)
    newest = max(Path(folder).glob("scores*.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(newest.read_text())["results"]["capitals"]["acc,none"]


if __name__ == "__main__":
    main()
