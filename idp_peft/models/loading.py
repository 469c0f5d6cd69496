"""Loading models: compressed ones in a form that propagates gradients."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from idp_peft.files.error_reason import missing, reason
from idp_peft.models.auto_class import auto_class_of
from idp_peft.offline import assets

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What reads a format, where it is not transformers itself.
READERS = {
    "compressed-tensors": "compressed-tensors",
    "gptq": "idp-peft[gptqmodel]",
    "awq": "idp-peft[gptqmodel]",
    "torchao": "idp-peft[torchao]",
    "bitsandbytes": "bitsandbytes",
    "hqq": "hqq",
    "gguf": "gguf",
}


def load(
    adapter: str | Path,
    base: str | Path | None = None,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: bool | str | None = None,
    **load_model_kwargs,
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """An adapter on its base, in evaluation mode, and the tokenizer: `model, tokenizer = idp_peft.load("user/name")`.

    Args:
        adapter (`str`): a folder or a Hub id. Adapters of PEFT's other methods work as well.
        base (`str`, *optional*, defaults to the one that the adapter's config names): anything `load_model` takes. Needed
            where that one is a folder of another machine.
        subfolder (`str`, *optional*): where in the folder or repository the adapter is.
        revision (`str`, *optional*): of the adapter's repository. The base's is in the adapter's config.
        token (`bool` or `str`, *optional*): for the adapter and its base on the Hub.
        load_model_kwargs: go to `load_model`: `for_training`, `dtype`, `device_map`, ...

    Returns:
        `tuple[PeftModel, PreTrainedTokenizerBase]`: the tokenizer is the adapter's own where one lies beside it, as
        `Trainer` saves it, else the base's. It pads on the left, as `generate` needs it.

    Raises:
        `FileNotFoundError`, `ValueError`: where there is no adapter or it is broken, and where its base is not there: the
            error says so and asks for `base`.
        `ImportError`: as `load_model`.
    """
    from peft import PeftModel

    hub = {name: value for name, value in {"revision": revision, "token": token}.items() if value is not None}
    where = hub if subfolder is None else {**hub, "subfolder": subfolder}
    config = adapter_config(adapter, where)
    name = base if base is not None else config.base_model_name_or_path
    if not name:
        raise ValueError(f"`adapter` {str(adapter)!r} does not say what its base is: pass `base`")
    of_base = {} if token is None else {"token": token}
    of_base |= {name: load_model_kwargs[name] for name in ("trust_remote_code",) if name in load_model_kwargs}
    if base is None and config.revision is not None:
        of_base["revision"] = config.revision
    try:
        model = load_model(name, **{**of_base, **load_model_kwargs})
    except (FileNotFoundError, ValueError) as error:
        if base is not None:
            raise
        raise type(error)(
            f"the base of `adapter` {str(adapter)!r} could not be loaded ({error}): pass `base`, the folder or Hub id where "
            "that model is now"
        ) from error
    tokenizer = tokenizer_beside(str(adapter), hub, subfolder)
    if tokenizer is None:
        tokenizer = load_tokenizer(name, **of_base)
    elif len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))  # as PEFT's auto classes do
    return PeftModel.from_pretrained(model, str(adapter), **where).eval(), tokenizer


def adapter_config(adapter: str | Path, hub_kwargs: dict | None = None) -> PeftConfig:
    """The config of an adapter in a folder or on the Hub.

    Args:
        adapter (`str`): the folder or Hub id.
        hub_kwargs (`dict`, *optional*): `subfolder`, `revision` and `token`.

    Raises:
        `FileNotFoundError`, `ValueError`: where there is none, or it is of a method that PEFT does not know.
    """
    from peft import PeftConfig

    where = hub_kwargs or {}
    folder = Path(adapter, where.get("subfolder", ""))
    if not (folder / "adapter_config.json").is_file() and (folder.is_absolute() or Path(adapter).exists()):
        raise FileNotFoundError(f"`adapter` {folder} is no adapter: there is no adapter_config.json in it")
    try:
        return PeftConfig.from_pretrained(str(adapter), **where)
    except KeyError as error:
        raise ValueError(
            f"`adapter` {str(adapter)!r} is of a method that PEFT does not know ({error}): import the package it comes from"
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"`adapter` {str(adapter)!r} could not be loaded: {reason(error)}") from error


def tokenizer_beside(adapter: str, hub: dict, subfolder: str | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer in an adapter's folder, or above its sub-folder; ready for `generate` as [`load_tokenizer`]'s."""
    from transformers import AutoTokenizer

    for place in dict.fromkeys((subfolder or "", "")):
        if Path(adapter).is_dir():
            found = Path(adapter, place, "tokenizer_config.json").is_file()
        else:
            try:
                found = bool(hf_hub_download(adapter, "tokenizer_config.json", subfolder=place or None, **hub))
            except EntryNotFoundError:
                found = False
        if found:
            return _for_generation(
                AutoTokenizer.from_pretrained(adapter, subfolder=place, trust_remote_code=False, **hub)
            )
    return None


def load_model(
    name_or_path: str | Path, for_training: bool = False, headless: bool = False, **from_pretrained_kwargs
) -> PreTrainedModel:
    """A causal language model in evaluation mode: dense, sparse, or in any quantised format that transformers reads.

    Args:
        name_or_path (`str`): `"default"` for the packaged default model, a folder, a `.gguf` file or a folder with one,
            or a hub id.
        for_training (`bool`, defaults to `False`): choose kernels that hand gradients on, where the format has several:
            gptqmodel's plain torch ones for GPTQ and AWQ, and bitsandbytes' without its repacking for inference. The
            default ones cut the gradient without an error once they have run in evaluation mode.
        headless (`bool`, defaults to `False`): without its output head, for what reads hidden states alone.
        from_pretrained_kwargs: go to `from_pretrained` of `AutoModelForCausalLM`, or of the auto class that knows a
            multimodal model, and win over the defaults below.

    The device is the GPU where there is one. The type is float32 on a CPU; on a GPU it is bfloat16 for a dense model and
    the checkpoint's own for a quantised one.

    * Packed integer weights of compressed-tensors are unpacked when loaded, instead of at the first forward: later it
      would change the weights of a model in use, and newer transformers (5.23) cannot load asymmetric ones otherwise.
    * A GGUF model becomes an ordinary dense one, which can be saved and trained like any other.

    Raises:
        `FileNotFoundError`: where there is no such folder, file or hub model.
        `ValueError`: where the folder holds no model, an adapter, or several GGUF files.
        `ImportError`: where the library that reads the format is missing, naming what to install.
    """
    from transformers import AutoModel

    where, gguf_file = find_model(name_or_path)
    hub = {name: from_pretrained_kwargs[name] for name in ("revision", "token") if name in from_pretrained_kwargs}
    quantization = {"quant_method": "gguf"} if gguf_file else quantization_of(where, **hub)
    # Without a word on it, transformers would ask at the terminal.
    arguments = {"trust_remote_code": False, **_defaults(quantization, for_training), **from_pretrained_kwargs}
    with _clear_errors(name_or_path, quantization), warnings.catch_warnings():
        # The part of it that says how to load does count.
        warnings.filterwarnings("ignore", message="You passed `quantization_config` or equivalent parameters")
        with_head = auto_class_of(None if gguf_file else _config_of(where, **hub).get("model_type"))
        auto_class = AutoModel if headless else with_head
        model, report = auto_class.from_pretrained(where, gguf_file=gguf_file, output_loading_info=True, **arguments)
        if (
            headless and report["missing_keys"]
        ):  # transformers 5.0 looks for Gemma 3n's under other names without a head
            model = with_head.from_pretrained(where, gguf_file=gguf_file, **arguments)
    if gguf_file:
        _forget_gguf(model)
        model.name_or_path = model.config.name_or_path = place_of(name_or_path)  # the folder may hold other models
    if for_training:
        _keep_differentiable(model)
    return model.eval()


def load_tokenizer(name_or_path: str | Path, **hub_kwargs) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that `load_model` can load, ready for `generate`: it has a padding token, and pads on the left.

    Args:
        name_or_path (`str`): as `load_model`.
        hub_kwargs: `token` and `revision` of a model on the Hub; `trust_remote_code`, `False` by default.

    Raises:
        `FileNotFoundError`, `ValueError`: as `load_model`.
    """
    from transformers import AutoTokenizer

    where, gguf_file = find_model(name_or_path)
    with _clear_errors(name_or_path, {}):
        arguments = {"trust_remote_code": False, "gguf_file": gguf_file, **hub_kwargs}
        return _for_generation(AutoTokenizer.from_pretrained(where, **arguments))


def _for_generation(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"  # most are saved with "right", and a row would go on behind its padding
    return tokenizer


def place_of(name_or_path: str | Path) -> str:
    """The one path or Hub id of what a user named, as an adapter's config keeps it: of a GGUF model, its file."""
    where, gguf_file = find_model(name_or_path)
    return where if gguf_file is None else str(Path(where, gguf_file))


def find_model(name_or_path: str | Path) -> tuple[str, str | None]:
    """`(folder or hub id, GGUF file in it or None)` of what a user named."""
    name = str(name_or_path)
    if name == "default":
        return str(assets.default_model()), None
    path = Path(name).expanduser()
    if path.is_dir():
        return _look_into(path)
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), path.name
    if path.is_file():
        raise ValueError(f"a model is a folder, a .gguf file or a hub id, got the file {name}")
    if path.suffix == ".gguf" or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"there is no model at {name}")
    return name, None


