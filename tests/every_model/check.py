"""What "works" means for one model, each promise against a slow reference: `checks(model_class)` runs them all."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable

import torch
from peft import PeftModel, get_peft_model

from idp_peft import IDPConfig
from idp_peft.decoder import forward_parameters
from tests.reference import bank_of, prompts_of
from tests.tiny import token_batch

TOLERANCE = 1e-4  # fp32, DESIGN.md promise 1
STEPS = {"max_new_tokens": 6, "do_sample": False}
ROWS = [5, 9, 2]  # tokens of the rows of a batch
# Their eager attention reports its weights before it scales them by the sink's share, so they are not what a choice reads.
REPORTS_OTHER_WEIGHTS = ("GraniteSWAForCausalLM", "GraniteMoeSWAForCausalLM")
LOW = 20  # ids below may mean something to a multimodal model


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

    def concatenated(self, ids: torch.Tensor, prompt: int, base=None, chosen=None, **arguments):
        """The plain base on `[P_i ; E(x)]`: its output, and how many positions stand in front of the input."""
        base = self.base if base is None else base
        chosen = self.prompts[prompt] if chosen is None else chosen
        whole = torch.cat([chosen[None].to(self.base.dtype), self.embed(ids)], dim=1)
        front, longest = len(chosen), max(self.lengths)
        if front < longest and "position_ids" in forward_parameters(type(base)):  # the input starts at position K
            whole = torch.cat([whole.new_zeros(1, longest - front, whole.shape[2]), whole], dim=1)
            arguments["attention_mask"] = (torch.arange(whole.shape[1]) >= longest - front)[None].long()
            arguments["position_ids"] = torch.arange(whole.shape[1])[None]
            front = longest
        if self.needs_positions:
            arguments.setdefault("position_ids", torch.arange(whole.shape[1])[None])
        return base(inputs_embeds=whole, use_cache=False, **arguments), front

    def expected_logits(self, ids: torch.Tensor, prompt: int, **arguments) -> torch.Tensor:
        """f([P_i ; E(x)]) at the input's positions, `[1, n, vocab]`."""
        output, front = self.concatenated(ids, prompt, **arguments)
        return output.logits[:, front:]


def tokens(lengths: list[int], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = token_batch(lengths, side)
    return (LOW + ids % (60 - LOW)) * mask, mask


def a_forced_prompt_is_concatenation(case: Case) -> None:
    ids = case.alone(1)
    for prompt in range(2):
        with torch.no_grad():
            logits = case.model(input_ids=ids, prompt_ids=torch.tensor([prompt])).logits
            expected = case.expected_logits(ids, prompt)
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
            expected = case.expected_logits(made, 1)[0, ids.shape[1] - 1 : -1]
        _close(logits[0], expected, f"generate {settings}")
        _same(made[0, ids.shape[1] :], logits[0].argmax(-1), f"generate {settings}")


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
    """Greedy sequences `[batch, n + steps]` and each step's logits `[batch, steps, vocab]`."""
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
            output, front = case.concatenated(ids, prompt, base=base, output_attentions=True, attention_mask=seen)
            if output.attentions is None or output.attentions[0] is None:
                return
            weights = output.attentions[0][0, :, front:].float()  # [heads, n, front+n]
            on_prompt, own = weights[..., :front].sum(-1), weights[..., front:].sum(-1)
            odds.append(on_prompt / (own + (1 - on_prompt - own).clamp(min=0)))  # the rest is on an attention sink
    odds = torch.stack(odds, dim=-1)
    scores = (odds / (1 + odds.sum(-1, keepdim=True))).mean((0, 1)) / torch.tensor(case.lengths)
    _close(case.model.last_selection.scores[0], scores, "scores")


def training_is_concatenation(case: Case) -> None:
    ids = case.alone(1)
    call = {"input_ids": ids, "labels": ids, "prompt_ids": torch.tensor([1])}
    chosen = case.prompts[1].clone().requires_grad_()
    base = case.again().train()
    loss = _loss(case.expected_logits(ids, 1, base=base, chosen=chosen), ids)
    (expected,) = torch.autograd.grad(loss, chosen)
    bank, model = bank_of(case.model), case.model
    untouched = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model.train()
    ways = [{}]
    if getattr(model.get_base_model(), "supports_gradient_checkpointing", False):
        ways.append({"use_reentrant": False})
    for checkpointing in ways:
        if checkpointing:
            model.gradient_checkpointing_enable(checkpointing)
        model.zero_grad()
        _loss(model(**call).logits, ids).backward()
        gradient = bank.weight.grad.split(case.lengths)
        way = "under gradient checkpointing" if checkpointing else "in training"
        scale = expected.abs().max()
        if not bool(scale > 1e-6):
            raise Wrong(f"the gradient of the concatenation is {scale}")
        _close(gradient[1] / scale, expected / scale, f"gradient {way}")
    if checkpointing:
        model.gradient_checkpointing_disable()
    model.zero_grad()
    before = model(**call).loss
    before.backward()
    with torch.no_grad():
        bank.weight -= 1e-3 * bank.weight.grad / bank.weight.grad.norm()
    after = model(**call).loss
    if not bool(after < before):
        raise Wrong(f"a step changes the loss from {before.item()} to {after.item()}")
    model.eval()
    for name, tensor in case.model.get_base_model().state_dict().items():
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
    training_is_concatenation,
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
