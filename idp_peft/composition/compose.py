"""One bank out of many adapters, and many adapters out of one bank: no training, every prompt as it was."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from idp_peft.composition.base_skeleton import BaseNotFound, is_same_place, position_counts_bank, shared_base
from idp_peft.composition.prompt_sources import PromptSource, distinct, fill, read_prompts
from idp_peft.config import IDPConfig
from idp_peft.hosting.architectures import find_decoder
from idp_peft.key_values import key_value_layout

# What the adapters say, and the arguments of `compose` for it.
_GIVEN = {
    "task_type": "adapters",
    "num_prompts": "adapters",
    "num_virtual_tokens": "adapters",
    "prompt_names": "names",
    "prompts": "adapters",
    "num_frozen_tokens": "adapters",
    "scales": "adapters",
    "scale_group_size": "adapters",
    "base_model_name_or_path": "base_model",
    "init": "adapters",
}
# Where all banks among the adapters agree, the new one does as they do.
_INHERITED = (
    "selection",
    "learn_centroids",
    "selection_layer",
    "selection_reduction",
    "selection_seed",
    "assignment",
    "revision",
)


def compose(adapters, output_dir, names=None, base_model=None, **config_fields) -> IDPConfig:
    """One IDP adapter that holds the prompts of many: forced to prompt i, it gives what adapter i gave alone.

        idp_peft.compose(["prompts/arc", "prompts/boolq", "me/piqa-prompt"], "bank")
        model = AutoPeftModelForCausalLM.from_pretrained("bank")
        model(**batch, prompt_ids=["arc", "boolq", "auto"])

    Prompts are copied, never trained or averaged. The paper (arXiv 2310.00867, section 3) makes its collections of
    prompts in this way: each is trained alone, and inputs choose among them.

    Args:
        adapters (`list`): IDP banks and PEFT's prompt tuning, p-tuning and multitask prompt
            tuning adapters (one prompt per task), in any mixture. Each one is a folder or a Hub id; a loaded `PeftModel`
            (its active adapter, or `(model, "name")`); or a pair `(adapter, prompts)` that takes some of its prompts,
            by number or name: `("bank", ["arc", 2])`.
        output_dir (`str`): the folder to write, in PEFT's format. An adapter that is there is replaced.
        names (`list[str]`, *optional*): `prompt_names` of the new bank, one per prompt. By default the names in a bank;
            for an adapter with one prompt the last part of its folder's, repository's or loaded adapter's name; for one
            with several without names, that and a number. Where two are alike the later one gets a number.
        base_model (`str` or `PreTrainedModel`, *optional*): the base, as a folder, a Hub id or the loaded model (which is
            not touched; its weights are not needed). Defaults to the one that the adapters name.
        config_fields: further fields of [`IDPConfig`], such as `selection_layer`. By default those on which all banks among
            the adapters agree, else `IDPConfig`'s own.

    Adapters with one prompt, and banks that choose by centroids, say what inputs their prompts are for. Prompts that were
    trained apart, each on its own kind of text, are therefore chosen by kind, with no further training: the new bank has
    `selection="centroid"` where all adapters say so.

    Where one prompt is not exactly what it was: with learned positions (GPT-2, OPT), and rotary frequencies that follow
    the length, every input starts at position K, that of the bank's longest prompt, as the definition of the method has
    it. A prompt from an adapter with another K then answers differently, and a warning says so: compose prompts of one
    length, or make a bank per length. With all other positions (rotary, ALiBi) lengths do not matter.

    Returns:
        `IDPConfig`: the new adapter's configuration.

    Raises:
        `ValueError`: without adapters, for adapters with different scales, for prompts of different widths or another width
            than the base's, for another method (LoRA), task type or an encoder-decoder, for a pickled or broken file, for
            names that are not distinct, for a base that cannot be found, and where `output_dir` is one of the adapters.

    Warns:
        where adapters name different bases and `base_model` does not settle it, and where a prompt is not exactly what
        it was.
    """
    for name in _GIVEN.keys() & config_fields.keys():
        raise ValueError(
            f"`{name}` follows from `{_GIVEN[name]}`, it cannot be given to `compose`: got {config_fields[name]!r}"
        )
    sources = _read(adapters)
    _check_output(output_dir, sources)
    prompts = [prompt for source in sources for prompt in source.prompts]
    if names is None:
        names = distinct(name for source in sources for name in source.names)
    elif isinstance(names, str) or len(names := list(names)) != len(prompts):
        raise ValueError(f"`names` must be a list of one name per prompt, {len(prompts)}, got {names!r}")
    base = shared_base(sources, base_model)
    lengths = [len(prompt) for prompt in prompts]
    keys = {"prompts": "key_values", "num_frozen_tokens": _frozen(sources)} if sources[0].holds_keys else {}
    config = IDPConfig(
        task_type=TaskType.CAUSAL_LM,
        init_weights=False,
        **keys,
        **_scales(sources),
        num_prompts=len(prompts),
        num_virtual_tokens=lengths[0] if len(set(lengths)) == 1 else lengths,
        prompt_names=names,
        base_model_name_or_path=base.name_or_path or None,
        **{**_agreed(sources), **config_fields},
    )
    _warn_of_positions(base, sources, names, max(lengths))
    model = get_peft_model(base, config)
    fill(model.base_model.layer.active_bank, sources)
    model.save_pretrained(output_dir, save_embedding_layers=False)
    return config


def split(adapter, output_dir, base_model=None) -> list[str]:
    """Each prompt of an adapter as a PEFT prompt tuning adapter of its own, which gives what the bank gives when that
    prompt is forced, in programs that know nothing of IDP: the reverse of [`compose`].

        idp_peft.split("bank", "prompts")  # prompts/arc, prompts/boolq, ...
        PeftModel.from_pretrained(base, "prompts/arc")

    PEFT's prompt tuning is right for rows without padding: it gives no `position_ids`, so that left padding counts.

    Args:
        adapter: as one of `adapters` in [`compose`]; `("bank", ["arc"])` splits off some prompts.
        output_dir (`str`): the folder to hold one folder per prompt, named after it (characters that do not belong in a
            file's name become `_`), or after the adapter and the prompt's number where prompts have no names.
        base_model (`str` or `PreTrainedModel`, *optional*): as in [`compose`].

    Returns:
        `list[str]`: the folders, in the order of the prompts.

    Raises:
        `ValueError`: as [`compose`]; and with learned positions, or rotary frequencies that follow the length, for a
            prompt that is shorter than the longest of its bank: an input behind it starts at position K, which PEFT's
            prompt tuning cannot do.
    """
    source = read_prompts(adapter)
    folders = [Path(output_dir) / name for name in distinct(_file_name(name) for name in source.names)]
    for folder in folders:
        _check_output(folder, [source])
    base = _base_to_split(source, base_model)
    decoder_config = None if base is None else base.config.get_text_config(decoder=True)
    if source.scales is not None:
        raise ValueError(
            f"{source.label} has scales, which PEFT's prompt adapters have not: fold them into the base first "
            "(`idp-peft export --fold_scales`), which gives a base and an adapter without any"
        )
    if source.holds_keys:
        return _split_keys(source, folders, base)
    shared = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        inference_mode=True,
        base_model_name_or_path=source.base_name if base is None else base.name_or_path or None,
        revision=source.config.revision,
        token_dim=source.width,
        num_transformer_submodules=1,
        num_layers=getattr(decoder_config, "num_hidden_layers", None),
        num_attention_heads=getattr(decoder_config, "num_attention_heads", None),
    )
    return _write(shared, folders, source.prompts)


def _split_keys(source: PromptSource, folders: list[Path], base) -> list[str]:
    """Prompts of keys and values, as PEFT's prefix tuning adapters."""
    if base is None:
        raise BaseNotFound(
            f"the base of {source.label} must be known to split prompts of keys and values: pass `base_model`"
        )
    layout = set(key_value_layout(find_decoder(base)))
    if len(layout) > 1 or any(key != value for _, key, value in layout):
        raise ValueError(
            f"PEFT's prefix tuning has keys and values of one shape in all layers, {type(base).__name__} has {sorted(layout)}"
        )
    ((heads, width, _),) = layout
    shared = PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        inference_mode=True,
        base_model_name_or_path=base.name_or_path or None,
        revision=source.config.revision,
        token_dim=heads * width,
        num_transformer_submodules=1,
        num_layers=source.width // (2 * heads * width),
        num_attention_heads=heads,
    )
    return _write(shared, folders, source.prompts)


