"""`recover`: one compressed model, one method, one run folder with an adapter at its end."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import shutil
from pathlib import Path

import transformers
from peft import PeftModel
from transformers import TrainingArguments, set_seed

from idp_peft.evaluation import environment
from idp_peft.files.folder_lock import alone_in
from idp_peft.hub.adapter_folder import push_adapter
from idp_peft.hub.push import PushError
from idp_peft.models.fingerprint import fingerprint
from idp_peft.models.gradient_probe import probe_gradients
from idp_peft.models.loading import accepted_by_trainer, load_model, load_tokenizer
from idp_peft.recover.adapter import with_adapter
from idp_peft.recover.arguments import RecoverArguments
from idp_peft.recover.checkpoints import MarkWhole, digests, is_whole
from idp_peft.recover.methods import LEARNING_RATES, learning_rate
from idp_peft.recover.run_folder import RunFolder
from idp_peft.recover.self_text import sample_blocks
from idp_peft.recover.settings import RecoverSettings
from idp_peft.recover.stopping import StopAtSignal
from idp_peft.recover.stored_teacher import StoredTeacher, is_taught
from idp_peft.recover.training import kinds_of, make_trainer, training_examples
from idp_peft.texts.chats import assistant_only
from idp_peft.texts.data import Block, blocks, load_kinds
from idp_peft.texts.tokens import beginning

logger = logging.getLogger(__name__)


def recover(
    model: str, output_dir: str | Path | None = None, *, arguments: TrainingArguments | None = None, **keywords
) -> Path:
    """Train an adapter that repairs a compressed model.

        recover("small", "run", teacher="default", max_steps=300)

    Everything that can be refused is refused before anything is written. A run that was interrupted, or killed, resumes
    from its last whole checkpoint when it is called again with the same settings, and ends with the same adapter. One
    process at a time works in a folder.

    Args:
        model (`str`): the compressed model: a folder, a `.gguf` file or a Hub id.
        output_dir (`str`, *optional*): the run's folder. It is required where `arguments` are not given.
        arguments (`TrainingArguments`, *optional*): how to train, in place of `output_dir` and single training arguments.
        keywords: fields of [`RecoverSettings`] (`method`, `teacher`, `dataset`, ...) and of [`RecoverArguments`]
            (`max_steps`, `learning_rate`, and all other training arguments).

    Returns:
        `Path`: the adapter's folder.

    Raises:
        `ValueError`, `FileNotFoundError`, `ImportError`: for settings, models or data that do not fit, saying which.
        `TypeError`: for an unknown keyword.
        `KeyboardInterrupt`: where the run was stopped; the same call resumes it.
        `RuntimeError`: where training changed the base model (never expected).
    """
    own = {field.name for field in dataclasses.fields(RecoverSettings)} & set(keywords)
    settings = RecoverSettings(model, **{name: keywords.pop(name) for name in own})
    if arguments is None:
        arguments = RecoverArguments(output_dir=None if output_dir is None else str(output_dir), **keywords)
    elif output_dir is not None or keywords:
        given = ", ".join([*["output_dir"][: output_dir is not None], *keywords])
        raise TypeError(f"recover() got `arguments` and, beside them, {given}: put these into `arguments`")
    settings.check()
    if arguments.learning_rate is None:
        arguments.learning_rate = learning_rate(settings)
    with alone_in(Path(arguments.output_dir)) if arguments.process_index == 0 else contextlib.nullcontext():
        return _run(settings, arguments)


def _run(settings, arguments: TrainingArguments) -> Path:
    folder = RunFolder(arguments.output_dir, settings, arguments)
    if folder.is_complete:
        logger.info("%s is complete already", folder.path)
        if arguments.push_to_hub and settings.method == "idp":
            _push(folder, arguments)
        return folder.adapter
    tokenizer = load_tokenizer(settings.model)
    tokens = set(tokenizer.get_vocab().values())
    dense, stored = settings.teacher, None
    if dense is not None and is_taught(dense):
        dense, stored = None, StoredTeacher(dense)
    if dense is not None:
        tokens &= _check_same_tokens(tokenizer, load_tokenizer(dense))
    train, held = ([], []) if settings.dataset == "self" else _blocks(settings, arguments, tokenizer)

    model = load_model(settings.model, for_training=True)
    teacher = load_model(dense) if dense is not None else None
    if stored is not None:
        stored.check([block.ids for block in (*train, *held)], tokenizer)
    tokens.intersection_update(
        *(range(one.config.get_text_config().vocab_size) for one in (model, teacher) if one is not None)
    )
    _check_known([*train, *held], tokens, tokenizer, settings.dataset)
    probe = probe_gradients(model)
    logger.info("%s: %s", settings.model, probe)
    if probe.verdict != "trainable":
        raise ValueError(f"`model` {settings.model!r} cannot be trained through: {probe}")
    before = fingerprint(model)
    folder.check_inputs(model=before, teacher=_digest_of(teacher, stored))

    folder.write("running", environment=environment(), gradient_probe=str(probe), base_sha256=before)
    if settings.dataset == "self":
        train, held = _sampled(settings, arguments, teacher, tokenizer, tokens, folder)
    folder.check_inputs(dataset=hashlib.sha256(repr([train, held]).encode()).hexdigest())
    folder.write("running")
    model = _with_adapter(model, tokenizer, train, settings, arguments, teacher)
    stop = StopAtSignal()
    trainer = _trainer(model, teacher or stored, train, held, settings, arguments, [stop, MarkWhole()])
    checkpoint = _checkpoint(folder, arguments)
    with stop:
        trainer.train(resume_from_checkpoint=checkpoint)
    if stop.asked and trainer.state.global_step < trainer.state.max_steps:
        folder.write("interrupted", training=_training_record(trainer, model, settings))
        raise KeyboardInterrupt("run the same command again to go on")
    if fingerprint(model) != before:
        raise RuntimeError("training changed the base model's weights: the adapter is not saved")
    _save(model, folder.adapter)
    written = digests(folder.adapter, "adapter_*")
    folder.write("complete", training=_training_record(trainer, model, settings), adapter=written)
    if arguments.push_to_hub and settings.method == "idp":
        _push(folder, arguments)
    elif arguments.push_to_hub:
        trainer.push_to_hub()
    return folder.adapter


def _digest_of(teacher, stored: StoredTeacher | None) -> str | None:
    if stored is not None:
        return stored.digest
    return None if teacher is None else fingerprint(teacher)


def _checkpoint(folder: RunFolder, arguments: TrainingArguments) -> str | None:
    """Where to go on: the checkpoint that the user names, or the run's own last one."""
    named = arguments.resume_from_checkpoint
    if named is not None and not is_whole(Path(named)):
        raise ValueError(
            f"`resume_from_checkpoint` {named!r} is no whole checkpoint (files are missing, cut or changed): leave it out to go "
            "on from the last one that is"
        )
    return named or folder.last_checkpoint


