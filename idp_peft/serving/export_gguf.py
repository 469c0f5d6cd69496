"""A GGUF file that carries an adapter, for llama.cpp and what is built on it: its prompts as rows of the vocabulary, its scales in
the weights' blocks.

All tensors but those that change are copied byte for byte, and so are the old rows of the tables. New rows are in the table's
own type: a row is quantised along itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from idp_peft.composition.base_skeleton import skeleton
from idp_peft.composition.prompt_sources import PromptSource, read_prompts
from idp_peft.files.whole_folder import check_free, whole_folder
from idp_peft.hosting.prompt_ids import check_prompt_ids
from idp_peft.serving.chat_template import with_prompts, with_prompts_in_all
from idp_peft.serving.export import check_fits, embedding_scale, refuse_links, tokenizer_for
from idp_peft.serving.exported import ADAPTER, FILE, describe
from idp_peft.serving.folded_weights import check_scales, factors_by_layer, write_adapter
from idp_peft.serving.vocabulary import PromptVocabulary, next_token_id

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFReader

MODEL = "model.gguf"
_TABLE, _HEAD, _SECOND_TABLE = "token_embd.weight", "output.weight", "per_layer_token_embd.weight"
_TOKENS, _CONTROL, _UNUSED, _NORMAL = "tokenizer.ggml.tokens", 3, 5, 1  # llama.cpp's types of tokens
_TEMPLATE, _ARCHITECTURE = "tokenizer.chat_template", "general.architecture"


class _Tensor(NamedTuple):
    """A tensor of the new file, made when it is written.

    Args:
        shape (`tuple[int, ...]`), dtype (`np.dtype`): of its bytes or numbers, as `gguf` has them.
        kind (`GGMLQuantizationType`): its type.
        make (`Callable`): gives them.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    kind: GGMLQuantizationType
    make: Callable[[], np.ndarray]


def export_to_gguf(
    adapter: str | Path,
    output_dir: str | Path,
    base: str | Path | None = None,
    *,
    keep_tied: bool = False,
    default_prompt: str | int | None = None,
    table_type: str | None = None,
) -> Path:
    """Write a folder with a GGUF file that carries an adapter, which any engine built on llama.cpp serves.

    `model.gguf` takes prompt 2 as the tokens `<|idp:2:00|><|idp:2:01|>...` in front of a text, before the beginning-of-sequence
    token. That token comes from whoever sends token ids: the file says `add_bos_token = false`. `idp_prompts.json` lists the ids,
    `idp_adapter/` keeps the adapter and its tokenizer for the router, and a `Modelfile` per prompt is for Ollama.

    Args:
        adapter (`str`): folder or Hub id of an IDP adapter, or of PEFT's prompt tuning. Its scales, if any, are folded.
        output_dir (`str`): a new or empty folder. It appears when all is done.
        base (`str`, *optional*, defaults to the one that the adapter's config names): a `.gguf` file, or a folder with one.
        keep_tied (`bool`, defaults to `False`): leave a table that is also the output head as it is. By default the head gets a
            copy of its own, in which new rows are the mean of all: else a prompt's token is often the likeliest.
        default_prompt (`str` or `int`, *optional*): the prompt that chats get where `idp_prompt` is not given (LM Studio).
        table_type (`str`, *optional*): convert the embedding table, and a head that it is tied to, to this type (`"q8_0"`, `"f16"`),
            where rows of its own cannot be written.

    Returns:
        `Path`: the folder.

    Raises:
        `ValueError`: where the adapter or the base cannot be exported: the text says why.
        `FileNotFoundError`: where the base is not there.
        `ImportError`: without the library `gguf`.
    """
    target = Path(output_dir).expanduser().absolute()
    check_free(target)
    source = read_prompts(str(adapter))
    path = _base_file(source.base_or(base))
    refuse_links(Path(adapter))
    model, reader = skeleton(str(path)), _reader(path)
    check_fits(model, source, path)
    if source.scales is not None:
        check_scales(source, fold_scales=True)
    old = {tensor.name: tensor for tensor in reader.tensors}
    rows = _check_tables(reader, old, path)
    tokenizer = tokenizer_for(str(adapter), path)
    names = getattr(source.config, "prompt_names", None)
    first = max(rows, next_token_id(tokenizer))  # transformers may give it tokens that the file does not have
    vocabulary = PromptVocabulary(rows, first, [len(prompt) for prompt in source.prompts], names)
    vocabulary.add_to(tokenizer)
    default = _default(default_prompt, vocabulary)
    changed = _folded(model, source, reader, old, path) if source.scales is not None else {}
    is_tied = _HEAD not in old and (keep_tied or not _may_have_head(reader))
    changed |= _tables(source, vocabulary, old, embedding_scale(model.get_input_embeddings()), is_tied, table_type)
    with whole_folder(output_dir) as folder:
        tensors = {name: _as_it_is(tensor) for name, tensor in old.items()} | changed
        _write(folder / MODEL, reader, _fields(reader, vocabulary, default), tensors)
        (folder / FILE).write_text(describe(vocabulary, is_tied, default), encoding="utf-8")
        write_adapter(str(adapter), folder / ADAPTER, folded=source.scales is not None)
        for prompt, tokens in enumerate(vocabulary.prompts):
            name = str(prompt) if names is None else names[prompt]
            (folder / f"Modelfile.{prompt}").write_text(
                _modelfile(name, "".join(tokens), _contents(reader, _TEMPLATE)), encoding="utf-8"
            )
        tokenizer.chat_template = with_prompts_in_all(tokenizer.chat_template, vocabulary.prompts)
        _save(tokenizer, folder / ADAPTER)
    return Path(output_dir)


