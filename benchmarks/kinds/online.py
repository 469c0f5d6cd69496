"""`python -m benchmarks.kinds.online`: do centroids find the kinds of real texts, named, clustered, or while training?

Only contexts are read, 64 tokens each, through the embedding table of the real model: nothing is trained. Batches are drawn
as a trainer draws them, and the package's own `Clusters` learns from them. What was tried instead is here too.

*Purity*: each kind goes to the prompt that most of its held-out contexts take (several kinds may share one); of every prompt
only its most frequent kind counts. Kinds weigh the same.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
MIXTURES = {"four kinds": ("articles", "programs", "stories", "languages"), "six kinds": None}
SHAPES = ((4, 60), (8, 100), (32, 100))  # batch, steps


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kinds.online", description=__doc__)
    parser.add_argument("--model", default="default", help="whose embedding table and tokenizer are used")
    parser.add_argument("--repetitions", type=int, default=12, help="orders of the data")
    parser.add_argument("--output", type=Path, default=RESULTS / "online.json")
    options = parser.parse_args()
    from benchmarks.common.markdown import head, row
    from idp_peft.evaluation import environment
    from idp_peft.files.whole_file import write_whole

    found = measure(options.model, options.repetitions)
    write_whole(options.output, json.dumps({"environment": environment(), "purity": found}, indent=1) + "\n")
    lines = head(["mixture and prompts", "centroids", "batch", "steps", "purity", "least of all orders"], numbers=False)
    for entry in found:
        numbers = [
            str(entry["batch"] or ""),
            str(entry["steps"] or ""),
            f"{entry['mean']:.3f}",
            f"{entry['least']:.3f}",
        ]
        lines.append(row([f"{entry['mixture']}, M = {entry['num_prompts']}", entry["centroids"], *numbers]))
    write_whole(options.output.with_suffix(".md"), "\n".join([*lines, ""]))
    print("\n".join(lines))


def measure(model: str, repetitions: int) -> list[dict]:
    """Purity of every way, for every mixture, number of prompts and shape of batches."""
    import torch

    from idp_peft.offline.assets import KINDS
    from idp_peft.recover.centroids import cluster

    means = context_means_of_kinds(model)
    found = []
    for mixture, kinds in MIXTURES.items():
        kinds = list(kinds or KINDS)
        train, held = ({kind: means[kind][part] for kind in kinds} for part in (0, 1))
        rows = torch.cat([train[kind][:150] for kind in kinds])
        names = torch.cat([torch.full((len(train[kind][:150]),), i) for i, kind in enumerate(kinds)])
        for num_prompts in sorted({4, len(kinds)}):
            here = {"mixture": mixture, "num_prompts": num_prompts, "batch": None, "steps": None}
            ways = {"clustered beforehand": cluster(rows, num_prompts)}
            if num_prompts == len(kinds):
                ways["named"] = names
            for way, prompt_ids in ways.items():
                clusters = new_clusters(num_prompts, rows.shape[1])
                clusters.set(prompt_ids, rows)
                value = purity(clusters, held)
                found.append({**here, "centroids": way, "mean": value, "least": value})
            for batch, steps in SHAPES:
                for way, learn in WAYS.items():
                    values = [
                        purity(learn(train, num_prompts, batch, steps, random.Random(seed)), held)
                        for seed in range(repetitions)
                    ]
                    summary = {"mean": sum(values) / len(values), "least": min(values)}
                    found.append({**here, "batch": batch, "steps": steps, "centroids": way, **summary})
    return found


def context_means_of_kinds(model: str, block: int = 256, context: int = 64) -> dict:
    """m(x) of the contexts of each kind's training and held-out blocks: kind to two float32 tensors `[blocks, d]`."""
    from idp_peft.models.loading import load_model, load_tokenizer
    from idp_peft.offline.assets import KINDS
    from idp_peft.recover.centroids import context_means
    from idp_peft.texts.data import load_texts, token_blocks
    from idp_peft.texts.examples import read_examples

    tokenizer, embeddings = load_tokenizer(model), load_model(model).get_input_embeddings()
    found = {}
    for kind in KINDS:
        parts = []
        for split in ("train", "held_out"):
            rows = token_blocks(tokenizer, load_texts(kind, split), block, min_tokens=context)
            parts.append(context_means(embeddings, read_examples([{"input_ids": row[:context]} for row in rows])))
        found[kind] = parts
    return found


def new_clusters(num_prompts: int, width: int):
    from idp_peft.centroids import Clusters
    from idp_peft.prompt_bank import PromptBank

    return Clusters(PromptBank([1] * num_prompts, 1, context_width=width))


def purity(clusters, held: dict) -> float:
    """As the module says."""
    import torch

    shares = []
    for means in held.values():
        chosen = clusters.scores(means).argmax(-1)
        shares.append(chosen.bincount(minlength=len(clusters.contexts)) / len(chosen))
    return float(torch.stack(shares).max(0).values.sum() / len(shares))


def draw(train: dict, batch: int, rng: random.Random):
    import torch

    kinds = [rng.choice(list(train)) for _ in range(batch)]
    return torch.stack([train[kind][rng.randrange(len(train[kind]))] for kind in kinds])


def learn_as_built(train: dict, num_prompts: int, batch: int, steps: int, rng: random.Random, starved: float = 0.0):
    """What a `Trainer` run makes of the centroids."""
    import torch

    clusters = new_clusters(num_prompts, next(iter(train.values())).shape[1])
    free = torch.ones(batch, dtype=torch.bool)
    for _ in range(steps):
        means = draw(train, batch, rng)
        known = clusters.known
        chosen = clusters.scores(means).argmax(-1) if known else torch.full((batch,), -2)
        clusters.note(chosen, free, means, torch.zeros(1))
        clusters.settle()
        if starved and known:
            few = clusters.contexts < starved * clusters.contexts.sum() / num_prompts
            if few.any():  # one of them a step takes the context that fits worst
                prompt = int(few.nonzero()[0])
                worst = clusters.scores(means).max(-1).values.argmin()
                clusters.centroids[prompt] = means[worst]
                clusters.contexts[prompt] = 1
    return clusters


def learn_with_reuse(*arguments):
    """Tried instead: a centroid with less than a quarter of its share of the contexts is used again."""
    return learn_as_built(*arguments, starved=0.25)


def learn_after_waiting(train: dict, num_prompts: int, batch: int, steps: int, rng: random.Random):
    """Tried instead: wait for eight steps' contexts before the centroids start."""
    import torch

    clusters = new_clusters(num_prompts, next(iter(train.values())).shape[1])
    waited = torch.cat([draw(train, batch, rng) for _ in range(8)])
    clusters.note(torch.full((len(waited),), -2), torch.ones(len(waited), dtype=torch.bool), waited, torch.zeros(1))
    clusters.settle()
    for _ in range(steps - 8):
        means = draw(train, batch, rng)
        clusters.note(clusters.scores(means).argmax(-1), torch.ones(batch, dtype=torch.bool), means, torch.zeros(1))
        clusters.settle()
    return clusters


WAYS = {
    "learned while training": learn_as_built,
    "the same, starved ones used again": learn_with_reuse,
    "the same, started after eight steps": learn_after_waiting,
}


if __name__ == "__main__":
    main()
