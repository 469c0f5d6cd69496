"""The path of a call: choose a prompt, put it in front of the input, hand back the caller's shapes.

    IDP(x) = f([P_{i*(x)} ; E(x)])

Hooks on the decoder do it ([`Forward`]). What the decoder is not told (IDP's own arguments, the labels) they read from the
running [`Call`], where the model's hooks left it (`hosting/model_call.py`). `front` is what stands before the rows of a text, and
`view` the caller's cache as the decoder sees it (`hosting/input_cache.py`).
"""

from __future__ import annotations

import torch
from torch import nn

from idp_peft.hosting.architectures import by_name, gathers_layers
from idp_peft.hosting.call import Call, current_call, enter, is_internal_run, leave, running
from idp_peft.hosting.decoder_input import DecoderInput
from idp_peft.hosting.generation import GenerateRequest
from idp_peft.hosting.input_cache import Front
from idp_peft.hosting.model_call import ModelCall
from idp_peft.hosting.outer_model import read_by_choice
from idp_peft.hosting.prompt_ids import CHOOSES, check_prompt_ids
from idp_peft.hosting.trainers import in_training
from idp_peft.selection import Selection, select


class Forward:
    """The hooks through which every call of a model goes.

    Args:
        layer (`IDPLayer`): whose prompts are applied.
    """

    def __init__(self, layer) -> None:
        self.layer = layer

    def hook(self, model: nn.Module, decoder: nn.Module) -> list:
        """Install the hooks; returns their handles."""
        around = ModelCall(self.layer)
        pairs = [(model, around.before, around.after), (decoder, self.before, self.after)]
        backbone = getattr(model, "base_model", model)
        if backbone not in (model, decoder):
            pairs.append((backbone, around.before_backbone, around.after_backbone))
        handles = []
        for module, before, after in pairs:
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True, always_call=True))
        return handles

    @torch.compiler.disable
    def before(self, decoder: nn.Module, args: tuple, kwargs: dict):
        """Forward pre-hook of the decoder: f(E(x)) becomes f([P_{i*(x)} ; E(x)])."""
        if is_internal_run():
            return None
        call = enter(decoder, self.layer, by_name(decoder, args, kwargs))
        x = DecoderInput(decoder, by_name(decoder, args, kwargs), call)
        call.scaling = None
        if self.layer.active_name is None:
            kwargs = x.without_adapter()
            call.input = None if x.view is None else x
            return (), kwargs
        call.input = x.read(self.layer)
        if x.next_turn_ids is not None:
            self.layer.remember(Selection(x.next_turn_ids, prompt_names=self.layer.active_config.prompt_names))
        if x.front is None:  # the cache holds no prompt yet
            self.layer.active_bank.is_new = False
            prompt_ids = self._select(call, x) if x.kept_ids is None else x.kept_ids  # i*(x)
            front = Front.of(prompt_ids.to(x.real_tokens.device), self.layer.active_bank, self.layer.signature)
            x.begin(front, self.layer)
            self._put_in_front(x)  # P_{i*(x)}
        arguments = x.arguments()  # E(x) behind it: mask and positions count the prompt
        call.scaling = self.layer.scaling.of_rows(x.front.prompt_ids, x.all_tokens)
        return (), arguments

    def _select(self, call: Call, x: DecoderInput) -> torch.Tensor:
        """i*(x): the prompt of each row of the decoder's input, int64 `[batch]`. A `generate` chooses once."""
        layer, batch = self.layer, len(x.real_tokens)
        if gathers_layers(x.decoder) and not layer.trains:
            layer.prompt_cache()  # all processes must join this gathering, also those whose rows do not read it
        rows = call.batch if call.generating else batch  # `generate` repeats each row for its beams
        selection = call.selection
        if selection is None:
            given = (slice(None, None, batch // rows), slice(call.tokens))  # without beams and drafted tokens
            inputs = {name: value[given] for name, value in read_by_choice(x.kwargs, call).items()}
            trains = not call.generating and in_training(layer.model, layer)
            asked = (call.selection_mask, call.labels, call.prompt_ids)
            selection = select(layer, inputs, x.real_tokens[given], *asked, training=trains)
        if call.generating:
            call.selection = selection
        layer.remember(selection)
        return selection.prompt_ids.repeat_interleave(batch // rows)

    def _put_in_front(self, x: DecoderInput) -> None:
        """P_{i*(x)}: its keys and values, computed once; where no cache can hold them, its embeddings."""
        layer, rows = self.layer, x.front.prompt_ids.clamp(min=0)
        if x.concatenates:
            x.put_embeddings(layer)
        elif x.front.positions and layer.trains:
            used, rows = rows.unique(return_inverse=True)
            layer.prompt_cache_with_graph(used, x.rotary_length).put_rows(rows, x.view)
        elif x.front.positions:
            layer.prompt_cache(x.rotary_length).put_rows(rows, x.view)

    @torch.compiler.disable
    def after(self, decoder: nn.Module, args: tuple, kwargs: dict, output):
        """Forward post-hook of the decoder: the caller's cache and the caller's n positions; runs after errors too."""
        call = None if is_internal_run() else current_call(self.layer)
        if call is None:
            return None
        self.layer.scaling.note_graph(call.scaling, () if output is None else output)
        x, call.input, call.scaling = call.input, None, None
        leave(decoder, self.layer)
        return None if x is None or output is None else x.hand_back(output)


def generate(layer, args: tuple, kwargs: dict, prompt_ids, selection_mask: torch.Tensor | None):
    """The base model's `generate(*args, **kwargs)`, with one prompt per row, chosen once and kept.

    Args:
        layer (`IDPLayer`): whose active adapter is applied.
        args (`tuple`), kwargs (`dict`): arguments of transformers' `generate`.
        prompt_ids (*optional*): forced prompts: int64 `[batch]`, or whatever [`check_prompt_ids`] accepts.
        selection_mask (`torch.Tensor`, *optional*): bool `[batch, n]`.
    """
    request = GenerateRequest(layer.model, args, kwargs)
    if request.source is None or layer.active_name is None:
        if prompt_ids is not None or selection_mask is not None:
            raise ValueError("`prompt_ids` and `selection_mask` need an active IDP adapter and an input")
        return layer.model.generate(*args, **kwargs)
    batch, tokens = request.source.shape[:2]
    with running(Call(layer, prompt_ids, selection_mask, generating=True, batch=batch, tokens=tokens)) as call:
        config, bank = layer.active_config, layer.active_bank
        forced = check_prompt_ids(prompt_ids, batch, bank.num_prompts, config.prompt_names)
        request.prepare(layer.decoder, bank.max_length)
        call.total = request.total_tokens
        kept = request.kept_prompts(layer.signature) if prompt_ids is None else None
        if kept is not None:
            call.selection = Selection(kept, prompt_names=config.prompt_names)
        elif config.chooses and request.in_chunks and (forced == CHOOSES).any():  # the choice reads the whole input
            inputs, mask = request.read_before_chunks()
            call.selection = select(layer, inputs, mask, selection_mask, prompt_ids=prompt_ids)
            layer.remember(call.selection)
        return layer.model.generate(*request.args, **request.kwargs)
