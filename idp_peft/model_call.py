"""The hooks on the causal language model: IDP's own arguments, taken out of its call before the base sees them."""

from __future__ import annotations

import torch
from torch import nn

from idp_peft import call as calls
from idp_peft.hosting.architectures import by_name
from idp_peft.hosting.outer_model import marked_as_text
from idp_peft.hosting.trainers import compares_answers, in_training, labels_of_step

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
        """Forward pre-hook."""
        own = {name: kwargs[name] for name in _OWN if kwargs.get(name) is not None}
        kwargs = {name: value for name, value in kwargs.items() if name not in _OWN}
        if self.layer.active_name is None:
            if own:
                raise ValueError(f"{' and '.join(f'`{n}`' for n in own)} given, but no IDP adapter is active")
            return args, kwargs
        outer = calls.current_call(self.layer)
        if outer is not None and outer.generating and not own:
            outer.given = by_name(model, args, kwargs)
            return None
        if outer is not None and not outer.generating:
            calls.forget(outer)
        if model.training:
            args, kwargs = (), marked_as_text(model, by_name(model, args, kwargs))
        call = calls.Call(self.layer, labels=self._labels(model, args, kwargs), **own)
        config = self.layer.active_config
        if config.num_prompts > 1 and "prompt_ids" not in own and in_training(self.layer):
            if config.assignment == "all":
                args, kwargs = self._on_every_prompt(call, model, args, kwargs)
            elif config.assignment == "uniform" and compares_answers():
                raise ValueError(
                    "assignment='uniform' deals a prompt to each row of every forward, and this trainer needs one prompt for one "
                    "context in all of them (answers that it compares, text that the model sampled, a reference): use "
                    "assignment='selected'"
                )
        call.given = by_name(model, args, kwargs)
        calls.begin(call)
        return args, kwargs

    @torch.compiler.disable
    def after(self, model: nn.Module, args: tuple, kwargs: dict, output):
        """Forward post-hook; runs after errors too, then without an output."""
        call = calls.current_call(self.layer)
        if call is None or call.generating:
            return None
        calls.end(call)
        if output is None or call.batch is None:
            return None
        return self._with_mean_logits(call.batch, output)

    @torch.compiler.disable
    def before_backbone(self, backbone: nn.Module, args: tuple, kwargs: dict):
        """Forward pre-hook of the model without its head, where that is not the decoder itself: of a multimodal model. Trainers
        with a head of their own call it directly (TRL)."""
        if self.layer.active_name is None:
            return None
        kwargs = by_name(backbone, args, kwargs)
        if backbone.training:
            kwargs = marked_as_text(backbone, kwargs)
        call = calls.current_call(self.layer)
        if call is not None and call.of_backbone:
            calls.forget(call)
            call = None
        if call is None:
            call = calls.Call(self.layer, labels=self._labels(backbone, (), kwargs), of_backbone=True)
            calls.begin(call)
        call.given = kwargs
        return (), kwargs

    @torch.compiler.disable
    def after_backbone(self, backbone: nn.Module, args: tuple, kwargs: dict, output) -> None:
        """Forward post-hook; runs after errors too."""
        call = calls.current_call(self.layer)
        if call is not None and call.of_backbone:
            calls.end(call)

    def _labels(self, model: nn.Module, args: tuple, kwargs: dict) -> torch.Tensor | None:
        """The labels of a call, or those that a trainer's loop took out of it."""
        kwargs = by_name(model, args, kwargs)
        labels = kwargs.get("labels")
        return labels_of_step(kwargs.get("input_ids")) if labels is None else labels

    def _on_every_prompt(self, call: calls.Call, model: nn.Module, args: tuple, kwargs: dict):
        """`assignment="all"`: repeat the batch once per prompt; the model's own loss is then the mean over prompts."""
        kwargs = by_name(model, args, kwargs)
        instead = "assignment='selected'" if compares_answers() else "assignment='selected' or 'uniform'"
        if kwargs.get("labels") is None:
            raise ValueError(
                "assignment='all' needs `labels` in the model's call: its loss is the model's own, the mean over prompts. For "
                f"a loss that is made of the logits, use {instead}"
            )
        if kwargs.get("fused_lm_head"):
            raise ValueError(
                "assignment='all' trains on the model's own loss, and TRL's fused head (`fused_lm_head=True`) makes one of "
                f"its own: use {instead}, or transformers' `Trainer`"
            )
        prompts = self.layer.active_bank.num_prompts
        call.batch = len(kwargs["labels"])
        call.prompt_ids = torch.arange(prompts).repeat_interleave(call.batch)
        for name, value in kwargs.items():
            if isinstance(value, torch.Tensor) and value.ndim >= 2:
                if len(value) != call.batch:
                    raise ValueError(
                        f"assignment='all' repeats every row of a batch, and `{name}` {list(value.shape)} does not have one entry "
                        f"for each of the {call.batch} rows: use assignment='selected' or 'uniform'"
                    )
                kwargs[name] = value.repeat(prompts, *[1] * (value.ndim - 1))
        if kwargs.get("num_items_in_batch") is not None:
            kwargs["num_items_in_batch"] = kwargs["num_items_in_batch"] * prompts
        call.labels = call.selection_mask = None
        return (), kwargs

    @staticmethod
    def _with_mean_logits(batch: int, output):
        """Back to one set of logits per example, `[batch, n, vocab]`: their mean over prompts."""
        is_tuple = isinstance(output, tuple)
        logits = output[1] if is_tuple else output.logits  # a tuple begins with the loss
        mean = logits.view(-1, batch, *logits.shape[1:]).mean(0)
        if is_tuple:
            return (output[0], mean, *output[2:])
        output["logits"] = mean
        return output
