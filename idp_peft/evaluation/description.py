"""What a model under evaluation is: its row's name, role, method and size, for the result file."""

from __future__ import annotations

import json
from pathlib import Path

from idp_peft.evaluation.prompted import idp_layer
from idp_peft.models.loading import find_model, holds_packed_weights

_LABELS = {"idp": "IDP", "prompt_tuning": "prompt tuning", "prefix_tuning": "prefix tuning", "lora": "LoRA"}


def describe(model, settings: dict) -> dict:
    """`label`, `role`, `model`, `adapter`, `method`, `extra_parameters`, `num_prompts` and `training`.

    Args:
        model: as loaded, with its adapter.
        settings (`dict`): `model`, `adapter`, and `label` and `role` where the user gave them.
    """
    config = model.active_peft_config if settings["adapter"] is not None else None
    method = None if config is None else str(getattr(config.peft_type, "value", config.peft_type)).lower()
    role = settings["role"] or _role(model, settings)
    return {
        "label": settings["label"] or _LABELS.get(method, method) or role,
        "role": role,
        "model": settings["model"],
        "adapter": settings["adapter"],
        "method": method,
        "extra_parameters": 0 if config is None else adapter_parameters(model),
        "num_prompts": getattr(config, "num_prompts", None),
        "training": _training(settings["adapter"]),
    }


def _role(model, settings: dict) -> str:
    if settings["adapter"] is not None:
        return "recovered"
    quantized = getattr(model.config, "quantization_config", None) is not None
    if quantized or Path(settings["model"], "compression.json").is_file():
        return "compressed"
    where, gguf_file = find_model(settings["model"])
    return "compressed" if gguf_file is not None and holds_packed_weights(Path(where, gguf_file)) else "dense"


def adapter_parameters(model) -> int:
    """Numbers that the adapter trained: of IDP its prompts and scales, of others all that their file holds."""
    if (layer := idp_layer(model)) is not None:
        return layer.active_bank.num_parameters
    from peft import get_peft_model_state_dict

    return sum(tensor.numel() for tensor in get_peft_model_state_dict(model).values())


def _training(adapter: str | None) -> dict | None:
    """What the run that made an adapter left beside it."""
    record = None if adapter is None else Path(adapter).parent / "run.json"
    if record is None or not record.is_file():
        return None
    return json.loads(record.read_text(encoding="utf-8")).get("training")
