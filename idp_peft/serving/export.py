"""A complete model folder that carries an adapter: its prompts as rows of the vocabulary, its scales in the weights' rows. Any
engine that takes token ids serves it.

The weights are copied byte for byte; the embedding table and the output head get rows. New output rows are the mean of all
old ones. That makes a new token's logit the mean of all old logits, which the greatest old one always beats: greedy
decoding cannot pick it, whatever the engine. Sampling could, about as often as a token of average logit;
`suppress_tokens` in the generation config forbids that where it is read, and so does the proxy.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from idp_peft.composition.base_skeleton import position_counts_bank, skeleton
from idp_peft.composition.prompt_sources import PromptSource, read_prompts
from idp_peft.files.inside_folder import files_inside
from idp_peft.files.whole_folder import check_free, whole_folder
from idp_peft.hosting.architectures import find_decoder
from idp_peft.serving.chat_template import with_prompts_in_all
from idp_peft.serving.exported import ADAPTER, FILE, describe
from idp_peft.serving.folded_weights import check_scales, folded, write_adapter
from idp_peft.serving.tensor_files import (
    DTYPES,
    INDEX,
    StoredTensor,
    WeightFiles,
    copy_model,
    weight_files,
)
from idp_peft.serving.vocabulary import PromptVocabulary, next_token_id

logger = logging.getLogger(__name__)

# What lies beside the weights and belongs to the model: its code and licence, and how it was compressed.
_BESIDE = ("*.py", "LICENSE*", "NOTICE*", "USE_POLICY*", "compression.json", "recipe.yaml", "quantize_config.json")
_MODEL = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", *_BESIDE)
# Of these, vLLM reads the output head from the embedding table whatever the config says.
_ALWAYS_TIED = ("gemma2", "cohere", "cohere2")
_NEVER = -1e4  # bias of a token that must not come out; float16 holds it


@dataclass(frozen=True)
class _Tables:
    """Names of the tensors that hold the vocabulary, as the checkpoint has them."""

    embeddings: str
    head: str | None  # `None` where it is tied to the embeddings and stays so
    head_from: str  # where the rows that the head has now are stored
    bias: str | None


def export_to_vocab(
    adapter: str | Path,
    output_dir: str | Path,
    base: str | Path | None = None,
    *,
    keep_tied: bool = False,
    fold_scales: bool = False,
) -> Path:
    """Write a model folder whose vocabulary holds an adapter's prompts.

    Prompt 2 in front of an input is the tokens `<|idp:2:00|><|idp:2:01|>...` in front of its token ids, before any
    beginning-of-sequence token. `idp_prompts.json` in the folder lists the ids; the adapter itself is kept in
    `idp_adapter/`, for the router. The chat template takes a variable `idp_prompt`, the number of a prompt.

    Args:
        adapter (`str`): folder or Hub id of an IDP adapter, or of PEFT's prompt tuning.
        output_dir (`str`): a new or empty folder. It appears when all is done.
        base (`str`, *optional*, defaults to the one that the adapter's config names): folder, Hub id or `"default"`, with
            weights in safetensors files; or a GGUF file, of which a dense copy is exported.
        keep_tied (`bool`, defaults to `False`): leave tied embeddings tied. By default they are untied, at the cost of one
            more table: the output row of a prompt token would be the prompt's own vector, and the token could be
            generated. With `True`, and for models that engines always tie (Gemma 2, Cohere), requests to engines that do not
            obey `suppress_tokens` must carry [`ExportedModel.logit_bias`], which the proxy adds.
        fold_scales (`bool`, defaults to `False`): write the adapter's scales into the weights, which then are not those of the
            base any more. Required where the adapter has scales: no engine applies them.

    Returns:
        `Path`: the folder.

    Raises:
        `ValueError`: where the adapter or the base cannot be exported: the text says why.
        `FileNotFoundError`: where the base is not there.
    """
    with _read(adapter, output_dir, base) as (source, folder):
        _export_vocabulary(str(adapter), source, folder, Path(output_dir), keep_tied, fold_scales)
    return Path(output_dir)


def _export_vocabulary(
    adapter: str, source: PromptSource, folder: Path, output_dir: Path, keep_tied: bool, fold_scales: bool
) -> None:
    model = skeleton(str(folder))
    files = weight_files(folder)
    check_fits(model, source, folder)
    check_scales(source, fold_scales)
    tables = _find_tables(model, files, keep_tied or model.config.model_type in _ALWAYS_TIED)
    tokenizer = tokenizer_for(adapter, folder)
    vocabulary = _vocabulary(source, files.tensor(tables.embeddings).shape[0], tokenizer)
    vocabulary.add_to(tokenizer)
    tokenizer.chat_template = with_prompts_in_all(tokenizer.chat_template, vocabulary.prompts)
    with whole_folder(output_dir) as target:
        tensors = _changed(files, tables, source, vocabulary, embedding_scale(model.get_input_embeddings()))
        if fold_scales:
            tensors |= folded(model, files, source)
        copy_model(files, target, tensors, tables.embeddings)
        for path in files_inside(folder, _BESIDE):
            shutil.copyfile(path, target / path.name)
        _write_config(folder, target, vocabulary, tables.head)
        _write_generation_config(model, folder, target, vocabulary)
        tokenizer.save_pretrained(target)
        (target / FILE).write_text(describe(vocabulary, tables.head is None), encoding="utf-8")
        write_adapter(adapter, target / ADAPTER, folded=fold_scales)


def export_folded(adapter: str | Path, output_dir: str | Path, base: str | Path | None = None) -> Path:
    """Write a model folder whose weights hold an adapter's scales, and beside them the adapter without scales.

        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("folded"), "folded/idp_adapter")

    Also for prompts of keys and values, which no vocabulary can hold.

    Args:
        adapter (`str`), output_dir (`str`), base (`str`, *optional*): as in [`export_to_vocab`].

    Returns:
        `Path`: the folder.

    Raises:
        `ValueError`: where the adapter has no scales, or the base's format cannot take them: the text says why.
        `FileNotFoundError`: where the base is not there.
    """
    with _read(adapter, output_dir, base) as (source, folder):
        check_scales(source, fold_scales=True)
        files = weight_files(folder)
        tensors = folded(skeleton(str(folder)), files, source)
        with whole_folder(output_dir) as target:
            copy_model(files, target, tensors, next(iter(files.places)))
            for path in files_inside(folder, _MODEL):
                if path.suffix != ".safetensors" and path.name != INDEX:
                    shutil.copyfile(path, target / path.name)
            new_base = str(Path(output_dir).expanduser().absolute())
            write_adapter(str(adapter), target / ADAPTER, folded=True, base=new_base)
    return Path(output_dir)


@contextmanager
def _read(adapter: str | Path, output_dir: str | Path, base: str | Path | None) -> Iterator[tuple[PromptSource, Path]]:
    """An adapter's prompts and its base's folder (of a GGUF file, a dense copy within the block), once the output is known to be
    free. Links that lead out of a folder are refused."""
    from idp_peft.models.loading import find_model, unpacked

    target = Path(output_dir).expanduser().absolute()
    check_free(target)
    source = read_prompts(str(adapter))
    name = source.base_or(base)
    is_file = find_model(name)[1] is not None
    with unpacked(name, target.parent) if is_file else nullcontext(name) as place:
        folder = _folder_of(place, source.config.revision if base is None and not is_file else None)
        refuse_links(folder, Path(adapter))
        yield source, folder


def refuse_links(*folders: Path) -> None:
    """Refuse a model's files that are links out of their folder: an export would copy what they lead to."""
    for folder in folders:
        files_inside(folder, _MODEL)  # none where it is no folder


