"""The definitions, written out slowly: what the fast paths must equal."""

from __future__ import annotations

import torch

from idp_peft.hosting.architectures import cache_name, find_decoder, forward_parameters, given_cache


def bank_of(model, name="default"):
    return find_decoder(model.get_base_model()).idp.idp_prompts[name]


def prompts_of(model, name="default") -> list[torch.Tensor]:
    """The prompts of an adapter, each `[k_i, d]`."""
    bank = bank_of(model, name)
    return list(bank.weight.detach().split(bank.lengths))


def concatenated_logits(model, base, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Promise 1's right-hand side for one unpadded row: the base on `[masked ; P_i ; E(x)]`, `[1, n, vocab]`.

    `base` is a separate copy of the base model that IDP never touched.
    """
    prompts = prompts_of(model)
    longest = max(len(p) for p in prompts)
    chosen = prompts[prompt].to(base.get_input_embeddings().weight.dtype)
    front = longest - len(chosen)
    whole = torch.cat([chosen.new_zeros(1, front, chosen.shape[1]), chosen[None]], dim=1)
    mask = torch.ones(1, longest + ids.shape[1], dtype=torch.long)
    mask[:, :front] = 0
    extra = {"attention_mask": mask}
    if "position_ids" in forward_parameters(type(base)):
        extra["position_ids"] = torch.arange(mask.shape[1])[None]
    with torch.no_grad():
        return logits_behind(base, whole, ids, **extra)


def plain_concatenated_logits(model, base, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """The base on `[P_i ; E(x)]` and nothing else: no mask, no positions."""
    chosen = prompts_of(model)[prompt].to(base.get_input_embeddings().weight.dtype)
    with torch.no_grad():
        return logits_behind(base, chosen[None], ids)


def logits_behind(base, prompt: torch.Tensor, ids: torch.Tensor, **extra) -> torch.Tensor:
    """The base on `[prompt ; E(x)]`, with gradients where they are enabled: `[1, n, vocab]`.

    Args:
        prompt (`torch.Tensor`): `[1, K, d]`.
        extra: `attention_mask` and `position_ids` `[1, K+n]`.
    """
    front = prompt.shape[1]
    decoder = find_decoder(base)
    if not looks_up_in_layers(decoder):
        whole = torch.cat([prompt, base.get_input_embeddings()(ids)], dim=1)
        if "mrope_section" in (getattr(decoder.config, "rope_parameters", None) or {}):
            # Without positions, transformers 5.0 wants to read them off ids.
            extra.setdefault("position_ids", torch.arange(whole.shape[1])[None])
            extra["position_ids"] = extra["position_ids"].expand(3, 1, -1)
        return base(inputs_embeds=whole, use_cache=False, **extra).logits[:, front:]
    # Ids would be lost where embeddings stand in one input with them: the prompt goes first, then the ids continue.
    prefix = {name: value[:, :front] for name, value in extra.items()}
    if hasattr(decoder, "per_layer_model_projection_scale"):  # Gemma 4 wants something looked up for embeddings as well
        prefix["per_layer_inputs"] = decoder.get_per_layer_inputs(torch.zeros(1, front, dtype=torch.long))
    start = base(inputs_embeds=prompt, use_cache=True, **prefix)
    if "position_ids" in extra:
        extra["position_ids"] = extra["position_ids"][:, front:]
    return base(input_ids=ids, **{cache_name(type(base)): given_cache(start)}, **extra).logits


def looks_up_in_layers(decoder) -> bool:
    """Whether layers look up an embedding of each token (Gemma 3n, Gemma 4)."""
    return bool(getattr(decoder.config, "hidden_size_per_layer_input", 0))


def brute_force_scores(
    model, base_eager, ids, mask, context, layer: int, reduction: str, of_decoder=None
) -> torch.Tensor:
    """Promise 3's right-hand side: all prompts before the input in one pass of the plain eager model, under an explicit
    block mask, read from the attention weights the model itself reports. Rows one by one, unpadded: `[rows, M]`.

    `of_decoder` is what the model gives its decoder for one unpadded row with pictures: embeddings, masks, positions.
    """
    return torch.stack(
        [
            _row_scores(
                model,
                base_eager,
                ids[row][mask[row].bool()],
                context[row][mask[row].bool()],
                layer,
                reduction,
                of_decoder,
            )
            for row in range(len(ids))
        ]
    )


@torch.no_grad()
def _row_scores(model, base, ids, context, layer, reduction, of_decoder=None):
    prompts = prompts_of(model)
    lengths = [len(p) for p in prompts]
    longest, total, n = max(lengths), sum(lengths), len(ids)
    own = base.get_input_embeddings()(ids[None])[0] if of_decoder is None else of_decoder["inputs_embeds"][0]
    embeds = torch.cat([*prompts, own])[None]
    owner = torch.cat([torch.full((k,), i) for i, k in enumerate(lengths)] + [torch.full((n,), -1)])
    positions = torch.cat([torch.arange(longest - k, longest) for k in lengths] + [torch.arange(longest, longest + n)])
    slots = torch.arange(total + n)
    causal = slots[:, None] >= slots
    same = (owner[:, None] == owner) | (owner[:, None] == -1)
    visible = causal & same

    def block_mask(window):
        seen = visible if window is None else visible & (positions[:, None] - positions < window)
        return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]

    decoder = find_decoder(base)
    config = decoder.config
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is not None and len(set(kinds)) > 1:
        attention_mask = {"full_attention": block_mask(None), "sliding_attention": block_mask(window)}
    elif kinds is not None and "sliding_attention" not in kinds:
        attention_mask = block_mask(None)
    else:
        attention_mask = block_mask(window)
    extra = {"position_ids": positions[None]} if "position_ids" in forward_parameters(type(decoder)) else {}
    if config.model_type == "bloom":
        slopes = _bloom_slopes(config.n_head)
        alibi = (slopes[:, None] * positions)[:, None]  # [heads, 1, keys]
        decoder.build_alibi_tensor = lambda *_, **__: alibi
    if of_decoder is not None:
        theirs = of_decoder["attention_mask"]
        for kind, mask in attention_mask.items() if isinstance(attention_mask, dict) else [(None, attention_mask)]:
            if isinstance(theirs, dict) or theirs.ndim == 4:
                mask[..., total:, total:] = theirs if kind is None else theirs[kind]
        if of_decoder.get("position_ids") is not None and of_decoder["position_ids"].ndim == 3:
            front = positions[:total].expand(3, 1, -1)
            extra["position_ids"] = torch.cat([front, of_decoder["position_ids"][-3:] + longest], dim=-1)
        ids = torch.where(ids == 1, 0, ids)  # of a picture, the padding token's part is looked up
    if looks_up_in_layers(decoder):
        looked_up = decoder.get_per_layer_inputs(torch.cat([torch.zeros(total, dtype=torch.long), ids])[None])
        if config.model_type == "gemma3n_text":  # (projected + looked_up) / sqrt(2) must be `projected` for a prompt
            looked_up[:, :total] = decoder.project_per_layer_inputs(embeds[:, :total]) * (2**0.5 - 1)
        extra |= {"per_layer_inputs": looked_up, "use_cache": True}  # 5.0's Gemma 3n shares keys in the cache alone
    out = decoder(
        inputs_embeds=embeds, attention_mask=attention_mask, output_attentions=True, **{"use_cache": False, **extra}
    )
    weights = out.attentions[layer][0].float().mean(0)[total:]  # [n, S+n]
    scores = torch.stack([part.sum(-1) for part in weights[:, :total].split(lengths, -1)], -1)[context.bool()].mean(0)
    return scores / torch.tensor(lengths) if reduction == "mean" else scores


def _bloom_slopes(heads: int) -> torch.Tensor:
    return torch.tensor([2 ** (-8 * (i + 1) / heads) for i in range(heads)])