def _save(tokenizer, folder: Path) -> None:
    """As its `tokenizer.json` alone says: the class that reads GGUF files is guessed, and may make another tokenizer of it."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _base_file(name: str) -> Path:
    from idp_peft.models.loading import find_model

    where, file = find_model(name)
    if file is None:
        raise ValueError(
            f"`--to-gguf` needs a base in a GGUF file, and {name!r} is none: convert it with llama.cpp's convert_hf_to_gguf.py and pass "
            "the file (`--model base.gguf`), or export with `--to-vocab`"
        )
    if not Path(where, file).is_file():
        raise FileNotFoundError(
            f"{Path(where, file)} is not there: download the file, and pass it (`--model base.gguf`)"
        )
    return Path(where, file)


def _reader(path: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError(f"reading a GGUF file needs another library: pip install 'gguf>=0.19.0' ({error})") from error
    reader = GGUFReader(path)
    if (parts := _contents(reader, "split.count") or 1) > 1:
        raise ValueError(
            f"{path} is one of {parts} files: put them together with llama.cpp's `llama-gguf-split --merge`"
        )
    return reader


def _contents(reader: GGUFReader, field: str):
    return None if reader.get_field(field) is None else reader.get_field(field).contents()


def _check_tables(reader: GGUFReader, tensors: dict, path: Path) -> int:
    """How many rows the vocabulary has: as many as names."""
    if _SECOND_TABLE in tensors:
        raise ValueError(
            f"{path} has more than one table that is looked up by token id: a prompt is a row of the first alone"
        )
    names = _contents(reader, _TOKENS)
    rows = len(tensors[_TABLE].data)
    if names is None or len(names) != rows:
        raise ValueError(
            f"{path} has {rows} rows of embeddings and {len(names or [])} tokens: a whole model has as many of both"
        )
    return rows


def _default(prompt: str | int | None, vocabulary: PromptVocabulary) -> int | None:
    if prompt is None:
        return None
    given = int(prompt) if isinstance(prompt, str) and prompt.isdigit() else prompt
    try:
        chosen = int(check_prompt_ids([given], 1, len(vocabulary.lengths), vocabulary.prompt_names))
    except ValueError as error:
        raise ValueError(f"`default_prompt`: {error}") from error
    if chosen < 0:
        raise ValueError(f"`default_prompt` must name one prompt, got {prompt!r}: leave it out for none")
    return chosen


def _may_have_head(reader: GGUFReader) -> bool:
    """Whether llama.cpp reads an output head of this architecture: it refuses a file with a tensor that it does not know."""
    from gguf import MODEL_ARCH_NAMES, MODEL_TENSOR, MODEL_TENSORS

    arch = _contents(reader, _ARCHITECTURE)
    return any(name == arch and MODEL_TENSOR.OUTPUT in MODEL_TENSORS[key] for key, name in MODEL_ARCH_NAMES.items())


# ---------------------------------------------------------------------- tensors


def _as_it_is(tensor) -> _Tensor:
    return _Tensor(tensor.data.shape, tensor.data.dtype, tensor.tensor_type, lambda: tensor.data)


def _tables(
    source: PromptSource, vocabulary: PromptVocabulary, old: dict, scale: float, is_tied: bool, table_type: str | None
) -> dict[str, _Tensor]:
    """The embedding table with the prompts as rows; and the output head, in which new rows are the mean of all."""
    from idp_peft.serving.gguf_types import mean_row

    added = vocabulary.rows - vocabulary.vocab_size
    prompts = torch.zeros(added, source.width)
    start = vocabulary.first - vocabulary.vocab_size
    prompts[start : start + sum(vocabulary.lengths)] = torch.cat(source.prompts) / scale
    table = _with_rows(old[_TABLE], prompts.numpy(), table_type)
    if is_tied:
        return {_TABLE: table}
    head = old.get(_HEAD, old[_TABLE])
    mean = mean_row(head.data, head.tensor_type)
    return {_TABLE: table, _HEAD: _with_rows(head, mean.repeat(added, 0), None if _HEAD in old else table_type)}


def _with_rows(tensor, rows: np.ndarray, table_type: str | None) -> _Tensor:
    """A table with more rows at its end, in its own type; or all of it in another."""
    import numpy as np
    from gguf import GGMLQuantizationType

    from idp_peft.serving.gguf_types import decoded, encoded

    kind, data = tensor.tensor_type, tensor.data
    if table_type is not None:
        if table_type.upper() not in GGMLQuantizationType.__members__:
            raise ValueError(f"`table_type` must be a type of GGUF files, as 'q8_0' or 'f16', got {table_type!r}")
        other = GGMLQuantizationType[table_type.upper()]
        if other != kind:
            data, kind = encoded(decoded(data, kind), other), other
    try:
        new = encoded(rows, kind)
    except ValueError as error:
        raise ValueError(f"{tensor.name}: {error}; `--table_type q8_0` converts the table") from error
    if not np.isfinite(decoded(new, kind)).all():
        raise ValueError(
            f"the prompts hold numbers that type {kind.name} of {tensor.name} cannot: `--table_type f32` converts it"
        )
    shape = (len(data) + len(new), *data.shape[1:])
    return _Tensor(shape, data.dtype, kind, lambda: np.concatenate([data, new.astype(data.dtype, copy=False)]))


def _folded(model: nn.Module, source: PromptSource, reader: GGUFReader, old: dict, path: Path) -> dict[str, _Tensor]:
    """The tensors of linear layers, their rows times the adapter's factors."""
    from idp_peft.serving.gguf_types import scaled

    files, changed = _NamesInFile(model, reader), {}
    for layer, module, factors in factors_by_layer(model, source):
        for own, _ in module.named_parameters(recurse=False):
            if own == "bias" and factors.ndim == 2:
                continue
            name, order = files.find(f"{layer}.{own}", len(factors))
            if name not in old:
                raise ValueError(
                    f"layer {layer!r} of the base is not among the tensors of {path} under a name of its own"
                )
            in_file = torch.empty_like(factors)
            in_file[order] = factors
            if len(old[name].data) != len(factors):
                raise ValueError(f"{name} of {path} has {len(old[name].data)} rows, its layer {len(factors)} channels")
            kind, data = old[name].tensor_type, old[name].data
            factor = in_file.float().numpy()
            scaled(data[:1], kind, factor[:1], name)  # what cannot be scaled is said before anything is written
            changed[name] = _Tensor(data.shape, data.dtype, kind, partial(scaled, data, kind, factor, name))
    return changed


