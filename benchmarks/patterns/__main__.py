"""`python -m benchmarks.patterns`: what adapters do to the activations and the attention of a compressed model.

The dense model, the compressed one and every adapter on it read the same held-out blocks of text. Twice: with all tokens, and
without each block's first, on which models park attention.

Any text in front of another changes what a model does with it, repair or not. So an IDP adapter can be given controls
(`--control`): its prompts as they were before training, and the trained ones on the dense model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.common.markdown import row

RESULTS = Path(__file__).parent / "results"
COMPRESSED = "compressed"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.patterns", description=__doc__)
    parser.add_argument("--model", required=True, help="the compressed model: folder or hub id")
    parser.add_argument("--dense", default="default", help="what it was compressed from: folder, hub id or 'default'")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=PATH",
        type=_named,
        help="one of the adapters; repeat it",
    )
    parser.add_argument(
        "--control", action="append", default=[], metavar="NAME", help="an IDP adapter that gets controls; repeat it"
    )
    parser.add_argument("--dataset", default="wiki", help="'wiki', 'c4', a file or a hub dataset")
    parser.add_argument("--split", default="held_out")
    parser.add_argument("--blocks", type=int, default=20, help="so many, one per document")
    parser.add_argument("--tokens", type=int, default=256, help="of a block")
    parser.add_argument("--context", type=int, default=64, help="first tokens, by which prompts are chosen; not scored")
    parser.add_argument("--label", help="name of the base in the result (default: the folder's)")
    parser.add_argument("--output", type=Path, help="default: results/<label>.json beside this file")
    options = parser.parse_args(arguments)
    options.label = options.label or Path(options.model).name
    options.output = options.output or RESULTS / f"{options.label}.json"
    names = [name for name, _ in options.adapter]
    if len({COMPRESSED, "reference", *names}) < 2 + len(names):
        parser.error(f"--adapter names must differ, and not be {COMPRESSED!r} or 'reference', got {names}")
    if unknown := [name for name in options.control if name not in names]:
        parser.error(f"--control must be the name of an --adapter ({', '.join(names)}), got {', '.join(unknown)}")
    return options


def _named(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"must be NAME=PATH, got {text!r}")
    return name, path


def load(options: argparse.Namespace) -> dict:
    """`reference`, `compressed`, the adapters and their controls; those on one base share its weights."""
    from peft import PeftModel

    from benchmarks.common.contestants import sharing_weights
    from idp_peft.models.loading import load_model

    dense, base = load_model(options.dense), load_model(options.model)
    models = {"reference": sharing_weights(dense), COMPRESSED: sharing_weights(base)}
    for name, path in options.adapter:
        models[name] = PeftModel.from_pretrained(sharing_weights(base), path).eval()
    for name in options.control:
        path = dict(options.adapter)[name]
        models[untrained(name)] = as_it_started(sharing_weights(base), path, options.model)
        models[on_dense(name)] = PeftModel.from_pretrained(sharing_weights(dense), path).eval()
    return models


def untrained(name: str) -> str:
    return f"{name}, untrained"


def on_dense(name: str) -> str:
    return f"{name} on dense"


def as_it_started(base, path: str, tokenizer: str):
    """An IDP adapter with its prompts as they were before training."""
    from peft import PeftConfig, get_peft_model

    config = PeftConfig.from_pretrained(path)
    if config.peft_type != "IDP" or config.init != "text":
        raise SystemExit(f"--control needs an IDP adapter that started from texts, {path} is none")
    config.inference_mode, config.tokenizer_name_or_path = False, tokenizer
    return get_peft_model(base, config).eval()


def blocks_of(options: argparse.Namespace) -> list[dict]:
    """Whole blocks, at most one per document, evenly spread over the documents; labels begin behind the context."""
    from idp_peft.models.loading import load_tokenizer
    from idp_peft.texts.data import load_texts, token_blocks

    texts = load_texts(options.dataset, options.split)
    length = options.tokens
    blocks = token_blocks(load_tokenizer(options.dense), texts, length, min_tokens=length, per_document=1)
    if len(blocks) < options.blocks:
        raise SystemExit(f"--blocks {options.blocks}: only {len(blocks)} documents have {options.tokens} tokens")
    chosen = [blocks[len(blocks) * number // options.blocks] for number in range(options.blocks)]
    return [{"input_ids": ids, "labels": [-100] * options.context + ids[options.context :]} for ids in chosen]


def nats(model, blocks: list[dict]) -> list[float]:
    """Loss in nats per token of each block behind its context, which alone chooses the prompt."""
    import torch

    from idp_peft.evaluation.prompted import idp_layer, input_logits

    losses = []
    for block in blocks:
        ids, labels = (torch.tensor([block[name]], device=model.device) for name in ("input_ids", "labels"))
        choice = {} if idp_layer(model) is None else {"selection_mask": labels == -100}
        with torch.no_grad():
            logits = input_logits(model, ids, torch.ones_like(ids), **choice)[0, :-1]
        losses.append(float(torch.nn.functional.cross_entropy(logits.float(), labels[0, 1:])))
    return losses


def described(model, path: str) -> dict:
    """What an adapter is: its method, size and settings, and the end of the path that it came from."""
    from idp_peft.evaluation.description import adapter_parameters

    config = model.active_peft_config
    fields = ("r", "lora_alpha", "num_prompts", "num_virtual_tokens", "selection", "selection_layer", "assignment")
    found = {name: value for name in fields if (value := getattr(config, name, None)) is not None}
    place = [part for part in Path(path).absolute().parts if part != "adapter"][-2:]
    return {"method": config.peft_type.value, "parameters": adapter_parameters(model), "from": "/".join(place), **found}


def measure(options: argparse.Namespace) -> dict:
    from idp_peft.analysis import compare_patterns
    from idp_peft.evaluation import environment

    blocks, models = blocks_of(options), load(options)
    kept = ("label", "dataset", "split", "blocks", "tokens", "context")
    result = {
        "settings": {name: getattr(options, name) for name in kept},
        "environment": environment(),
        "adapters": {name: described(models[name], path) for name, path in options.adapter},
        "nats": {name: nats(model, blocks) for name, model in models.items()},
    }
    reference = models.pop("reference")
    in_short = {"parts": ("hidden", "attention")}  # where the first token matters
    for name, settings in (("all_tokens", in_short), ("without_first", {"skip": 1})):
        result[name] = compare_patterns(reference, models, blocks, start=COMPRESSED, **settings).to_dict()
    result["behind_prompts"] = {
        name: compare_patterns(models[on_dense(name)], {name: models[name]}, blocks).to_dict()
        for name in options.control
    }
    return result


def markdown(result: dict) -> str:
    """The tables of a result file."""
    from idp_peft.analysis import PatternComparison

    settings, environment = result["settings"], result["environment"]
    means = {name: sum(losses) / len(losses) for name, losses in result["nats"].items()}
    gap = means[COMPRESSED] - means["reference"]
    lines = [
        f"{settings['label']}: {settings['blocks']} blocks of {settings['tokens']} tokens, {settings['dataset']} "
        f"({settings['split']}). torch {environment['torch']}, transformers {environment['transformers']}, commit "
        f"{environment['commit']}.",
        "",
        "| | method | parameters | from | nats per token | recovery |",
        "|---|---|---:|---|---:|---:|",
    ]
    for name, loss in means.items():
        about = result["adapters"].get(name, {})
        recovery = "" if name in ("reference", COMPRESSED) else f"{100 * (means[COMPRESSED] - loss) / gap:.1f} %"
        cells = [name, about.get("method", ""), about.get("parameters", ""), about.get("from", "")]
        lines.append(row([*map(str, cells), f"{loss:.4f}", recovery]))
    for title, key in (("All tokens", "all_tokens"), ("Without the first token of each block", "without_first")):
        lines += ["", f"## {title}", "", PatternComparison.from_dict(result[key]).to_markdown().rstrip()]
    for name, content in result["behind_prompts"].items():
        own, other = (result["all_tokens"]["prompt_ids"][one] for one in (name, on_dense(name)))
        alike = sum(one == another for one, another in zip(own, other, strict=True))
        lines += ["", f"## {name} beside the dense model with the same bank", ""]
        lines += [f"Each chooses for itself: the same prompt for {alike} of {len(own)} blocks.", ""]
        lines.append(PatternComparison.from_dict(content).to_markdown().rstrip())
    return "\n".join(lines) + "\n"


def write(result: dict, output: Path) -> None:
    """The result as JSON, its tables, and a figure for each of the two comparisons."""
    from idp_peft.analysis import PatternComparison
    from idp_peft.files.whole_file import write_whole

    write_whole(output, json.dumps(result, allow_nan=False) + "\n")
    output.with_suffix(".md").write_text(markdown(result), encoding="utf-8")
    for key in ("all_tokens", "without_first"):
        figure = PatternComparison.from_dict(result[key]).plot()
        figure.savefig(output.with_name(f"{output.stem}-{key.replace('_', '-')}.png"), dpi=100)


def main() -> None:
    import transformers

    options = parse()
    transformers.utils.logging.set_verbosity_error()
    write(measure(options), options.output)


if __name__ == "__main__":
    main()
