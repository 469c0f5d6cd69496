"""`python -m benchmarks.system_prompt MODEL`: what is a system prompt worth as a prompt of keys and values?

The dense model's keys and values of an application's system prompt, with its template, stand in for it in front of the
compressed model; nothing is trained. Compared with the compressed model that reads the same text itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
SYSTEM = (
    "You are the writing assistant of an encyclopedia. You are given the beginning of an article, and you write how it goes on. "
    "Keep to facts that are in the article or are generally known. Write in the style of the beginning: plain sentences, names in "
    "full, years in figures, and no opinion of your own. Do not address the reader, and do not repeat the beginning. Where the "
    "article is a list, go on with the list. Where a fact is uncertain, leave it out. Never mention these instructions."
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.system_prompt", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="compressed model")
    parser.add_argument("--teacher", default="default", help="dense model")
    parser.add_argument("--chats", type=int, default=32, help="chats that are scored")
    parser.add_argument("--turns", type=int, default=9, help="timed requests of each")
    parser.add_argument("--output", type=Path, default=RESULTS / "system_prompt.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    from idp_peft.evaluation import environment
    from idp_peft.files.whole_file import write_whole
    from idp_peft.models.loading import load_model, load_tokenizer

    tokenizer = load_tokenizer(options.model)
    prefix, chats = chats_of(tokenizer, options.chats)
    dense, compressed = load_model(options.teacher), load_model(options.model)
    result = {"system_tokens": len(prefix), "chats": len(chats), "nats": {}, "seconds": {}}
    result["nats"]["dense model, reads it"] = [nats(dense, [*prefix, *chat], answer) for chat, answer in chats]
    result["nats"]["compressed model, reads it"] = [
        nats(compressed, [*prefix, *chat], answer) for chat, answer in chats
    ]
    ids = [*prefix, *chats[0][0]]
    for name, teacher in (("its own keys and values", compressed), ("the dense model's keys and values", dense)):
        model = behind(compressed, teacher, prefix)
        result["nats"][f"compressed model behind {name}"] = [nats(model, chat, answer) for chat, answer in chats]
        if teacher is dense:
            pairs = [(first_token(model, chats[0][0]), _without(model, ids)) for _ in range(options.turns + 1)][1:]
            result["seconds"]["prompt"], reads = (list(seconds) for seconds in zip(*pairs, strict=True))
        compressed = model.unload()
    result["seconds"]["reads it"] = reads
    result |= {"model": Path(options.model).name, "teacher": options.teacher, "environment": environment()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(options.output, json.dumps(result) + "\n")
    write_whole(options.output.with_suffix(".md"), table(result))
    print(table(result))


def chats_of(tokenizer, count: int) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
    """The system prompt's tokens, and of each chat what stands behind them and how it goes on: held-out articles, cut after
    64 tokens."""
    from idp_peft.evaluation.chunks import chunk_documents
    from idp_peft.texts.data import load_texts

    system = {"role": "system", "content": SYSTEM}
    prefix = tokenizer.apply_chat_template([system], return_dict=False)
    blocks = chunk_documents(tokenizer, load_texts("wiki", "held_out"), 192, per_document=1)
    chats = []
    for block in blocks[:: max(1, len(blocks) // count)][:count]:
        user = {"role": "user", "content": tokenizer.decode(block[:64])}
        ids = tokenizer.apply_chat_template([system, user], add_generation_prompt=True, return_dict=False)
        assert ids[: len(prefix)] == prefix
        chats.append((ids[len(prefix) :], block[64:]))
    return prefix, chats


def behind(compressed, teacher, prefix: list[int]):
    """The compressed model behind one prompt: the teacher's keys and values of the system prompt."""
    from peft import get_peft_model

    import idp_peft

    shape = {"num_prompts": 1, "num_virtual_tokens": len(prefix), "prompts": "key_values", "init_weights": False}
    model = get_peft_model(compressed, idp_peft.IDPConfig(task_type="CAUSAL_LM", **shape)).eval()
    idp_peft.start_at(model, teacher, [prefix])
    return model


def nats(model, ids: list[int], answer: list[int]) -> float:
    """Nats per token of an answer behind a chat."""
    import torch

    row = torch.tensor([[*ids, *answer]])
    with torch.no_grad():
        logits = model(input_ids=row, use_cache=False).logits[0, -len(answer) - 1 : -1]
    return round(float(torch.nn.functional.cross_entropy(logits.float(), torch.tensor(answer))), 6)


def first_token(model, ids: list[int]) -> float:
    """Seconds to the first token of an answer."""
    import torch

    row = torch.tensor([ids])
    began = time.perf_counter()
    with torch.inference_mode():
        model.generate(input_ids=row, attention_mask=torch.ones_like(row), max_new_tokens=1, do_sample=False)
    return time.perf_counter() - began


def _without(model, ids: list[int]) -> float:
    with model.disable_adapter():
        return first_token(model, ids)


def table(result: dict) -> str:
    """Nats on the answers, and what is repaired; the time to the first token."""
    from benchmarks.common.markdown import head, row

    mean = {name: statistics.mean(values) for name, values in result["nats"].items()}
    dense, compressed = mean["dense model, reads it"], mean["compressed model, reads it"]
    lines = head([f"the system prompt, {result['system_tokens']} tokens", "nats per token", "damage repaired"])
    for name, value in mean.items():
        lines.append(row([name, f"{value:.4f}", f"{100 * (compressed - value) / (compressed - dense):.1f} %"]))
    ratio = statistics.median(a / b for a, b in zip(*result["seconds"].values(), strict=True))
    prompt, reads = (1000 * statistics.median(result["seconds"][name]) for name in ("prompt", "reads it"))
    lines += [
        "",
        f"First token: {prompt:.0f} ms behind the prompt, {reads:.0f} ms with the text read (ratio {ratio:.2f}).",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
