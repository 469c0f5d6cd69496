"""What an IDP adapter is: how many prompts, how long, who picks one, and how they start."""

from __future__ import annotations

import copy
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from peft import PeftConfig, TaskType

from idp_peft.hosting.checkpoint import refuse_gguf_base_in_auto_class
from idp_peft.hosting.prompt_ids import checked_names, number_of


class IDPPeftType(str, enum.Enum):
    """The key under which PEFT and transformers know the method.

    An enum of our own: transformers reads `peft_type.value`, so a plain string would break it.
    """

    IDP = "IDP"


_CHOICES = {
    "prompts": ("tokens", "key_values"),
    "selection": ("attention", "centroid", "random", "fixed"),
    "selection_reduction": ("mean", "sum"),
    "assignment": ("uniform", "selected", "all"),
    "init": ("vocab", "random", "text"),
}
# Prompt tokens that a bank may have in all. A config from a file could otherwise ask for any amount of memory.
MAX_TOKENS = 2**20
# PEFT and TRL read these fields on every config; IDP trains nothing but its prompts, so they stay None.
_UNUSED_FIELDS = ("target_modules", "modules_to_save", "trainable_token_indices")


@dataclass
class IDPConfig(PeftConfig):
    r"""
    Configuration of Inference-time Dynamic Prompting: M soft prompts, one of which each input picks for itself.

        i*(x)  = argmax_i  mean_{heads, t in ctx(x), j <= k_i}  A[t, (i, j)]
        IDP(x) = f([P_{i*} ; E(x)])

    Source: Hoang et al., "Do Compressed LLMs Forget Knowledge?", arXiv 2310.00867, section 3. The paper leaves prompt
    counts, lengths and the selecting layer open; each is a field here.

    Args:
        task_type (`str`, *required in practice*, defaults to `None`):
            `"CAUSAL_LM"`, or `None` for a bare `PeftModel` around a causal language model. Nothing else: the method
            needs causal attention.
        num_prompts (`int`, defaults to `4`):
            M, how many soft prompts the bank holds, at least 1. With 1 there is nothing to choose and IDP is prompt
            tuning that survives padding, beams and static caches.
        num_virtual_tokens (`int`, `list[int]` or `None`, defaults to `32`):
            k, the length of every prompt in tokens, or one length per prompt (each at least 1). `None` is allowed with
            `init="text"` alone: each prompt is then as long as its text. 32 is a whole number of cache blocks in the
            common serving engines.
        prompts (`str`, defaults to `"tokens"`):
            What a prompt is. `"tokens"`, the paper's: k input vectors, whose keys and values are what the base makes of them.
            `"key_values"`: the keys and values of every layer are the parameters themselves (`key_values.py`); they repair
            more, have one length, and start at real text: `init="text"`, [`start_at`] or `recover`.
        num_frozen_tokens (`int`, defaults to `1`):
            How many tokens at the front of each key/value prompt are not trained, below `num_virtual_tokens`: the first is the
            attention sink (the token that takes surplus attention), which training destroys. Token prompts have none.
        scales (`bool`, defaults to `False`):
            Whether one factor per output channel of every linear layer of the decoder is trained beside the prompts
            (`scales.py`). All prompts share them; a row without a prompt gets the base exactly. They can be folded into the
            weights' own row scales.
        scale_group_size (`int`, *optional*):
            With `scales=True`: one factor per output channel *and* per so many neighbouring input channels (of a layer whose inputs
            that does not divide, per output channel). They want the weights in memory as floating point numbers, and fold into
            quantised weights whose groups are of this size, or divide it. `None`: a factor is for a whole row.
        prompt_names (`list[str]`, *optional*):
            What the prompts are called, one distinct name per prompt: `prompt_ids` then takes names as well as numbers
            (`model(..., prompt_ids=["arc", "boolq", None, "auto"])`), and `last_selection.names` gives them. `"auto"`
            is no name: it lets a row choose beside forced ones. Where `prompt_ids` must be a tensor (a dataset's column
            for `Trainer`), [`~IDPConfig.prompt_id`] turns a name into its number.
        selection (`str`, defaults to `"attention"`):
            Who picks. `"attention"`: the equation above, the paper's. `"centroid"`: the prompt whose training contexts are
            most like the input, by the cosine of mean input embeddings (`selection.py`); right far more often where
            inputs differ in kind (`benchmarks/kinds`), and no layer runs for it. `"random"`: a hash of the context's token
            ids and `selection_seed`, so the same input always gets the same prompt, alone or in a batch; the baseline
            every claim about selection must beat. `"fixed"`: always `fixed_prompt`.
        learn_centroids (`bool`, defaults to `True`):
            Whether `selection="centroid"` learns its centroids while training, from the contexts that train each prompt.
            [`fit_centroids`] sets them beforehand, and turns this off. A single prompt learns one too, for [`compose`].
        selection_layer (`int`, defaults to `0`):
            The decoder layer whose attention decides, from `-L` to `L-1` for L layers; negative counts from the end.
            At layer 0 the choice is exact and costs a fraction of one layer, because the input's queries there do not
            depend on any prompt. At a deeper layer the layers below see all M prompts at once, as in the paper.
        selection_reduction (`str`, defaults to `"mean"`):
            `"mean"` divides a prompt's attention by its length; `"sum"` does not, and so favours longer prompts.
        selection_seed (`int`, defaults to `0`):
            Seed of `selection="random"`, 0 or more.
        fixed_prompt (`int`, defaults to `0`):
            The prompt that `selection="fixed"` uses, from 0 to `num_prompts - 1`.
        assignment (`str`, defaults to `"selected"`):
            Which prompt a training example trains (in training mode; evaluation always selects). `"selected"`: the one
            the example would choose, so that the prompts which inference uses are the ones that learn; it may settle
            on few of them. The choice reads what stands before the example's first label; a loop that calls the model
            without `labels` or `selection_mask` is warned once, since the choice then reads the targets too.
            `"uniform"`: a balanced random deal over each batch, from torch's global generator, so a
            resumed `Trainer` continues it exactly; all prompts learn, and the choice may fall on a poor one (measured:
            `benchmarks/LOG.md`). `"all"`: every example trains every prompt, at M times the cost; the loss is the mean
            over prompts, the returned logits their mean.
        init (`str`, defaults to `"vocab"`):
            How prompts start. `"vocab"`: embeddings of distinct random real tokens, after the embedding module's own
            scaling (Gemma multiplies by the square root of the width), so that they start where the model expects
            its inputs. `"random"`: Gaussian vectors of the same root mean square norm. `"text"`: the embeddings of
            `init_text`, repeated or cut to the prompt's length.
        init_text (`list[str]`, *optional*):
            One text per prompt, for `init="text"` alone.
        tokenizer_name_or_path (`str`, *optional*):
            Tokenizer of `init_text`: a Hub id, a folder or a `.gguf` file, for `init="text"` alone. It is used once, when the
            prompts start. It is never saved, and a config that is read from a file has none: loading an adapter loads no
            tokenizer. Set it again to start new prompts from a loaded config; without it they start as `"vocab"`.
        tokenizer_kwargs (`dict`, *optional*):
            Further arguments of `AutoTokenizer.from_pretrained`, for `init="text"` alone. Never saved either.
        init_weights (`bool`, defaults to `True`):
            `False` leaves the prompts at torch's own random embedding initialisation; for tests of loading.

    Raises:
        `ValueError`: naming the field, the rule and the value received, for every value or combination outside the
        above.
    """

    num_prompts: int = field(default=4, metadata={"help": "M, the number of soft prompts in the bank (>= 1)."})
    num_virtual_tokens: int | list[int] | None = field(
        default=32, metadata={"help": "k, tokens per prompt: one int, or one length per prompt."}
    )
    prompts: str = field(default="tokens", metadata={"help": f"What a prompt is: one of {_CHOICES['prompts']}."})
    num_frozen_tokens: int = field(default=1, metadata={"help": "Tokens of a key/value prompt that are not trained."})
    scales: bool = field(default=False, metadata={"help": "Train a factor per output channel of the linear layers."})
    scale_group_size: int | None = field(
        default=None, metadata={"help": "Input channels that share a factor; None: all."}
    )
    prompt_names: list[str] | None = field(default=None, metadata={"help": "One distinct name per prompt."})
    selection: str = field(
        default="attention", metadata={"help": f"Who picks a prompt: one of {_CHOICES['selection']}."}
    )
    learn_centroids: bool = field(default=True, metadata={"help": "Learn centroids while training."})
    selection_layer: int = field(default=0, metadata={"help": "Layer whose attention decides; negative from the end."})
    selection_reduction: str = field(default="mean", metadata={"help": f"One of {_CHOICES['selection_reduction']}."})
    selection_seed: int = field(default=0, metadata={"help": "Seed of selection='random' (>= 0)."})
    fixed_prompt: int = field(default=0, metadata={"help": "The prompt that selection='fixed' uses."})
    assignment: str = field(
        default="selected", metadata={"help": f"Prompt a training example trains: {_CHOICES['assignment']}."}
    )
    init: str = field(default="vocab", metadata={"help": f"How prompts start: one of {_CHOICES['init']}."})
    init_text: list[str] | None = field(default=None, metadata={"help": "One text per prompt, for init='text'."})
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "Tokenizer of `init_text`."})
    tokenizer_kwargs: dict | None = field(default=None, metadata={"help": "Arguments of that tokenizer's loading."})
    init_weights: bool = field(default=True, metadata={"help": "False: leave torch's embedding initialisation."})
    target_modules: list[str] | None = field(default=None, metadata={"help": "Must stay None."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Must stay None."})
    trainable_token_indices: list[int] | None = field(default=None, metadata={"help": "Must stay None."})

    def __post_init__(self) -> None:
        super().__post_init__()
        # A plain string means a file: code leaves the enum.
        from_file = type(self.peft_type) is str
        self.peft_type = IDPPeftType.IDP
        refuse_gguf_base_in_auto_class(self.base_model_name_or_path)
        if from_file:
            self.tokenizer_name_or_path = self.tokenizer_kwargs = None
        if self.task_type not in (None, TaskType.CAUSAL_LM):
            raise ValueError(
                f"`task_type` must be 'CAUSAL_LM' (or None), got {str(self.task_type)!r}: IDP prompts a causal language model"
            )
        for name in _UNUSED_FIELDS:
            if (value := getattr(self, name)) is not None:
                raise ValueError(f"`{name}` must be None, got {value!r}: IDP trains its prompts and nothing else")
        for name, allowed in _CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, got {value!r}")
        if not isinstance(self.scales, bool):
            raise ValueError(f"`scales` must be True or False, got {self.scales!r}")
        if self.scale_group_size is not None:
            _check_int("scale_group_size", self.scale_group_size, low=1)
            if not self.scales:
                raise ValueError(f"`scale_group_size` {self.scale_group_size} needs scales=True, got scales=False")
        _check_int("num_prompts", self.num_prompts, low=1)
        self._check_lengths(from_file)
        self.prompt_names = checked_names(self.prompt_names, self.num_prompts)
        _check_int("selection_layer", self.selection_layer)
        _check_int("selection_seed", self.selection_seed, low=0, high=2**63 - 1)
        _check_int("fixed_prompt", self.fixed_prompt, low=0)
        if self.fixed_prompt >= self.num_prompts:
            raise ValueError(f"`fixed_prompt` must be below num_prompts={self.num_prompts}, got {self.fixed_prompt}")
        if self.fixed_prompt and self.selection != "fixed":
            raise ValueError(f"`fixed_prompt` {self.fixed_prompt} needs selection='fixed', got {self.selection!r}")
        if self.selection == "centroid" and self.learn_centroids and self.assignment != "selected":
            raise ValueError(
                f"`assignment` must be 'selected' where centroids are learned, got {self.assignment!r}, which trains every prompt "
                "on every kind of input: set learn_centroids=False, and call `idp_peft.fit_centroids` before training"
            )
        self._check_text_init(from_file)
        _check_int("num_frozen_tokens", self.num_frozen_tokens, low=0)
        if self.prompts == "key_values":
            self._check_key_values(from_file)

    def _check_key_values(self, from_file: bool) -> None:
        length = self.num_virtual_tokens
        if not isinstance(length, int):
            raise ValueError(
                f"`num_virtual_tokens` must be one length for all with prompts='key_values', got {length!r}"
            )
        _check_int("num_frozen_tokens", self.num_frozen_tokens, low=0, high=length - 1)
        if self.init != "text" and self.init_weights and not from_file:
            raise ValueError(
                f"prompts='key_values' must start at real text (random ones make the model worse): set init='text' with "
                f"`init_text`, or init_weights=False and call `idp_peft.start_at`; got init={self.init!r}"
            )

    def _check_lengths(self, from_file: bool) -> None:
        lengths = self.num_virtual_tokens
        if lengths is None and from_file:
            raise ValueError("`num_virtual_tokens` must be given in a config that is read from a file, got None")
        if lengths is None and self.init != "text":
            raise ValueError(f"`num_virtual_tokens` may be None with init='text' alone, got init={self.init!r}")
        if isinstance(lengths, (list, tuple)):
            if len(lengths) != self.num_prompts:
                raise ValueError(
                    f"`num_virtual_tokens` must have one length per prompt (num_prompts={self.num_prompts}), got "
                    f"{len(lengths)} lengths {list(lengths)}"
                )
            lengths = self.num_virtual_tokens = list(lengths)
        for length in [] if lengths is None else lengths if isinstance(lengths, list) else [lengths]:
            _check_int("num_virtual_tokens", length, low=1)
        total = 0 if lengths is None else sum(lengths) if isinstance(lengths, list) else lengths * self.num_prompts
        if max(total, self.num_prompts) > MAX_TOKENS:
            raise ValueError(
                f"`num_prompts` and `num_virtual_tokens` must give at most {MAX_TOKENS} prompt tokens in all, got "
                f"{max(total, self.num_prompts)}"
            )

    def _check_text_init(self, from_file: bool) -> None:
        texts = self.init_text
        if self.init != "text":
            for name in ("init_text", "tokenizer_name_or_path", "tokenizer_kwargs"):
                if (value := getattr(self, name)) is not None:
                    raise ValueError(f"`{name}` needs init='text', got {value!r} with init={self.init!r}")
            return
        if not isinstance(texts, (list, tuple)) or len(texts) != self.num_prompts:
            raise ValueError(
                f"`init_text` must be a list of one text per prompt (num_prompts={self.num_prompts}), got "
                f"{len(texts) if isinstance(texts, (list, tuple)) else repr(texts)}"
            )
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"`init_text` must hold texts that are not empty, got {text!r}")
        if self.tokenizer_name_or_path is None and not from_file:
            raise ValueError("`tokenizer_name_or_path` must be given with init='text', got None")
        if self.tokenizer_kwargs is not None and not isinstance(self.tokenizer_kwargs, Mapping):
            raise ValueError(f"`tokenizer_kwargs` must be a dict, got {self.tokenizer_kwargs!r}")

    @property
    def prompt_lengths(self) -> list[int]:
        """`list[int]` of M entries: the length k_i of each prompt, in tokens."""
        if self.num_virtual_tokens is None:
            raise ValueError("`num_virtual_tokens` is not known before the texts of `init_text` were tokenised")
        if isinstance(self.num_virtual_tokens, list):
            return list(self.num_virtual_tokens)
        return [self.num_virtual_tokens] * self.num_prompts

    @property
    def frozen_tokens(self) -> int:
        """How many tokens at the front of each prompt are not trained: 0 for token prompts."""
        return self.num_frozen_tokens if self.prompts == "key_values" else 0

    @property
    def chooses(self) -> bool:
        """Whether inputs choose: whether there is more than one prompt, and `selection` is not `"fixed"`."""
        return self.num_prompts > 1 and self.selection != "fixed"

    @property
    def keeps_centroids(self) -> bool:
        """Whether the adapter says what inputs its prompts are for. A single prompt does too, so that it can be composed."""
        return self.selection == "centroid" or self.num_prompts == 1

    def prompt_id(self, name: str | None) -> int:
        """The number of the prompt of this name, for `prompt_ids` that must be a tensor; -1 (no prompt) for `None`.

            dataset = dataset.map(lambda row: {"prompt_ids": config.prompt_id(row["task"])})

        Raises:
            `ValueError`: for an unknown name, or where `prompt_names` is `None`.
        """
        return -1 if name is None else number_of(name, self.num_prompts, self.prompt_names)

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Write the config into a folder, without what only the start of the prompts needed (their tokenizer).

        Raises:
            `ValueError`: where the lengths are not known yet (`num_virtual_tokens=None` before the prompts exist).
        """
        if self.num_virtual_tokens is None:
            raise ValueError(
                "`num_virtual_tokens` is not known before the texts of `init_text` were tokenised: save the config after "
                "`get_peft_model`"
            )
        saved = copy.copy(self)
        saved.tokenizer_name_or_path = saved.tokenizer_kwargs = None
        super(IDPConfig, saved).save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder=None, **kwargs):
        """Load a config from a folder or the Hub. Where it came from is remembered, so that the weights beside it can be
        checked before a model is touched (`hosting/checkpoint.py`)."""
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        hub_arguments, *_ = cls._split_kwargs(kwargs)
        config._came_from = (str(pretrained_model_name_or_path), subfolder, hub_arguments)
        return config


def _check_int(name: str, value, low: int | None = None, high: int | None = None) -> None:
    bound = "" if low is None else f" of at least {low}"
    bound += "" if high is None else f" and at most {high}"
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if not is_int or (low is not None and value < low) or (high is not None and value > high):
        raise ValueError(f"`{name}` must be an int{bound}, got {value!r}")