class _NamesInFile:
    """Where the parameters of a transformers model are in a GGUF file, as transformers itself reads it.

    Args:
        model (`PreTrainedModel`): the model, without weights.
        reader (`GGUFReader`): the file.
    """

    def __init__(self, model: nn.Module, reader: GGUFReader) -> None:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

        kind = TENSOR_PROCESSORS.get(_contents(reader, _ARCHITECTURE), TensorProcessor)
        self.processor = kind(config=model.config.get_text_config(decoder=True).to_dict())
        self.names = {hf: file for file, hf in get_gguf_hf_weights_map(model, self.processor).items()}

    def find(self, parameter: str, rows: int) -> tuple[str | None, torch.Tensor]:
        """Its name in the file, and for each of its output channels the row there: llama.cpp turns the heads of some models."""
        import numpy as np

        name = self.names.get(parameter)
        if name is None:
            return None, torch.arange(rows)
        numbers = np.arange(rows, dtype=np.float32)
        if parameter.endswith("weight"):
            numbers = numbers[:, None].repeat(2, 1)
        order = self.processor.process(numbers, name).weights
        order = order if order.ndim == 1 else order[:, 0] if len(order) == rows else order[0]
        return name, torch.from_numpy(np.ascontiguousarray(order)).long()


# ---------------------------------------------------------------------- the file


