"""What each sub-command can be told. Plain dataclasses, so that `--help` needs no heavy import."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


def _option(default, text: str):
    return field(default=default, metadata={"help": text})


def _required(text: str):
    return field(metadata={"help": text})


_DATA = "a file or folder that `datasets` reads (.jsonl, .parquet, .csv, .txt, save_to_disk, ...) or a Hub id"
_CONFIG = "Configuration name of a dataset."
_COLUMN = "Column of texts or chats; without a column 'text', also messages, or prompt and completion."
_ASSISTANT = "Of chats, predict the assistant's words alone, as TRL's option."


@dataclass
class CompressOptions:
    """Compress a dense model with an existing library."""

    model: str = _required(
        "Dense model: 'default' (SmolLM2-135M-Instruct, fetched), a folder, a .gguf file or a Hub id."
    )
    output_dir: str = _required("Folder of the compressed model; must not exist or be empty.")
    recipe: str = _option("gptq-3bit", "gptq-3bit, gptq-4bit, sparsegpt-50, sparsegpt-2:4 (error lists all).")
    backend: str = _option("llmcompressor", "Library that does the work; each is an extra of the package.")
    dataset: str = _option("wiki", f"Calibration text: 'wiki', {_DATA}.")
    dataset_split: str = _option("train", "Split of the calibration text.")
    dataset_config: str | None = _option(None, _CONFIG)
    text_column: str = _option("text", _COLUMN)
    calibration_samples: int = _option(64, "Calibration blocks.")
    calibration_tokens: int = _option(256, "Tokens of each calibration block.")
    group_size: int = _option(64, "Weights that share a scale; must divide the layers' widths.")
    symmetric: bool = _option(False, "Quantise without zero points (less accurate).")
    seed: int = _option(0, "Seed of the calibration sample.")


@dataclass
class RecoverOptions:
    """Train prompts (or a baseline) that repair a compressed model. Every flag of TrainingArguments works as well."""

    model: str = _required("Compressed model: a folder, a .gguf file or a Hub id ('default': a dense one).")
    method: Literal["idp", "prompt_tuning", "prefix_tuning", "lora", "ia3", "ln_tuning"] = _option(
        "idp", "What is trained: idp, or one of PEFT's own methods as a baseline."
    )
    teacher: str | None = _option(None, "Dense model to distil from; without one, language modelling on the text.")
    distillation_weight: float = _option(1.0, "Share of the distillation loss; the rest is language modelling.")
    temperature: float = _option(1.0, "Temperature of the distillation loss.")
    dataset: str = _option("wiki", f"'wiki', {_DATA}, or 'self': text that the teacher writes.")
    dataset_split: str = _option("train", "Split of the dataset.")
    dataset_config: str | None = _option(None, _CONFIG)
    text_column: str = _option("text", _COLUMN)
    kind_column: str | None = _option(None, "Column of the kind of each text: every kind trains a prompt of its own.")
    assistant_only_loss: bool = _option(False, _ASSISTANT)
    eval_share: float = _option(0.05, "Share of the documents kept for Trainer's evaluation, with --eval_strategy.")
    block_tokens: int = _option(256, "Tokens of a training example.")
    context_tokens: int = _option(
        64, "Tokens in front of an example that pick its prompt and are not predicted (a completion's: its prompt)."
    )
    min_tokens: int = _option(32, "Texts with fewer tokens are left out; chats are not.")
    self_samples: int = _option(256, "Texts that --dataset self samples.")
    prompts: Literal["tokens", "key_values"] = _option(
        "tokens", "What a prompt is: input vectors, or the keys and values of every layer."
    )
    num_frozen_tokens: int = _option(1, "Tokens at the front of each key/value prompt that are not trained.")
    num_prompts: int = _option(4, "M, prompts in the bank.")
    num_virtual_tokens: int = _option(32, "k, tokens of each prompt.")
    selection: Literal["attention", "centroid", "random", "fixed"] = _option("attention", "Who picks a prompt.")
    selection_layer: int = _option(0, "Layer whose attention decides.")
    selection_reduction: Literal["mean", "sum"] = _option("mean", "Score of a prompt: mean or sum over its tokens.")
    assignment: Literal["uniform", "selected", "all"] = _option("selected", "Which prompt a training example trains.")
    scales: bool = _option(True, "Also train a factor per output channel of every linear layer, shared by the prompts.")
    scale_group_size: int | None = _option(
        None, "Inputs that share a factor of the scales (default: all of a row); 64 or 128, as in quantised weights."
    )
    scales_learning_rate: float | None = _option(None, "Peak learning rate of the scales (default: their own).")
    init: Literal["vocab", "random", "corpus"] = _option(
        "corpus",
        "How prompts start: random tokens, random vectors, or the openings of training texts (prefix tuning: the teacher's "
        "keys and values of them, where there is a teacher).",
    )
    match_budget: bool = _option(False, "Give a baseline the size nearest to the bank's parameter count.")
    lora_rank: int = _option(16, "Rank of LoRA without --match_budget.")
    lora_target_modules: str = _option("all-linear", "Layers of LoRA without --match_budget.")


@dataclass
class TeachOptions:
    """Keep what a dense model predicts on training text: `recover --teacher FOLDER` then needs no second model."""

    model: str = _required("Dense model: 'default', a folder, a .gguf file or a Hub id.")
    output_dir: str = _required("Folder for what it predicts; the same command goes on where it was.")
    dataset: str = _option("wiki", f"Training text, as for recover: 'wiki', {_DATA}.")
    dataset_split: str = _option("train", "Split of the dataset.")
    dataset_config: str | None = _option(None, _CONFIG)
    text_column: str = _option("text", _COLUMN)
    block_tokens: int = _option(256, "Tokens of a training example; the same as recover's.")
    min_tokens: int = _option(32, "Texts with fewer tokens are left out; the same as recover's.")
    top_k: int = _option(64, "Likeliest next tokens that are kept of each token.")
    batch_size: int = _option(4, "Blocks at once.")


@dataclass
class EvaluateOptions:
    """Measure perplexity and zero-shot tasks of a dense, compressed or repaired model."""

    model: str = _required("Model: 'default', a folder, a .gguf file or a Hub id.")
    output: str = _required("JSON file for the result, per-item scores included.")
    adapter: str | None = _option(None, "PEFT adapter on it: a folder or a Hub id.")
    label: str | None = _option(None, "Row name in tables (default: what the model is).")
    role: Literal["dense", "compressed", "recovered"] | None = _option(None, "Default: by adapter and configuration.")
    dataset: str = _option("wiki", f"Text for perplexity: 'wiki', 'c4', {_DATA}, or 'none'.")
    dataset_split: str = _option("held_out", "Split of the dataset.")
    dataset_config: str | None = _option(None, _CONFIG)
    text_column: str = _option("text", _COLUMN)
    assistant_only_loss: bool = _option(False, _ASSISTANT)
    tasks: list[str] | None = _option(None, "Zero-shot tasks: local_* names, 'all_local', or the harness's own names.")
    limit: int | None = _option(None, "At most so many documents and questions per task, a seeded sample.")
    seed: int = _option(0, "Seed of that sample.")
    window: int = _option(256, "Tokens the model sees at once when perplexity is measured.")
    stride: int = _option(192, "Tokens scored per window; the ones before are context, which picks the prompt.")
    batch_size: int = _option(4, "Rows per forward pass.")
    each_prompt: bool = _option(False, "Also force every prompt in turn: best single, random and oracle choice.")


@dataclass
class ReportOptions:
    """Write one HTML page and a Markdown table from result files."""

    results: list[str] = _required("Result files of evaluate, or folders of them.")
    output_dir: str = _required("Folder for report.html, report.md and statistics.json.")
    seed: int = _option(0, "Seed of the bootstrap.")


@dataclass
class PushOptions:
    """Upload a finished adapter to the Hub, with a model card. Log in before: `hf auth login`, or HF_TOKEN."""

    adapter: str = _required("Folder of an IDP adapter.")
    repo: str = _required("Repository: 'user/name'. It is made if it is not there.")
    results: list[str] | None = _option(None, "Result files of evaluate for the card, or folders of them.")
    private: bool = _option(False, "Make a new repository private.")
    revision: str | None = _option(None, "Branch (default: the main one).")
    commit_message: str = _option("Upload adapter", "Message of the commit.")


@dataclass
class ExportOptions:
    """Write a complete model that carries an adapter: its prompts as tokens of the vocabulary, its scales in the weights."""

    adapter: str = _required("Adapter: a folder or a Hub id.")
    output_dir: str = _required("Folder of the exported model; must not exist or be empty.")
    to_vocab: bool = _option(False, "Every soft prompt token becomes a token of the vocabulary, for any engine.")
    to_gguf: bool = _option(
        False, "The same in a GGUF file, for llama.cpp; scales are folded, the base is a GGUF file."
    )
    fold_scales: bool = _option(False, "Write the adapter's scales into the weights; with --to_vocab, or alone.")
    model: str | None = _option(None, "The adapter's base (default: the one that the adapter names).")
    default_prompt: str | None = _option(
        None, "With --to_gguf: prompt of chats whose request names none, name or number."
    )
    table_type: str | None = _option(None, "With --to_gguf: convert the embedding table to this type: q8_0, f16, f32.")
    keep_tied: bool = _option(
        False,
        "Leave tied embeddings tied: smaller, but prompt tokens can then be generated unless the engine is told not to.",
    )


@dataclass
class RouteOptions:
    """Choose a prompt for each text, without the rest of the model: JSON lines in, JSON lines out."""

    adapter: str = _required("IDP adapter: a folder or a Hub id; or a folder that export wrote.")
    model: str | None = _option(None, "The adapter's base (default: the one that the adapter names).")
    input: str = _option("-", "File of JSON lines, objects or texts ('-': standard input).")
    output: str = _option("-", "File for the same lines with prompt_id and scores ('-': standard output).")
    text_column: str = _option("text", "Where the text is in an object.")
    batch_size: int = _option(8, "Texts at once.")


@dataclass
class ProxyOptions:
    """Serve an exported model behind an OpenAI-compatible proxy that chooses prompts. Bearer tokens, if any, are read from
    $IDP_PROXY_API_KEY (what requests must carry) and $IDP_ENGINE_API_KEY (what the engine wants)."""

    model: str = _required("Folder that export wrote.")
    engine: str = _required("Address of the engine that serves it: http://127.0.0.1:8000.")
    served_model_name: str | None = _option(None, "Name the engine serves it under (default: --model, as vLLM's).")
    host: str = _option("127.0.0.1", "Address to listen on.")
    port: int = _option(8100, "Port to listen on.")
    max_body_bytes: int = _option(1048576, "Bytes that a request may have.")
    max_tokens: int | None = _option(None, "Tokens that a text may have (default: the base's positions, 8192 at most).")
    max_texts: int = _option(256, "Texts that a request may have.")
    max_request_tokens: int | None = _option(
        None, "Tokens that all texts of a request may have (default: 32768, or --max_tokens if that is more)."
    )
    max_characters: int | None = _option(
        None, "Characters that all texts of a request may have (default: 16 for each of --max_request_tokens)."
    )
    max_requests: int = _option(256, "Requests that are worked on at once; more are answered 503.")
    max_connections: int = _option(512, "Connections at once; above it, those that have owed a request for longest go.")
    client_timeout: float = _option(
        30.0, "Seconds within which a request must arrive whole, and that an answer may be left unread."
    )
    timeout: float = _option(600.0, "Seconds that the engine may be silent.")
    allow_origins: list[str] | None = _option(
        None, "Origins of web pages that may call from a browser, https://chat.example.org; '*': all (default: none)."
    )
    engine_fields: list[str] | None = _option(
        None, "Fields of the engine's own that requests may hold; they are handed on unchecked."
    )
    engine_kind: Literal["openai", "ollama"] = _option(
        "openai", "Ollama has a model per prompt: a chat goes to the model of its prompt."
    )
    playground: bool = _option(False, "Serve a page to try it in a browser, at /playground.")
    chat_choice: Literal["first_turn", "whole"] = _option(
        "first_turn", "What of a chat chooses its prompt: its first user turn, or in each turn all of it."
    )
