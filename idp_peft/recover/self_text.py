"""Training text without a corpus: sampled from the dense model itself (data-free, as in LLM-QAT, arXiv 2305.17888)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tqdm.auto import tqdm

_BATCH = 8


def sample_blocks(
    teacher, tokenizer, tokens: set[int], count: int, length: int, seed: int, file: Path
) -> list[list[int]]:
    """`count` blocks of token ids, each begun by a random ordinary token and continued by sampling.

    Written to `file` as they come, one JSON list a line, so that an interrupted call goes on where it was.

    Args:
        teacher (`PreTrainedModel`): the dense model.
        tokenizer: its tokenizer.
        tokens (`set[int]`): the ids that may come out; rows that pad a vocabulary are no tokens.
        count (`int`): how many blocks, at least 1.
        length (`int`): at most so many tokens each; a text that the model ends sooner is shorter.
        seed (`int`): decides every token.
        file (`Path`): JSON lines.
    """
    blocks = _read(file)[:count] if file.exists() else []
    blocks = blocks[: len(blocks) // _BATCH * _BATCH]  # whole batches: a batch is drawn at once
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(block) + "\n" for block in blocks))
    ordinary = torch.tensor(sorted(tokens - set(tokenizer.all_special_ids)))
    never = sorted(set(range(teacher.config.get_text_config().vocab_size)) - tokens)
    with tqdm(total=count, initial=len(blocks), desc="sampling text from the teacher") as progress:
        while len(blocks) < count:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + len(blocks))
            size = min(_BATCH, count - len(blocks))
            first = ordinary[torch.randint(len(ordinary), (size, 1), generator=generator)]
            draw = int(torch.randint(2**31, (), generator=generator))
            new = _continue(teacher, tokenizer, first, never, length, draw)
            with file.open("a") as out:
                out.writelines(json.dumps(block) + "\n" for block in new)
            blocks += new
            progress.update(size)
    return blocks


@torch.no_grad()
def _continue(teacher, tokenizer, first: torch.Tensor, never: list[int], length: int, seed: int) -> list[list[int]]:
    end = tokenizer.eos_token_id
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first = first.to(teacher.device)
        rows = teacher.generate(
            input_ids=first,
            attention_mask=torch.ones_like(first),
            max_length=length,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            suppress_tokens=never or None,
            pad_token_id=end if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        ).tolist()
    return [row[: row.index(end, 1)] if end in row[1:] else row for row in rows]


def _read(file: Path) -> list[list[int]]:
    blocks = []
    for line in file.read_text().splitlines():
        try:
            blocks.append(json.loads(line))
        except json.JSONDecodeError:  # the line that was being written when the run was killed
            break
    return blocks
