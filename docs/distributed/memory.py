"""What each GPU holds while prompts train on a sharded 4-bit base: the arithmetic behind the table in ../distributed.md.

python docs/distributed/memory.py            # the table
"""

from __future__ import annotations

from dataclasses import dataclass

GB = 1e9


@dataclass(frozen=True)
class Setup:
    """A Llama of 70B by default: sizes from its config.json."""

    layers: int = 80
    width: int = 8192
    heads: int = 64
    kv_heads: int = 8
    head_dim: int = 128
    intermediate: int = 28672
    vocabulary: int = 128256
    prompts: int = 8
    prompt_tokens: int = 32
    rows: int = 1
    tokens: int = 1024

    @property
    def layer_weights(self) -> int:
        """Of one layer's matrices: queries and output, keys and values, and the three of the MLP."""
        attention = 2 * self.width * self.heads * self.head_dim + 2 * self.width * self.kv_heads * self.head_dim
        return attention + 3 * self.width * self.intermediate

    @property
    def other_weights(self) -> int:
        """What stays in 16 bits: both embeddings, and the norms."""
        return 2 * self.vocabulary * self.width + (2 * self.layers + 1) * self.width

    @property
    def prompt_parameters(self) -> int:
        return self.prompts * self.prompt_tokens * self.width


def table(setup: Setup, gpus: int) -> dict[str, float]:
    """GB on each of `gpus` GPUs, by what it is."""
    packed = setup.layers * setup.layer_weights
    slots = setup.rows * (setup.tokens + setup.prompt_tokens)
    return {
        "packed weights, half a byte each, spread": packed / 2 / gpus / GB,
        # A byte for every 64 weights, and 4 bytes for every 256 of those; bitsandbytes keeps them beside the weights,
        # where sharding does not see them.
        "scales of the packed weights, whole on each": packed * (1 / 64 + 4 / (64 * 256)) / GB,
        "embeddings and norms in bfloat16, spread": 2 * setup.other_weights / gpus / GB,
        "two gathered layers": 2 * setup.layer_weights / 2 / GB,
        "one gathered embedding": 2 * setup.vocabulary * setup.width / GB,
        "largest matrix, unpacked to bfloat16": 2 * setup.width * setup.intermediate / GB,
        "layers' inputs, kept by checkpointing": 2 * setup.layers * slots * setup.width / GB,
        "MLP of the layer that is computed again": 3 * 2 * slots * setup.intermediate / GB,
        "logits in float32, and their gradient": 2 * 4 * setup.rows * setup.tokens * setup.vocabulary / GB,
        "prompts, gradient, two moments of Adam, float32, spread": 16 * setup.prompt_parameters / gpus / GB,
        "prompt cache in bfloat16 (evaluation only)": prompt_cache_bytes(setup) / GB,
    }


def prompt_cache_bytes(setup: Setup, element: int = 2) -> int:
    """2 x layers x M x K x kv_heads x head_dim x bytes."""
    tokens = setup.prompts * setup.prompt_tokens
    return 2 * setup.layers * tokens * setup.kv_heads * setup.head_dim * element


def markdown(setup: Setup, gpus: tuple[int, ...] = (2, 4, 8)) -> str:
    columns = [table(setup, count) for count in gpus]
    rows = [f"| GB on each of | {' | '.join(f'{count} GPUs' for count in gpus)} |", "|---" * (len(gpus) + 1) + "|"]
    rows += [f"| {name} | {' | '.join(f'{column[name]:.2f}' for column in columns)} |" for name in columns[0]]
    rows.append(f"| **sum** | {' | '.join(f'**{sum(column.values()):.1f}**' for column in columns)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    import sys

    sys.stdout.write(markdown(Setup()) + "\n")
