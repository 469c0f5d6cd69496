"""`python -m benchmarks.repair.truncation MODEL`: what does a teacher lose of which only the likeliest tokens are kept?

The distillation loss and its gradient at the last hidden states (all that reaches an adapter), with all tokens of the dense
model's prediction, and with its k likeliest and "another token".
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
KEPT = (4, 16, 64, 256, 1024)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.repair.truncation", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="compressed model")
    parser.add_argument("--teacher", default="default", help="dense model")
    parser.add_argument("--blocks", type=int, default=16, help="training blocks of 256 tokens")
    parser.add_argument("--output", type=Path, default=RESULTS / "truncation.json")
    options = parser.parse_args(arguments)
    from benchmarks.common.markdown import head, row
    from idp_peft.evaluation import environment
    from idp_peft.files.whole_file import write_whole

    found = measure(options.model, options.teacher, options.blocks)
    settings = {"model": Path(options.model).name, "teacher": options.teacher, "blocks": options.blocks}
    result = {"settings": settings, "environment": environment(), "kept": found}
    write_whole(options.output, json.dumps(result, indent=1) + "\n")
    lines = head(
        ["tokens kept", "bytes a token of text", "probability kept", "loss of the full one", "cosine of gradients"]
    )
    for entry in found:
        values = [f"{entry['probability']:.4f}", f"{entry['loss']:.4f}", f"{entry['cosine']:.4f}"]
        lines.append(row([str(entry["top_k"]), str(8 * entry["top_k"]), *values]))
    write_whole(options.output.with_suffix(".md"), "\n".join([*lines, ""]))
    print("\n".join(lines))


def measure(model_name: str, teacher_name: str, count: int) -> list[dict]:
    """For each number of tokens kept: the teacher's probability on them, the loss as a share of the full one, and the cosine
    between both losses' gradients, means over tokens."""
    import torch

    from idp_peft.models.loading import load_model, load_tokenizer
    from idp_peft.recover.distillation import forward_kl
    from idp_peft.recover.stored_teacher import truncated_kl
    from idp_peft.texts.data import blocks, load_texts

    cut = [
        block.ids
        for block in blocks(load_tokenizer(model_name), load_texts("wiki", "train"), 256)
        if len(block.ids) == 256
    ]
    rows = torch.tensor(cut[:: max(1, len(cut) // count)][:count])
    student, teacher = load_model(model_name), load_model(teacher_name)
    sums: dict[int, torch.Tensor] = {top_k: torch.zeros(3, dtype=torch.double) for top_k in KEPT}
    full = tokens = 0
    for block in rows[:, None]:
        with torch.no_grad():
            hidden = student.get_decoder()(input_ids=block).last_hidden_state[0]  # [n, d]
            target = teacher(input_ids=block).logits[0].float().log_softmax(-1)  # [n, V]
        loss, gradient = _with_gradient(
            student.lm_head, hidden, lambda logits, target=target: forward_kl(logits, target)
        )
        full, tokens = full + loss, tokens + len(hidden)
        best = target.topk(max(KEPT), dim=-1)
        for top_k in KEPT:
            ids, kept = best.indices[:, :top_k], best.values[:, :top_k]
            part, its = _with_gradient(
                student.lm_head, hidden, lambda logits, ids=ids, kept=kept: truncated_kl(logits, ids, kept)
            )
            cosine = torch.cosine_similarity(its, gradient, dim=-1).sum()
            sums[top_k] += torch.tensor([kept.exp().sum(), part, cosine], dtype=torch.double)
    return [
        {"top_k": top_k, "probability": kept / tokens, "loss": loss / full, "cosine": cosine / tokens}
        for top_k, (kept, loss, cosine) in ((top_k, found.tolist()) for top_k, found in sums.items())
    ]


def _with_gradient(head, hidden, loss_of) -> tuple:
    """A loss of the logits, and its gradient at the hidden states `[n, d]`."""
    hidden = hidden.detach().requires_grad_()
    loss = loss_of(head(hidden))
    loss.backward()
    return loss.item(), hidden.grad


if __name__ == "__main__":
    main()
