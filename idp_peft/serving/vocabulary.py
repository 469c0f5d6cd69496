"""Which token id and which name each soft prompt token gets in an exported vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

_MULTIPLE = 64  # engines pad to it themselves, or want it of what they load


@dataclass(frozen=True)
class PromptVocabulary:
    """The rows that are added to a vocabulary, after its last one.

    Args:
        vocab_size (`int`): rows of the base's embedding table.
        first (`int`): token id of the first soft prompt token.
        lengths (`list[int]`): k_i.
        prompt_names (`list[str]`, *optional*): what the adapter calls its prompts.
    """

    vocab_size: int
    first: int
    lengths: list[int]
    prompt_names: list[str] | None = None

    @property
    def rows(self) -> int:
        """Rows of the new embedding table: a multiple of 64."""
        needed = self.first + sum(self.lengths)
        return -(-needed // _MULTIPLE) * _MULTIPLE

    @property
    def never_generated(self) -> list[int]:
        """Token ids that must not come out of the model: all that are new."""
        return list(range(self.vocab_size, self.rows))

    def token_ids(self, prompt: int) -> list[int]:
        """The token ids of a prompt, in order."""
        start = self.first + sum(self.lengths[:prompt])
        return list(range(start, start + self.lengths[prompt]))

    def tokens(self, prompt: int) -> list[str]:
        """The names of a prompt's tokens: `<|idp:2:07|>` is token 7 of prompt 2."""
        width = max(2, len(str(max(self.lengths) - 1)))
        return [f"<|idp:{prompt}:{token:0{width}}|>" for token in range(self.lengths[prompt])]

    @property
    def prompts(self) -> list[list[str]]:
        """The names of every prompt's tokens."""
        return [self.tokens(prompt) for prompt in range(len(self.lengths))]

    @property
    def all_tokens(self) -> list[str]:
        return [token for tokens in self.prompts for token in tokens]

    def add_to(self, tokenizer) -> None:
        """Give a tokenizer the new tokens, as special ones.

        Raises:
            `ValueError`: where it has a token of such a name already, or gives the new ones other ids.
        """
        known = tokenizer.get_vocab()
        if taken := [token for token in self.all_tokens if token in known]:
            raise ValueError(
                f"the tokenizer already has a token named {taken[0]!r}: export the base that the adapter was trained on, not a "
                "model that was exported before"
            )
        tokenizer.add_tokens([*self._gap(tokenizer), *self.all_tokens], special_tokens=True)
        expected = list(range(self.first, self.first + sum(self.lengths)))
        found = tokenizer("".join(self.all_tokens), add_special_tokens=False)["input_ids"]
        if found != expected or tokenizer.convert_tokens_to_ids(self.all_tokens) != expected:
            raise ValueError(
                f"{type(tokenizer).__name__} does not give the new tokens the ids {expected[0]} to {expected[-1]}, one each: "
                "this model cannot be exported to its vocabulary"
            )

    def _gap(self, tokenizer) -> list[str]:
        """Names for table rows without a token: token ids must be consecutive."""
        return [f"<|idp:unused:{row}|>" for row in range(next_token_id(tokenizer), self.first)]


def next_token_id(tokenizer) -> int:
    """The id that the next new token of a tokenizer gets."""
    return max(tokenizer.get_vocab().values()) + 1
