"""A model by name, as lm-evaluation-harness's command line gives it: `--model idp --model_args pretrained=...,peft=...`."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import get_dtype

from idp_peft.evaluation.harness import HarnessModel
from idp_peft.evaluation.harness_arguments import check_arguments, whole_number
from idp_peft.evaluation.prompted import check_prompt_id, idp_layer
from idp_peft.files.error_reason import reason


class HarnessModelByName(HarnessModel):
    """[`HarnessModel`] from `model_args`: dense, compressed, or with an adapter of any kind, all by the same code.

    A model is loaded as `idp-peft evaluate` loads it, so the numbers are the same: float32 on a CPU, on a GPU bfloat16
    or what a quantised checkpoint asks for. Device, parallelism and text are the harness's own (`HFLM`).

    Args:
        pretrained (`str`): the base: a Hub id, a folder, a GGUF file, or `default`. Left out: the one that the adapter
            was trained on.
        peft (`str`, *optional*): an adapter of any kind; left out: the base alone.
        prompt_id (`int` or `str`, *optional*): force this prompt of an IDP adapter, by number or name, on every request
            (-1: none).
        revision, peft_revision (`str`): of the base and of the adapter, which need not be the same repository.
        arguments: as `HFLM` takes them; the list is `harness_arguments.TAKEN`.

    Raises:
        `ValueError`: for an unknown argument, a missing one, or a forced prompt that there is not.
        `FileNotFoundError`: where a model or an adapter does not exist.
    """

    def __init__(self, pretrained: str | None = None, peft: str | None = None, **arguments):
        check_arguments(arguments)
        prompt_id = arguments.pop("prompt_id", None)
        if not isinstance(prompt_id, str):
            prompt_id = whole_number("prompt_id", prompt_id)
        for name in ("max_length", "prefix_token_id"):
            arguments[name] = whole_number(name, arguments.get(name))
        arguments["device"] = _checked_device(arguments.get("device"))
        peft = None if peft is None else _absolute(str(peft))
        self._peft_revision = arguments.pop("peft_revision", None)
        pretrained = _base_of(peft, self._peft_revision) if pretrained is None else str(pretrained)
        where, gguf_file = _find(pretrained, arguments)
        arguments.setdefault("dtype", None)
        # Not `HarnessModel`'s, which takes a model in memory.
        HFLM.__init__(self, pretrained=where, peft=peft, gguf_file=gguf_file, backend="causal", **arguments)
        self._begin(check_prompt_id(self.model, prompt_id))

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None):
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if twice := sorted(set(arg_dict) & set(given)):
            raise ValueError(
                f"`model_args` has {', '.join(map(repr, twice))}, which the command line gives too (by its default, if not by "
                f"you): use --{twice[0]} alone"
            )
        return cls(**arg_dict, **given)

    # ------------------------------------------------------------------ loading

    def _create_tokenizer(self, pretrained, tokenizer, **arguments) -> None:
        if tokenizer:
            tokenizer, gguf_file = _find(str(tokenizer), {})
            if gguf_file:
                pretrained, tokenizer = tokenizer, None
            arguments["gguf_file"] = gguf_file
        super()._create_tokenizer(pretrained, tokenizer, **arguments)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def _create_model(self, pretrained, peft=None, dtype=None, gguf_file=None, **arguments) -> None:
        from idp_peft.models.loading import load_model

        options = {"revision": arguments["revision"], "trust_remote_code": arguments["trust_remote_code"]}
        for name in ("subfolder", "attn_implementation"):
            if arguments.get(name):
                options[name] = arguments[name]
        if dtype is not None:
            options["dtype"] = get_dtype(dtype)
        options |= self._placement(arguments, dtype)
        self._model = load_model(os.path.join(pretrained, gguf_file) if gguf_file else pretrained, **options)
        if peft is not None:
            self._model = _with_adapter(self._model, peft, self._peft_revision)
        self._config = self._model.config

    def _placement(self, arguments: dict, dtype) -> dict:
        """Where the weights go; nothing where `load_model` puts them there by itself."""
        if arguments["parallelize"]:
            if not torch.cuda.is_available():
                raise ValueError("`parallelize=True` spreads a model over GPUs, and there is none: leave it out")
            names = ("parallelize", "max_memory_per_gpu", "max_cpu_memory", "offload_folder", "gpus")
            return self._get_accelerate_args(**{name: arguments[name] for name in names})
        if self.device.type != "cpu":
            return {"device_map": {"": str(self.device)}}
        if not torch.cuda.is_available():
            return {}
        return {"device_map": {"": "cpu"}, **({"dtype": torch.float32} if dtype is None else {})}

    # ------------------------------------------------------------------ what the harness asks of a model type

    def set_cache_hook(self, cache_hook) -> None:
        layer = idp_layer(self.model)
        if layer is not None and layer.active_config.chooses and self.prompt_id is None:
            raise ValueError(
                "`use_cache` stores an answer by its context and continuation alone, and an IDP model's answer also depends on "
                "the prompt that its question chose: leave it out, or force one with prompt_id"
            )
        super().set_cache_hook(cache_hook)

    def get_model_info(self) -> dict:
        """The harness's own, and of an IDP adapter its size, and which prompt each question got (in their order)."""
        info = super().get_model_info()
        if (layer := idp_layer(self.model)) is None:
            return info
        config = layer.active_config
        by_task: dict[str, list] = {}
        for (task, _), prompt in sorted(self.prompts.items(), key=lambda item: (str(item[0][0]), item[0][1])):
            by_task.setdefault(str(task), []).append(prompt)
        return {
            **info,
            "num_prompts": config.num_prompts,
            "prompt_lengths": config.prompt_lengths,
            "selection": config.selection if self.prompt_id is None else f"forced: {self.prompt_id}",
            # Of several processes this one knows its own questions alone.
            "chosen_prompts": by_task if self.world_size == 1 else None,
        }


