"""What each process of a distributed run does in the tests: a user's own code, started as a user starts it.

`python -m torch.distributed.run --nproc_per_node 2 -m tests.distributed_job FOLDER JOB...` runs jobs by name and leaves
`FOLDER/JOB.json`, what each process saw; called without a launcher, the same functions are the single process that the
results are compared with.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import accelerate
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, DistributedType, PartialState
from accelerate.utils import set_seed
from packaging.version import Version
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from idp_peft import IDPConfig, start_at
from idp_peft.hosting.architectures import find_blocks
from tests.tiny import tiny

# accelerate 1.12 (and transformers 5.0 with it) restores optimizers to "cpu:0", a place that torch does not know, and under
# FSDP2 gives an empty adapter to all processes but the first.
RESUMES = Version(accelerate.__version__) >= Version("1.15")
LENGTHS = [3, 4, 2, 4]
BATCH = 4  # of all processes together
# As many tokens as `LENGTHS` in all, once the first of each prompt is frozen.
KEY_VALUES = {"prompts": "key_values", "num_virtual_tokens": 4, "init_weights": False}


def let_accelerate_shard_on_cpu(way: str) -> None:
    """accelerate offers FSDP and DeepSpeed to accelerators only: tell it that these processes have one."""
    if way == DistributedType.DEEPSPEED:
        import deepspeed

        torch.distributed.init_process_group("gloo")
        deepspeed.init_distributed("gloo")
    start = PartialState.__init__

    def init(self, *args, **kwargs):
        start(self, *args, **kwargs)
        if way == DistributedType.DEEPSPEED:
            self.distributed_type, self.device, self.backend = way, torch.device("cpu"), "gloo"
            self.num_processes, self.process_index = torch.distributed.get_world_size(), torch.distributed.get_rank()
            self.local_process_index = self.process_index
        elif self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU  # from which accelerate goes on to FSDP

    PartialState.__init__ = init


def examples(count: int = 16, length: int = 12) -> list[dict]:
    """Rows with a context of five tokens in front of their labels."""
    ids = torch.randint(2, 97, (count, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :5] = -100
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": label}
        for row, label in zip(ids, labels, strict=True)
    ]


def build(
    assignment: str,
    base: str | None = None,
    architecture: str = "llama",
    dtype=torch.float32,
    starts_at_base: bool = False,
    **config,
):
    set_seed(7)
    model = tiny(architecture) if base is None else AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    config = {"num_prompts": 4, "num_virtual_tokens": LENGTHS, **config}
    adapted = get_peft_model(model, IDPConfig(task_type="CAUSAL_LM", assignment=assignment, **config))
    if config.get("prompts") == "key_values":
        # Under ZeRO-3, a teacher that is built here has other weights; under FSDP2, only one process may hold the base.
        teacher = adapted.get_base_model() if starts_at_base else tiny("llama", seed=1)
        start_at(adapted, teacher, [row["input_ids"].tolist() for row in examples(4)])
    return adapted


def bank_of(model):
    return model.base_model.layer.active_bank


def shard_parts_of_layers(model) -> None:
    """Units that no accelerate config makes: attention and decoder have their own, layers too."""
    decoder = model.get_base_model().model
    for layer in decoder.layers:
        torch.distributed.fsdp.fully_shard(layer.self_attn)
        torch.distributed.fsdp.fully_shard(layer)
    torch.distributed.fsdp.fully_shard(decoder)
    torch.distributed.fsdp.fully_shard(model)


class Calls:
    """Counts the forwards of some modules, inside a `with`."""

    def __init__(self, modules) -> None:
        self.modules, self.count = list(modules), 0

    def __enter__(self) -> Calls:
        self.handles = [module.register_forward_pre_hook(self._called) for module in self.modules]
        return self

    def _called(self, *_) -> None:
        self.count += 1

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()


def loop(
    folder: Path, assignment: str, checkpointing: bool = False, precision: str = "no", by_hand: bool = False, **config
) -> dict:
    """A plain accelerate loop: train, evaluate, generate, save."""
    accelerator = Accelerator(mixed_precision=precision)
    model = build(assignment, **config)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if by_hand and accelerator.distributed_type == DistributedType.FSDP:
        shard_parts_of_layers(model)
    # `eps`: where a gradient is next to nothing, rounding must not decide the direction of a step.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, eps=1e-3)
    batches = DataLoader(examples(), batch_size=BATCH // accelerator.num_processes)
    if by_hand:
        batches = accelerator.prepare(batches)
    else:
        model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    inner = accelerator.unwrap_model(model)
    set_seed(1)
    model.train()
    result = {"losses": [], "wrapper": type(model).__name__, "trained_on": []}
    for batch in batches:
        loss = model(**batch, use_cache=False).loss
        result["trained_on"].append(inner.base_model.last_selection.prompt_ids.tolist())
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        result["losses"].append(accelerator.gather(loss.detach()[None]).mean().item())
    result |= evaluate(accelerator, model, inner)
    result |= save(accelerator, model, inner, folder)
    result |= gradients(accelerator, model, inner)
    return result


def evaluate(accelerator, model, inner) -> dict:
    """Choices and logits of a padded batch, and what is generated from it: every process has all of it. And how often the
    last layer runs for that batch a second time."""
    model.eval()
    ids = torch.stack([row["input_ids"] for row in examples(6)])
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[2, :6] = 0
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    choices = inner.base_model.last_selection.prompt_ids.tolist()
    with torch.no_grad(), Calls([find_blocks(inner.base_model.layer.decoder)[1][-1]]) as calls:
        model(input_ids=ids, attention_mask=mask)
    if accelerator.distributed_type == DistributedType.FSDP:
        torch.distributed.fsdp.register_fsdp_forward_method(model, "generate")
    generated = inner.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    return {
        "choices": choices,
        "logits": logits[:, -1].float().tolist(),
        "generated": generated[:, -4:].tolist(),
        "runs_again": calls.count,
    }


def save(accelerator, model, inner, folder: Path) -> dict:
    """PEFT's own way of saving under accelerate; only the first process writes."""
    with Calls(inner.modules()) as calls:
        accelerator.wait_for_everyone()
        weights = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            inner.save_pretrained(folder, state_dict=weights)
    accelerator.wait_for_everyone()
    refused = None
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        try:
            inner.save_pretrained(folder / "in_parts")
        except ValueError as error:
            refused = str(error)
    with torch.no_grad():
        tokens = bank_of(inner).embeddings()
    return {"forwards_while_saving": calls.count, "refused": refused, "prompts": tokens.tolist()}


