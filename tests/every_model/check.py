"""What "works" means for one model, each promise against a slow reference: `checks(model_class)` runs them all."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import PeftModel, get_peft_model

from idp_peft import IDPConfig
from idp_peft.hosting.architectures import cache_name, find_decoder, forward_parameters, given_cache
from tests.reference import bank_of, prompts_of
from tests.tiny import token_batch

TOLERANCE = 1e-4  # fp32, docs/method.md, promise 1
ROWS = [5, 9, 2]  # tokens of the rows of a batch
# Their eager attention reports its weights before it scales them by the sink's share, so they are not what a choice reads.
REPORTS_OTHER_WEIGHTS = ("GraniteSWAForCausalLM", "GraniteMoeSWAForCausalLM")
# What else these want while they train: which tokens are of a picture.
TYPES_IN_TRAINING = {
    "Gemma3ForConditionalGeneration": "token_type_ids",
    "Molmo2ForConditionalGeneration": "mm_token_type_ids",
}
LOW = 20  # ids below may mean something to a multimodal model
STEPS = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": list(range(LOW))}


class Wrong(AssertionError):
    """A promise that does not hold."""


class Case:
    """One tiny base, its untouched copy, and the model that IDP made of it."""

    def __init__(self, base: torch.nn.Module, again: Callable[[], torch.nn.Module], **config) -> None:
        self.again = again
        self.base = again()
        # Chunks are counted from the first token, so prompts of several lengths would give an input several borders.
        chunked = getattr(self.base.config.get_text_config(), "attention_chunk_size", None) is not None
        self.lengths = [4, 4] if chunked else [3, 5]
        arguments = {"num_prompts": 2, "num_virtual_tokens": list(self.lengths), **config}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = get_peft_model(base, IDPConfig(task_type="CAUSAL_LM", **arguments)).eval()
        with torch.no_grad():
            bank_of(self.model).weight.normal_(std=float(self.base.get_input_embeddings().weight.std()) or 0.2)
        self.prompts = prompts_of(self.model)
        self.needs_positions = False  # Qwen2-VL of transformers 5.0 makes none without ids

    def batch(self, side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
        return tokens(ROWS, side)

    def alone(self, row: int) -> torch.Tensor:
        ids, mask = self.batch()
        return ids[row][mask[row].bool()][None]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.base.get_input_embeddings()(ids)

    def training_call(self, ids: torch.Tensor) -> dict:
        """What a training step on the longer prompt calls the model with."""
        call = {"input_ids": ids, "labels": ids, "prompt_ids": torch.tensor([1])}
        if name := TYPES_IN_TRAINING.get(type(self.base).__name__):
            call[name] = torch.zeros_like(ids)
        return call

    def concatenated(self, ids: torch.Tensor, prompt: int, base=None, chosen=None, **arguments) -> Concatenated:
        """The plain base on `[P_i ; E(x)]`.

        Args:
            base (`PreTrainedModel`, *optional*): another copy of the base.
            chosen (`torch.Tensor`, *optional*): `[k, d]`, in the place of the prompt.
            arguments: of the base's call.
        """
        base = self.base if base is None else base
        chosen = (self.prompts[prompt] if chosen is None else chosen)[None].to(self.base.dtype)
        front, longest = chosen.shape[1], max(self.lengths)
        total = front + ids.shape[1]
        positioned = "position_ids" in forward_parameters(type(base))
        if front < longest and positioned:  # the input starts at position K
            chosen = torch.cat([chosen.new_zeros(1, longest - front, chosen.shape[2]), chosen], dim=1)
            front, total = longest, total + longest - front
            arguments["attention_mask"] = (torch.arange(total) >= front - len(self.prompts[prompt]))[None].long()
            arguments["position_ids"] = torch.arange(total)[None]
        if self.needs_positions and positioned:
            arguments.setdefault("position_ids", torch.arange(total)[None])
        if base.training and (name := TYPES_IN_TRAINING.get(type(base).__name__)):
            arguments[name] = torch.zeros(1, total, dtype=torch.long)
        if getattr(find_decoder(base).config, "hidden_size_per_layer_input", 0):
            return self._continued(base, chosen, ids, arguments)
        whole = torch.cat([chosen, self.embed(ids)], dim=1)
        output = base(inputs_embeds=whole, use_cache=False, **arguments)
        return Concatenated(output.logits[:, front:], _of_first_layer(output, slice(front, None)), front)

    def _continued(self, base, chosen: torch.Tensor, ids: torch.Tensor, arguments: dict) -> Concatenated:
        """The same where layers look tokens up by their ids (Gemma 3n and 4): the prompt goes first, without ids."""
        front, decoder = chosen.shape[1], find_decoder(base)
        prefix = {name: value[:, :front] for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        if hasattr(
            decoder, "per_layer_model_projection_scale"
        ):  # Gemma 4 wants something looked up for embeddings as well
            prefix["per_layer_inputs"] = decoder.get_per_layer_inputs(torch.zeros(1, front, dtype=torch.long))
        begun = given_cache(base(inputs_embeds=chosen, use_cache=True, **prefix))
        if "position_ids" in arguments:
            arguments["position_ids"] = arguments["position_ids"][:, front:]
        output = base(input_ids=ids, **{cache_name(type(base)): begun}, **arguments)
        return Concatenated(output.logits, _of_first_layer(output, slice(None)), front)


@dataclass(frozen=True)
class Concatenated:
    """What the base makes of a prompt and an input, at the input's positions.

    Args:
        logits (`torch.Tensor`): `[1, n, vocab]`.
        attention (`torch.Tensor`, *optional*): `[heads, n, front + n]`, the first layer's, where the base reports it.
        front (`int`): slots in front of the input.
    """

    logits: torch.Tensor
    attention: torch.Tensor | None
    front: int


def _of_first_layer(output, rows: slice) -> torch.Tensor | None:
    attentions = getattr(output, "attentions", None)
    return None if not attentions or attentions[0] is None else attentions[0][0, :, rows].float()


def tokens(lengths: list[int], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = token_batch(lengths, side)
    return (LOW + ids % (60 - LOW)) * mask, mask


def a_forced_prompt_is_concatenation(case: Case) -> None:
    ids = case.alone(1)
    for prompt in range(2):
        with torch.no_grad():
            logits = case.model(input_ids=ids, prompt_ids=torch.tensor([prompt])).logits
            expected = case.concatenated(ids, prompt).logits
            _close(logits, expected, f"prompt {prompt}")
            _matters(logits, case.base(input_ids=ids).logits)
            inner = case.model.get_base_model()
            by_embeddings = {"inputs_embeds": case.embed(ids)}
            if case.needs_positions:
                by_embeddings["position_ids"] = torch.arange(ids.shape[1])[None]
            for call in ({"input_ids": ids, "use_cache": False}, by_embeddings):
                logits = inner(prompt_ids=torch.tensor([prompt]), **call).logits
                _close(logits, expected, f"prompt {prompt}, {list(call)[-1]}")


def a_padded_row_is_that_row_alone(case: Case) -> None:
    for side in ("left", "right"):
        ids, mask = case.batch(side)
        with torch.no_grad():
            together = case.model(input_ids=ids, attention_mask=mask).logits
            chosen = case.model.last_selection
            for row in range(len(ROWS)):
                alone = case.model(input_ids=case.alone(row)).logits[0]
                selection = case.model.last_selection
                _close(selection.scores[0], chosen.scores[row], f"scores of row {row}, padded {side}")
                _close(together[row][mask[row].bool()], alone, f"row {row}, padded {side}")


def generation_is_concatenation(case: Case) -> None:
    """Every step's logits are those of one pass over the prompt, the input and what was generated."""
    ids = case.alone(0)
    for settings in ({}, {"use_cache": False}):
        made, logits = generate(case.model, ids, prompt_ids=torch.tensor([1]), **settings)
        with torch.no_grad():
            expected = case.concatenated(made, 1).logits[0, ids.shape[1] - 1 : -1]
        _close(logits[0], expected, f"generate {settings}")
        _same(made[0, ids.shape[1] :], logits[0, :, LOW:].argmax(-1) + LOW, f"generate {settings}")


