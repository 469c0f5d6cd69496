"""What is served: a base and an adapter, what `idp-peft export` makes of them, and LoRAs of the same base."""

from __future__ import annotations

from pathlib import Path

from benchmarks.serving.engines import Served, llama_cpp, proxy, vllm

NUM_PROMPTS, LENGTH, LORA_RANK = 4, 32, 16
SLOTS, CONTEXT = 32, 640
LORAS = {"LoRA, rank 16": "lora-16", "LoRA of the bank's size": "lora-size"}
ROUTES = {
    "llama.cpp": [
        "base alone",
        "IDP, the client chooses",
        "IDP, the proxy chooses",
        "LoRA, rank 16",
        "LoRA of the bank's size",
    ],
    "vllm": [
        "base alone",
        "IDP, the client chooses",
        "IDP, the proxy chooses",
        "IDP by embeddings",
        "LoRA, rank 16",
        "LoRA of the bank's size",
    ],
}


def make(engine: str, folder: Path) -> None:
    """Write what an engine serves into a folder, unless it is there."""
    from benchmarks.common.contestants import with_method
    from benchmarks.common.real_gguf import write_gguf
    from idp_peft.models.loading import load_model, place_of
    from idp_peft.recover.methods import nearest_lora
    from idp_peft.serving import export_to_gguf, export_to_vocab

    done = folder / "made"
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    base = str(write_gguf(folder / "base.gguf")) if engine == "llama.cpp" else place_of("default")
    network = load_model(base)
    bank = {"num_prompts": NUM_PROMPTS, "num_virtual_tokens": LENGTH}
    with_method(network, "IDP by centroid", **bank).save_pretrained(folder / "adapter")
    budget = NUM_PROMPTS * LENGTH * network.get_input_embeddings().embedding_dim
    loras = {"lora-16": ("all-linear", LORA_RANK), "lora-size": nearest_lora(network, budget)}
    if engine == "llama.cpp":
        export_to_gguf(folder / "adapter", folder / "served", base)
        for name, (targets, rank) in loras.items():
            write_lora(folder / f"{name}.gguf", network, targets, rank)
    else:
        export_to_vocab(folder / "adapter", folder / "served", base)
        (folder / "base").symlink_to(base)
        for name, method in (("lora-16", "LoRA, rank 16"), ("lora-size", "LoRA, budget-matched")):
            with_method(network, method, **bank).save_pretrained(folder / name)
    done.touch()


def write_lora(file: Path, model, targets: str | list[str], rank: int, size: float = 1e-3) -> None:
    """A LoRA of random numbers of some size as a GGUF file: what it costs does not depend on them."""
    import gguf
    import torch

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 2.0 * rank)
    generator = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        wanted = isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
        if wanted and (targets == "all-linear" or name.rpartition(".")[2] in targets):
            place = names.get_name(f"{name}.weight", try_suffixes=(".weight",))
            for end, shape in (("a", (rank, module.in_features)), ("b", (module.out_features, rank))):
                part = size * torch.randn(shape, generator=generator)
                writer.add_tensor(f"{place}.lora_{end}", part.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Routes:
    """Ways to a model in one engine, each in a process of its own: name -> the processes that answer, the first one the client's.

    Args:
        engine (`str`): `"llama.cpp"` or `"vllm"`.
        folder (`Path`): what [`make`] wrote.
        names (`list[str]`): of `ROUTES[engine]`.
    """

    def __init__(self, engine: str, folder: Path, names: list[str]) -> None:
        from idp_peft.serving import ExportedModel, Router, VllmPrompts

        self.engine = engine
        self.processes = {name: self._start(engine, folder, name) for name in names}
        self.exported = ExportedModel.from_folder(folder / "served")
        self.router = Router.from_pretrained(folder / "served")
        if "IDP by embeddings" in names:
            self.embeddings = VllmPrompts(Router.from_pretrained(folder / "adapter", folder / "base"))

    @staticmethod
    def _start(engine: str, folder: Path, name: str) -> list[Served]:
        log, lora = folder / "engine.log", LORAS.get(name)
        if engine == "llama.cpp":
            file = folder / "served" / "model.gguf" if name.startswith("IDP") else folder / "base.gguf"
            started = llama_cpp(file, log, SLOTS, CONTEXT, (folder / f"{lora}.gguf",) if lora else ())
        else:
            flags = ["--enable-prompt-tokens-details"]
            if lora:
                flags += [
                    "--enable-lora",
                    "--max-lora-rank",
                    str(LORA_RANK),
                    "--lora-modules",
                    f"{lora}={folder / lora}",
                ]
            if name == "IDP by embeddings":
                flags.append("--enable-prompt-embeds")
            is_exported = name in ("IDP, the client chooses", "IDP, the proxy chooses")
            started = vllm(folder / ("served" if is_exported else "base"), log, SLOTS, CONTEXT, tuple(flags))
        return [proxy(folder / "served", started, log), started] if name == "IDP, the proxy chooses" else [started]

    def body(self, route: str, text: str, tokens_out: int) -> dict:
        """A greedy request of exactly so many tokens."""
        model = LORAS[route] if self.engine == "vllm" and route in LORAS else "idp"
        fields = {"model": model, "max_tokens": tokens_out, "temperature": 0, "ignore_eos": True}
        if route == "IDP by embeddings":
            return self.embeddings.completion_body([text], **fields)
        if route != "IDP, the client chooses":
            return {**fields, "prompt": text}
        ids = self.router.token_ids(text)
        return {**fields, "prompt": self.exported.token_ids[int(self.router.route([ids]).prompt_ids[0])] + ids}
