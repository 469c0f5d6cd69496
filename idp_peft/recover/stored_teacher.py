"""What a dense model predicts, kept in files: a repair distils from them, with no second model in memory.

Of each token of each training block the `top_k` likeliest next tokens and their log-probabilities are kept. What is left is one more
outcome, "another token", so that the loss is a KL divergence over k + 1 outcomes: never more than the full one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from idp_peft.files.folder_lock import alone_in
from idp_peft.files.inside_folder import inside
from idp_peft.files.whole_file import write_whole
from idp_peft.texts.tokens import padded_batch

FILE = "teacher.json"
_PER_SHARD = 64  # blocks


def teach(
    model: str | Path,
    output_dir: str | Path,
    *,
    dataset: str = "wiki",
    dataset_split: str = "train",
    dataset_config: str | None = None,
    text_column: str = "text",
    block_tokens: int = 256,
    min_tokens: int = 32,
    top_k: int = 64,
    batch_size: int = 4,
) -> Path:
    """Write what a dense model predicts on training text, for `recover(..., teacher=output_dir)`.

        idp_peft.recover.teach("dense", "teacher", dataset="wiki")
        idp_peft.recover.recover("small", "run", teacher="teacher", dataset="wiki")

    An interrupted call goes on where it was.

    Args:
        model (`str`): the dense model: a folder, a `.gguf` file or a Hub id.
        output_dir (`str`): the folder to write.
        dataset (`str`), dataset_split (`str`), dataset_config (`str`, *optional*), text_column (`str`), block_tokens (`int`),
            min_tokens (`int`): as in [`RecoverSettings`]. The repair must have the same.
        top_k (`int`, defaults to 64): next tokens that are kept of each token, at least 1.
        batch_size (`int`, defaults to 4): blocks at once.

    Returns:
        `Path`: the folder.

    Raises:
        `ValueError`: for settings or text that do not fit, or a folder that holds something else.
    """
    from idp_peft.models.fingerprint import fingerprint
    from idp_peft.models.loading import load_model, load_tokenizer
    from idp_peft.texts.data import load_texts, token_blocks

    if top_k < 1 or batch_size < 1:
        raise ValueError(f"`top_k` and `batch_size` must be at least 1, got {top_k} and {batch_size}")
    folder = Path(output_dir)
    with alone_in(folder):
        tokenizer = load_tokenizer(model)
        texts = load_texts(dataset, dataset_split, text_column, dataset_config)
        blocks = token_blocks(tokenizer, texts, block_tokens, min_tokens)
        if not blocks:
            raise ValueError(f"`dataset` {dataset!r} has no document of `min_tokens`={min_tokens} tokens")
        teacher = load_model(model).eval()
        record = {
            "format": 1,
            "model": str(model),
            "weights": fingerprint(teacher),
            "vocabulary": vocabulary_digest(tokenizer),
            "blocks": hashlib.sha256(repr(blocks).encode()).hexdigest(),
            "top_k": min(top_k, teacher.config.get_text_config().vocab_size),
            "shards": -(-len(blocks) // _PER_SHARD),
        }
        _check_same(folder, record)
        write_whole(folder / FILE, json.dumps(record, indent=1) + "\n")
        with tqdm(total=len(blocks), desc="what the teacher predicts") as bar:
            for number in range(record["shards"]):
                part = blocks[number * _PER_SHARD : (number + 1) * _PER_SHARD]
                path = folder / shard_name(number)
                if not path.is_file():  # it appears whole
                    _write(path, _predictions(teacher, part, record["top_k"], batch_size))
                bar.update(len(part))
    return folder


def vocabulary_digest(tokenizer) -> str:
    """sha256 of a tokenizer's tokens and their ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def is_taught(folder: str | Path) -> bool:
    """Whether a folder holds what a teacher predicts, and not the teacher."""
    return (Path(folder).expanduser() / FILE).is_file()


def _check_same(folder: Path, record: dict) -> None:
    path = folder / FILE
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            before = {}
        changed = [name for name, value in record.items() if before.get(name) != value]
        if changed:
            raise ValueError(
                f"`output_dir` {str(folder)!r} holds predictions of another call ({', '.join(changed)} differ): choose another folder"
            )
    elif any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise ValueError(f"`output_dir` {str(folder)!r} must be new, empty or a folder to go on with")


