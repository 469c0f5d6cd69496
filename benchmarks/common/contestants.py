"""The models that are compared: one base, held once in memory, under every method."""

from __future__ import annotations

import copy
import json
from pathlib import Path

# IDP as in the paper, and with what goes beyond it.
IDP = {
    "IDP": {},
    "IDP by centroid": {"selection": "centroid"},
    "IDP, key/values by centroid": {"selection": "centroid", "prompts": "key_values"},
    "IDP, key/values by centroid, scales": {"selection": "centroid", "prompts": "key_values", "scales": True},
    "IDP, key/values by centroid, scales folded": {"selection": "centroid", "prompts": "key_values", "folded": True},
}
METHODS = ("base alone", *IDP, "prompt tuning", "prefix tuning", "LoRA, rank 16", "LoRA, budget-matched")
# A Llama of a billion parameters with random weights: speed does not depend on their values.
RANDOM_1B = dict(
    vocab_size=32_000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)


def load_base(name: str):
    """`"default"`, a folder, a hub id, or `"random-1b"`; float32 on a CPU, the first GPU where there is one."""
    if name != "random-1b":
        from idp_peft.models.loading import load_model

        return load_model(name, for_training=True)
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    on_gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**RANDOM_1B))
    return (model.to("cuda", torch.bfloat16) if on_gpu else model).eval()


def with_method(base, method: str, num_prompts: int = 4, num_virtual_tokens: int = 32, **idp):
    """A model with a method of `METHODS` on `base`'s own weights, in evaluation mode; `base` stays as it is.

    Args:
        num_prompts, num_virtual_tokens (`int`): M and k of IDP's bank; k of prompt and prefix tuning; the budget.
        idp: further fields of `IDPConfig`.
    """
    import torch
    from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

    from idp_peft.recover.methods import nearest_lora

    fields = IDP.get(method, {}) | idp
    if fields.pop("folded", False):  # into weights of its own
        model = _with_bank(copy.deepcopy(base), num_prompts, num_virtual_tokens, fields | {"scales": True})
        model.fold_scales()
        return model
    model = sharing_weights(base)
    if method == "base alone":
        return model.eval()
    common = {"task_type": "CAUSAL_LM"}
    if method in IDP:
        return _with_bank(model, num_prompts, num_virtual_tokens, fields)
    elif method == "prompt tuning":
        config = PromptTuningConfig(num_virtual_tokens=num_virtual_tokens, **common)
    elif method == "prefix tuning":
        config = PrefixTuningConfig(num_virtual_tokens=num_virtual_tokens, **common)
    elif method == "LoRA, rank 16":
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", **common)
    elif method == "LoRA, budget-matched":
        budget = num_prompts * num_virtual_tokens * base.get_input_embeddings().embedding_dim
        targets, rank = nearest_lora(base, budget)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, **common)
    else:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {method!r}")
    torch.manual_seed(0)
    return get_peft_model(model, config).eval()


def _with_bank(model, num_prompts: int, num_virtual_tokens: int, fields: dict):
    """A model with a bank, started at random tokens, each prompt with a centroid where the choice is by these."""
    import torch
    from peft import get_peft_model

    import idp_peft

    torch.manual_seed(0)
    if fields.get("prompts") == "key_values":
        fields = {**fields, "init_weights": False}
    shape = {"num_prompts": num_prompts, "num_virtual_tokens": num_virtual_tokens}
    adapted = get_peft_model(model, idp_peft.IDPConfig(task_type="CAUSAL_LM", **shape, **fields)).eval()
    texts = torch.randint(10, model.config.vocab_size, (num_prompts, num_virtual_tokens)).tolist()
    if "init_weights" in fields:
        idp_peft.start_at(adapted, adapted.get_base_model(), texts)
    bank = adapted.base_model.layer.active_bank
    if bank.clusters is not None:
        means = torch.randn(num_prompts, adapted.get_input_embeddings().weight.shape[1])
        bank.clusters.set(torch.arange(num_prompts), means)
    return adapted


def sharing_weights(base):
    """A copy whose tensors are the base's own: contestants share memory, and caches hit them alike."""
    kept = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    return copy.deepcopy(base, kept)


def parse_with_common(parser, arguments: list[str] | None, results: Path, repetitions: int):
    """Parse a command line with what benchmarks have in common: `--base`, `--label`, `--repetitions`, `--seconds`, `--output`.

    Args:
        results (`Path`): the folder of the default output.
        repetitions (`int`): the default.
    """
    parser.add_argument("--base", default="default", help="folder, hub id, 'default' or 'random-1b'")
    parser.add_argument("--label", help="name of the base in tables and of the result files (default: --base)")
    parser.add_argument("--repetitions", type=int, default=repetitions, help="turns of each, after one to warm up")
    parser.add_argument(
        "--seconds", type=float, default=240, help="no further turn of a case after these; two at least"
    )
    parser.add_argument("--output", type=Path, help="default: results/<label>.json beside this file")
    options = parser.parse_args(arguments)
    options.label = options.label or Path(options.base).name
    options.output = options.output or results / f"{options.label}.json"
    return options


class PeakMemory:
    """The most memory, in bytes, that this process (or the GPU) has held since this was made."""

    def __init__(self) -> None:
        import torch

        self.on_gpu = torch.cuda.is_available()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins again (man 5 proc)

    def read(self) -> int:
        import torch

        if self.on_gpu:
            return torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


class Record:
    """A result file that grows turn by turn and is gone on with where it was left.

    Args:
        path (`Path`): the JSON file.
        settings (`dict`): what was asked for; a file with others is refused.
    """

    def __init__(self, path: Path, settings: dict) -> None:
        from idp_peft.evaluation import environment

        self.path = path
        self.content = {"settings": settings, "environment": environment(), "turns": []}
        if path.is_file():
            self.content = json.loads(path.read_text())
            if self.content["settings"] != settings:
                raise SystemExit(f"{path} holds a run with other settings: remove it, or give another --output")
        self._done = {self._key(turn) for turn in self.content["turns"]}

    def has(self, **what) -> bool:
        return self._key(what) in self._done

    def add(self, **turn) -> None:
        """Keep one turn: what was measured (`case`, `contestant`, `repetition`), and its numbers."""
        from idp_peft.files.whole_file import write_whole

        self.content["turns"].append(turn)
        self._done.add(self._key(turn))
        write_whole(self.path, json.dumps(self.content, indent=0) + "\n")

    @staticmethod
    def _key(turn: dict) -> str:
        return json.dumps([turn["case"], turn["contestant"], turn["repetition"]], sort_keys=True)