def _write(config, folders: list[Path], prompts: list[torch.Tensor]) -> list[str]:
    """One adapter of PEFT's own per prompt."""
    for folder, prompt in zip(folders, prompts, strict=True):
        folder.mkdir(parents=True, exist_ok=True)
        config.num_virtual_tokens = len(prompt)
        config.save_pretrained(str(folder))
        save_file(
            {"prompt_embeddings": prompt.contiguous()}, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"}
        )
    return [str(folder) for folder in folders]


def _read(adapters) -> list[PromptSource]:
    """Every adapter's prompts, all of one width."""
    if isinstance(adapters, (str, Path, tuple)) or not isinstance(adapters, Iterable):
        raise ValueError(f"`adapters` must be a list of adapters, got {adapters!r}")
    sources = [read_prompts(adapter) for adapter in adapters]
    if not sources:
        raise ValueError("`adapters` must hold at least one adapter, got none")
    for source in sources:
        if source.holds_keys != sources[0].holds_keys:
            raise ValueError(
                f"prompts of keys and values and token prompts cannot stand in one bank: {sources[0].label} and {source.label}"
            )
        if source.width != sources[0].width:
            raise ValueError(
                f"adapters must be of one base model: the prompts of {sources[0].label} have width {sources[0].width}, those "
                f"of {source.label} {source.width}"
            )
    return sources


