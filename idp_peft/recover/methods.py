"""What is trained on the compressed model: IDP, or one of PEFT's own methods as a baseline, at a matched budget if asked."""

from __future__ import annotations

import math

from peft import IA3Config, LNTuningConfig, LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from idp_peft.config import IDPConfig
from idp_peft.hosting.architectures import embedding_width, find_decoder
from idp_peft.models.loading import place_of
from idp_peft.scales import factor_shapes

METHODS = ("idp", "prompt_tuning", "prefix_tuning", "lora", "ia3", "ln_tuning")
# Peak learning rates, as tuned (benchmarks/LOG.md, benchmarks/repair); prefix tuning's is for the start at a teacher's keys and values, untuned.
LEARNING_RATES = {
    "idp": 3e-2,
    "key_values": 1e-2,
    "key_values alone": 3e-2,  # without scales beside them
    "scales": 3e-3,
    "prompt_tuning": 3e-2,
    "prefix_tuning": 1e-2,
    "lora": 1e-3,
    "ia3": 3e-3,
    "ln_tuning": 3e-3,
}


def method_config(
    model: nn.Module, settings, texts: list[str] | None = None, names: list[str] | None = None
) -> PeftConfig:
    """The PEFT configuration of `settings.method`.

    Args:
        model (`PreTrainedModel`): the compressed model.
        settings (`RecoverSettings`): what the user asked for. With `match_budget`, a baseline gets the size that is
            nearest to the prompt bank's parameter count: LoRA its rank and layers, prompt tuning one prompt of the
            bank's total length, prefix tuning its number of tokens.
        texts (`list[str]`, *optional*): starts of the prompts for `init="corpus"`.
        names (`list[str]`, *optional*): the kinds of text that there is a prompt for each.

    Raises:
        `ValueError`: for an unknown method.
    """
    if settings.method == "idp":
        start = {"init": settings.init}
        if settings.prompts == "key_values":
            start = {"prompts": "key_values", "num_frozen_tokens": settings.num_frozen_tokens, "init_weights": False}
        elif settings.init == "corpus":
            start = {"init": "text", "init_text": texts, "tokenizer_name_or_path": place_of(settings.model)}
        count = len(names) if names else settings.num_prompts
        is_set = settings.selection == "centroid" or count == 1  # centroids are set before training
        return IDPConfig(
            task_type="CAUSAL_LM",
            num_prompts=count,
            num_virtual_tokens=settings.num_virtual_tokens,
            prompt_names=names,
            scales=settings.scales,
            scale_group_size=settings.scale_group_size,
            selection=settings.selection,
            learn_centroids=not is_set,
            selection_layer=settings.selection_layer,
            selection_reduction=settings.selection_reduction,
            assignment=settings.assignment,
            **start,
        )
    budget = settings.num_prompts * settings.num_virtual_tokens * embedding_width(model.get_input_embeddings())
    if settings.prompts == "key_values":
        trained = settings.num_virtual_tokens - settings.num_frozen_tokens
        budget = settings.num_prompts * trained * prefix_parameters_per_token(model.config)
    if settings.scales:
        shapes = factor_shapes(find_decoder(model), settings.scale_group_size)
        budget += sum(shape.numel() for shape in shapes.values())
    if settings.method == "lora":
        targets, rank = settings.lora_target_modules, settings.lora_rank
        if settings.match_budget:
            targets, rank = nearest_lora(model, budget)
        return LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=targets)
    if settings.method == "prompt_tuning":
        tokens = settings.num_virtual_tokens * (settings.num_prompts if settings.match_budget else 1)
        return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens)
    if settings.method == "prefix_tuning":
        tokens = settings.num_virtual_tokens
        if settings.match_budget:
            tokens = max(1, round(budget / prefix_parameters_per_token(model.config)))
        return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens)
    if settings.method == "ia3":  # a factor per output channel of every linear layer
        return IA3Config(task_type="CAUSAL_LM", target_modules="all-linear", feedforward_modules=[])
    if settings.method == "ln_tuning":
        return LNTuningConfig(task_type="CAUSAL_LM", target_modules=norm_layers(model))
    raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {settings.method!r}")


def learning_rate(settings) -> float:
    """The peak learning rate of what is trained, where the user names none."""
    if settings.method == "idp" and settings.prompts == "key_values":
        return LEARNING_RATES["key_values" if settings.scales else "key_values alone"]
    return LEARNING_RATES[settings.method]


def norm_layers(model: nn.Module) -> list[str]:
    """The names of a model's normalisation layers: modules without children whose one or two parameters are vectors."""
    return [
        name
        for name, module in model.named_modules()
        if (parameters := list(module.parameters()))
        and not list(module.children())
        and all(parameter.ndim == 1 for parameter in parameters)
    ]


def nearest_lora(model: nn.Module, budget: int) -> tuple[str | list[str], int]:
    """`(target_modules, rank)` whose parameter count is nearest to a budget, by ratio.

    All linear layers are taken, or, where rank 1 on all of them is already too much, the attention layers that PEFT's
    own default adapts for this architecture.
    """
    candidates = {"all-linear": lora_parameters_per_rank(model, None)}
    names = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type)
    if names:
        candidates[tuple(names)] = lora_parameters_per_rank(model, names)
    choices = [(targets, max(1, round(budget / each)), each) for targets, each in candidates.items() if each]
    targets, rank, _ = min(choices, key=lambda choice: abs(math.log(choice[1] * choice[2] / budget)))
    return (targets if isinstance(targets, str) else list(targets)), rank


def lora_parameters_per_rank(model: nn.Module, names: list[str] | None) -> int:
    """Parameters of a rank-1 LoRA on the linear layers of these names (`None`: all but the output head)."""
    head = model.get_output_embeddings()
    total = 0
    for name, module in model.named_modules():
        if names is None:
            wanted = module is not head and (isinstance(module, nn.Linear) or hasattr(module, "in_features"))
        else:
            wanted = name.rpartition(".")[2] in names
        if wanted:
            total += sum(_widths(module))
    return total


def _widths(module: nn.Module) -> tuple[int, int]:
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    return tuple(module.weight.shape)  # GPT-2's Conv1D keeps [in, out]


def prefix_parameters_per_token(config) -> int:
    """Keys and values of one virtual token in every layer, as PEFT's prefix tuning trains them."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * kv_heads * head_dim
