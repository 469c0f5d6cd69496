"""Distillation: the compressed model learns to predict what the dense one predicts.

    loss = w T^2 mean_t KL(softmax(z_t / T) || softmax(s_t / T)) + (1 - w) mean_t -log softmax(s_t)[x_{t+1}]

z: the dense model's logits (no gradients, one batch at a time, kept nowhere), s: the recovered model's, t: positions whose
next token is labelled. Forward KL, after Hinton et al., arXiv 1503.02531. In contrast to language modelling alone, there is
nothing to gain from the training text itself: an undamaged model has loss 0 (at w = 1).

Where one vocabulary has more rows than the other (most are padded to some multiple), both softmaxes of the first term are
over the rows that both have.
"""

from __future__ import annotations

import torch
from torch import nn

from idp_peft.config import IDPConfig
from idp_peft.recover.stored_teacher import StoredTeacher, truncated_kl
from idp_peft.recover.two_rates import RepairTrainer

_IGNORED = -100


class DistillationTrainer(RepairTrainer):
    """`transformers.Trainer` with the loss above.

    Args:
        teacher (`PreTrainedModel` or `StoredTeacher`): the dense model, whose token ids mean the same, put into eval mode and
            onto the student's device; or what it predicts, from files.
        weight (`float`): w, from above 0 to 1.
        temperature (`float`): T, above 0.

    Raises:
        `ValueError`: for values outside these ranges.
    """

    def __init__(self, *args, teacher: nn.Module | StoredTeacher, weight: float, temperature: float, **kwargs) -> None:
        is_stored = isinstance(teacher, StoredTeacher)
        check_distillation(weight, temperature, is_stored)
        super().__init__(*args, **kwargs)
        self.teacher = teacher if is_stored else teacher.eval().requires_grad_(False).to(self.args.device)
        self.weight, self.temperature = weight, temperature
        # The loss below divides by the labelled tokens of the whole optimiser step, when Trainer counts them.
        self.model_accepts_loss_kwargs = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        scored = labels[:, 1:] != _IGNORED  # [B, n-1]
        items = scored.sum() if num_items_in_batch is None else num_items_in_batch
        target = self._target(inputs, scored)
        losses = []
        for forced in self._prompts_in_turn(model, len(labels)):
            outputs = model(**inputs, **forced, use_cache=False)
            # PEFT's prompt tuning returns logits of its prompt positions too, in front.
            logits = outputs.logits[:, -labels.shape[1] :][:, :-1][scored]  # [T, V]
            if isinstance(self.teacher, StoredTeacher):
                loss = self.weight * truncated_kl(logits, *target)
            else:
                loss = self.weight * forward_kl(logits, target, self.temperature)
            if self.weight < 1:
                own = nn.functional.cross_entropy(logits.float(), labels[:, 1:][scored], reduction="sum")
                loss = loss + (1 - self.weight) * own
            losses.append(loss)
        loss = sum(losses) / len(losses) / items
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # as Trainer does: gradients are averaged over processes
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _target(self, inputs: dict, scored: torch.Tensor):
        """What the teacher says where tokens are scored: logits `[T, V]`, or ids and log-probabilities `[T, k]`."""
        if isinstance(self.teacher, StoredTeacher):
            found = self.teacher.predictions(inputs["input_ids"], inputs["attention_mask"])
            return [part[:, :-1][scored] for part in found]
        seen = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
        return self.teacher(**seen, use_cache=False).logits[:, :-1][scored]

    def _prompts_in_turn(self, model: nn.Module, batch: int):
        """Forced prompts of each pass: every prompt of the bank under `assignment="all"`, else one free pass."""
        unwrapped = self.accelerator.unwrap_model(model)
        config = unwrapped.peft_config[unwrapped.active_adapter]
        if not (model.training and isinstance(config, IDPConfig) and config.assignment == "all"):
            return [{}]
        return [{"prompt_ids": torch.full((batch,), i)} for i in range(config.num_prompts)]


def forward_kl(logits: torch.Tensor, target: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """T^2 KL(softmax(target / T) || softmax(logits / T)), summed over tokens. Both `[tokens, vocabulary]`, any dtype; of
    unequal vocabularies, the rows that only one has are left out of both softmaxes."""
    common = min(logits.shape[-1], target.shape[-1])
    logits, target = logits[..., :common], target[..., :common]
    student = (logits.float() / temperature).log_softmax(-1)
    teacher = (target.float() / temperature).log_softmax(-1)
    return nn.functional.kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2


def check_distillation(weight: float, temperature: float, is_stored: bool = False) -> None:
    """
    Args:
        is_stored (`bool`, defaults to `False`): whether the teacher is read from files.

    Raises:
        `ValueError`: for a weight outside (0, 1], or a temperature that is not above 0, or not 1 with a teacher from files.
    """
    if not 0 < weight <= 1:
        raise ValueError(f"`distillation_weight` must be above 0 and at most 1, got {weight}")
    if not temperature > 0:
        raise ValueError(f"`temperature` must be above 0, got {temperature}")
    if is_stored and temperature != 1:
        raise ValueError(f"`temperature` must be 1 with a teacher from files, got {temperature}")