def _look_into(folder: Path) -> tuple[str, str | None]:
    if (folder / "config.json").is_file():
        return str(folder), None
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds an adapter, not a model: give the model that it was trained on")
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if len(files) > 1:
        raise ValueError(f"{folder} holds {len(files)} GGUF files, name one of them: {', '.join(files)}")
    if not files:
        raise ValueError(f"{folder} is no model: it has neither a config.json nor a .gguf file")
    return str(folder), files[0]


def quantization_of(where: str, **hub_kwargs) -> dict:
    """The `quantization_config` of a folder or hub id, as it is written there; empty for a model without."""
    config = _config_of(where, **hub_kwargs)
    return config.get("quantization_config") or config.get("compression_config") or {}


def _config_of(where: str, **hub_kwargs) -> dict:
    """The config.json of a folder or hub id."""
    from transformers import PreTrainedConfig

    with _clear_errors(where, {}):
        return PreTrainedConfig.get_config_dict(where, **hub_kwargs)[0]


def _defaults(quantization: dict, for_training: bool) -> dict:
    on_gpu = torch.cuda.is_available()
    arguments = {"device_map": "cuda"} if on_gpu else {}
    arguments["dtype"] = ("auto" if quantization else torch.bfloat16) if on_gpu else torch.float32
    method = quantization.get("quant_method")
    with _clear_errors("", quantization):
        if method == "gguf":
            arguments |= _gguf_arguments()
        elif method == "compressed-tensors" and _is_one_packed_scheme(quantization):
            from transformers import CompressedTensorsConfig

            arguments["quantization_config"] = CompressedTensorsConfig(dequantize=True)
        elif method in ("gptq", "awq") and for_training:
            from transformers import AwqConfig, GPTQConfig

            kind, backend = (GPTQConfig, "torch") if method == "gptq" else (AwqConfig, "torch_awq")
            arguments["quantization_config"] = kind(bits=quantization.get("bits", 4), backend=backend)
    return arguments


