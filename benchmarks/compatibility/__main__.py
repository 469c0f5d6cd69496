"""`python -m benchmarks.compatibility`: run the matrix on a tiny Llama and write its results and its table."""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path

import peft
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from benchmarks.common.markdown import head, row
from benchmarks.compatibility.matrix import FEATURES, METHODS, contestant, judge

RESULTS = Path(__file__).parent / "results"
VOCABULARY = 97
TITLES = {"base": "base alone", "idp": "IDP", "prompt_tuning": "PEFT prompt tuning", "lora": "PEFT LoRA"}
SIGNS = {"right": "right", "error": "error"}


def tiny_llama() -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = VOCABULARY  # never generated
    return model.eval()


def cell(result: dict) -> str:
    return SIGNS.get(result["verdict"]) or f"**{result['message']}**"


def table(rows: dict[str, dict[str, dict]]) -> str:
    lines = head(["", *(TITLES[m] for m in METHODS)], numbers=False)
    for feature, verdicts in rows.items():
        lines.append(row([feature, *(cell(verdicts[m]) for m in METHODS)]))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compatibility")
    parser.add_argument("--output", type=Path, default=RESULTS / "matrix.json")
    output = parser.parse_args().output
    logging.set_verbosity_error()
    rows = {}
    for feature in FEATURES:
        rows[feature] = {}
        for method in METHODS:
            verdict, message = judge(feature, contestant(method, tiny_llama(), VOCABULARY))
            rows[feature][method] = {"verdict": verdict, "message": message}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    output.parent.mkdir(exist_ok=True)
    result = {"date": date.today().isoformat(), "versions": versions, "model": "tiny random Llama", "features": rows}
    output.write_text(json.dumps(result, indent=1) + "\n")
    output.with_suffix(".md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
