"""`python -m benchmarks.kinds MODEL`: does each kind of text get its own prompt, and what is that worth?

One prompt is trained for each kind, alone, and the prompts are composed into one bank: `recover` and `compose`, as a user
would call them. Every prompt is then forced on every held-out block of every kind, so that what any choice is worth can be
looked up. What was trained stays in the run's folder; a run goes on where it was.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
SINGLE, LORA = "one prompt of the bank's length", "LoRA of the bank's size"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kinds", description=__doc__)
    parser.add_argument("model", help="compressed model")
    parser.add_argument("--teacher", default="default", help="dense model")
    parser.add_argument("--kinds", nargs="+", default=["articles", "programs", "stories", "languages"])
    parser.add_argument("--prompts", default="tokens", choices=["tokens", "key_values"])
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=60, help="training steps per kind, of 4 blocks of 256 tokens")
    parser.add_argument("--blocks", type=int, default=40, help="held-out blocks per kind")
    parser.add_argument("--context-tokens", type=int, default=64, help="tokens that the choice reads, not scored")
    parser.add_argument(
        "--controls",
        nargs="*",
        default=[],
        choices=["one", "lora"],
        help="also train one prompt of the bank's length, or a LoRA of its size, on all kinds, as many steps in all",
    )
    parser.add_argument("--unseen", nargs="*", default=[], help="kinds that no prompt was trained on, measured as well")
    parser.add_argument("--runs", type=Path, default=Path("runs/kinds"), help="folder of what is trained")
    parser.add_argument("--output", type=Path, default=RESULTS / "kinds.json")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    from idp_peft.files.whole_file import write_whole

    made = train(options)
    result = measure(options, made)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(options.output, json.dumps(result) + "\n")
    from benchmarks.kinds.tables import tables

    text = tables(result)
    write_whole(options.output.with_suffix(".md"), text)
    print(text)


def train(options: argparse.Namespace) -> dict[str, Path]:
    """The adapters that are compared: name to folder."""
    from benchmarks.common.processor import has_bfloat16_units
    from idp_peft.composition import compose
    from idp_peft.recover import recover

    # Without scales: prompts that are trained apart share none, and could not be composed.
    settings = {
        "teacher": options.teacher,
        "context_tokens": options.context_tokens,
        "scales": False,
        "bf16": has_bfloat16_units(),
        "prompts": options.prompts,
    }
    one = {"num_prompts": 1, "num_virtual_tokens": options.tokens, "selection": "centroid"}
    alone = [
        str(recover(options.model, options.runs / kind, dataset=kind, max_steps=options.steps, **one, **settings))
        for kind in options.kinds
    ]
    bank = options.runs / f"bank of {len(options.kinds)}"
    compose(alone, bank, names=options.kinds, base_model=_base(options.model))
    made = {"bank": bank}
    size = {"num_prompts": len(options.kinds), "num_virtual_tokens": options.tokens}
    total = {"num_prompts": 1, "num_virtual_tokens": options.tokens * len(options.kinds)}
    controls = {"one": (SINGLE, total), "lora": (LORA, {"method": "lora", "match_budget": True, **size})}
    for control in options.controls:
        name, own = controls[control]
        settings |= {"dataset": str(_mixture(options)), "max_steps": options.steps * len(options.kinds)}
        made[name] = recover(options.model, options.runs / f"{control} for {len(options.kinds)}", **own, **settings)
    return made


def _base(model: str):
    from idp_peft.models.loading import place_of

    return str(place_of(model))


def _mixture(options: argparse.Namespace) -> Path:
    """A file with the training texts of all kinds, as many characters of each."""
    from idp_peft.texts.data import load_texts

    path = options.runs / f"mixture of {len(options.kinds)}.jsonl"
    if not path.is_file():
        texts = {kind: load_texts(kind, "train") for kind in options.kinds}
        most = min(sum(map(len, of_kind)) for of_kind in texts.values())
        with path.open("w", encoding="utf-8") as file:
            for of_kind in texts.values():
                written = 0
                for text in of_kind:
                    if written >= most:
                        break
                    file.write(json.dumps({"text": text}) + "\n")
                    written += len(text)
    return path


def measure(options: argparse.Namespace, made: dict[str, Path]) -> dict:
    """Nats per token of every held-out block: of the dense and the compressed model, under every prompt of the bank, and of
    the controls; and what each choice takes."""
    import torch
    from peft import PeftModel

    from benchmarks.choice.losses import nats_of_every_prompt
    from idp_peft.evaluation import environment
    from idp_peft.evaluation.chunks import chunk_documents, score_chunks
    from idp_peft.evaluation.prompted import select_prompts
    from idp_peft.models.loading import load_model, load_tokenizer
    from idp_peft.texts.data import load_texts

    tokenizer, length, context = load_tokenizer(options.model), 256, options.context_tokens
    blocks = {}
    for kind in [*options.kinds, *options.unseen]:
        found = chunk_documents(tokenizer, load_texts(kind, "held_out"), length)
        every = max(1, len(found) // options.blocks)  # from all over the held-out part
        blocks[kind] = found[::every][: options.blocks]
    rows = [block for of_kind in blocks.values() for block in of_kind]
    kinds = [kind for kind, of_kind in blocks.items() for _ in of_kind]
    scored = length - context

    def nats(model) -> list[float]:
        return (score_chunks(model, rows, context, batch_size=4).nats / scored).tolist()

    result = {
        "kinds": options.kinds,
        "unseen": options.unseen,
        "block_kinds": kinds,
        "settings": {
            name: getattr(options, name)
            for name in ("teacher", "prompts", "tokens", "steps", "blocks", "context_tokens")
        },
        "model": Path(options.model).name,
        "environment": environment(),
        "nats": {"dense": nats(load_model(options.teacher))},
        "choices": {},
    }
    gc.collect()
    base = load_model(options.model)
    result["nats"]["compressed"] = nats(base)
    contexts = [row[:context] for row in rows]
    for name, folder in made.items():
        model = PeftModel.from_pretrained(base, folder).eval()
        if name == "bank":
            after, _ = nats_of_every_prompt(model, torch.tensor(rows), context, len(options.kinds))
            result["by_prompt"] = (after / scored).tolist()
            config = model.base_model.layer.active_config
            for selection in ("centroid", "attention"):
                config.selection = selection
                result["choices"][selection] = select_prompts(model, contexts, 8)
        else:
            result["nats"][name] = nats(model)
        base = model.unload()
    return result


if __name__ == "__main__":
    main()
