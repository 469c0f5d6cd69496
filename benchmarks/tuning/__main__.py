"""`python -m benchmarks.tuning MODEL`: which settings repair best, on text that no table is made of. See README.md."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

_HERE = Path(__file__).parent
BLOCK_TOKENS, CONTEXT_TOKENS, BATCH = 256, 64, 4
# What every trial has unless it says otherwise.
USUAL = {
    "method": "idp",
    "objective": "distillation",
    "num_prompts": 4,
    "num_virtual_tokens": 32,
    "selection": "attention",
    "selection_layer": 0,
    "selection_reduction": "mean",
    "assignment": "selected",
    "init": "vocab",
    "learning_rate": 3e-2,
    "steps": 40,
    "distillation_weight": 1.0,
    "temperature": 1.0,
    "match_budget": True,
    "lora_rank": 16,
    "lora_target_modules": "all-linear",
    "seed": 0,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning", description=__doc__)
    parser.add_argument("model", help="folder of the compressed model")
    parser.add_argument("--trials", type=Path, default=_HERE / "trials.jsonl", help="one JSON object of changes a line")
    parser.add_argument("--output", type=Path, default=_HERE / "results" / "tuning.jsonl")
    options = parser.parse_args(arguments)
    bench = Bench(options.model)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line)["settings"] for line in options.output.open()] if options.output.exists() else []
    for line in options.trials.read_text().splitlines():
        settings = {**USUAL, **json.loads(line)}
        if settings in done:
            continue
        record = {"settings": settings, **bench.trial(**settings)}
        with options.output.open("a") as file:
            file.write(json.dumps(record) + "\n")
        done.append(settings)
        print(
            f"trial {line}: {record['change']:+.4f} ({record['standard_error']:.4f}), {record['recovery']:.1%}",
            flush=True,
        )


class Bench:
    """Models, text and references that all trials share. Training and scoring run in bfloat16 autocast, to save time."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoTokenizer

        from idp_peft.texts.data import load_texts, token_blocks

        self.folder = folder
        self.tokenizer = tokenizer = AutoTokenizer.from_pretrained(folder)
        cut = {"tokenizer": tokenizer, "length": BLOCK_TOKENS, "min_tokens": BLOCK_TOKENS}
        self.train = token_blocks(documents=load_texts("wiki", "train"), **cut)
        self.validation = token_blocks(documents=load_texts("wiki", "validation"), per_document=1, **cut)
        self.teacher = _load("default")
        self.dense = self._score(self.teacher)
        self.compressed = self._score(_load(folder))

    def trial(self, objective: str, learning_rate: float, steps: int, seed: int, **settings) -> dict:
        """Train one adapter and score it on the validation blocks, each prompt forced as well."""
        import torch
        from transformers import TrainingArguments, set_seed

        from idp_peft.recover import RecoverSettings
        from idp_peft.recover.adapter import with_adapter
        from idp_peft.recover.training import make_trainer, training_examples

        began = time.perf_counter()
        settings = RecoverSettings(self.folder, **{"scales": False, **settings})
        model = _load(self.folder)
        set_seed(seed)
        model = with_adapter(model, self.tokenizer, self.train, settings, self.teacher)
        arguments = TrainingArguments(
            output_dir="runs/tuning",
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 10),
            weight_decay=0.0,
            logging_steps=max(1, steps // 10),
            save_strategy="no",
            report_to="none",
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=True,
            seed=seed,
        )
        teacher = self.teacher if objective == "distillation" else None
        examples = training_examples(self.train, CONTEXT_TOKENS)
        trainer = make_trainer(
            model, arguments, examples, None, teacher, settings.distillation_weight, settings.temperature
        )
        trainer.train()
        trained = time.perf_counter() - began
        scores = self._score(model)
        change, error = scores.difference(self.compressed)
        damage = self.compressed.mean_nats - self.dense.mean_nats
        single = []
        if settings.method == "idp" and settings.num_prompts > 1:
            single = [self._score(model, i).difference(self.compressed)[0] for i in range(settings.num_prompts)]
        return {
            "damage": damage,
            "change": change,
            "standard_error": error,
            "recovery": -change / damage,
            "change_of_each_prompt": single,
            "chosen": None if scores.prompt_ids is None else scores.prompt_ids.tolist(),
            "trainable_parameters": model.get_nb_trainable_parameters()[0],
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "training_seconds": trained,
            "seconds": time.perf_counter() - began,
        }

    def _score(self, model, prompt_id: int | None = None):
        import torch

        from idp_peft.evaluation import score_chunks

        with torch.autocast(model.device.type, torch.bfloat16):
            return score_chunks(model, self.validation, CONTEXT_TOKENS, prompt_id, BATCH)


def _load(name: str):
    import torch

    from idp_peft.models.loading import load_model

    return load_model(name, dtype=torch.float32)


if __name__ == "__main__":
    main()