def gradients(accelerator, model, inner) -> dict:
    """The bank's gradient where each process trained one prompt of its own and nobody the others, `[tokens, d]`."""
    model.train()
    batch = {name: torch.stack([row[name] for row in examples(BATCH)]) for name in examples(1)[0]}
    prompts = torch.arange(2).repeat_interleave(BATCH // 2)
    mine = slice(None)
    if accelerator.num_processes == 2:
        half = accelerator.process_index * BATCH // 2
        mine = slice(half, half + BATCH // 2)
    loss = model(**{name: value[mine] for name, value in batch.items()}, prompt_ids=prompts[mine], use_cache=False).loss
    accelerator.backward(loss)
    gradient = bank_of(inner).weight.grad
    if gradient is None:
        return {"gradient": None}
    return {"gradient": (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).tolist()}


def trainer(folder: Path, assignment: str, **config) -> dict:
    """transformers' Trainer: train, evaluate, save; then again from the checkpoint in the middle."""
    whole = _trained(folder / "run", build(assignment, **config))
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    result = {
        "losses": losses,
        "eval_loss": whole.evaluate()["eval_loss"],
        "wrapper": type(whole.model_wrapped).__name__,
    }
    result["finds_unused"] = getattr(whole.model_wrapped, "find_unused_parameters", None)
    with Calls(whole.accelerator.unwrap_model(whole.model).modules()) as calls:
        whole.save_model(str(folder))
    result["forwards_while_saving"] = calls.count
    if not RESUMES:
        return result
    blank = build(assignment, **config)
    with torch.no_grad():
        bank_of(blank).weight.zero_()  # everything must come from the checkpoint
    resumed = _trained(folder / "run", blank, resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    resumed.save_model(str(folder / "resumed"))
    result["resumed_losses"] = [entry["loss"] for entry in resumed.state.log_history if "loss" in entry]
    return result


def _trained(folder: Path, model, **how) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=BATCH // int(os.environ.get("WORLD_SIZE", 1)),
        learning_rate=0.05,
        logging_steps=1,
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
        seed=3,
        use_cpu=True,
        ddp_find_unused_parameters=False,
    )
    one = Trainer(model=model, args=arguments, train_dataset=examples(), eval_dataset=examples(8))
    one.train(**how)
    return one


# Each takes the folder to write to, and that of a base model.
JOBS = {
    "selected": lambda folder, base: loop(folder, "selected", base=base),
    "uniform": lambda folder, base: loop(folder, "uniform", base=base),
    "key_values": lambda folder, base: loop(folder, "selected", base=base, **KEY_VALUES),
    "own_key_values": lambda folder, base: loop(folder, "selected", base=base, starts_at_base=True, **KEY_VALUES),
    "trainer_key_values": lambda folder, base: trainer(folder, "selected", base=base, **KEY_VALUES),
    "centroid": lambda folder, base: loop(folder, "selected", base=base, selection="centroid"),
    "scales": lambda folder, base: loop(folder, "selected", base=base, scales=True),
    "all": lambda folder, base: loop(folder, "all", base=base),
    "checkpointing": lambda folder, base: loop(folder, "selected", base=base, checkpointing=True),
    "deeper": lambda folder, base: loop(folder, "selected", base=base, selection_layer=-1),
    "mixed": lambda folder, base: loop(folder, "selected", base=base, precision="bf16"),
    "half": lambda folder, base: loop(folder, "selected", base=base, dtype=torch.bfloat16),
    "by_hand": lambda folder, base: loop(folder, "selected", base=base, by_hand=True),
    "gpt2": lambda folder, base: loop(folder, "selected", architecture="gpt2"),
    "bloom": lambda folder, base: loop(folder, "selected", architecture="bloom"),
    "gemma2": lambda folder, base: loop(folder, "selected", architecture="gemma2"),
    "gemma3n": lambda folder, base: loop(folder, "selected", architecture="gemma3n"),
    "trainer": lambda folder, base: trainer(folder, "uniform", base=base),
    "trainer_centroid": lambda folder, base: trainer(folder, "selected", base=base, selection="centroid"),
    "trainer_selected": lambda folder, base: trainer(folder, "selected", base=base),
}


def main(folder: str, *jobs: str) -> None:
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        let_accelerate_shard_on_cpu(DistributedType.FSDP)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        let_accelerate_shard_on_cpu(DistributedType.DEEPSPEED)
    for job in jobs:
        AcceleratorState._reset_state(reset_partial_state=True)
        result = JOBS[job](Path(folder) / job, str(Path(folder) / "base"))
        everyone = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, result)
        if torch.distributed.get_rank() == 0:
            (Path(folder) / f"{job}.json").write_text(json.dumps(everyone))
    torch.distributed.destroy_process_group()
    # A reducer that Python frees on its way out waits for gloo's threads, and was seen to wait without end. Everything is
    # written, so this process leaves at once.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
