"""`python -m benchmarks.choice.untrained MODEL OUTPUT`: a bank as training starts it, saved as an adapter.

Each prompt is the opening of a random training block (`init="corpus"` of `idp-peft recover`): what the choice says before
any prompt has learned to be chosen.
"""

from __future__ import annotations

import argparse


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choice.untrained", description=__doc__)
    parser.add_argument("model", help="folder or name of the model")
    parser.add_argument("output", help="folder of the adapter")
    parser.add_argument("--num-prompts", type=int, default=4)
    parser.add_argument("--num-virtual-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    import torch
    from transformers import set_seed

    from idp_peft.models.loading import load_model, load_tokenizer
    from idp_peft.recover import RecoverSettings
    from idp_peft.recover.adapter import with_adapter
    from idp_peft.texts.data import load_texts, token_blocks

    tokenizer = load_tokenizer(options.model)
    blocks = token_blocks(tokenizer, load_texts("wiki", "train"), 256, min_tokens=256)
    set_seed(options.seed)
    bank = RecoverSettings(
        model=options.model,
        num_prompts=options.num_prompts,
        num_virtual_tokens=options.num_virtual_tokens,
        scales=False,
    )
    with_adapter(load_model(options.model, dtype=torch.float32), tokenizer, blocks, bank).save_pretrained(
        options.output
    )


if __name__ == "__main__":
    main()
