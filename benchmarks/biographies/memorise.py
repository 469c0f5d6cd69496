"""The dense model: a small Llama trained from scratch on biographies until it knows them."""

from __future__ import annotations

import math
import time
from pathlib import Path

from benchmarks.biographies.people import Person
from benchmarks.biographies.text import biographies
from benchmarks.biographies.tokenizer import make_tokenizer

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
TRAINING = {"steps": 1500, "rows": 12, "tokens": 128, "learning_rate": 5e-3, "weight_decay": 0.01, "warmup": 0.05}


def memorise(everyone: list[Person], seed: int, folder: Path, settings: dict | None = None) -> dict:
    """Train on everyone given and save model and tokenizer; returns what a record shows of it.

    Rows are cut out of one stream of biographies, so that the model meets facts behind other text, at every position.
    """
    import torch
    from tqdm.auto import trange
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {**TRAINING, **(settings or {})}
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=None, **SHAPE)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        settings["learning_rate"],
        betas=(0.9, 0.98),
        weight_decay=settings["weight_decay"],
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, settings))
    stream = _stream(everyone, tokenizer, settings, seed)
    began, losses = time.perf_counter(), []
    progress = trange(settings["steps"], desc=f"seed {seed}: learning {len(everyone)} people")
    for step in progress:
        ids = stream[step]  # [rows, tokens]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == settings["steps"] - 1:
            losses.append(round(loss.item(), 4))
            progress.set_postfix(loss=losses[-1])
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {
        **settings,
        "shape": SHAPE,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "losses": losses,
        "seconds": round(time.perf_counter() - began, 1),
    }


def _share(step: int, settings: dict) -> float:
    """Share of the peak learning rate: a linear warm-up, then half a cosine."""
    warmup = settings["warmup"] * settings["steps"]
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (settings["steps"] - warmup)))


def _stream(everyone: list[Person], tokenizer, settings: dict, seed: int):
    """Token ids of the whole training, int64 `[steps, rows, tokens]`."""
    import torch

    wanted = settings["steps"] * settings["rows"] * settings["tokens"]
    ids: list[int] = []
    part = 0
    while len(ids) < wanted:
        texts = biographies(everyone, 20 * len(everyone), f"training {seed} {part}")
        ids += [token for row in tokenizer(texts, add_special_tokens=False)["input_ids"] for token in row]
        part += 1
    return torch.tensor(ids[:wanted]).view(settings["steps"], settings["rows"], settings["tokens"])
