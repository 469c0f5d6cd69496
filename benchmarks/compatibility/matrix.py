"""What works with which method: every feature of `forward` and `generate`, judged against the definition.

Each check compares a method with what it *means*, computed row by row, without padding and without a cache, on a separate
copy of the base model: `[P ; E(x)]` for prompt methods, the adapted model itself for LoRA and for the base alone. A check
passes ("right"), finds a difference that nothing announced ("wrong"), or meets an error ("error").
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from idp_peft import IDPConfig
from idp_peft.selection import select

METHODS = ("base", "idp", "prompt_tuning", "lora")
TOLERANCE = 1e-4
NEW_TOKENS = 6


class Undefined(Exception):
    """The base cannot say what a method means."""


@dataclass
class Contestant:
    """A method on a tiny model, with an untouched copy of its base.

    Args:
        method (`str`): one of `METHODS`.
        model (`nn.Module`): the model under test.
        base (`nn.Module`): the base model, untouched.
        lengths (`list[int]`): real tokens of the test batch's rows.
    """

    method: str
    model: torch.nn.Module
    base: torch.nn.Module
    vocabulary: int
    lengths: tuple[int, ...] = (5, 9, 7)

    def batch(self, side: str = "left") -> dict[str, torch.Tensor]:
        """A padded batch: `input_ids` and `attention_mask`, int64 `[rows, tokens]`."""
        generator = torch.Generator().manual_seed(0)
        width = max(self.lengths)
        ids = torch.zeros(len(self.lengths), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, length in enumerate(self.lengths):
            where = slice(width - length, width) if side == "left" else slice(0, length)
            ids[row, where] = torch.randint(2, self.vocabulary, (length,), generator=generator)
            mask[row, where] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def single(self) -> torch.Tensor:
        """The longest row, without padding, int64 `[1, max(lengths)]`."""
        return self.batch()["input_ids"][self.lengths.index(max(self.lengths))][None]

    def prompt(self, ids: torch.Tensor) -> torch.Tensor | None:
        """The soft prompt that stands in front of one unpadded row by definition, `[k, d]`."""
        if self.method == "idp":
            layer = self.model.base_model.layer
            with torch.no_grad():
                chosen = int(select(layer, {"input_ids": ids}, torch.ones_like(ids).bool()).prompt_ids)
            bank = layer.idp_prompts["default"]
            return bank.weight.detach().split(bank.lengths)[chosen]
        if self.method == "prompt_tuning":
            return self.model.prompt_encoder["default"].embedding.weight.detach()
        return None

    def embeds(self, ids: torch.Tensor, prompt: torch.Tensor | None) -> torch.Tensor:
        embeds = self.base.get_input_embeddings()(ids)
        return embeds if prompt is None else torch.cat([prompt[None], embeds], dim=1)

    def defined_logits(self, ids: torch.Tensor, prompt: torch.Tensor | None) -> torch.Tensor:
        """What the method means for one unpadded row, `[1, n, vocab]`."""
        model = self.model if self.method == "lora" else self.base
        with torch.no_grad():
            if prompt is None:
                return model(input_ids=ids, use_cache=False).logits
            if self.looks_up_in_layers():
                return self._prompt_first(ids, prompt)
            embeds = self.embeds(ids, prompt)
            everything = torch.ones(
                embeds.shape[:2], dtype=torch.long
            )  # without a mask, transformers 5.0 wants Qwen-VL's ids
            return model(inputs_embeds=embeds, attention_mask=everything, use_cache=False).logits[:, len(prompt) :]

    def looks_up_in_layers(self) -> bool:
        """Whether layers look up an embedding of each token (Gemma 3n, Gemma 4), which embeddings as input would lose."""
        return bool(getattr(self.base.get_decoder().config, "hidden_size_per_layer_input", 0))

    def _prompt_first(self, ids: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """The base on the prompt, then on ids. Gemma 4 takes its padding token's part for what has no id."""
        decoder, beside = self.base.get_decoder(), {}
        if "inputs_embeds" in inspect.signature(decoder.get_per_layer_inputs).parameters:
            beside["per_layer_inputs"] = decoder.get_per_layer_inputs(torch.zeros(1, len(prompt), dtype=torch.long))
        start = self.base(inputs_embeds=prompt[None], use_cache=True, **beside)
        cache = {name: start[name] for name in ("cache", "past_key_values") if name in start}
        return self.base(input_ids=ids, **cache).logits

    def defined_greedy(self, ids: torch.Tensor, steps: int = NEW_TOKENS) -> torch.Tensor:
        """Greedy continuation of one unpadded row by definition, int64 `[steps]`. The prompt is chosen once."""
        prompt, start = self.prompt(ids), ids.shape[1]
        for _ in range(steps):
            ids = torch.cat([ids, self.defined_logits(ids, prompt)[:, -1:].argmax(-1)], dim=1)
        return ids[0, start:]

    def defined_generate(self, ids: torch.Tensor, **arguments) -> torch.Tensor:
        """The base's own `generate` on the concatenation of one unpadded row: new tokens, int64 `[sequences, steps]`."""
        prompt = self.prompt(ids)
        if prompt is None:
            model = self.model if self.method == "lora" else self.base
            return model.generate(input_ids=ids, **arguments)[:, ids.shape[1] :]
        if (
            self.looks_up_in_layers()
            or "inputs_embeds" not in inspect.signature(self.base.prepare_inputs_for_generation).parameters
        ):
            raise Undefined("the base cannot generate from the embeddings that define this")
        return self.base.generate(inputs_embeds=self.embeds(ids, prompt), **arguments)

    def generate(self, **arguments):
        return self.model.generate(**{"max_new_tokens": NEW_TOKENS, "do_sample": False, **arguments})