def _fields(reader: GGUFReader, vocabulary: PromptVocabulary, default: int | None) -> dict[str, tuple]:
    """The file's metadata with the new tokens: name to value, type and type of the entries."""
    from gguf import GGUFValueType as Type

    fields = {
        field.name: (field.contents(), field.types[0], field.types[-1] if field.types[0] == Type.ARRAY else None)
        for field in reader.fields.values()
        if not field.name.startswith("GGUF.") and field.name != _ARCHITECTURE
    }
    new = {row: (f"<|idp:unused:{row}|>", _UNUSED) for row in vocabulary.never_generated}
    new |= {vocabulary.first + i: (name, _CONTROL) for i, name in enumerate(vocabulary.all_tokens)}
    new_names, new_types = ([one[part] for one in new.values()] for part in (0, 1))
    types = fields.get("tokenizer.ggml.token_type", ([_NORMAL] * vocabulary.vocab_size, Type.ARRAY, Type.INT32))
    scores = fields.get("tokenizer.ggml.scores")
    suppressed = _contents(reader, "tokenizer.ggml.suppress_tokens") or []
    fields |= {
        _TOKENS: (fields[_TOKENS][0] + new_names, *fields[_TOKENS][1:]),
        "tokenizer.ggml.token_type": (types[0] + new_types, *types[1:]),
        "tokenizer.ggml.add_bos_token": (False, Type.BOOL, None),
        "tokenizer.ggml.suppress_tokens": ([*suppressed, *vocabulary.never_generated], Type.ARRAY, Type.INT32),
    }
    if scores is not None:
        fields["tokenizer.ggml.scores"] = (scores[0] + [0.0] * len(new), *scores[1:])
    rows = f"{_contents(reader, _ARCHITECTURE)}.vocab_size"
    if rows in fields:
        fields[rows] = (vocabulary.rows, *fields[rows][1:])
    for name, (text, *kinds) in list(fields.items()):
        if name == _TEMPLATE or name.startswith(f"{_TEMPLATE}."):
            fields[name] = (with_prompts(text, vocabulary.prompts, default), *kinds)
    return fields


def _write(path: Path, reader: GGUFReader, fields: dict[str, tuple], tensors: dict[str, _Tensor]) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, _contents(reader, _ARCHITECTURE), endianess=reader.endianess)
    writer.data_alignment = int(reader.alignment)
    for name, (value, kind, entries) in fields.items():
        writer.add_key_value(name, value, kind, sub_type=entries)
    for name, (shape, dtype, kind, _) in tensors.items():
        writer.add_tensor_info(name, shape, dtype, math.prod(shape) * dtype.itemsize, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors.values():
        writer.write_tensor_data(tensor.make())
    writer.close()


def _modelfile(name: str, tokens: str, chat_template: str | None) -> str:
    """An Ollama model that always uses one prompt."""
    if chat_template and "<|im_start|>" in chat_template:
        rest = (
            "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
        )
    else:
        rest = "{{ .Prompt }}"
    return f'# prompt {name}: ollama create NAME -f this file\nFROM ./{MODEL}\nTEMPLATE """{tokens}{rest}"""\n'
