"""Damage, training and the checks of the demo: plain transformers, PEFT and `Trainer` calls around one adapter."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from idp_peft import assets
from idp_peft.evaluation import chunk_documents, mask_context

# The learning rate and the like were chosen by these; the table is made from the others.
_TUNING_CHUNKS = 32


def data(options: argparse.Namespace, length: int):
    """`(tokenizer, model folder, training chunks, held-out chunks)`; held-out chunks are one per article."""
    folder = options.model or assets.default_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train, held_out = assets.split_documents(assets.wiki_documents())
    chunks = chunk_documents(tokenizer, held_out, length, per_document=1)
    chunks = chunks[:_TUNING_CHUNKS] if options.tuning else chunks[_TUNING_CHUNKS:]
    return tokenizer, folder, chunk_documents(tokenizer, train, length), chunks[: options.chunks]


def load(folder: str | Path, damage: str) -> torch.nn.Module:
    """A model in float32, damaged in place unless `damage="none"`.

    Damaged after loading, because `Trainer` refuses a model that `from_pretrained` quantised with torchao's 4-bit
    formats, even with an adapter on it; the weights are the same bit for bit.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=_device()).eval()
    if damage != "none":
        from torchao.quantization import quantize_

        def is_damaged(module: torch.nn.Module, name: str) -> bool:
            return isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()

        quantize_(model, _format(damage), filter_fn=is_damaged)
    return model


def loading(damage: str) -> dict:
    """Keyword arguments of `from_pretrained` that do in one go what `load` does in two steps."""
    arguments = {"dtype": torch.float32, "device_map": _device()}
    if damage != "none":
        arguments["quantization_config"] = TorchAoConfig(_format(damage))
    return arguments


def _format(damage: str):
    """Rounding in groups of 64 weights with a zero point, the better of torchao's two schemes on the default model.

    Such layers are differentiable towards their inputs on every processor.
    """
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup

    return IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, damage), granularity=PerGroup(64), mapping_type=MappingType.ASYMMETRIC
    )


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def fingerprint(model: torch.nn.Module) -> str:
    """sha256 of a model's base weights: names, types, shapes and bits, packed words included; prompts left out."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    digest = hashlib.sha256()
    for name, tensor in sorted(base.state_dict().items()):
        if ".idp." not in name:
            for part_name, part in _parts(name, tensor.detach()):
                digest.update(f"{part_name} {part.dtype} {tuple(part.shape)}".encode())
                digest.update(part.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _parts(name: str, tensor: torch.Tensor):
    """The plain tensors inside one that a quantisation library made, by name."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from _parts(f"{name}.{part}", getattr(tensor, part))


def check_gradients(model: torch.nn.Module, token_ids: list[int]) -> None:
    """Refuse a base whose layers cut the gradient, as some kernels do without an error once they have run in eval mode.

    Raises:
        `RuntimeError`: naming the layers whose output forgot that their input wants a gradient.
    """
    severed = []

    def look(name):
        def hook(_module, args, output):
            if args[0].requires_grad and not output.requires_grad:
                severed.append(name)

        return hook

    named = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    handles = [module.register_forward_hook(look(name)) for name, module in named]
    try:
        embeds = model.get_input_embeddings()(torch.tensor([token_ids], device=model.device)).detach()
        model(inputs_embeds=embeds.requires_grad_(), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if severed:
        raise RuntimeError(
            f"{len(severed)} of {len(named)} linear layers pass no gradient to their input, {severed[0]!r} first: "
            "prompts cannot be trained through this base"
        )


def train(model: torch.nn.Module, chunks: list[list[int]], context_tokens: int, options: argparse.Namespace) -> list:
    """Train the prompts by the plain language-modelling loss after each chunk's context; returns `Trainer`'s log."""
    input_ids = torch.tensor(chunks)
    labels = mask_context(input_ids, context_tokens)
    dataset = [{"input_ids": x, "labels": y} for x, y in zip(input_ids, labels, strict=True)]
    arguments = TrainingArguments(
        output_dir=str(options.adapter.parent / "trainer"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, options.steps // 10),
        weight_decay=0.0,
        logging_steps=max(1, options.steps // 10),
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=options.seed,
    )
    trainer = Trainer(model, arguments, train_dataset=dataset, data_collator=default_data_collator)
    trainer.train()
    model.eval()
    return trainer.state.log_history


@torch.no_grad()
def logit_difference(one: torch.nn.Module, other: torch.nn.Module, chunks: list[list[int]]) -> float:
    """Largest absolute difference of two models' logits; both choose their prompts themselves."""
    input_ids = torch.tensor(chunks, device=one.device)
    return float((one(input_ids=input_ids).logits - other(input_ids=input_ids).logits).abs().max())


def continue_texts(model: torch.nn.Module, tokenizer, starts: tuple[str, ...]):
    """Greedy continuations of a left-padded batch, and the selection made for it."""
    inputs = tokenizer(list(starts), return_tensors="pt", padding=True, padding_side="left").to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return tokenizer.batch_decode(tokens, skip_special_tokens=True), model.last_selection
