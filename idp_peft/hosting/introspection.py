"""What a host knows and does not pass on, read from the call stack or from compiled code. No other file looks there.

Each function says why nothing else tells, and when it can go. Checked with transformers 5.0 to 5.24, peft 0.21 and trl 1.16.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from functools import cache
from itertools import chain
from types import CodeType, FrameType

from peft import AutoPeftModelForCausalLM, PeftModel
from torch import nn

_GENERATION = "transformers.generation.utils"
_CONTINUOUS = "transformers.generation.continuous_batching"
_HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only")
_STEPS = ("training_step", "prediction_step")


def peft_model_under_construction(frame: FrameType) -> PeftModel | None:
    """The `PeftModel` whose constructor makes a tuner; `None` where something else makes it.

    Why: PEFT gives the tuner no reference to the `PeftModel` around it, and that object writes the card. It can go when
    PEFT asks the tuner for its card.

    Args:
        frame (`FrameType`): the caller of the tuner's constructor.
    """
    return frame.f_locals["self"] if frame.f_code is PeftModel.__init__.__code__ else None


def adapter_of_auto_class() -> str | None:
    """The adapter that one of PEFT's auto classes loads right now; `None` outside of one.

    Why: these classes read the adapter's config, and then load its base by name alone. A base that is a GGUF file would be
    taken for a Hub id. The config is the last thing they ask a method for. It can go when they load GGUF files.
    """
    code = AutoPeftModelForCausalLM.from_pretrained.__func__.__code__
    found = (str(f.f_locals["pretrained_model_name_or_path"]) for f in _callers() if f.f_code is code)
    return next(found, None)


def repository_of_trainer(frame: FrameType) -> str | None:
    """The repository that a `Trainer` pushes to, when it is the one that asks for a card.

    Why: `Trainer.create_model_card` passes a folder alone. It can go when `Trainer` passes `hub_model_id`.

    Args:
        frame (`FrameType`): the caller of `create_or_update_model_card`.
    """
    trainer = frame.f_locals.get("self") if frame.f_code.co_name == "create_model_card" else None
    return getattr(trainer, "hub_model_id", None)


def adapter_that_transformers_loads() -> tuple[str, str | None, dict] | None:
    """Folder or Hub id, sub-folder and Hub arguments of the adapter that transformers' own `load_adapter` loads right now;
    `None` outside of one.

    Why: on models whose decoder is called `transformer` (GPT-2, BLOOM, Falcon, ...), transformers 5.0 looks for the weights
    under another name, and leaves the prompts at their starting values with nothing but a report. It can go with
    transformers 5.0.
    """
    native = ("transformers.integrations.peft", "load_adapter")
    frame = next((f for f in _callers() if (f.f_globals.get("__name__"), f.f_code.co_name) == native), None)
    source = None if frame is None else frame.f_locals.get("peft_model_id")
    if source is None or frame.f_locals.get("adapter_state_dict") is not None:
        return None
    given = dict(getattr(frame.f_locals.get("load_config"), "download_kwargs", None) or {})
    return str(source), given.get("subfolder") or None, {name: given[name] for name in _HUB_ARGUMENTS if name in given}


def variables_of_generate(model: nn.Module) -> list[dict]:
    """Local variables of the functions of a model's `generate` that run its forward; empty outside of one.

    Why: with transformers' own `add_adapter` the base's `generate` runs, and its forward is not told that it is a step of
    one. It can go when `generate` passes something on, or when transformers lets an adapter wrap it.
    """
    return [frame.f_locals for frame in _callers() if is_generate(frame) and frame.f_locals.get("self") is model]


def is_generate(frame: FrameType) -> bool:
    """Whether a frame is a function of transformers' generation."""
    return frame.f_globals.get("__name__") == _GENERATION


def frames_of_step() -> list[FrameType]:
    """The frames from the caller to the innermost `training_step` or `prediction_step` of a transformers `Trainer`, which is
    the last; empty outside of one.

    Why: label smoothing, metrics and TRL's losses take the labels out of the model's call, and packing leaves no trace in
    it. A data collator that adds `selection_mask` needs none of this; users of ready-made collators do. It can go when
    trainers pass labels (or a mask of the completion) on to the model.
    """
    trainer = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    frames = []
    for frame in _callers() if trainer is not None else ():
        frames.append(frame)
        if frame.f_code.co_name in _STEPS and isinstance(frame.f_locals.get("self"), trainer):
            return frames
    return []


def is_preparing_fsdp2() -> bool:
    """Whether accelerate is sharding a model by FSDP2 right now.

    Why: it pairs the tensors of the model's state dict with those that `fully_shard` has made, and takes every one for a
    parameter. A persistent buffer, which is not sharded, stops it (accelerate 1.15) or shifts all pairs behind it (1.10). It
    can go when accelerate leaves buffers out.
    """
    sharding = ("accelerate.utils.fsdp_utils", "fsdp2_prepare_model")
    return any((f.f_globals.get("__name__"), f.f_code.co_name) == sharding for f in _callers())


def is_continuous_batching(cache_class: type) -> bool:
    """Whether a cache class belongs to transformers' continuous batching."""
    return cache_class.__module__.startswith(_CONTINUOUS)


def continuous_batching_under_construction() -> FrameType | None:
    """The frame that makes a manager of transformers' continuous batching; `None` outside of one.

    Why: `model.eval()` is the one step of it that reaches a module before its threads start. It can go when transformers
    asks the model whether it supports paged attention.
    """
    return next((f for f in _callers() if f.f_globals.get("__name__", "").startswith(_CONTINUOUS)), None)


def _callers() -> Iterator[FrameType]:
    """The frames of the running call, from the innermost to the outermost."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


@cache
def names_in_forward(module_class: type[nn.Module]) -> list[str]:
    """Every name that a module class's forward looks up.

    Why: which attention modules use `AttentionInterface`, which decoders build masks for windows, and which make a cache of
    their own, stands in no attribute that is right for every class (`is_backend_compatible()` is wrong for one of the 24
    architectures tested). It can go when such attributes exist.
    """

    def names(code: CodeType) -> list[str]:
        inner = (names(part) for part in code.co_consts if isinstance(part, CodeType))
        return [*code.co_names, *chain.from_iterable(inner)]

    return names(inspect.unwrap(module_class.forward).__code__)


@cache
def constants_in_forward(module_class: type[nn.Module]) -> str:
    """The constants of a module class's forward, keyword names included, as text.

    Why: whether Doge's decoder makes a mask in every call changed between versions. It can go with transformers 5.0.
    """
    return str(inspect.unwrap(module_class.forward).__code__.co_consts)