def _folder_of(name: str, revision: str | None) -> Path:
    """The local folder of a base, downloaded where it lies on the Hub."""
    from idp_peft.models.loading import find_model

    where, _ = find_model(name)
    if Path(where).is_dir():
        return Path(where)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(where, revision=revision, allow_patterns=list(_MODEL)))


def check_fits(model: nn.Module, source: PromptSource, base: Path) -> None:
    """Refuse prompts that would come out wrong as rows of a base's vocabulary."""
    if source.holds_keys:
        raise ValueError(
            f"{source.label} holds prompts of keys and values: no token of a vocabulary has these; train one with prompts='tokens'"
        )
    embeddings, decoder = model.get_input_embeddings(), find_decoder(model)
    if source.width != embeddings.embedding_dim:
        raise ValueError(
            f"the prompts of {source.label} have width {source.width}, the embeddings of the base model in {base} "
            f"{embeddings.embedding_dim}"
        )
    lengths = [len(prompt) for prompt in source.prompts]
    if len(set(lengths)) > 1 and position_counts_bank(model):
        raise ValueError(
            f"prompts of unequal lengths {lengths} cannot be exported for {type(model).__name__}, whose positions are learned "
            f"or depend on the length: every input starts at position {max(lengths)} there, also behind a shorter prompt"
        )
    tables = [
        name
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Embedding)
        and module is not embeddings
        and len(module.weight) == len(embeddings.weight)
    ]
    if tables:
        raise ValueError(
            f"{type(model).__name__} has more than one table that is looked up by token id ({', '.join(tables)}): a prompt is "
            "a row of the first alone"
        )
    if not all(prompt.isfinite().all() for prompt in source.prompts):
        raise ValueError(f"the prompts of {source.label} hold NaN or infinity")


