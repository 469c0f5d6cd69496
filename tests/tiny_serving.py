"""Tiny models and adapters as the folders that serving begins with."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model

from idp_peft import IDPConfig, fit_centroids
from idp_peft.models.loading import load_model
from tests.tiny import tiny
from tests.tiny_chats import chat_tokenizer


@dataclass(frozen=True)
class Saved:
    """An adapter on its base, in memory and as folders."""

    model: PeftModel
    base: Path
    adapter: Path

    def generate(self, ids: list[int], prompt: int, tokens: int = 8) -> list[int]:
        """What the adapter's model says behind some tokens, greedily, with a forced prompt."""
        given = torch.tensor([ids])
        out = self.model.generate(
            input_ids=given, prompt_ids=torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False
        )
        return out[0, len(ids) :].tolist()


def saved(folder: Path, name: str = "llama", tied: bool = False, tokenizer=None, **config) -> Saved:
    """A tiny base and an adapter on it, saved and loaded again.

    Args:
        tied (`bool`): tie the embeddings of a base that does not by itself.
        tokenizer (*optional*): the base's.
        config: of the adapter.
    """
    model = tiny(name)
    if tied:
        model.config.tie_word_embeddings = True
        settings, model = model.generation_config, type(model)(model.config)
        model.generation_config = settings
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.2)
        model.tie_weights()
    model.save_pretrained(folder / "base")
    (chat_tokenizer() if tokenizer is None else tokenizer).save_pretrained(folder / "base")
    base = load_model(folder / "base", dtype="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = {"num_prompts": 3, "num_virtual_tokens": 4, **config}
        adapted = get_peft_model(base, IDPConfig(task_type="CAUSAL_LM", **config)).eval()
    if config.get("selection") == "centroid":
        per_prompt = 90 // config["num_prompts"]
        rows = [
            {"input_ids": [2 + i * per_prompt + j for j in range(per_prompt)], "prompt_ids": i}
            for i in range(config["num_prompts"])
        ]
        fit_centroids(adapted, rows)
    adapted.save_pretrained(folder / "adapter")
    return Saved(adapted, folder / "base", folder / "adapter")


def say(model, ids: list[int], tokens: int = 8, **settings) -> list[int]:
    """What a plain model says behind some tokens, greedily unless told otherwise."""
    given = torch.tensor([ids])
    return model.generate(input_ids=given, max_new_tokens=tokens, **{"do_sample": False, **settings})[
        0, len(ids) :
    ].tolist()
