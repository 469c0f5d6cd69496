"""PEFT's model classes, with an IDP model card and push."""

from __future__ import annotations

import sys
from pathlib import Path

from peft import PeftModel, PeftModelForCausalLM

from idp_peft.hosting.introspection import repository_of_trainer
from idp_peft.hosting.sharding import is_spread


class KnowsItsCard:
    """PEFT's saving, card and push, with a card that is right for IDP.

    Why a class of our own: PEFT's `create_or_update_model_card` puts the path of a local base into the metadata, which the
    Hub refuses, and transformers' `push_to_hub` writes a generic card over it. Both are methods of the `PeftModel`, and
    PEFT makes that one itself, of a class that follows from the task type; a method brings only the tuner inside of it. So
    where PEFT makes our tuner for a `PeftModel`, that one instance becomes one of the classes below (`model.py`). Nothing of
    PEFT is patched, and models with another method stay what they are.
    """

    @property
    def model_tags(self) -> list[str]:
        """The base's tags and `"idp"`, `"soft-prompt"`: what trainers put on the cards they write. The base keeps its own."""
        return [*(getattr(self.get_base_model(), "model_tags", None) or []), "idp", "soft-prompt"]

    def save_pretrained(self, save_directory: str, *args, **kwargs) -> None:
        """PEFT's own, with an error where the prompts are sharded.

        Raises:
            `ValueError`: where that is so, and no whole `state_dict` is given.
        """
        if kwargs.get("state_dict") is None and is_spread(self):
            raise ValueError(
                "this process holds only a part of the prompts: call `state_dict = accelerator.get_state_dict(model)` on "
                "every process, then `save_pretrained(..., state_dict=state_dict)` on the main one"
            )
        super().save_pretrained(save_directory, *args, **kwargs)

    def fold_scales(self) -> None:
        """Write the active adapter's scales into the base's weights; see [`idp_peft.fold_scales`].

        Raises:
            `ValueError`: as there.
        """
        from idp_peft.models.folding import fold_scales

        fold_scales(self)

    def create_or_update_model_card(self, output_dir: str, results=None) -> None:
        """Write README.md into a folder, or renew our part of the one that is there.

        Args:
            output_dir (`str`): the folder.
            results (`str`, `Path` or a list of them, *optional*): result files of `idp-peft evaluate`, or folders of them,
                with one of this adapter among them. Without any, a card says nothing of results: those it had before may be
                those of other weights.

        Raises:
            `FileNotFoundError`, `ValueError`: for `results` that are none, or none of this adapter.
        """
        from idp_peft.hub.live_model import results_of, write_card_of

        place = repository_of_trainer(sys._getframe(1)) or Path(output_dir).absolute().name
        write_card_of(self, Path(output_dir) / "README.md", place, results_of(self, results), [])

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: list[str] | None = None,
        results=None,
    ):
        """Save the adapters into a repository on the Hub: config, one safetensors file, and a card.

        As transformers' own, with the right card and errors that say how far it came. A card that is in the repository
        keeps what others wrote into it.

        Args:
            repo_id (`str`): `"user/name"`, or a name of the user's own.
            commit_message, commit_description, private, token, revision, create_pr: as transformers' `push_to_hub`.
            max_shard_size: not used, an adapter is one file.
            tags (`list[str]`, *optional*): further tags of the card.
            results: as `create_or_update_model_card`.

        Returns:
            `CommitInfo`: where the commit is; a `str`, its URL.

        Raises:
            `PushError`: where a step failed: which one, what is in the repository, and what to do.
            `FileNotFoundError`, `ValueError`: for `results` that are none, or none of this adapter.
        """
        from idp_peft.hub.live_model import results_of, write_card_of
        from idp_peft.hub.push import push

        measured = results_of(self, results)

        def describe(file: Path, repo_id: str) -> None:
            write_card_of(self, file, repo_id, measured, list(tags or []))

        return push(
            self.save_pretrained,
            describe,
            repo_id,
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )


class IDPPeftModel(KnowsItsCard, PeftModel):
    """A `PeftModel` whose adapters are IDP's."""


class IDPPeftModelForCausalLM(KnowsItsCard, PeftModelForCausalLM):
    """A `PeftModelForCausalLM` whose adapters are IDP's."""


# transformers' pipelines know what they support by the class's name; pickle goes by the qualified one.
IDPPeftModelForCausalLM.__name__ = PeftModelForCausalLM.__name__

OURS = {PeftModel: IDPPeftModel, PeftModelForCausalLM: IDPPeftModelForCausalLM}