def contestant(method: str, base: torch.nn.Module, vocabulary: int) -> Contestant:
    """Put a method on a copy of a tiny base model, with weights large enough to matter."""
    untouched, base = base, copy.deepcopy(base)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if method == "base":
            model = base
        elif method == "idp":
            model = get_peft_model(base, IDPConfig(task_type="CAUSAL_LM", num_prompts=4, num_virtual_tokens=4))
        elif method == "prompt_tuning":
            model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
        else:
            model = get_peft_model(
                base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
            )
    return Contestant(method, model.eval(), untouched, vocabulary)


# ---------------------------------------------------------------------- the checks: True is right, False is wrong


def padded_forward(c: Contestant, side: str) -> bool:
    batch = c.batch(side)
    with torch.no_grad():
        logits = c.model(**batch).logits[:, -batch["input_ids"].shape[1] :]
    for row, mask in enumerate(batch["attention_mask"].bool()):
        ids = batch["input_ids"][row][mask][None]
        if not _close(logits[row][mask], c.defined_logits(ids, c.prompt(ids))[0]):
            return False
    return True


def logits_shape(c: Contestant) -> bool | str:
    batch = c.batch()
    with torch.no_grad():
        found, expected = c.model(**batch).logits.shape, c.base(**batch).logits.shape
    return found == expected or f"{found[1] - expected[1]} positions more than the input"


def padded_greedy(c: Contestant, **arguments) -> bool:
    batch = c.batch()
    tokens = batch["input_ids"].shape[1]
    generated = c.generate(**batch, **arguments)
    return torch.equal(generated[:, :tokens], batch["input_ids"]) and all(
        torch.equal(generated[row, tokens:], c.defined_greedy(batch["input_ids"][row][mask][None]))
        for row, mask in enumerate(batch["attention_mask"].bool())
    )


def single_greedy(c: Contestant, **arguments) -> bool:
    ids = c.single()
    return torch.equal(c.generate(input_ids=ids, **arguments)[0, ids.shape[1] :], c.defined_greedy(ids))


def beams(c: Contestant, padded: bool = False, **arguments) -> bool:
    arguments = {"num_beams": 3, "do_sample": False, "max_new_tokens": NEW_TOKENS, **arguments}
    batch = c.batch() if padded else {"input_ids": c.single(), "attention_mask": torch.ones_like(c.single())}
    (rows, tokens), per_row = batch["input_ids"].shape, arguments.get("num_return_sequences", 1)
    generated = c.model.generate(**batch, **arguments)[:, tokens:].view(rows, per_row, -1)
    return all(
        torch.equal(generated[row], c.defined_generate(batch["input_ids"][row][mask][None], **arguments))
        for row, mask in enumerate(batch["attention_mask"].bool())
    )


def sampling(c: Contestant) -> bool:
    ids = c.single()
    arguments = {"do_sample": True, "top_k": 20, "max_new_tokens": NEW_TOKENS, "num_return_sequences": 3}
    torch.manual_seed(7)
    expected = c.defined_generate(ids, **arguments)
    torch.manual_seed(7)
    return torch.equal(c.model.generate(input_ids=ids, **arguments)[:, ids.shape[1] :], expected)