def embedding_scale(embeddings: nn.Module) -> float:
    """What the embedding module multiplies its rows by.

    Raises:
        `ValueError`: for a module that does something else.
    """
    if type(embeddings) is nn.Embedding:
        return 1.0
    scale = getattr(embeddings, "scalar_embed_scale", None)
    if scale is None:
        raise ValueError(
            f"{type(embeddings).__name__} is neither a plain table nor one with a known scale: which row gives a prompt's "
            "vector cannot be said"
        )
    return float(scale)


def _find_tables(model: nn.Module, files: WeightFiles, keep_tied: bool) -> _Tables:
    model.tie_weights()  # on the meta device, transformers leaves that to the loading
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    embeddings = _stored_name(names[inputs], "weight", files, "the embedding table")
    _check_table(files, embeddings, tuple(inputs.weight.shape), "the embedding table")
    bias = None
    if getattr(outputs, "bias", None) is not None:
        bias = _stored_name(names[outputs], "bias", files, "the bias of the output head")
    if outputs.weight is inputs.weight:
        # A checkpoint's names may lack the prefix that the model's own have, but not those of its head.
        return _Tables(embeddings, None if keep_tied else f"{names[outputs]}.weight", embeddings, bias)
    head = f"{names[outputs]}.weight"
    if head not in files.places:
        renamed = _by_shape(files, tuple(outputs.weight.shape), embeddings)
        head = renamed or _stored_name(names[outputs], "weight", files, "the output head")
    _check_table(files, head, tuple(outputs.weight.shape), "the output head")
    return _Tables(embeddings, head, head, bias)


def _stored_name(module: str, parameter: str, files: WeightFiles, what: str) -> str:
    """The name of a parameter in the checkpoint, where a prefix may be missing, be one more, or stand elsewhere."""
    name = f"{module}.{parameter}"
    if name in files.places:
        return name
    found = [key for key in files.places if key.endswith(f".{name}") or name.endswith(f".{key}")]
    if len(found) != 1:  # multimodal checkpoints have the parts of the path in another order, or not all
        last = ".".join(name.split(".")[-2:])
        found = [key for key in files.places if key.endswith(last) and set(key.split(".")) <= set(name.split("."))]
    if len(found) == 1:
        return found[0]
    others = [key for key in files.places if key.startswith(f"{module}.") or f".{module}." in key]
    if others:
        raise ValueError(
            f"{what} of the base model is itself quantised (it is stored as {', '.join(sorted(others))}): it cannot get rows; "
            "compress the model without it"
        )
    raise ValueError(f"{what} of the base model ({name}) is not among the tensors in {files.folder}")