def _absolute(name: str) -> str:
    """A folder as an absolute path, which the harness cannot take for a Hub id."""
    return os.path.abspath(os.path.expanduser(name)) if Path(name).expanduser().is_dir() else name


def _find(name: str, arguments: dict) -> tuple[str, str | None]:
    """`(folder or Hub id, GGUF file in it)` of a base, taking `gguf_file` and a folder's `subfolder` out of `arguments`."""
    from idp_peft.models.loading import find_model

    gguf_file = arguments.pop("gguf_file", None)
    if Path(name).expanduser().is_dir():
        name = os.path.join(name, str(arguments.pop("subfolder", None) or ""), str(gguf_file or ""))
    elif gguf_file:
        from huggingface_hub import hf_hub_download

        subfolder, revision = arguments.pop("subfolder", None), arguments.get("revision")
        name = hf_hub_download(name, str(gguf_file), subfolder=subfolder, revision=revision)
    where, gguf_file = find_model(name)
    return _absolute(where), gguf_file


def _checked_device(device) -> str:
    """The device asked for; the CPU where there is no GPU, since the command line asks for one by default.

    Raises:
        `ValueError`: for a name that torch does not know. The harness would take it for "whichever there is".
    """
    there_is_a_gpu = torch.cuda.is_available()
    if device is None:
        return "cuda" if there_is_a_gpu else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"`device` must be a device of torch, like cpu or cuda:0, got {device!r}") from error
    return "cpu" if kind == "cuda" and not there_is_a_gpu else str(device)


def _base_of(peft: str | None, revision: str | None) -> str:
    if peft is None:
        raise ValueError("`model_args` needs `pretrained` (a model), `peft` (an adapter), or both, got neither")
    base = _adapter_config(peft, revision).base_model_name_or_path
    if not base:
        raise ValueError(f"`model_args` needs `pretrained`: the config of the adapter {peft} names no base model")
    return base


def _adapter_config(peft: str, revision: str | None):
    from peft import PeftConfig

    import idp_peft  # noqa: F401  (registers the method)

    if not Path(peft, "adapter_config.json").is_file() and (Path(peft).is_absolute() or Path(peft).exists()):
        raise FileNotFoundError(f"`peft` {peft} is no adapter: there is no adapter_config.json in it")
    try:
        return PeftConfig.from_pretrained(peft, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"`peft` {peft!r} could not be loaded: {reason(error)}") from error


def _with_adapter(model, peft: str, revision: str | None):
    from peft import PeftModel

    _adapter_config(peft, revision)
    return PeftModel.from_pretrained(model, peft, revision=revision).eval()