def _check_same_tokens(tokenizer, other) -> set[int]:
    """The teacher's token ids. Either tokenizer may have tokens more; those that both have must be the same."""
    own, its = tokenizer.get_vocab(), other.get_vocab()
    by_id = {i: token for token, i in its.items()}
    different = [token for token, i in own.items() if its.get(token, i) != i or by_id.get(i, token) != token]
    if different:
        raise ValueError(
            f"`teacher` must have the model's vocabulary: {len(different)} tokens differ, {different[0]!r} for one "
            f"({len(own)} tokens, teacher {len(its)})"
        )
    return set(by_id)


def _check_known(blocks: list[Block], tokens: set[int], tokenizer, dataset: str) -> None:
    """Refuse text with tokens outside of those that all models have, by their tokenizers and by their rows."""
    unknown = sorted({i for block in blocks for i in block.ids} - tokens)
    if unknown:
        names = [tokenizer.convert_ids_to_tokens(i) for i in unknown]
        raise ValueError(
            f"`dataset` {dataset!r} holds {len(names)} tokens that `model` or `teacher` does not have, {names[0]!r} (id "
            f"{unknown[0]}) for one: give models of one vocabulary, or text without them"
        )


def _blocks(settings, arguments: TrainingArguments, tokenizer) -> tuple[list[Block], list[Block]]:
    """Blocks to train on, and those kept for Trainer's evaluation (none unless it evaluates)."""
    where = settings.dataset, settings.dataset_split, settings.text_column, settings.dataset_config
    texts, kinds = map(list, zip(*load_kinds(*where, settings.kind_column), strict=True))
    texts = assistant_only(texts) if settings.assistant_only_loss else texts
    train, held = [], []
    for kind in dict.fromkeys(kinds):
        of_kind = [text for text, its in zip(texts, kinds, strict=True) if its == kind]
        first = len(of_kind) - _kept(len(of_kind), settings, arguments)
        for found, part in ((train, of_kind[:first]), (held, of_kind[first:])):
            cut = blocks(tokenizer, part, settings.block_tokens, settings.min_tokens)
            found += [dataclasses.replace(block, kind=kind) for block in cut]
    held = [block for block in held if block.kind in {of_train.kind for of_train in train}]
    if not train:
        raise ValueError(
            f"`dataset` {settings.dataset!r} has no document of `min_tokens`={settings.min_tokens} tokens to train on (of chats: "
            f"none with something to predict in its first `block_tokens`={settings.block_tokens})"
        )
    logger.info("%d training blocks of at most %d tokens", len(train), settings.block_tokens)
    return train, held