@torch.no_grad()
def _predictions(teacher, blocks: list[list[int]], top_k: int, batch_size: int) -> dict[str, torch.Tensor]:
    ids, logprobs = [], []
    for start in range(0, len(blocks), batch_size):
        rows = blocks[start : start + batch_size]
        input_ids, mask = padded_batch(rows)
        logits = teacher(
            input_ids=input_ids.to(teacher.device), attention_mask=mask.to(teacher.device), use_cache=False
        ).logits
        best = logits.float().log_softmax(-1).topk(top_k, dim=-1)
        for row, block in enumerate(rows):
            ids.append(best.indices[row, : len(block)].to("cpu", torch.int32))
            logprobs.append(best.values[row, : len(block)].cpu())
    return {
        "input_ids": torch.tensor([token for block in blocks for token in block], dtype=torch.int32),
        "lengths": torch.tensor([len(block) for block in blocks]),
        "top_ids": torch.cat(ids),
        "top_logprobs": torch.cat(logprobs),
    }


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    temporary = path.with_name(f".{path.name}")
    save_file(tensors, temporary)
    temporary.replace(path)


class StoredTeacher:
    """What a teacher predicts on blocks of text, read from a folder that [`teach`] wrote.

    Args:
        folder (`str`): the folder.

    Raises:
        `ValueError`: where it is not complete, or cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        try:
            self.record = json.loads(inside(self.folder, FILE).read_text(encoding="utf-8"))
            count, self.top_k = int(self.record["shards"]), int(self.record["top_k"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"`teacher` {str(folder)!r} holds a {FILE} that cannot be read ({error})") from error
        self._places: dict[bytes, tuple[int, int, int]] = {}  # digest of a block -> shard, first row, rows
        for number in range(count):
            for block, start in self._blocks(number):
                self._places[_digest(block)] = (number, start, len(block))
        self._open: dict[int, object] = {}

    def _path(self, number: int) -> Path:
        path = inside(self.folder, shard_name(number))
        if not path.is_file():
            raise ValueError(
                f"`teacher` {str(self.folder)!r} is not complete: run `idp-peft teach` again, which goes on"
            )
        return path

    def _blocks(self, number: int) -> Iterator[tuple[list[int], int]]:
        with safe_open(self._path(number), framework="pt") as file:
            ids, lengths = file.get_tensor("input_ids").tolist(), file.get_tensor("lengths").tolist()
        start = 0
        for length in lengths:
            yield ids[start : start + length], start
            start += length

    @property
    def digest(self) -> str:
        """Of all that it says."""
        return hashlib.sha256(json.dumps(self.record, sort_keys=True).encode()).hexdigest()

    def check(self, blocks: list[list[int]], tokenizer) -> None:
        """Refuse text or a tokenizer that the teacher was not asked with.

        Raises:
            `ValueError`: naming what differs.
        """
        if self.record.get("vocabulary") != vocabulary_digest(tokenizer):
            raise ValueError(f"`teacher` {str(self.folder)!r} was made with another vocabulary than the model's")
        if missing := sum(_digest(block) not in self._places for block in blocks):
            raise ValueError(
                f"`teacher` {str(self.folder)!r} says nothing of {missing} of the {len(blocks)} training blocks: run `idp-peft teach` "
                "with the same dataset, block_tokens and min_tokens"
            )

    def predictions(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest next tokens behind each token, int64 `[batch, n, k]`, and their log-probabilities, float32.

        Args:
            input_ids (`torch.Tensor`): int64 `[batch, n]`, blocks padded on the right.
            attention_mask (`torch.Tensor`): `[batch, n]`.
        """
        shape = (*input_ids.shape, self.top_k)
        ids, logprobs = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
        for row, (tokens, mask) in enumerate(zip(input_ids.cpu(), attention_mask.cpu().bool(), strict=True)):
            number, start, length = self._places[_digest(tokens[mask].tolist())]
            if number not in self._open:
                self._open[number] = safe_open(self._path(number), framework="pt")
            file = self._open[number]
            ids[row, :length] = file.get_slice("top_ids")[start : start + length].long()
            logprobs[row, :length] = file.get_slice("top_logprobs")[start : start + length]
        return ids.to(input_ids.device), logprobs.to(input_ids.device)


def _digest(block: list[int]) -> bytes:
    return hashlib.sha256(repr(block).encode()).digest()


def truncated_kl(logits: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) over the teacher's k likeliest tokens and "another token", summed over tokens.

    Args:
        logits (`torch.Tensor`): the student's, `[tokens, vocabulary]`.
        ids (`torch.Tensor`), logprobs (`torch.Tensor`): the teacher's, `[tokens, k]`.
    """
    own = logits.float().log_softmax(-1).gather(-1, ids)
    kept = (logprobs.exp() * (logprobs - own)).sum()
    tiny = torch.finfo(torch.float32).eps
    rest = (1 - logprobs.exp().sum(-1)).clamp(min=tiny)
    rest_own = (1 - own.exp().sum(-1)).clamp(min=tiny)
    return kept + (rest * (rest.log() - rest_own.log())).sum()