def generation_of_a_padded_row_is_that_of_the_row_alone(case: Case) -> None:
    ids, mask = case.batch()
    _, logits = generate(case.model, ids, attention_mask=mask)
    with_beams = case.model.generate(input_ids=ids, attention_mask=mask, num_beams=2, **STEPS)
    for row in range(len(ROWS)):
        _, logits_alone = generate(case.model, case.alone(row))
        _close(logits[row], logits_alone[0], f"row {row}")
        alone = case.model.generate(input_ids=case.alone(row), num_beams=2, **STEPS)
        _same(with_beams[row, ids.shape[1] :], alone[0, ROWS[row] :], f"row {row} with beams")


def generate(model, ids: torch.Tensor, **arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy sequences of plain tokens `[batch, n + steps]` and each step's logits `[batch, steps, vocab]`."""
    made = model.generate(input_ids=ids, return_dict_in_generate=True, output_logits=True, **STEPS, **arguments)
    return made.sequences, torch.stack(made.logits, dim=1)


def the_choice_is_the_definition(case: Case) -> None:
    """By the weights that the eager base reports on each `[P_i ; E(x)]`: queries and keys of layer 0 do not depend on the
    prompt, so the joint softmax follows from each prompt's odds."""
    if type(case.base).__name__ in REPORTS_OTHER_WEIGHTS:
        return
    base, ids = case.again(attention="eager"), case.alone(1)
    odds = []
    with torch.no_grad():
        case.model(input_ids=ids)
        for prompt in range(2):
            seen = torch.ones(
                1, len(case.prompts[prompt]) + ids.shape[1], dtype=torch.long
            )  # some are not causal without
            found = case.concatenated(ids, prompt, base=base, output_attentions=True, attention_mask=seen)
            if found.attention is None:
                return
            on_prompt, own = (part.sum(-1) for part in found.attention.split([found.front, ids.shape[1]], -1))
            odds.append(on_prompt / (own + (1 - on_prompt - own).clamp(min=0)))  # the rest is on an attention sink
    odds = torch.stack(odds, dim=-1)
    scores = (odds / (1 + odds.sum(-1, keepdim=True))).mean((0, 1)) / torch.tensor(case.lengths)
    _close(case.model.last_selection.scores[0], scores, "scores")


def a_deeper_layer_reads_a_padded_row_as_that_row_alone(case: Case) -> None:
    """The last layer's scores, below which all prompts stand in front at once; a layer that cannot be asked says so."""
    config = {"num_prompts": 2, "num_virtual_tokens": list(case.lengths), "selection_layer": -1}
    try:
        model = get_peft_model(case.again(), IDPConfig(task_type="CAUSAL_LM", **config)).eval()
    except ValueError as error:
        if "`selection_layer` must be 0 on" not in str(error):
            raise
        return
    with torch.no_grad():
        bank_of(model).weight.copy_(bank_of(case.model).weight)
        for side in ("left", "right"):
            ids, mask = case.batch(side)
            model(input_ids=ids, attention_mask=mask)
            scores = model.last_selection.scores
            for row in range(len(ROWS)):
                model(input_ids=case.alone(row))
                _close(scores[row], model.last_selection.scores[0], f"scores of row {row}, padded {side}")


def training_is_concatenation(case: Case) -> None:
    ids, model = case.alone(1), case.model
    chosen = case.prompts[1].clone().requires_grad_()
    logits = case.concatenated(ids, 1, base=case.again().train(), chosen=chosen).logits
    (expected,) = torch.autograd.grad(_loss(logits, ids), chosen)
    scale = expected.abs().max()
    if not bool(scale > 1e-6):
        raise Wrong(f"the gradient of the concatenation is {scale}")

    def compare(way: str) -> None:
        model.zero_grad()
        _loss(model(**case.training_call(ids)).logits, ids).backward()
        gradient = bank_of(model).weight.grad.split(case.lengths)[1]
        _close(gradient / scale, expected / scale, f"gradient {way}")

    model.train()
    try:
        compare("in training")
        if getattr(model.get_base_model(), "supports_gradient_checkpointing", False):
            model.gradient_checkpointing_enable({"use_reentrant": False})
            compare("under gradient checkpointing")
    except ValueError as error:
        if "turn gradient checkpointing off" not in " ".join(str(error).split()):
            raise
    finally:
        model.gradient_checkpointing_disable()
        model.eval()


def a_step_trains_the_prompt_and_nothing_else(case: Case) -> None:
    model, call, weight = case.model.train(), case.training_call(case.alone(1)), bank_of(case.model).weight
    try:
        model.zero_grad()
        before = model(**call).loss
        before.backward()
        with torch.no_grad():
            weight -= 1e-3 * weight.grad / weight.grad.norm()
        after = model(**call).loss
    finally:
        model.eval()
    if not bool(after < before):
        raise Wrong(f"a step changes the loss from {before.item()} to {after.item()}")
    untouched = case.base.state_dict()
    for name, tensor in model.get_base_model().state_dict().items():
        if ".idp." not in name and not torch.equal(tensor, untouched[name]):
            raise Wrong(f"training changed {name} of the base")


def without_the_adapter_it_is_the_base(case: Case) -> None:
    ids, mask = case.batch()
    with torch.no_grad(), case.model.disable_adapter():
        logits = case.model(input_ids=ids, attention_mask=mask).logits
        expected = case.base(input_ids=ids, attention_mask=mask).logits
    if not torch.equal(logits.nan_to_num(), expected.nan_to_num()):
        raise Wrong("disable_adapter() differs from the base")


def an_adapter_that_is_loaded_is_the_one_that_was_saved(case: Case) -> None:
    ids = case.alone(0)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case.model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(case.again(), folder).eval()
    with torch.no_grad():
        _same(loaded(input_ids=ids).logits, case.model(input_ids=ids).logits, "a loaded adapter's logits")


CHECKS: list[Callable[[Case], None]] = [
    a_forced_prompt_is_concatenation,
    a_padded_row_is_that_row_alone,
    generation_is_concatenation,
    generation_of_a_padded_row_is_that_of_the_row_alone,
    the_choice_is_the_definition,
    a_deeper_layer_reads_a_padded_row_as_that_row_alone,
    training_is_concatenation,
    a_step_trains_the_prompt_and_nothing_else,
    without_the_adapter_it_is_the_base,
    an_adapter_that_is_loaded_is_the_one_that_was_saved,
]


def _loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])


def _close(got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    if got.shape != expected.shape:
        raise Wrong(f"{what}: shape {list(got.shape)} instead of {list(expected.shape)}")
    difference = (got - expected).abs().max().item()
    if not difference <= TOLERANCE:
        raise Wrong(f"{what}: off by {difference:.3g} of {expected.abs().max().item():.3g}")


def _same(got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    if not torch.equal(got, expected):
        raise Wrong(f"{what}: {got.flatten()[-8:].tolist()} instead of {expected.flatten()[-8:].tolist()}")


def _matters(logits: torch.Tensor, without: torch.Tensor) -> None:
    if not bool((logits - without).abs().max() > 1e-3):
        raise Wrong("the prompt does not matter")
