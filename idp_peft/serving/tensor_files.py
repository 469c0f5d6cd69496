"""Safetensors files at the level of bytes: what is not changed is copied, whatever its type, and never held in memory."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from idp_peft.files.inside_folder import inside, plain_name

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_CHUNK = 2**24  # bytes copied at once
# Floating point types that rows can be written in; a quantised table has none of them.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@dataclass(frozen=True)
class Slice:
    """Some bytes of a file."""

    path: Path
    start: int
    length: int


@dataclass(frozen=True)
class Made:
    """Bytes that are made when they are written: a changed tensor is never held beside the others."""

    length: int
    make: Callable[[], bytes]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a safetensors file has it, or will: its bytes are those of its pieces, one after the other."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Slice | Made | bytes, ...]

    @property
    def nbytes(self) -> int:
        return sum(len(piece) if isinstance(piece, bytes) else piece.length for piece in self.pieces)

    def with_rows(self, rows: torch.Tensor) -> StoredTensor:
        """The same tensor with more rows at its end, cast to its type."""
        data = _bytes(rows.to(DTYPES[self.dtype]))
        return StoredTensor(self.dtype, (self.shape[0] + len(rows), *self.shape[1:]), (*self.pieces, data))

    def made_by(self, make: Callable[[], torch.Tensor]) -> StoredTensor:
        """The same tensor with other numbers, of the same type and shape, made when they are written."""
        return StoredTensor(self.dtype, self.shape, (Made(self.nbytes, lambda: _bytes(make())),))


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of a model folder.

    Args:
        folder (`Path`): the folder.
        places (`dict[str, str]`): which file each tensor is in.
    """

    folder: Path
    places: dict[str, str]

    @property
    def files(self) -> list[str]:
        return sorted(set(self.places.values()))

    def tensors(self, file: str) -> dict[str, StoredTensor]:
        return read_header(self.folder / file)[0]

    def tensor(self, name: str) -> StoredTensor:
        return self.tensors(self.places[name])[name]

    def read(self, name: str) -> torch.Tensor:
        """A tensor's numbers."""
        with safe_open(self.folder / self.places[name], framework="pt") as file:
            return file.get_tensor(name)

    def rows(self, name: str, chunk: int = 4096) -> Iterable[torch.Tensor]:
        """The rows of a tensor, some at a time."""
        with safe_open(self.folder / self.places[name], framework="pt") as file:
            table = file.get_slice(name)
            for start in range(0, table.get_shape()[0], chunk):
                yield table[start : start + chunk]


def weight_files(folder: Path) -> WeightFiles:
    """The safetensors files of a model folder, by its index where it has one.

    Raises:
        `ValueError`: where the folder has none, or one that cannot be read.
    """
    try:
        if (folder / INDEX).is_file():
            return WeightFiles(folder, _places(folder))
        if (folder / SINGLE).is_file():
            return WeightFiles(folder, dict.fromkeys(read_header(inside(folder, SINGLE))[0], SINGLE))
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"the weights in {folder} cannot be read and may be truncated: {error}") from error
    raise ValueError(
        f"the base model in {folder} has no {SINGLE}: only safetensors files can be copied byte for byte; load the model and "
        "save it again (`load_model(...).save_pretrained(...)`), which writes them"
    )


def _places(folder: Path) -> dict[str, str]:
    """Which file each tensor is in, as the folder's index says and its files agree."""
    index = json.loads(inside(folder, INDEX).read_text(encoding="utf-8"))
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{INDEX} must hold a `weight_map` of tensors and their files")
    for tensor, file in places.items():
        if not plain_name(file, f"the file of {tensor!r} in {INDEX}").endswith(".safetensors"):
            raise ValueError(f"the file of {tensor!r} in {INDEX} must be a safetensors file, got {file!r}")
    held = {file: set(read_header(inside(folder, file))[0]) for file in sorted(set(places.values()))}
    if lost := [tensor for tensor, file in places.items() if tensor not in held[file]]:
        raise ValueError(f"{INDEX} says that {lost[0]!r} is in {places[lost[0]]!r}, but it is not")
    return places


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Every tensor of a file, in the order of its bytes, and the file's metadata."""
    with safe_open(path, framework="pt"):  # checks that the header is sound and the file is whole
        pass
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        piece = Slice(path, 8 + length + start, stop - start)
        tensors[name] = StoredTensor(entry["dtype"], tuple(entry["shape"]), (piece,))
    return tensors, metadata


def write_tensors(path: Path, tensors: dict[str, StoredTensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file."""
    header, offset = {"__metadata__": metadata} if metadata else {}, 0
    for name, tensor in tensors.items():
        stop = offset + tensor.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for piece in (piece for tensor in tensors.values() for piece in tensor.pieces):
            _copy(piece, file) if isinstance(piece, Slice) else file.write(
                piece.make() if isinstance(piece, Made) else piece
            )


def copy_model(files: WeightFiles, target: Path, changed: dict[str, StoredTensor], beside: str) -> None:
    """Copy a model's weights with some tensors changed or added.

    Args:
        files (`WeightFiles`): where from.
        target (`Path`): folder to write into.
        changed (`dict`): what is changed, by name; new names are added.
        beside (`str`): name of the tensor whose file gets what is new.
    """
    places = {**dict.fromkeys(changed, files.places[beside]), **files.places}
    for name in files.files:
        mine = {tensor: value for tensor, value in changed.items() if places[tensor] == name}
        if not mine:
            shutil.copyfile(files.folder / name, target / name)
            continue
        tensors, metadata = read_header(files.folder / name)
        write_tensors(target / name, {**tensors, **mine}, metadata)
    if (files.folder / INDEX).is_file():
        index = json.loads((files.folder / INDEX).read_text(encoding="utf-8"))
        size = sum(tensor.nbytes for name in files.files for tensor in read_header(target / name)[0].values())
        index["weight_map"] = places
        metadata = index.get("metadata")
        index["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": size}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _copy(piece: Slice, target) -> None:
    with piece.path.open("rb") as source:
        source.seek(piece.start)
        left = piece.length
        while left:
            data = source.read(min(left, _CHUNK))
            if not data:
                raise ValueError(f"{piece.path} is truncated: {left} bytes are missing")
            target.write(data)
            left -= len(data)
