"""The hooks on the model around the decoder: they note what the decoder is not told.

That is IDP's own arguments (which the base does not know), the labels, and what the caller wrote.
"""

from __future__ import annotations

import torch
from torch import nn

from idp_peft.hosting.architectures import by_name
from idp_peft.hosting.call import Call, begin, current_call, end, enter, labels_of, leave
from idp_peft.hosting.outer_model import marked_as_text
from idp_peft.hosting.repeated_batch import repeat_batch, with_mean_logits
from idp_peft.hosting.trainers import compares_answers, in_training

_OWN = ("prompt_ids", "selection_mask")


class ModelCall:
    """Reads `prompt_ids`, `selection_mask` and `labels` off a forward of the model, for the decoder's hooks.

    Args:
        layer (`IDPLayer`): whose prompts are applied.
    """

    def __init__(self, layer) -> None:
        self.layer = layer

    @torch.compiler.disable
    def before(self, model: nn.Module, args: tuple, kwargs: dict):
        """Forward pre-hook of the model: takes IDP's own arguments out of its call before the base sees them."""
        own = {name: kwargs[name] for name in _OWN if kwargs.get(name) is not None}
        kwargs = {name: value for name, value in kwargs.items() if name not in _OWN}
        if self.layer.active_name is None:
            if own:
                raise ValueError(f"{' and '.join(f'`{n}`' for n in own)} given, but no IDP adapter is active")
            return args, kwargs
        outer = current_call(self.layer)
        if outer is not None and outer.generating and not own:
            outer.given = by_name(model, args, kwargs)
            return None
        if outer is not None and not outer.generating:
            end(outer)  # an interrupt left it behind
        if model.training:
            args, kwargs = (), marked_as_text(model, by_name(model, args, kwargs))
        call = Call(self.layer, **own, labels=labels_of(by_name(model, args, kwargs)), began_at=model)
        config = self.layer.active_config
        if config.num_prompts > 1 and "prompt_ids" not in own and in_training(model, self.layer):
            if config.assignment == "all":
                args, kwargs = (), self._on_every_prompt(call, by_name(model, args, kwargs))
            elif config.assignment == "uniform" and compares_answers():
                raise ValueError(
                    "assignment='uniform' deals a prompt to each row of every forward, and this trainer needs one prompt for one "
                    "context in all of them (answers that it compares, text that the model sampled, a reference): use "
                    "assignment='selected'"
                )
        call.given = by_name(model, args, kwargs)
        begin(call)
        return args, kwargs

    @torch.compiler.disable
    def after(self, model: nn.Module, args: tuple, kwargs: dict, output):
        """Forward post-hook of the model; runs after errors too, then without an output."""
        call = leave(model, self.layer)
        repeated = call is not None and output is not None and call.batch is not None
        return with_mean_logits(call.batch, output) if repeated else None

    @torch.compiler.disable
    def before_backbone(self, backbone: nn.Module, args: tuple, kwargs: dict):
        """Forward pre-hook of the model without its head, where that is not the decoder itself: of a multimodal model. Trainers
        with a head of their own call it directly (TRL)."""
        if self.layer.active_name is None:
            return None
        kwargs = by_name(backbone, args, kwargs)
        if backbone.training:
            kwargs = marked_as_text(backbone, kwargs)
        enter(backbone, self.layer, kwargs).given = kwargs
        return (), kwargs

    @torch.compiler.disable
    def after_backbone(self, backbone: nn.Module, args: tuple, kwargs: dict, output) -> None:
        """Forward post-hook; runs after errors too."""
        leave(backbone, self.layer)

    def _on_every_prompt(self, call: Call, kwargs: dict) -> dict:
        """`assignment="all"`: the batch once per prompt."""
        prompts = self.layer.active_bank.num_prompts
        repeated = repeat_batch(kwargs, prompts)
        call.batch = len(kwargs["labels"])
        call.prompt_ids = torch.arange(prompts).repeat_interleave(call.batch)
        call.labels = call.selection_mask = None
        return repeated
