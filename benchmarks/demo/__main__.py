"""`python -m benchmarks.demo`: the steps of the demo, in order."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

_HERE = Path(__file__).parent
# A chunk's context is scored in no row, and is all that the choice reads.
CHUNK_TOKENS, CONTEXT_TOKENS = 256, 64
STARTS = ("The capital of France is the city of", "In 1912 the ship left the port of Southampton and")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo",
        description="Damage a small language model with 4-bit quantisation, repair it with IDP, print one table.",
    )
    add = parser.add_argument
    add("--model", help="folder or hub id of a causal language model (default: SmolLM2-135M-Instruct, fetched)")
    add("--damage", choices=("int4", "int3", "none"), default="int4", help="'none': prompts on the sound model")
    add("--num-prompts", type=int, default=4, help="M (default: %(default)s)")
    add("--num-virtual-tokens", type=int, default=32, help="k, tokens of each prompt (default: %(default)s)")
    add("--assignment", choices=("uniform", "selected", "all"), default="selected", help="default: %(default)s")
    add("--init", choices=("vocab", "random"), default="vocab", help="default: %(default)s")
    add("--steps", type=int, default=40, help="optimiser steps (default: %(default)s)")
    add("--batch-size", type=int, default=4, help="chunks per step (default: %(default)s)")
    add("--learning-rate", type=float, default=3e-2, help="peak of a cosine schedule (default: %(default)s)")
    add("--chunks", type=int, help="held-out chunks to score (default: all, one per article)")
    add("--tuning", action="store_true", help="score the articles that settings may be chosen by, not the others")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--adapter", type=Path, default=Path("runs/demo/adapter"), help="where it is saved (default: %(default)s)")
    add("--output", type=Path, default=_HERE / "results" / "demo.json", help="JSON of every number")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    began = time.perf_counter()
    # Imported here, so that --help is instant.
    import torch
    import transformers
    from peft import AutoPeftModelForCausalLM, get_peft_model

    from benchmarks.demo import repair, report
    from idp_peft import IDPConfig
    from idp_peft.evaluation import score_chunks

    transformers.set_seed(options.seed)
    tokenizer, model_folder, train_chunks, chunks = repair.data(options, CHUNK_TOKENS)
    print(f"{len(train_chunks)} training chunks, {len(chunks)} held-out chunks of {CHUNK_TOKENS} tokens", flush=True)

    def score(model, name: str, prompt_id: int | None = None):
        return score_chunks(model, chunks, CONTEXT_TOKENS, prompt_id, options.batch_size, description=name)

    rows = {"dense": score(repair.load(model_folder, "none"), "dense")}
    model = repair.load(model_folder, options.damage)
    fingerprint = repair.fingerprint(model)
    rows["compressed"] = score(model, "compressed")

    repair.check_gradients(model, chunks[0][:CONTEXT_TOKENS])

    transformers.set_seed(options.seed)  # the prompts' start depends on the seed alone
    config = IDPConfig(
        task_type="CAUSAL_LM",
        num_prompts=options.num_prompts,
        num_virtual_tokens=options.num_virtual_tokens,
        assignment=options.assignment,
        init=options.init,
    )
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
    history = repair.train(model, train_chunks, CONTEXT_TOKENS, options)

    single = [score(model, f"prompt {i}", i) for i in range(options.num_prompts)]
    rows |= {f"prompt {i}": scores for i, scores in enumerate(single)}
    rows["IDP (free choice)"] = score(model, "IDP")
    rows |= report.reference_choices(single)

    model.save_pretrained(options.adapter)
    reloaded = AutoPeftModelForCausalLM.from_pretrained(options.adapter, **repair.loading(options.damage))
    checks = {
        "trainable_parameters": model.get_nb_trainable_parameters()[0],
        "base_unchanged": repair.fingerprint(model) == fingerprint == repair.fingerprint(reloaded),
        "reload_max_abs_difference": repair.logit_difference(model, reloaded, chunks[: options.batch_size]),
    }
    written, selection = repair.continue_texts(reloaded, tokenizer, STARTS)

    seconds = time.perf_counter() - began
    print("\n" + report.table(rows))
    print(f"\nAdapter saved to {options.adapter} and loaded again. It goes on:")
    for text, prompt in zip(written, selection.prompt_ids.tolist(), strict=True):
        print(f"  [prompt {prompt}] {text!r}")
    print(f"last_selection = {selection}")
    print(f"Base weights bit-identical: {checks['base_unchanged']}; ", end="")
    print(f"largest logit difference after reloading: {checks['reload_max_abs_difference']:g}")
    report.write(options, rows, checks, history, seconds, {"chunk": CHUNK_TOKENS, "context": CONTEXT_TOKENS})
    print(f"{seconds / 60:.1f} minutes on {torch.get_num_threads()} threads; every number is in {options.output}")
    if not checks["base_unchanged"] or checks["reload_max_abs_difference"] > 1e-4:
        raise SystemExit(f"the demo broke one of its promises: {checks}")


if __name__ == "__main__":
    main()