def _by_shape(files: WeightFiles, shape: tuple[int, ...], embeddings: str) -> str | None:
    """The one other table of the vocabulary, whatever it is called: transformers renames heads (GPT-NeoX's `embed_out`)."""
    tensors = {name: tensor for file in files.files for name, tensor in files.tensors(file).items()}
    found = [name for name, tensor in tensors.items() if tensor.shape == shape and name != embeddings]
    return found[0] if len(found) == 1 else None


def _check_table(files: WeightFiles, name: str, shape: tuple[int, ...], what: str) -> None:
    tensor = files.tensor(name)
    if tensor.dtype not in DTYPES or tensor.shape != shape:
        raise ValueError(
            f"{what} of the base model ({name}) is {tensor.dtype} of shape {list(tensor.shape)}, expected one of "
            f"{', '.join(DTYPES)} and shape {list(shape)}: a table that is itself quantised cannot get rows"
        )


def tokenizer_for(adapter: str, folder: Path):
    """The tokenizer beside an adapter, else its base's."""
    from idp_peft.models.loading import load_tokenizer, tokenizer_beside

    beside = tokenizer_beside(adapter, {}, None)
    tokenizer = load_tokenizer(folder) if beside is None else beside
    tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side  # what is set later on is not saved
    return tokenizer


def _vocabulary(source: PromptSource, rows: int, tokenizer) -> PromptVocabulary:
    names = getattr(source.config, "prompt_names", None)
    first = max(rows, next_token_id(tokenizer))
    return PromptVocabulary(rows, first, [len(prompt) for prompt in source.prompts], names)


def _changed(
    files: WeightFiles, tables: _Tables, source: PromptSource, vocabulary: PromptVocabulary, scale: float
) -> dict[str, StoredTensor]:
    """The tensors that get rows."""
    embeddings = files.tensor(tables.embeddings)
    added = vocabulary.rows - vocabulary.vocab_size
    rows = torch.zeros(added, source.width)
    start = vocabulary.first - vocabulary.vocab_size
    rows[start : start + sum(vocabulary.lengths)] = torch.cat(source.prompts) / scale
    changed = {tables.embeddings: embeddings.with_rows(rows)}
    if tables.head is not None:
        mean = _mean_row(files, tables.head_from)
        changed[tables.head] = files.tensor(tables.head_from).with_rows(mean.expand(added, -1))
    if tables.bias is not None:
        changed[tables.bias] = files.tensor(tables.bias).with_rows(torch.full((added,), _NEVER))
    return changed


def _mean_row(files: WeightFiles, name: str) -> torch.Tensor:
    """The mean of a table's rows, float64 `[1, d]`."""
    total = sum(rows.double().sum(0, keepdim=True) for rows in files.rows(name))
    return total / files.tensor(name).shape[0]


def _write_config(folder: Path, target: Path, vocabulary: PromptVocabulary, head: str | None) -> None:
    """The base's config with the new number of rows, untied where there is a head of its own."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else None
    for part in (part for part in (config, text) if part is not None):
        if part is text or text is None or "vocab_size" in part:
            part["vocab_size"] = vocabulary.rows
        if head is not None:
            part["tie_word_embeddings"] = False
    quantization = config.get("quantization_config") or {}
    for rule in ("ignore", "modules_to_not_convert", "llm_int8_skip_modules"):
        ignored = quantization.get(rule)
        if head is not None and isinstance(ignored, list) and head.removesuffix(".weight") not in ignored:
            ignored.append(head.removesuffix(".weight"))  # a head of its own is a layer that was not quantised
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_generation_config(model: nn.Module, folder: Path, target: Path, vocabulary: PromptVocabulary) -> None:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        config = GenerationConfig.from_pretrained(folder)
    else:
        config = GenerationConfig.from_model_config(model.config)
    config.suppress_tokens = sorted({*(config.suppress_tokens or []), *vocabulary.never_generated})
    config.save_pretrained(target)