def _scales(sources: list[PromptSource]) -> dict:
    """The new bank's scales: those that all adapters have alike. A bank's scales are shared by its prompts."""
    sizes = [getattr(source.config, "scale_group_size", None) for source in sources]
    for source, size in zip(sources[1:], sizes[1:], strict=True):
        first, other = sources[0].scales, source.scales
        unlike = size != sizes[0] or (first is None) != (other is None)
        if unlike or (first is not None and not torch.equal(first, other)):
            raise ValueError(
                f"{sources[0].label} and {source.label} scale the base's linear layers differently, and the prompts of one bank "
                "share their scales: compose adapters without scales, or prompts that were trained on the same ones"
            )
    return {"scales": sources[0].scales is not None, "scale_group_size": sizes[0]}


def _frozen(sources: list[PromptSource]) -> int:
    """How many tokens of all prompts are not trained: the fewest that any adapter leaves."""
    return min(getattr(source.config, "num_frozen_tokens", 0) for source in sources)


def _base_to_split(source: PromptSource, base_model):
    """The base, where it can be loaded. Prompts of equal lengths can be split off without it."""
    unequal = any(len(prompt) != source.longest for prompt in source.prompts)
    try:
        base = shared_base([source], base_model)
    except BaseNotFound:
        if unequal or base_model is not None:
            raise
        return None
    if unequal and position_counts_bank(base):
        short = [
            name for name, prompt in zip(source.names, source.prompts, strict=True) if len(prompt) != source.longest
        ]
        raise ValueError(
            f"the prompts {short} of {source.label} are shorter than its longest, {source.longest} tokens: on a "
            f"{base.config.model_type} model an input behind them starts at position {source.longest}, which PEFT's prompt "
            "tuning cannot do. Split off the others alone: split((adapter, prompts), ...)"
        )
    return base


def _warn_of_positions(base, sources: list[PromptSource], names: list[str], longest: int) -> None:
    moved = [source.longest for source in sources for _ in source.prompts]
    moved = {name: start for name, start in zip(names, moved, strict=True) if start != longest}
    if moved and position_counts_bank(base):
        warnings.warn(
            f"on a {base.config.model_type} model every input of this bank starts at position {longest}, so these prompts do "
            f"not give exactly what they gave alone (where it started at): {moved}. Compose prompts of one length, or make a "
            "bank for each length",
            stacklevel=3,
        )


def _agreed(sources: list[PromptSource]) -> dict:
    """What all banks among the sources (all sources, for the base's revision) say alike."""
    banks = [source.config for source in sources if isinstance(source.config, IDPConfig)]
    agreed = {}
    for name in _INHERITED:
        values = [getattr(config, name) for config in (banks if name != "revision" else [s.config for s in sources])]
        if values and all(value == values[0] for value in values) and values[0] != "fixed":
            agreed[name] = values[0]
    if all(source.says_what_for for source in sources):
        agreed["selection"] = "centroid"
        if agreed.get("assignment", "selected") != "selected":
            agreed["learn_centroids"] = False
    return agreed


def _check_output(folder, sources: list[PromptSource]) -> None:
    for source in sources:
        if source.model is None and is_same_place(source.label, str(folder)):
            raise ValueError(
                f"`output_dir` would replace the adapter {source.label} that is read: choose another folder"
            )


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name).strip(".") or "prompt"
