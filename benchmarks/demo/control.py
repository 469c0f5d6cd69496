"""`python -m benchmarks.demo.control`: how much of the demo's gain is repair, and how much the model getting used to the text?

The same training on the undamaged model (`--damage none`) shows what prompts bring without any damage. Repair is what the
compressed model gains beyond that, paired by chunk.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from idp_peft.evaluation import ChunkScores

RESULTS = Path(__file__).parent / "results"
CONTROL = RESULTS / "experiments" / "2026-11-23-demo-dense-control.json"


def gain(record: dict) -> ChunkScores:
    """Nats of each chunk that the adapter took away, as scores: `[chunks]`."""
    nats = {row: torch.tensor(record["chunks"][row]["nats"]) for row in ("compressed", "IDP (free choice)")}
    scored = record["tokens_per_chunk"]["chunk"] - record["tokens_per_chunk"]["context"]
    tokens = torch.full((len(nats["compressed"]),), scored)
    return ChunkScores((nats["compressed"] - nats["IDP (free choice)"]).double(), tokens)


def main() -> None:
    demo, control = json.loads((RESULTS / "demo.json").read_text()), json.loads(CONTROL.read_text())
    damage = demo["summary"]["compressed"]["nats_above_dense"]
    beyond, error = gain(demo).difference(gain(control))
    result = {
        "gain_of_the_compressed_model": gain(demo).mean_nats,
        "gain_of_the_dense_model": gain(control).mean_nats,
        "beyond_the_dense_model": beyond,
        "standard_error": error,
        "share_of_the_damage": beyond / damage,
        "share_standard_error": error / damage,
    }
    (RESULTS / "control.json").write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"gain in nats per token: compressed {result['gain_of_the_compressed_model']:.4f}, dense "
        f"{result['gain_of_the_dense_model']:.4f}; beyond the dense model's {beyond:.4f} (SE {error:.4f}), "
        f"{beyond / damage:.1%} of the damage (SE {error / damage:.1%})"
    )


if __name__ == "__main__":
    main()
