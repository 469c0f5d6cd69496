"""The prompt bank: the M soft prompts of one adapter, stored end to end, and how they start."""

from __future__ import annotations

import torch
from peft.utils.integrations import gather_params_ctx
from torch import nn

from idp_peft.config import IDPConfig
from idp_peft.hosting.sharding import is_sharded, whole_shape


class PromptBank(nn.Embedding):
    """The soft prompts of one adapter: `weight` is float32 `[sum_i k_i, d]`, prompt after prompt.

    Args:
        lengths (`list[int]`): k_i, the length of each prompt in tokens.
        embedding_dim (`int`): d, the width of the base model's input embeddings.
        device (`torch.device`, *optional*): where the weight lives.
    """

    def __init__(self, lengths: list[int], embedding_dim: int, device: torch.device | None = None) -> None:
        super().__init__(sum(lengths), embedding_dim, device=device, dtype=torch.float32)
        self.lengths = list(lengths)
        self.is_new = True  # until it is first applied: a failed load takes a new bank off again

    @property
    def num_prompts(self) -> int:
        return len(self.lengths)

    @property
    def max_length(self) -> int:
        """K, the length of the longest prompt: every input starts at position K."""
        return max(self.lengths)

    @torch.no_grad()
    def load(self, prompts: torch.Tensor | None) -> None:
        """Take over stored prompts, float `[sum_i k_i, d]`, where there are any and the weight is on a real device."""
        if prompts is not None and prompts.shape == self.weight.shape and not self.weight.is_meta:
            self.weight.copy_(prompts)

    def embeddings(self) -> torch.Tensor:
        """The embeddings of all prompts, float `[sum_i k_i, d]`.

        They come through the module's forward, so that sharded parameters (ZeRO-3) are gathered. FSDP2 has gathered them
        where the model's own forward runs; outside of it every process must ask for them.
        """
        if is_sharded(self.weight):
            return self.weight.full_tensor()
        # The index stays on the CPU while an offloaded weight waits on the meta device.
        device = None if self.weight.is_meta else self.weight.device
        return self(torch.arange(self.num_embeddings, device=device))

    def embeddings_as(self, dtype: torch.dtype) -> torch.Tensor:
        """The embeddings of all prompts in the base's type.

        Raises:
            `ValueError`: naming the prompts that hold NaN or infinity, or would in this type.
        """
        embeddings = self.embeddings()
        cast = embeddings.to(dtype)
        finite = cast.detach().isfinite().all(-1)  # [sum_i k_i]
        if not finite.all():
            bad = [i for i, part in enumerate(finite.split(self.lengths)) if not part.all()]
            if embeddings.isfinite().all():
                raise ValueError(
                    f"prompt(s) {bad} of the bank hold numbers up to {embeddings.abs().max():.3g}, which {dtype} cannot hold: "
                    "load the base in bfloat16 or float32"
                )
            raise ValueError(
                f"prompt(s) {bad} of the bank hold NaN or infinity: reload the adapter or lower the learning rate"
            )
        return cast

    def rows(self, prompt_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The prompt of each row, `[batch, K, d]`, right-aligned; shorter ones are preceded by their first token.

        Args:
            prompt_ids (`torch.Tensor`): int64 `[batch]`, from 0 to M-1.
        """
        embeddings = self.embeddings_as(dtype)
        return embeddings[self.token_index("right", embeddings.device)[prompt_ids.to(embeddings.device)]]

    def token_index(self, align: str, device: torch.device) -> torch.Tensor:
        """int64 `[M, K]`: which row of `weight` stands in slot j of prompt i.

        Args:
            align (`str`): `"left"`: prompts begin at slot 0, and the slots after a shorter one repeat its last token.
                `"right"`: prompts end at slot K-1, and the slots before a shorter one repeat its first token.
        """
        lengths = torch.tensor(self.lengths, device=device)[:, None]  # [M, 1]
        starts = lengths.cumsum(0) - lengths
        slots = torch.arange(self.max_length, device=device)  # [K]
        if align == "left":
            return starts + torch.minimum(slots, lengths - 1)
        return starts + self.token_in_slot(device)

    def token_in_slot(self, device: torch.device) -> torch.Tensor:
        """int64 `[M, K]`: which of its own tokens stands in slot j of right-aligned prompt i (0 before a shorter one)."""
        slots = torch.arange(self.max_length, device=device)
        lengths = torch.tensor(self.lengths, device=device)
        return (slots - (self.max_length - lengths[:, None])).clamp(min=0)

    def real_slots(self, device: torch.device) -> torch.Tensor:
        """bool `[M, K]`: the slots of right-aligned prompts that hold a token of their own."""
        slots = torch.arange(self.max_length, device=device)
        lengths = torch.tensor(self.lengths, device=device)
        return slots >= self.max_length - lengths[:, None]


@torch.no_grad()
def initial_tokens(config: IDPConfig, embeddings: nn.Module, texts: list[list[int]] | None) -> torch.Tensor:
    """Starting values of a bank, float32 `[sum_i k_i, d]`, by `config.init`.

    Args:
        config (`IDPConfig`): the rule and the lengths.
        embeddings (`nn.Module`): the base's input embedding module. It is *called*, so its own scaling is in the result.
        texts (`list[list[int]]`, *optional*): token ids of each `init_text`. Without them, `init="text"` starts as
            `"vocab"`: of an adapter that is being loaded, the weights follow.
    """
    device, vocabulary = embeddings.weight.device, whole_shape(embeddings.weight)[0]
    lengths = config.prompt_lengths
    total = sum(lengths)
    if texts is not None:
        ids = torch.tensor(
            [ids[j % len(ids)] for ids, length in zip(texts, lengths, strict=True) for j in range(length)]
        )
    else:
        # Distinct tokens while the vocabulary lasts; the CPU generator makes a seed mean the same on every device.
        ids = torch.cat([torch.randperm(vocabulary) for _ in range(-(-total // vocabulary))])[:total]
    with gather_params_ctx(embeddings.weight, modifier_rank=None):  # under ZeRO-3
        tokens = embeddings(ids.to(device)).float()  # [sum_i k_i, d]
    if config.init == "random":
        root_mean_square = tokens.pow(2).mean().sqrt()
        tokens = torch.randn(tokens.shape).to(device) * root_mean_square
    return tokens
