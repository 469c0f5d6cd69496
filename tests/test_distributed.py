"""DDP and FSDP2 through accelerate: two processes do what one does with the whole batch.

Sums over rows and processes are taken in another order, so numbers differ in float32's last digits: 1e-5, relative and
absolute, for losses, gradients and prompts after training (4e-6 was the most seen where each matrix product was off by up to two
units in its last place), and 1e-4 for the logits that these prompts make (2e-5).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from tests.distributed_job import BATCH, LENGTHS, RESUMES, examples
from tests.distributed_run import (
    FSDP2,
    close,
    in_one_process,
    in_two_processes,
    prompts_in,
    saved_in,
    skip_without_fsdp2_on_a_cpu,
)
from tests.tiny import tiny

pytestmark = pytest.mark.xdist_group("distributed")  # one launch for all of them
TOLERANCE, LOGITS = 1e-5, 1e-4
# The launch costs more than the jobs, so each way is launched once.
JOBS = {
    "ddp": ["selected", "all", "centroid", "key_values", "scales", "trainer"],
    "fsdp2": ["selected", "uniform", "centroid", "key_values", "scales", "checkpointing", "trainer"],
}
SETTINGS = {"ddp": {}, "fsdp2": FSDP2}
CASES = [(way, job) for way, jobs in JOBS.items() for job in jobs]
LOOPS = [case for case in CASES if case[1] != "trainer"]


class Runs:
    """Results of one process and of two, by way and job, computed when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._two, self._one = folder, {}, {}

    def two(self, way: str) -> dict[str, list[dict]]:
        skip_without_fsdp2_on_a_cpu(SETTINGS[way])
        if way not in self._two:
            self._two[way] = None  # a launch that failed is not tried again by every test
            self._two[way] = in_two_processes(self.folder / way, JOBS[way], SETTINGS[way])
        if self._two[way] is None:
            pytest.fail(f"the launch of {way} failed in an earlier test")
        return self._two[way]

    def one(self, job: str) -> dict:
        if job not in self._one:
            self._one |= in_one_process(self.folder / "one", [job])
        return self._one[job]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("distributed"))


@pytest.mark.parametrize(("way", "job"), CASES)
def test_losses_and_prompts_are_those_of_one_process_with_the_whole_batch(runs, way, job):
    wrapper = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPPeftModelForCausalLM"}[way]
    for seen in runs.two(way)[job]:
        assert seen["wrapper"] == wrapper, "the run was not distributed in the way it should be"
        assert close(seen["losses"], runs.one(job)["losses"], TOLERANCE)
    found, expected = prompts_in(runs.folder / way / job), prompts_in(runs.folder / "one" / job)
    assert found.shape == ((12, 96) if job == "key_values" else (sum(LENGTHS), 32))
    assert close(found, expected, TOLERANCE)


@pytest.mark.parametrize(("way", "job"), LOOPS)
def test_every_process_chooses_and_generates_as_one_process_does(runs, way, job):
    expected = runs.one(job)
    assert len(set(expected["choices"])) > 1, "examples that all choose the same prompt would show nothing"
    for seen in runs.two(way)[job]:
        assert seen["choices"] == expected["choices"]
        assert seen["generated"] == expected["generated"]
        assert close(seen["logits"], expected["logits"], LOGITS)


@pytest.mark.parametrize("way", list(JOBS))
def test_processes_learn_the_centroids_that_one_process_learns(runs, way):
    runs.two(way)
    runs.one("centroid")
    found, expected = saved_in(runs.folder / way / "centroid"), saved_in(runs.folder / "one" / "centroid")
    assert torch.equal(found["contexts"], expected["contexts"])
    assert expected["contexts"].sum() == 16, "each example of the run, once"
    assert close(found["centroids"], expected["centroids"], TOLERANCE)


@pytest.mark.parametrize("way", list(JOBS))
def test_processes_train_the_scales_that_one_process_trains(runs, way):
    runs.two(way)
    runs.one("scales")
    found, expected = saved_in(runs.folder / way / "scales"), saved_in(runs.folder / "one" / "scales")
    assert expected["scales"].abs().max() > 0.1, "AdamW's four steps at 0.05"
    assert close(found["scales"], expected["scales"], TOLERANCE)


