"""Training text without a corpus: sampled from the dense model itself (data-free, as in LLM-QAT, arXiv 2305.17888)."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig

from idp_peft.texts.tokens import beginning

_BATCH = 8


def sample_blocks(
    teacher, tokenizer, tokens: set[int], count: int, length: int, seed: int, file: Path
) -> list[list[int]]:
    """`count` blocks of token ids: what the tokenizer puts in front of every text, a random ordinary token, and what the
    teacher continues it with, drawn from its own distribution (temperature 1, nothing cut off or reweighted).

    A text ends before the first token that ends a text, by the teacher's generation config or by the tokenizer. Padding is
    never drawn.

    Written to `file` as they come, one JSON list a line, so that an interrupted call goes on where it was.

    Args:
        teacher (`PreTrainedModel`): the dense model.
        tokenizer: its tokenizer.
        tokens (`set[int]`): the ids that may come out; rows that pad a vocabulary are no tokens.
        count (`int`): how many blocks, at least 1.
        length (`int`): at most so many tokens each, those in front included; a text that the model ends sooner is shorter.
        seed (`int`): decides every token.
        file (`Path`): JSON lines.
    """
    blocks = _read(file)[:count] if file.exists() else []
    blocks = blocks[: len(blocks) // _BATCH * _BATCH]  # whole batches: a batch is drawn at once
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(block) + "\n" for block in blocks))
    settings = _settings(teacher, tokenizer, tokens, length)
    begin = beginning(tokenizer)
    special = {*tokenizer.all_special_ids, *begin, *(settings.eos_token_id or ())}
    ordinary = torch.tensor(sorted(tokens - special))
    front = torch.tensor([begin], dtype=torch.long)  # [1, front]
    with tqdm(total=count, initial=len(blocks), desc="sampling text from the teacher") as progress:
        while len(blocks) < count:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + len(blocks))
            size = min(_BATCH, count - len(blocks))
            first = ordinary[torch.randint(len(ordinary), (size, 1), generator=generator)]
            first = torch.cat([front.expand(size, -1), first], dim=1)  # [size, front + 1]
            new = _continue(teacher, first, settings, int(torch.randint(2**31, (), generator=generator)))
            with file.open("a") as out:
                out.writelines(json.dumps(block) + "\n" for block in new)
            blocks += new
            progress.update(size)
    return blocks


def _settings(teacher, tokenizer, tokens: set[int], length: int) -> GenerationConfig:
    """Plain sampling. A text ends where the teacher's own config says so, too: models for chats have several tokens for
    that, and the tokenizer names one of them at most."""
    of_model = teacher.generation_config.eos_token_id
    of_model = of_model if isinstance(of_model, list) else [of_model]
    ends = sorted({token for token in (*of_model, tokenizer.eos_token_id) if token is not None})
    padding = next((token for token in (tokenizer.pad_token_id, *ends) if token is not None), 0)
    drawn = tokens - ({tokenizer.pad_token_id} - set(ends))
    return GenerationConfig(
        max_length=length,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=ends or None,
        pad_token_id=padding,
        suppress_tokens=sorted(set(range(teacher.config.get_text_config().vocab_size)) - drawn) or None,
    )


@torch.no_grad()
def _continue(teacher, first: torch.Tensor, settings: GenerationConfig, seed: int) -> list[list[int]]:
    start = first.shape[1]
    if start >= settings.max_length:
        return first.tolist()
    own = teacher.generation_config
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first = first.to(teacher.device)
        try:
            teacher.generation_config = settings  # `generate` fills from it what its own argument leaves open
            mask = torch.ones_like(first)
            rows = teacher.generate(input_ids=first, attention_mask=mask, generation_config=settings).tolist()
        finally:
            teacher.generation_config = own
    return [_until(row, start, settings.eos_token_id or ()) for row in rows]


def _until(row: list[int], start: int, ends: Collection[int]) -> list[int]:
    """A row up to its first end at `start` or behind it."""
    return row[: next((place for place in range(start, len(row)) if row[place] in ends), len(row))]


def _read(file: Path) -> list[list[int]]:
    blocks = []
    for line in file.read_text().splitlines():
        try:
            blocks.append(json.loads(line))
        except json.JSONDecodeError:  # the line that was being written when the run was killed
            break
    return blocks
