"""Prompts for a vLLM that serves the base as it is. vLLM is not imported.

Of token prompts: embeddings, the chosen prompt's vectors, then the text's; the engine needs `--enable-prompt-embeds`. Of prompts of
keys and values: token ids, a placeholder, then the text's; the engine needs `vllm_connector.py`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import torch

from idp_peft.serving.chat_turns import first_turn
from idp_peft.serving.router import Router

# The role of a message that holds a soft prompt alone; see `chat_template`.
ROLE = "idp"


class VllmPrompts:
    """Turns texts into prompts for `vllm.LLM.generate` and into bodies for vLLM's HTTP server.

        prompts = VllmPrompts(Router.from_pretrained("adapter"))
        LLM("base", enable_prompt_embeds=True).generate(prompts.for_llm(texts))

    Args:
        router (`Router`): who chooses, and holds the embeddings.
    """

    def __init__(self, router: Router) -> None:
        if router.has_scales:
            raise ValueError(
                "this adapter has scales, which no engine applies: export it (`idp-peft export --fold_scales`), serve that folder, "
                "and make the router of it"
            )
        self.router = router

    @torch.no_grad()
    def for_llm(
        self, texts: Sequence[str | list[int]], prompt_ids: Sequence[int] | None = None, mixed: bool = False
    ) -> list[dict]:
        """What vLLM calls an `EmbedsPrompt`, one for each text; of key/value prompts a `TokensPrompt`.

        Args:
            texts (`Sequence[str | list[int]]`): texts or token ids.
            prompt_ids (`Sequence[int]`, *optional*): forced prompts, -1 for none; chosen by default.
            mixed (`bool`, defaults to `False`): leave the text's tokens to the engine: `prompt_token_ids` and
                `prompt_is_token_ids` say which positions they are. The rows of `prompt_embeds` there are zero.

        Returns:
            `list[dict]`: `prompt_embeds` `[k + n, d]` and, with `mixed`, the two lists of k + n entries; `prompt_token_ids` of
            k + n entries.
        """
        rows = [self.router.token_ids(text) for text in texts]
        chosen = self.router.route(rows).prompt_ids.tolist() if prompt_ids is None else list(prompt_ids)
        if self.router.holds_keys:
            return [{"prompt_token_ids": self._placeholder(p) + row} for p, row in zip(chosen, rows, strict=True)]
        return [self._mixed(p, row) if mixed else self._embedded(p, row) for p, row in zip(chosen, rows, strict=True)]

    def completion_body(self, texts: Sequence[str | list[int]], prompt_ids=None, **fields) -> dict:
        """The body of a `POST /v1/completions`: `prompt_embeds` in base64 (of key/value prompts `prompt`, token ids), and whatever
        else is given.

        Args:
            texts, prompt_ids: as [`for_llm`].
            fields: `model`, `max_tokens`, ...
        """
        if self.router.holds_keys:
            return {**fields, "prompt": [prompt["prompt_token_ids"] for prompt in self.for_llm(texts, prompt_ids)]}
        prompts = [encode(prompt["prompt_embeds"]) for prompt in self.for_llm(texts, prompt_ids)]
        return {**fields, "prompt_embeds": prompts if len(prompts) > 1 else prompts[0]}

    def chat_body(self, messages: list[dict], prompt_id: int | None = None, **fields) -> dict:
        """The body of a `POST /v1/chat/completions`: a first message with the prompt as a content part, then the chat.

        The engine must render with [`chat_template`], since a template that does not know that message would not put it in
        front of everything.

        Args:
            messages (`list[dict]`): the chat; its [`first_turn`] picks the prompt as the tokenizer's own template renders it.
            prompt_id (`int`, *optional*): a forced prompt.
            fields: `model`, `max_tokens`, ...

        Raises:
            `ValueError`: of key/value prompts, whose placeholder is no message: render the chat, and send a completion.
        """
        if self.router.holds_keys:
            raise ValueError("prompts of keys and values need token ids: render the chat, and use `completion_body`")
        if prompt_id is None:
            tokenizer = self.router.tokenizer
            text = tokenizer.apply_chat_template(first_turn(messages), tokenize=False, add_generation_prompt=True)
            row = tokenizer(text, add_special_tokens=False)["input_ids"]
            prompt_id = int(self.router.route([row]).prompt_ids[0])
        part = {"type": "prompt_embeds", "data": encode(self.router.prompts[prompt_id])}
        return {**fields, "messages": [{"role": ROLE, "content": [part]}, *messages]}

    def chat_template(self) -> str:
        """The tokenizer's chat template, for vLLM's `--chat-template FILE`: a first message of role `idp` comes first as it
        is, the rest is rendered as before.

        Raises:
            `ValueError`: where the tokenizer has no template, or several.
        """
        template = self.router.tokenizer.chat_template
        if not isinstance(template, str):
            raise ValueError("the tokenizer must have one chat template")
        # No loop over the content: vLLM looks for one to tell how the template wants its messages.
        front = (
            f"{{%- if messages and messages[0]['role'] == '{ROLE}' %}}"
            "{%- set first = messages[0]['content'] %}"
            "{{- first if first is string else first[0]['text'] }}"
            "{%- set messages = messages[1:] %}{%- endif %}\n"
        )
        return front + template

    def _embedded(self, prompt: int, row: list[int]) -> dict:
        vectors = self._vectors(row)
        return {"prompt_embeds": torch.cat([self._prompt(prompt), vectors])}

    def _mixed(self, prompt: int, row: list[int]) -> dict:
        front = self._prompt(prompt)
        is_token = [False] * len(front) + [True] * len(row)
        embeds = torch.cat([front, front.new_zeros(len(row), front.shape[1])])
        # What stands for a vector is never looked up; it must be some token.
        return {
            "prompt_embeds": embeds,
            "prompt_token_ids": [row[0]] * len(front) + row,
            "prompt_is_token_ids": is_token,
        }

    def _placeholder(self, prompt: int) -> list[int]:
        config = self.router.config
        _check_prompt(prompt, config.num_prompts)
        return placeholder(prompt, config.num_virtual_tokens) if prompt >= 0 else []

    def _prompt(self, prompt: int) -> torch.Tensor:
        prompts = self.router.prompts
        _check_prompt(prompt, len(prompts))
        return prompts[prompt] if prompt >= 0 else prompts[0][:0]

    def _vectors(self, row: list[int]) -> torch.Tensor:
        embeddings = self.router.layer.get_base_layer()
        return embeddings(torch.tensor(row, device=embeddings.weight.device))


def placeholder(prompt: int, length: int) -> list[int]:
    """The token ids that stand for a key/value prompt in a request: its number, as many times as it has tokens. A text that begins
    so, though no real one does, would be read as the prompt."""
    return [prompt] * length


def _check_prompt(prompt: int, count: int) -> None:
    if not -1 <= prompt < count:
        raise ValueError(f"`prompt_ids` must be between -1 (no prompt) and {count - 1}, got {prompt}")


def encode(tensor: torch.Tensor) -> str:
    """A tensor as vLLM's server reads it: saved by torch, in base64."""
    file = io.BytesIO()
    torch.save(tensor.detach().cpu().clone(), file)  # a clone: a view would be saved with all it is a view of
    return base64.b64encode(file.getvalue()).decode()
