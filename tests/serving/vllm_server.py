"""A real vLLM server on loopback, and models that its CPU kernels take."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as tf
from peft import get_peft_model

import idp_peft
from benchmarks.common.reserved_port import reserved_port
from benchmarks.serving.engines import VLLM_BLOCK, vllm_command, vllm_environment
from idp_peft import IDPConfig
from idp_peft.models.loading import load_model, load_tokenizer
from idp_peft.serving import ExportedModel, export_to_vocab
from tests.loopback import client
from tests.patience import PATIENCE
from tests.tiny import VOCAB
from tests.tiny_chats import chat_tokenizer


class VllmServer:
    """`python -m vllm.entrypoints.openai.api_server`, for a `with`. `kill` is what a machine does that runs out of memory."""

    def __init__(self, model: Path, log: Path, flags: tuple[str, ...] = ()) -> None:
        self.port, self._port_holder = reserved_port()
        self.url, self.log, self.process = f"http://127.0.0.1:{self.port}", log, None
        self.command = vllm_command(model, self.port, 16, 512, flags)

    def start(self) -> None:
        environment = {**os.environ, **vllm_environment()}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=environment, cwd=self.log.parent, start_new_session=True
            )

    def wait(self) -> None:
        """Until it answers."""
        until = time.monotonic() + PATIENCE
        with client(self.url, timeout=30) as http:
            while time.monotonic() < until:
                if self.process.poll() is not None:
                    break
                try:
                    if http.get("/health").status_code == 200:
                        return
                except Exception:  # whatever a server says that is not there yet
                    pass
                time.sleep(0.5)
        raise RuntimeError(f"vLLM did not start:\n{self.log.read_text(errors='replace')[-3000:]}")

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def __enter__(self) -> VllmServer:
        self.start()
        try:
            self.wait()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.kill()


@dataclass(frozen=True)
class Subject:
    """An adapter, its export, and texts to try it on."""

    model: torch.nn.Module
    tokenizer: tf.PreTrainedTokenizerBase
    base: Path
    adapter: Path
    exported: ExportedModel
    texts: list[str]
    chat: list[dict]

    def say(self, ids: list[int], prompt: int | None, tokens: int = 16) -> list[int]:
        """What the adapter's model says behind some tokens, greedily."""
        given = torch.tensor([ids])
        forced = {} if prompt is None else {"prompt_ids": torch.tensor([prompt])}
        out = self.model.generate(
            input_ids=given, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **forced
        )
        return out[0, len(ids) :].tolist()

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    @property
    def chat_ids(self) -> list[int]:
        rendered = self.tokenizer.apply_chat_template(self.chat, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(rendered, add_special_tokens=False)["input_ids"]


def subject(name: str, folder: Path) -> Subject:
    """`"tiny"`: a random Llama; `"gemma2"`: a random one of scaled, tied embeddings; `"default"`: the packaged 135M model.
    Prompts of one cache block each."""
    if name != "default":
        random_model(name, folder / "base")
        texts = ["w5 w11 w7 w30", "w64 w9", "w8 w20 w31 w44 w2 w3 w17 w90"]
        chat = [{"role": "user", "content": "w5 w6 w70"}]
        base = str(folder / "base")
    else:
        texts = ["The capital of France is", "Once upon a time, there was a", "def fibonacci(n):"]
        chat = [{"role": "user", "content": "Name three colours."}]
        base = "default"
    loaded = load_model(base)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = IDPConfig(task_type="CAUSAL_LM", num_prompts=4, num_virtual_tokens=VLLM_BLOCK)
        get_peft_model(loaded, config).save_pretrained(folder / "adapter")
    exported = ExportedModel.from_folder(export_to_vocab(folder / "adapter", folder / "exported", base))
    model, _ = idp_peft.load(folder / "adapter", base)
    return Subject(model, load_tokenizer(base), Path(base), folder / "adapter", exported, texts, chat)


def random_model(name: str, folder: Path) -> None:
    arguments = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    classes = {
        "tiny": (tf.LlamaForCausalLM, tf.LlamaConfig),
        "tiny_qwen2": (tf.Qwen2ForCausalLM, tf.Qwen2Config),
        "gemma2": (tf.Gemma2ForCausalLM, tf.Gemma2Config),
    }
    model_class, config_class = classes[name]
    model = model_class(config_class(**arguments))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
        if name == "gemma2":  # scaled and tied: larger ones would say the last token again and again
            model.model.embed_tokens.weight.mul_(0.1)
    model.save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
