"""What a repair is made of: the model, the method, the data and the objective."""

from __future__ import annotations

from dataclasses import dataclass

from idp_peft.recover.distillation import check_distillation
from idp_peft.recover.methods import METHODS
from idp_peft.recover.stored_teacher import is_taught


@dataclass
class RecoverSettings:
    """Everything that `recover` is told beside `TrainingArguments`.

    Args:
        model (`str`): the compressed model: a folder, a `.gguf` file or a Hub id (`"default"`: a dense one).
        method (`str`, defaults to `"idp"`): what is trained: `"idp"`, or one of PEFT's own methods as a baseline
            (`"prompt_tuning"`, `"prefix_tuning"`, `"lora"`, `"ia3"`, `"ln_tuning"`).
        teacher (`str`, *optional*): the dense model to distil from, or a folder that [`teach`] wrote, with what it predicts on the
            same text. Without one, the objective is language modelling.
        distillation_weight (`float`, defaults to `1.0`): the share of the distillation loss; the rest is language modelling.
        temperature (`float`, defaults to `1.0`): of the distillation loss.
        dataset (`str`, defaults to `"wiki"`): what [`load_texts`] takes, or `"self"`: text that the teacher writes.
        dataset_split (`str`), dataset_config (`str`, *optional*), text_column (`str`): as in [`load_texts`].
        kind_column (`str`, *optional*): the column that says what kind a document is. Each kind trains the prompt of its
            name, so `num_prompts` is how many kinds there are.
        assistant_only_loss (`bool`, defaults to `False`): predict the assistant's turns of a chat alone.
        eval_share (`float`, defaults to `0.05`): the share of the documents kept for Trainer's evaluation, where it evaluates.
        block_tokens (`int`, defaults to `256`): tokens of a training example.
        context_tokens (`int`, defaults to `64`): tokens in front of an example that choose its prompt and are not predicted
            (of a completion: its prompt).
        min_tokens (`int`, defaults to `32`): texts with fewer tokens are left out; chats are not.
        self_samples (`int`, defaults to `256`): texts that the teacher writes for `dataset="self"`.
        prompts (`str`), num_frozen_tokens (`int`), num_prompts (`int`), num_virtual_tokens (`int`), selection (`str`), selection_layer (`int`),
            selection_reduction (`str`), assignment (`str`): as in [`IDPConfig`].
            With `"centroid"`, the centroids are set before training ([`fit_centroids`]).
        scales (`bool`, defaults to `True`): as in [`IDPConfig`]: train a factor per output channel beside the prompts. Without
            them, prompts that were trained apart can be composed, and exported without folding.
        scale_group_size (`int`, *optional*): as in [`IDPConfig`]: train a factor per group of so many inputs, too.
        scales_learning_rate (`float`, *optional*): the peak learning rate of the scales; by default their own.
        init (`str`, defaults to `"corpus"`): how prompts start: `"vocab"`, `"random"`, or the openings of training texts, each
            of its own kind or cluster where there are such. Key/value prompts start at what the teacher makes of these, or,
            without one of the model's shape, the model itself
            (prefix tuning: the teacher's keys and values of them, where there is a teacher).
        match_budget (`bool`, defaults to `False`): give a baseline the size nearest to the bank's parameter count.
        lora_rank (`int`, defaults to `16`), lora_target_modules (`str`, defaults to `"all-linear"`): of LoRA without
            `match_budget`.
    """

    model: str
    method: str = "idp"
    teacher: str | None = None
    distillation_weight: float = 1.0
    temperature: float = 1.0
    dataset: str = "wiki"
    dataset_split: str = "train"
    dataset_config: str | None = None
    text_column: str = "text"
    kind_column: str | None = None
    assistant_only_loss: bool = False
    eval_share: float = 0.05
    block_tokens: int = 256
    context_tokens: int = 64
    min_tokens: int = 32
    self_samples: int = 256
    prompts: str = "tokens"
    num_frozen_tokens: int = 1
    num_prompts: int = 4
    num_virtual_tokens: int = 32
    selection: str = "attention"
    selection_layer: int = 0
    selection_reduction: str = "mean"
    assignment: str = "selected"
    scales: bool = True
    scale_group_size: int | None = None
    scales_learning_rate: float | None = None
    init: str = "corpus"
    match_budget: bool = False
    lora_rank: int = 16
    lora_target_modules: str | list[str] = "all-linear"

    def check(self) -> None:
        """
        Raises:
            `ValueError`: naming the setting, the rule and the value received.
        """
        if self.method not in METHODS:
            raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.dataset == "self" and self.teacher is None:
            raise ValueError("`dataset` 'self' needs `teacher`: the model that the text is sampled from")
        is_stored = self.teacher is not None and is_taught(self.teacher)
        if is_stored and self.dataset == "self":
            raise ValueError(
                "`dataset` 'self' needs a `teacher` that can write, and this folder holds what one predicts"
            )
        if self.dataset == "self" and self.assistant_only_loss:
            raise ValueError("`assistant_only_loss` needs chats, and `dataset` 'self' is text: leave it out")
        if self.kind_column is not None and (self.dataset == "self" or self.method != "idp"):
            what = f"`dataset` {self.dataset!r}" if self.dataset == "self" else f"`method` {self.method!r}"
            raise ValueError(f"`kind_column` says which prompt a document trains, and {what} has none: leave it out")
        if self.method == "idp" and self.prompts == "key_values" and self.init != "corpus":
            raise ValueError(
                f"`init` must be 'corpus' with prompts='key_values', which start at real text, got {self.init!r}"
            )
        if not 1 <= self.context_tokens < self.block_tokens:
            raise ValueError(
                f"`context_tokens` must be from 1 to block_tokens - 1 = {self.block_tokens - 1}, got {self.context_tokens}"
            )
        if not 0 < self.eval_share < 1:
            raise ValueError(f"`eval_share` must be between 0 and 1, got {self.eval_share}")
        check_distillation(self.distillation_weight, self.temperature, is_stored)