def inputs_embeds(c: Contestant) -> bool:
    ids = c.single()
    embeds = c.base.get_input_embeddings()(ids).detach()
    with torch.no_grad():
        if not _close(c.base(inputs_embeds=embeds).logits, c.base(input_ids=ids).logits):
            raise Undefined("the base itself makes something else of embeddings than of their ids")
    generated = c.generate(inputs_embeds=embeds)
    return torch.equal(generated[0], c.defined_greedy(ids))


def multi_turn(c: Contestant) -> bool:
    """The first turn's cache is handed to the second; a prompt, once chosen, is kept."""
    first = c.single()
    cache = DynamicCache(config=c.base.config)
    turn = c.generate(input_ids=first, past_key_values=cache)
    second = torch.cat([turn, torch.tensor([[11, 12, 13]])], dim=1)
    generated = c.generate(input_ids=second, past_key_values=cache)[0, second.shape[1] :]
    prompt, ids = c.prompt(first), second
    for _ in range(NEW_TOKENS):
        ids = torch.cat([ids, c.defined_logits(ids, prompt)[:, -1:].argmax(-1)], dim=1)
    return torch.equal(generated, ids[0, second.shape[1] :])


def output_scores(c: Contestant) -> bool:
    ids = c.single()
    output = c.generate(input_ids=ids, output_scores=True, return_dict_in_generate=True)
    logits = c.defined_logits(output.sequences[:, :-1], c.prompt(ids))[:, ids.shape[1] - 1 :]
    return len(output.scores) == NEW_TOKENS and _close(torch.stack(output.scores, dim=1), logits)


class _Collector(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        pass


def streaming(c: Contestant) -> bool:
    ids, streamer = c.single(), _Collector()
    c.generate(input_ids=ids, streamer=streamer)
    return streamer.tokens == ids[0].tolist() + c.defined_greedy(ids).tolist()


def assisted(c: Contestant) -> bool:
    return single_greedy(c, assistant_model=copy.deepcopy(c.base))


def gradient_checkpointing(c: Contestant) -> bool:
    if c.method == "base":
        for parameter in c.model.parameters():
            parameter.requires_grad_(True)
    batch = c.batch("right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    forced = {"prompt_ids": torch.tensor([2, 0, 2])} if c.method == "idp" else {}
    gradients = []
    for checkpointing in (False, True):
        c.model.train()
        c.model.zero_grad()
        if checkpointing:
            c.model.gradient_checkpointing_enable({"use_reentrant": False})
        c.model(**batch, labels=labels, **forced).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in c.model.parameters() if p.grad is not None]))
    c.model.gradient_checkpointing_disable()
    c.model.eval()
    return bool(gradients[0].abs().max() > 0) and _close(*gradients)


def _close(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and bool((left - right).abs().max() <= TOLERANCE)


FEATURES: dict[str, Callable[[Contestant], bool | str]] = {
    "logits have the base's shape": logits_shape,
    "left-padded batch, forward": lambda c: padded_forward(c, "left"),
    "right-padded batch, forward": lambda c: padded_forward(c, "right"),
    "left-padded batch, generate": padded_greedy,
    "left-padded batch, beams": lambda c: beams(c, padded=True),
    "left-padded batch, static cache": lambda c: padded_greedy(c, cache_implementation="static"),
    "left-padded batch, `use_cache=False`": lambda c: padded_greedy(c, use_cache=False),
    "beams": beams,
    "`num_return_sequences`": lambda c: beams(c, num_return_sequences=3),
    "sampling": sampling,
    "static cache": lambda c: single_greedy(c, cache_implementation="static"),
    "`use_cache=False`": lambda c: single_greedy(c, use_cache=False),
    "`inputs_embeds`": inputs_embeds,
    "prompt lookup": lambda c: single_greedy(c, prompt_lookup_num_tokens=2),
    "assisted decoding": assisted,
    "multi-turn cache reuse": multi_turn,
    "chunked prefill": lambda c: single_greedy(
        c, prefill_chunk_size=4, past_key_values=DynamicCache(config=c.base.config)
    ),
    "`output_scores`": output_scores,
    "streaming": streaming,
    "gradient checkpointing": gradient_checkpointing,
}


def judge(feature: str, c: Contestant) -> tuple[str, str]:
    """("right" | "wrong" | "error" | "undefined", message)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = FEATURES[feature](c)
        if isinstance(result, str):
            return "wrong", result
        return ("right", "") if result else ("wrong", "differs from the definition, silently")
    except Undefined as error:
        return "undefined", str(error)
    except Exception as error:  # an error is a result here, whatever its kind
        return "error", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