def _kept(count: int, settings, arguments: TrainingArguments) -> int:
    return max(1, round(settings.eval_share * count)) if str(arguments.eval_strategy.value) != "no" else 0


def _sampled(settings, arguments, teacher, tokenizer, tokens: set[int], folder: RunFolder):
    file = folder.path / "self_text.jsonl"
    sampled = sample_blocks(
        teacher, tokenizer, tokens, settings.self_samples, settings.block_tokens, arguments.seed, file
    )
    front = len(beginning(tokenizer))
    long_enough = [Block(ids, front=front) for ids in sampled if len(ids) >= max(2, settings.min_tokens)]
    kept = _kept(len(long_enough), settings, arguments)
    if len(long_enough) <= kept:
        raise ValueError(
            f"`dataset` 'self': of {len(sampled)} texts that `teacher` {settings.teacher!r} wrote, {len(long_enough)} have "
            f"`min_tokens`={settings.min_tokens} tokens, which leaves none to train on: give more `self_samples`, or lower "
            "`min_tokens`"
        )
    return long_enough[: len(long_enough) - kept], long_enough[len(long_enough) - kept :]


def _with_adapter(model, tokenizer, train: list[Block], settings, arguments: TrainingArguments, teacher) -> PeftModel:
    set_seed(arguments.seed)  # the prompts' start depends on the seed alone
    model = with_adapter(model, tokenizer, train, settings, teacher)
    logger.info("%d trainable parameters", model.get_nb_trainable_parameters()[0])
    return model


def _trainer(model, teacher, train, held, settings, arguments: TrainingArguments, callbacks):
    arguments.remove_unused_columns = False  # the collator knows its columns
    with accepted_by_trainer(model):
        return make_trainer(
            model,
            arguments,
            training_examples(train, settings.context_tokens, kinds := kinds_of(train)),
            training_examples(held, settings.context_tokens, kinds) or None,
            teacher,
            settings.distillation_weight,
            settings.temperature,
            callbacks,
            settings.scales_learning_rate or LEARNING_RATES["scales"],
        )


def _training_record(trainer: transformers.Trainer, model: PeftModel, settings) -> dict:
    """What a report shows of the training."""
    return {
        "method": settings.method,
        "objective": "distillation" if settings.teacher is not None else "language modelling",
        "steps": trainer.state.global_step,
        "learning_rate": trainer.args.learning_rate,
        "seed": trainer.args.seed,
        "dataset": settings.dataset,
        "trainable_parameters": model.get_nb_trainable_parameters()[0],
        "history": trainer.state.log_history,
    }


def _push(folder: RunFolder, arguments: TrainingArguments) -> None:
    """The adapter alone: `Trainer` would push the run's folder, with its record and a second copy of the adapter."""
    repo_id = arguments.hub_model_id or folder.path.absolute().name
    try:
        push_adapter(
            folder.adapter,
            repo_id,
            private=arguments.hub_private_repo,
            token=arguments.hub_token,
            revision=getattr(arguments, "hub_revision", None),
            commit_message="End of training",
        )
    except PushError as error:
        raise PushError(
            f"{error} The run is complete: the same command again pushes it, or `idp-peft push --adapter {folder.adapter} "
            f"--repo {repo_id}`"
        ) from error


def _save(model: PeftModel, target: Path) -> None:
    temporary = target.with_name(".adapter")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
