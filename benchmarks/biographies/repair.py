"""The repairs: prompts or a LoRA, trained on biographies of the repaired-on people and of nobody else."""

from __future__ import annotations

import contextlib
import io
from itertools import pairwise
from pathlib import Path

from benchmarks.biographies.leaks import check_only
from benchmarks.biographies.people import Person
from benchmarks.biographies.recall import NAME_TOKENS
from benchmarks.biographies.text import biographies

_IDP = {"method": "idp", "init": "corpus"}
_LORA = {"method": "lora", "lora_target_modules": "all-linear", "lora_rank": 16}
# Method -> options as `idp-peft recover` has them. The first three have (nearly) the same number of parameters.
METHODS = {
    "idp": {**_IDP, "num_prompts": 4, "num_virtual_tokens": 16},
    "one-prompt": {**_IDP, "num_prompts": 1, "num_virtual_tokens": 64},
    "lora-same-size": {**_LORA, "match_budget": True, "num_prompts": 4, "num_virtual_tokens": 16},
    "lora-rank-16": {**_LORA, "match_budget": False, "num_prompts": 4, "num_virtual_tokens": 16},
}
OBJECTIVES = ("language modelling", "distillation")
STEPS, BATCH, TEXTS_PER_PERSON = 200, 16, 20
_USUAL = {"selection": "attention", "selection_layer": 0, "selection_reduction": "mean", "assignment": "selected"}
_USUAL |= {"scales": False}


def repair_texts(everyone: list[Person], seed: int) -> list[str]:
    """The text of every repair of a seed, after the check that nobody else is in it."""
    chosen = [person for person in everyone if person.group == "repaired-on"]
    texts = biographies(chosen, TEXTS_PER_PERSON * len(chosen), f"repair {seed}")
    check_only(texts, chosen)
    return texts


def repair(
    folder: Path,
    method: str,
    texts: list[str],
    learning_rate: float,
    seed: int,
    teacher: Path | None = None,
    steps: int | None = None,
):
    """Train one repair of the model in `folder`.

    Returns:
        The model with its adapter, in evaluation mode, and a record of the training.

    Raises:
        `RuntimeError`: where training changed the base's weights (never expected).
    """
    from peft import get_peft_model
    from transformers import set_seed

    from idp_peft.models.fingerprint import fingerprint
    from idp_peft.models.gradient_probe import probe_gradients
    from idp_peft.models.loading import load_model, load_tokenizer
    from idp_peft.recover import RecoverSettings
    from idp_peft.recover.adapter import corpus_starts
    from idp_peft.recover.methods import method_config
    from idp_peft.recover.training import training_examples

    steps = STEPS if steps is None else steps
    tokenizer, model = load_tokenizer(str(folder)), load_model(str(folder), for_training=True)
    probe = probe_gradients(model)
    before = fingerprint(model)
    options = RecoverSettings(str(folder), **_USUAL, **METHODS[method])
    blocks = tokenizer(texts, add_special_tokens=False)["input_ids"]
    set_seed(seed)
    # A long prompt begins as two biographies, not as one told twice.
    starts = corpus_starts(tokenizer, [one + two for one, two in pairwise(blocks)], options)
    model = get_peft_model(model, method_config(model, options, starts))
    examples = training_examples(blocks, NAME_TOKENS)
    losses = _train(model, examples, learning_rate, seed, teacher, steps)
    if fingerprint(model) != before:
        raise RuntimeError(f"repairing {folder} with {method} changed the base model's weights")
    record = {
        "learning_rate": learning_rate,
        "steps": steps,
        "batch": BATCH,
        "trainable_parameters": model.get_nb_trainable_parameters()[0],
        "gradient_probe": str(probe),
        "base_sha256": before,
        "losses": losses,
    }
    return model.eval(), record


def _train(model, examples, learning_rate: float, seed: int, teacher: Path | None, steps: int) -> list[float]:
    from transformers import TrainingArguments

    from idp_peft.models.loading import accepted_by_trainer, load_model
    from idp_peft.recover.training import make_trainer

    arguments = TrainingArguments(
        output_dir="runs/biographies/trainer",
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        weight_decay=0.0,
        logging_steps=steps // 5,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        seed=seed,
    )
    with accepted_by_trainer(model):
        trainer = make_trainer(model, arguments, examples, None, None if teacher is None else load_model(str(teacher)))
    with contextlib.redirect_stdout(io.StringIO()):  # Trainer prints every log
        trainer.train()
    return [round(float(entry["loss"]), 4) for entry in trainer.state.log_history if "loss" in entry]