@pytest.mark.parametrize(("way", "job"), LOOPS)
def test_the_prompt_cache_is_computed_once(runs, way, job):
    assert [seen["runs_again"] for seen in runs.two(way)[job]] == [1, 1]


@pytest.mark.parametrize(("way", "job"), LOOPS)
def test_processes_train_on_the_prompts_that_one_process_gives_their_rows(runs, way, job):
    if job == "all":
        pytest.skip("every row trains every prompt")
    parts = zip(*(seen["trained_on"] for seen in runs.two(way)[job]), strict=True)
    assert [first + second for first, second in parts] == runs.one(job)["trained_on"]


def test_uniform_deals_the_prompts_evenly_over_all_processes(runs):
    for step in zip(*(seen["trained_on"] for seen in runs.two("fsdp2")["uniform"]), strict=True):
        assert sorted(prompt for part in step for prompt in part) == list(range(BATCH)), "four rows, four prompts"


@pytest.mark.parametrize(("way", "job"), LOOPS)
def test_prompts_that_nobody_chose_have_a_gradient_of_zero(runs, way, job):
    """Each process forces one prompt of its own; without a gradient for the others DDP would stop the next step."""
    for seen in runs.two(way)[job]:
        parts = torch.tensor(seen["gradient"]).split([3] * 4 if job == "key_values" else LENGTHS)
        assert [bool(part.abs().max() > 0) for part in parts] == [True, True, False, False]
        assert close(seen["gradient"], runs.one(job)["gradient"], TOLERANCE)


@pytest.mark.parametrize(("way", "job"), CASES)
def test_saving_runs_nothing_of_the_model(runs, way, job):
    assert [seen["forwards_while_saving"] for seen in runs.two(way)[job]] == [0, 0]


@pytest.mark.parametrize(("way", "job"), LOOPS)
def test_every_process_can_read_the_whole_bank_outside_of_a_forward(runs, way, job):
    for seen in runs.two(way)[job]:
        saved = saved_in(runs.folder / way / job)
        found = torch.tensor(seen["prompts"])
        if "frozen" in saved:  # the first token of each prompt
            assert torch.equal(found[::4], saved["frozen"])
            found = found[torch.arange(len(found)) % 4 > 0]
        assert torch.equal(found, saved["weight"])


def test_a_part_of_the_prompts_is_not_saved(runs):
    for seen in runs.two("fsdp2")["selected"]:
        assert "call `state_dict = accelerator.get_state_dict(model)` on every process" in seen["refused"]
    assert not (runs.folder / "fsdp2" / "selected" / "in_parts").exists()


def test_nobody_looks_for_unused_parameters(runs):
    assert [seen["finds_unused"] for seen in runs.two("ddp")["trainer"]] == [False, False]


@pytest.mark.parametrize("way", JOBS)
def test_a_run_resumes_from_its_checkpoint(runs, way):
    """From a bank of zeros: prompts and optimizer come from the checkpoint, the deal of prompts from its generators."""
    job = runs.folder / way / "trainer"
    if not RESUMES:
        pytest.skip("this accelerate does not resume several processes on a CPU")
    assert torch.equal(prompts_in(job / "resumed"), prompts_in(job))
    for seen in runs.two(way)["trainer"]:
        assert seen["resumed_losses"] == seen["losses"]
        assert seen["eval_loss"] == pytest.approx(runs.one("trainer")["eval_loss"], rel=TOLERANCE)


@pytest.mark.parametrize("way", JOBS)
def test_what_was_saved_loads_in_another_process(runs, way):
    seen, folder = runs.two(way)["selected"][0], runs.folder / way / "selected"
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "IDP"
    model = PeftModel.from_pretrained(tiny("llama"), str(folder)).eval()
    ids = torch.stack([row["input_ids"] for row in examples(6)])
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[2, :6] = 0
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -1]
    assert close(logits, seen["logits"], TOLERANCE)
