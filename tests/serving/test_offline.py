"""vLLM's own Python interface takes the prompts as they are: whole and mixed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="`make test-serving` makes an environment with it")

from benchmarks.serving.engines import VLLM_BLOCK, vllm_environment
from tests.patience import PATIENCE
from tests.serving.vllm_server import subject

ROOT = Path(__file__).parent.parent.parent
CODE = """
import json, sys
from idp_peft.serving import Router, VllmPrompts
from vllm import LLM, SamplingParams

adapter, base, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
if __name__ == "__main__":
    prompts = VllmPrompts(Router.from_pretrained(adapter, base))
    llm = LLM(base, enable_prompt_embeds=True, dtype="float32", enforce_eager=True, max_model_len=256, block_size=BLOCK)
    greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    said = [
        [list(out.outputs[0].token_ids) for out in llm.generate(prompts.for_llm(texts, mixed=mixed), greedy, use_tqdm=False)]
        for mixed in (False, True)
    ]
    print("SAID", json.dumps(said))
"""


def test_whole_and_mixed_prompts_give_what_the_adapter_gives(tmp_path):
    one = subject("tiny", tmp_path)
    script = tmp_path / "script.py"
    script.write_text(CODE.replace("BLOCK", str(VLLM_BLOCK)))
    call = [sys.executable, str(script), str(one.adapter), str(one.base), json.dumps(one.texts)]
    environment = {**os.environ, **vllm_environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(call, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("SAID "))
    expected = [one.say(one.ids(text), None) for text in one.texts]
    assert json.loads(line.removeprefix("SAID ")) == [expected, expected]
