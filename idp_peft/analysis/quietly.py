"""Measures a model and restores its modes, its latest choice and the random generators."""

from __future__ import annotations

import random
import sys
from contextlib import contextmanager

import torch


@contextmanager
def quietly(model, layer=None):
    """Evaluation mode without gradients; every module's own mode and `last_selection` come back, after errors too.

    Args:
        model (`nn.Module`): any wrapping of the model.
        layer (`IDPLayer`, *optional*): whose latest choice is kept, of a model with an IDP adapter.
    """
    training = [module for module in model.modules() if module.training]
    before = None if layer is None else layer.last_selection
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        if layer is not None:
            layer.remember(before)


@contextmanager
def same_random_numbers(device: torch.device):
    """Whatever is drawn inside, the generators of Python, numpy and torch go on as if nothing had been.

    Args:
        device (`torch.device`): the model's; its generator is kept as well.
    """
    python, numpy, torch_state = random.getstate(), sys.modules.get("numpy"), torch.get_rng_state()
    numpy_state = None if numpy is None else numpy.random.get_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(torch_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
