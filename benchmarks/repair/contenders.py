"""What is compared: settings of `recover`, by the name that tables show."""

from __future__ import annotations

KEYS = {"prompts": "key_values", "num_prompts": 1, "scales": False}
TOKENS = {"prompts": "tokens", "num_prompts": 1, "scales": False}
BANK = {"prompts": "key_values", "num_prompts": 6, "selection": "centroid", "scales": False}
SCALES = {"scales": True}
GROUPS = {"scales": True, "scale_group_size": 64}  # that of the quantised weights

# One kind of text. A LoRA "of the size" has as many parameters as the key/value prompt of 32 tokens.
ONE_KIND = {
    "key/value prompt of 32 + scales": {**KEYS, **SCALES},
    "key/value prompt of 32 + scales of groups": {**KEYS, **GROUPS},
    "token prompt of 32 + scales of groups": {**TOKENS, **GROUPS},
    "LoRA of rank 16": {"method": "lora"},
    "key/value prompt of 32": KEYS,
    "LoRA of the size": {"method": "lora", "match_budget": True, **KEYS},
    "token prompt of 32 + scales": {**TOKENS, **SCALES},
    "scales alone (IA3)": {"method": "ia3"},
    "token prompt of 32": TOKENS,
    "key/value prompt of 6": {**KEYS, "num_virtual_tokens": 6},
    "key/value prompt of 6 + scales": {**KEYS, **SCALES, "num_virtual_tokens": 6},
    "norms (LN tuning)": {"method": "ln_tuning"},
}
# Six kinds of text, as much of each. "Of the size": as many parameters as the bank of six.
MIXTURE = {
    "six key/value prompts by centroid": BANK,
    "six key/value prompts by centroid + scales": {**BANK, **SCALES},
    "one key/value prompt of 192": {**KEYS, "num_virtual_tokens": 192},
    "one key/value prompt of 192 + scales": {**KEYS, **SCALES, "num_virtual_tokens": 192},
    "LoRA of the size": {"method": "lora", "match_budget": True, **BANK},
    "LoRA of rank 16": {"method": "lora"},
    "six key/value prompts of named kinds": {**BANK, "kind_column": "kind"},
    "six key/value prompts by attention": {**BANK, "selection": "attention"},
    "six key/value prompts by chance": {**BANK, "selection": "random"},
    "six token prompts by centroid": {**BANK, "prompts": "tokens"},
    "six token prompts by centroid + scales": {**BANK, **SCALES, "prompts": "tokens"},
    "scales alone (IA3)": {"method": "ia3"},
}
STUDIES = {"wiki": ONE_KIND, "kinds": MIXTURE}
# Peak learning rates that are tried; of what has scales, pairs of the prompts' and the scales'.
RATES = {
    "key/value prompt of 32 + scales": [
        (1e-2, 3e-3),
        (1e-2, 1e-2),
        (1e-2, 3e-2),
        (3e-3, 3e-3),
        (3e-3, 1e-2),
        (3e-2, 1e-2),
    ],
    "key/value prompt of 32 + scales of groups": [(1e-2, 3e-3), (1e-2, 1e-3)],
    "token prompt of 32 + scales of groups": [(3e-2, 3e-3), (3e-2, 1e-3)],
    "LoRA of rank 16": [3e-4, 1e-3, 2e-3, 4e-3],
    "key/value prompt of 32": [3e-3, 1e-2, 3e-2],
    "LoRA of the size": [1e-3, 2e-3, 4e-3, 8e-3],
    "token prompt of 32 + scales": [(1e-2, 1e-2), (3e-2, 3e-3), (3e-2, 1e-2), (3e-2, 3e-2)],
    "scales alone (IA3)": [3e-3, 1e-2, 3e-2],
    "token prompt of 32": [1e-2, 3e-2, 1e-1],
    "norms (LN tuning)": [3e-3, 1e-2, 3e-2],
}
# Those whose rates others share.
LIKE = {
    "key/value prompt of 6": "key/value prompt of 32",
    "key/value prompt of 6 + scales": "key/value prompt of 32 + scales",
    **{name: "key/value prompt of 32" for name in MIXTURE if "key/value" in name and "scales" not in name},
    **{name: "key/value prompt of 32 + scales" for name in MIXTURE if "key/value" in name and "scales" in name},
    "six token prompts by centroid": "token prompt of 32",
    "six token prompts by centroid + scales": "token prompt of 32 + scales",
}
