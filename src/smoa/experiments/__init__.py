"""The lab: data, prompts, training and evaluation around SMoA (extra: ``pip install ".[lab]"``).

Built on transformers' Trainer; what is here is the thin part between the libraries: which questions, how they are put
to the model, which logits are computed and what is written down about a run.
"""