def _gguf_arguments() -> dict:
    """Newer versions can compute on packed blocks, without gradients; older ones always unpack."""
    import transformers

    if not hasattr(transformers, "GgufConfig"):
        return {}
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}


def _is_one_packed_scheme(quantization: dict) -> bool:
    """Whether unpacking is a matter of the weights alone, and one rule holds for all: transformers applies only one."""
    schemes = list(quantization.get("config_groups", {}).values())
    weights = [scheme.get("weights") for scheme in schemes]
    plain = all(not scheme.get("input_activations") for scheme in schemes)
    return (
        quantization.get("format") == "pack-quantized"
        and plain
        and bool(weights)
        and all(one is not None and one == weights[0] for one in weights)
    )


def _keep_differentiable(model: PreTrainedModel) -> None:
    """bitsandbytes repacks 4-bit weights at the first forward in evaluation mode on processors with AVX512-BF16.

    The kernel that reads them has no backward: from then on the gradient is lost, with a warning at most.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _forget_gguf(model: PreTrainedModel) -> None:
    """The weights are dense by now, but the model would refuse to be saved or trained for where it came from."""
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if name in vars(model):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


@contextlib.contextmanager
def unpacked(name_or_path: str | Path, beside: Path) -> Iterator[str]:
    """A model as a folder or Hub id, for what reads nothing else: of a GGUF file, a dense copy that is there within the block.

    Args:
        name_or_path (`str`): as `load_model`.
        beside (`Path`): the folder in which a copy is made: where there is room for what will come of it.
    """
    where, gguf_file = find_model(name_or_path)
    if gguf_file is None:
        yield where
        return
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{Path(gguf_file).stem}-", dir=beside) as folder:
        load_model(name_or_path, device_map="cpu").save_pretrained(folder)
        with contextlib.suppress(OSError, ValueError):  # whoever needs one will say so
            load_tokenizer(name_or_path).save_pretrained(folder)
        yield folder


def holds_packed_weights(gguf_file: str | Path) -> bool:
    """Whether a GGUF file is of a compressed model: weights in blocks of few bits, not numbers of 16 bits or more."""
    from gguf import GGMLQuantizationType, GGUFReader

    whole = {GGMLQuantizationType[name] for name in ("F64", "F32", "F16", "BF16")}
    return any(tensor.tensor_type not in whole for tensor in GGUFReader(gguf_file).tensors)


@contextlib.contextmanager
def _clear_errors(name: str | Path, quantization: dict) -> Iterator[None]:
    """Turns transformers' long errors into one line that names the model."""
    method = quantization.get("quant_method")
    try:
        yield
    except ImportError as error:
        reader = READERS.get(method)
        if reader is None:
            raise
        raise missing(f'reading a {method} model needs another library: pip install "{reader}"', error) from error
    except OSError as error:
        if Path(name).expanduser().is_dir():
            raise ValueError(f"{name} is no complete model: {reason(error)}") from error
        raise FileNotFoundError(f"{name} is neither a folder nor a model of the hub: {reason(error)}") from error


@contextlib.contextmanager
def accepted_by_trainer(model: torch.nn.Module) -> Iterator[None]:
    """Within it, `Trainer(model, ...)` accepts an adapter on any quantised base; afterwards nothing is changed.

    `Trainer` refuses several formats by a list, whether or not they hand gradients on. Ask `probe_gradients` first: it
    looks at the gradients themselves. Only the construction must stand inside, training need not.
    """
    # What transformers sets on models whose adapter it added itself; its check lets those pass.
    name = "_hf_peft_config_loaded"
    before = vars(model).get(name)
    setattr(model, name, True)
    try:
        yield
    finally:
        if before is None:
            delattr(model, name)
        else:
            setattr(model, name, before)
