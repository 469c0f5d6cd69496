"""A chat template that puts a prompt's tokens in front of what it renders: `chat_template_kwargs={"idp_prompt": 2}`."""

from __future__ import annotations

import json

# The variable that a request sets.
VARIABLE = "idp_prompt"


def with_prompts(template: str, prompts: list[list[str]], default: int | None = None) -> str:
    """A template that renders what `template` does, behind the tokens of prompt number `idp_prompt`, if that is given.

    Args:
        template (`str`): a Jinja chat template.
        prompts (`list[list[str]]`): the names of each prompt's tokens.
        default (`int`, *optional*): the prompt where `idp_prompt` is not given.
    """
    if default is not None:
        template = f"{{%- if {VARIABLE} is not defined %}}{{{{- {json.dumps(''.join(prompts[default]))} }}}}{{%- endif %}}\n{template}"
    texts = json.dumps(["".join(tokens) for tokens in prompts])
    # Jinja as transformers sets it up takes away one line break behind a block, so the template begins where it began.
    return (
        f"{{%- if {VARIABLE} is defined and {VARIABLE} is not none and {VARIABLE} >= 0 %}}"
        f"{{{{- {texts}[{VARIABLE}] }}}}{{%- endif %}}\n{template}"
    )


def with_prompts_in_all(template: str | dict | None, prompts: list[list[str]]) -> str | dict | None:
    """The same for a tokenizer's `chat_template`: one, several by name, or none."""
    if isinstance(template, dict):
        return {name: with_prompts(text, prompts) for name, text in template.items()}
    return None if template is None else with_prompts(template, prompts)
