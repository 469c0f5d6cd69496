"""The selection report at every evaluation of a training run."""

from __future__ import annotations

import itertools
import logging

import torch
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from idp_peft.analysis.measure import measure
from idp_peft.analysis.quietly import same_random_numbers
from idp_peft.layer import active_layer
from idp_peft.texts.examples import read_examples

logger = logging.getLogger(__name__)


class SelectionCallback(TrainerCallback):
    """Logs the numbers of [`selection_report`] at each evaluation of a `Trainer`, `SFTTrainer` or the like.

        Trainer(..., callbacks=[SelectionCallback()])        # log_history, metrics, model card
        trainer.add_callback(SelectionCallback(trainer))     # and what `report_to` names

    `eval_prompt_share_0` ..., `eval_selection_entropy`, `eval_selection_margin` (see [`SelectionReport.metrics`]) join the
    evaluation's own metrics: `trainer.evaluate()` returns them, its entry in `state.log_history` holds them, and
    `metric_for_best_model` may name one (`"oracle_agreement"`, say). A callback cannot log for others, so trackers
    such as TensorBoard or Weights & Biases see them only where the callback is given its trainer. Where prompts are never
    chosen, one warning says so.

    Training is not changed: no random number is drawn, no mode changed, and no data loader consumed (examples come from
    its dataset). In distributed runs every process reads the same examples.

    Args:
        trainer (`Trainer`, *optional*): the trainer, so that what `report_to` names gets the numbers too.
        max_examples (`int`, defaults to `128`): the first so many examples of the evaluation's dataset. A share of 128
            examples is known to within 4 points (one standard error), at the cost of reading them through one layer.
        oracle (`bool`, defaults to `False`): the oracle's numbers as well, at M forward passes of each of these examples.
        batch_size (`int`, *optional*): examples per pass; by default the trainer's own for evaluation.

    Raises:
        `ValueError`: for fewer than one example; when first used, without an active IDP adapter.
    """

    def __init__(
        self, trainer=None, *, max_examples: int = 128, oracle: bool = False, batch_size: int | None = None
    ) -> None:
        if max_examples < 1:
            raise ValueError(f"`max_examples` must be at least 1, got {max_examples}")
        self.trainer, self.max_examples, self.oracle, self.batch_size = trainer, max_examples, oracle, batch_size
        self.report = None  # the latest, for whoever wants more than numbers
        self._warned = False

    def on_evaluate(self, args, state, control, metrics=None, model=None, eval_dataloader=None, **_):
        device = active_layer(model).get_base_layer().weight.device
        autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        with same_random_numbers(device), torch.autocast(device.type, autocast, enabled=autocast is not None):
            examples = read_examples(_in_order(eval_dataloader, self.max_examples))
            batch_size = self.batch_size or args.per_device_eval_batch_size
            self.report = measure(model, examples, oracle=self.oracle, batch_size=batch_size)
        metrics = {} if metrics is None else metrics
        prefix = next((key.removesuffix("_runtime") for key in metrics if key.endswith("_runtime")), "eval")
        numbers = self.report.metrics(prefix)
        metrics.update(numbers)
        _add_to_log(state, prefix, numbers)
        if not self._warned and (text := self.report.warning) is not None:
            logger.warning("step %d: %s", state.global_step, text)
            self._warned = True
        if self.trainer is not None:
            epoch = {} if state.epoch is None else {"epoch": state.epoch}
            self.trainer.callback_handler.on_log(args, state, control, {**numbers, **epoch})


def _in_order(loader, count: int):
    """The first examples of a loader's dataset as its collator makes them, without iterating over the loader: that would
    draw a random number, and move the state that accelerate keeps of loaders that a training step goes on with."""
    dataset = loader.dataset
    streams = isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__")
    items = dataset if streams else (dataset[number] for number in range(len(dataset)))
    for item in itertools.islice(items, count):
        batch = loader.collate_fn([item])
        yield {name: value[0] for name, value in batch.items() if isinstance(value, torch.Tensor) and value.ndim == 2}


def _add_to_log(state, prefix: str, numbers: dict[str, float]) -> None:
    """Into the evaluation's own entry, so that whoever reads the history finds one per evaluation."""
    latest = state.log_history[-1] if state.log_history else {}
    if latest.get("step") == state.global_step and f"{prefix}_runtime" in latest:
        latest.update(numbers)
    else:
        state.log_history.append({**numbers, "step": state.global_step})
