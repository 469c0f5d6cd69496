"""The prompt bank: the M soft prompts of one adapter, stored end to end, and how they start."""

from __future__ import annotations

import torch
from peft.utils.integrations import gather_params_ctx
from torch import nn

from idp_peft.centroids import Clusters
from idp_peft.config import IDPConfig
from idp_peft.hosting.introspection import is_preparing_fsdp2
from idp_peft.hosting.sharding import is_sharded, whole_shape

_BUFFERS = ("centroids", "contexts", "frozen")  # what a bank holds beside its parameter, as its config says


class PromptBank(nn.Embedding):
    """The soft prompts of one adapter, prompt after prompt, one row per token.

    A row of a token prompt is an input vector, `[d]`. A row of a key/value prompt is the token's keys and values of every layer,
    end to end, `[P]` (`key_values.py`). The parameter `weight` holds the tokens that are trained, float32
    `[sum_i (k_i - frozen_tokens), d or P]`; the buffer `frozen` holds the others, the first of each prompt.

    Args:
        lengths (`list[int]`): k_i, the length of each prompt in tokens.
        embedding_dim (`int`): numbers per token: d, the width of the base model's input embeddings, or P.
        device (`torch.device`, *optional*): where the weight lives.
        context_width (`int`, *optional*): the width of the base's input embeddings, where `clusters` is to say what inputs each
            prompt is for.
        frozen_tokens (`int`, defaults to 0): how many tokens at the front of each prompt are not trained.
        holds_keys (`bool`, defaults to `False`): whether these are key/value prompts.
        factor_shapes (`list[torch.Size]`, *optional*): of the factors of each linear layer of the decoder, where the bank scales
            them. The parameter `scales`, float32 `[C]`, holds what all of them differ from 1 by, layer after layer, so that
            weight decay draws the model to the base; `None` otherwise.
    """

    def __init__(
        self,
        lengths: list[int],
        embedding_dim: int,
        device: torch.device | None = None,
        context_width: int | None = None,
        frozen_tokens: int = 0,
        holds_keys: bool = False,
        factor_shapes: list[torch.Size] | None = None,
    ) -> None:
        trained = sum(lengths) - frozen_tokens * len(lengths)
        super().__init__(trained, embedding_dim, device=device, dtype=torch.float32)
        self.lengths, self.frozen_tokens, self.holds_keys = list(lengths), frozen_tokens, holds_keys
        if frozen_tokens:
            self._register("frozen", torch.float32, frozen_tokens * len(lengths), embedding_dim, device=device)
        self.clusters: Clusters | None = None
        if context_width is not None:
            self._register("centroids", torch.float32, len(lengths), context_width, device=device)
            self._register("contexts", torch.long, len(lengths), device=device)
            self.clusters = Clusters(self)
        self.factor_shapes, count = factor_shapes, sum(shape.numel() for shape in factor_shapes or [])
        self.scales = None if factor_shapes is None else nn.Parameter(torch.zeros(count, device=device))
        self.is_new = True  # no call has used it yet: a failed load removes it

    def _register(self, name: str, dtype: torch.dtype, *shape: int, device: torch.device | None) -> None:
        self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))

    @property
    def num_prompts(self) -> int:
        return len(self.lengths)

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained. (A sharded weight has no elements of its own.)"""
        return self.num_embeddings * self.embedding_dim + sum(shape.numel() for shape in self.factor_shapes or [])

    @property
    def max_length(self) -> int:
        """K, the length of the longest prompt: every input starts at position K."""
        return max(self.lengths)

    @torch.no_grad()
    def load(self, stored: dict[str, torch.Tensor]) -> None:
        """Take over stored tensors of this bank, by name, where they fit and the bank is on a real device."""
        for name, tensor in self.state_dict(keep_vars=True).items():
            if name in stored and stored[name].shape == tensor.shape and not tensor.is_meta:
                tensor.copy_(stored[name])

    def _apply(self, fn, recurse: bool = True) -> PromptBank:
        buffers = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, exact in buffers.items():  # float32, whatever the model is cast to; nor do they go to the meta device
            device = getattr(self, name).device
            setattr(self, name, exact if device.type == "meta" else exact.to(device))
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        if self.clusters is not None:
            self.clusters.settle()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if is_preparing_fsdp2():
            for name in _BUFFERS:
                destination.pop(f"{prefix}{name}", None)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *args) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)
        missing_keys[:] = [key for key in missing_keys if key.removeprefix(prefix) not in _BUFFERS]

    def embeddings(self) -> torch.Tensor:
        """The rows of all prompts, float `[sum_i k_i, d or P]`.

        The module's forward makes ZeRO-3 gather the weight. FSDP2 gathers it in the model's own forward; elsewhere every
        process must call this.
        """
        if is_sharded(self.weight):
            return self._with_frozen(self.weight.full_tensor())
        # The index stays on the CPU while an offloaded weight waits on the meta device.
        device = None if self.weight.is_meta else self.weight.device
        return self._with_frozen(self(torch.arange(self.num_embeddings, device=device)))

    def forward(self, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """Rows of trained tokens; without any, the factors of the linear layers."""
        return 1 + self.scales.float() if tokens is None else super().forward(tokens)

    def factors(self) -> torch.Tensor:
        """The factors of the linear layers, float32 `[C]`, layer after layer; gathered as [`embeddings`] are."""
        return 1 + self.scales.full_tensor().float() if is_sharded(self.scales) else self()

    def stored(self) -> list[torch.Tensor]:
        """What the prompts and factors are made of, to compare them by value: not copied where this process has all of it."""
        own = [tensor for tensor in (self.weight, getattr(self, "frozen", None), self.scales) if tensor is not None]
        if all(len(tensor) and not tensor.is_meta and not is_sharded(tensor) for tensor in own):
            return [tensor.detach() for tensor in own]
        return [self.embeddings()] if self.scales is None else [self.embeddings(), self.factors()]

    def _with_frozen(self, trained: torch.Tensor) -> torch.Tensor:
        """All tokens of all prompts, the frozen ones in front of each prompt's others."""
        if not self.frozen_tokens:
            return trained
        each = [length - self.frozen_tokens for length in self.lengths]
        frozen = self.frozen.to(trained.device).split(self.frozen_tokens)
        return torch.cat([part for pair in zip(frozen, trained.split(each), strict=True) for part in pair])

    @torch.no_grad()
    def start(self, tokens: torch.Tensor) -> None:
        """Set all tokens of all prompts, float `[sum_i k_i, d]`, the frozen ones included."""
        parts = [part.tensor_split([self.frozen_tokens]) for part in tokens.split(self.lengths)]
        if self.frozen_tokens:
            self.frozen.copy_(torch.cat([frozen for frozen, _ in parts]))
        self.weight.copy_(torch.cat([trained for _, trained in parts]))

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
        """int64 `[M, K]`: which row of [`embeddings`] stands in slot j of prompt i.

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


def same_length(texts: list[list[int]], config: IDPConfig) -> torch.Tensor:
    """Token ids of the texts that prompts start at, repeated or cut to their one length: int64 `[M, k]`."""
    (length,) = set(config.prompt_lengths)
    return torch.tensor([[ids[j % len(ids)] for j in range(length)] for ids in texts])


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
