"""Language models of any kind: loading them, counting their weights, their prompts, losses and responses.

The kinds: an LLM-to-SLM checkpoint, a causal language model, an encoder-decoder, and a PEFT adapter of any of these.
All get the two-sided tokenizer, so that one collator and one way to end a response serve all of them.
"""

import copy
import hashlib
import inspect
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from . import auto  # noqa: F401  (LLM-to-SLM is one of the models that the Auto classes load)
from .configuration_llm2slm import LLM2SLMConfig
from .loading_llm2slm import architecture_of, load_slm, load_tokenizer, max_positions, resolve_revision, split_gguf
from .modeling_llm2slm import LLM2SLMForConditionalGeneration
from .tokenization_llm2slm import LLM2SLMTokenizer
from .utils import MAX_NEW_TOKENS, check_installed

SHOT_SEPARATOR = "\n\n"  # between the examples shown to a model without a chat template; ends its response


# ---------------------------------------------------------------------------------------------------------------- load
def choose_device(name: str | None = None) -> torch.device:
    """
    The device asked for; CUDA if none is and there is one.

    Raises:
        ValueError: if this machine has no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # what torch raises for a name or a device it does not have
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def load_checkpoint(
    name: str,
    revision: str | None = None,
    llm: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    load_llm: bool = True,
) -> tuple[LLM2SLMForConditionalGeneration, LLM2SLMTokenizer]:
    """
    Loads an LLM-to-SLM checkpoint and its tokenizer with this package's classes. A checkpoint's own copy of the code
    is never run, so there is nothing to trust.

    Args:
        name (`str`): A folder, or a name on the Hub.
        revision (`str`, *optional*): Branch, tag or commit of its repository.
        llm (`str`, *optional*): Where its LLM is, if not where it says.
        dtype (`str`, *optional*, defaults to `"auto"`): Number format of the weights; as they are stored.
        device (`str`, *optional*): Where it is put; see [`choose_device`].
        load_llm (`bool`, *optional*, defaults to `True`): `False` leaves a slim checkpoint without its LLM.

    Raises:
        OSError: if there is no such checkpoint, or not its LLM.
        ValueError: if it is another kind of model, or its LLM is not the one it was trained with.
    """
    place = choose_device(device)
    check_folder(name)
    # The checkpoint's `auto_map` names code of its own; False says that the code registered here is the one to run.
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:  # which does not always say what it was looking for
        raise OSError(f"There is no checkpoint {name!r}: {error}") from error
    if config.model_type != "llm2slm":
        raise ValueError(f"{name!r} is a {config.model_type} model, not an LLM-to-SLM checkpoint.")
    # The tokenizer first: it is loaded in no time, and what is wrong with it shows before the models are read.
    tokenizer = LLM2SLMTokenizer.from_pretrained(name, revision=revision)
    model = LLM2SLMForConditionalGeneration.from_pretrained(
        name, revision=revision, llm_name_or_path=llm, dtype=dtype, load_llm=load_llm
    )
    return model.to(place), tokenizer


def load_model(
    name: str,
    revision: str | None = None,
    llm: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    trained_llm: str | None = None,
) -> tuple[PreTrainedModel, LLM2SLMTokenizer]:
    r"""
    Loads a model of any kind and its tokenizer.

    Args:
        name (`str`): A folder, a GGUF file, or a name on the Hub.
        revision (`str`, *optional*): Branch, tag or commit of its repository.
        llm (`str`, *optional*):
            Where the frozen LLM of an LLM-to-SLM checkpoint, or the base model of an adapter is, if not where they
            say.
        dtype (`str`, *optional*, defaults to `"auto"`): Number format of the weights; as they are stored.
        device (`str`, *optional*): Where it is put; see [`choose_device`].
        trained_llm (`str`, *optional*): What the training of an adapter called its base model.

    Raises:
        OSError: if there is no such model.
        ValueError: if it is not a language model, or `llm` is given for one that needs no other.
    """
    model, tokenizer = _load_any(name, revision, llm, dtype, device, trained_llm)
    if model.config.model_type != "llm2slm":  # which takes padding on either side
        tokenizer.llm_tokenizer.padding_side = "right" if model.config.is_encoder_decoder else "left"
    return model, tokenizer


def identify(model) -> str:
    """A hash of a model's architecture and of all its weights."""
    digest = hashlib.sha256()
    identity = [type(model).__name__, architecture_of(model.config)]
    digest.update(json.dumps(identity, sort_keys=True, default=str).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(content.numpy())
    return digest.hexdigest()


def weights_id(checkpoint: str, revision: str | None = None) -> str:
    """
    What tells a checkpoint's weights from those of another, before they are loaded: the commit on the Hub or, of a
    folder, their hash.

    Raises:
        OSError: if there is no such checkpoint.
    """
    check_folder(checkpoint)
    if commit := resolve_revision(checkpoint, None, {"revision": revision}):
        return commit
    digest = hashlib.sha256()
    for path in sorted(Path(checkpoint).glob("*.safetensors")):
        with open(path, "rb") as file:
            while part := file.read(2**24):
                digest.update(part)
    return digest.hexdigest()


def load_models_tokenizer(
    name: str, revision: str | None = None, llm: str | None = None, trained_llm: str | None = None
) -> LLM2SLMTokenizer:
    r"""
    Loads the tokenizer of a model of any kind, without the model; arguments are those of [`load_model`].

    Raises:
        OSError: if there is no such model.
    """
    check_folder(name)
    folder, gguf_file = split_gguf(name, None)
    if gguf_file is None and find_adapter_config_file(folder, revision=revision) is not None:
        check_installed("An adapter", "peft", install="pip install 'llm-to-slm[peft]'")
        return _load_adapters_tokenizer(name, revision, *_find_base(name, revision, llm, trained_llm))
    if _model_type(name, revision) == "llm2slm":
        return LLM2SLMTokenizer.from_pretrained(name, revision=revision)
    return _load_both_sides(name, revision)


def _load_any(name, revision, llm, dtype, device, trained_llm):
    check_folder(name)
    folder, gguf_file = split_gguf(name, None)
    if gguf_file is None and find_adapter_config_file(folder, revision=revision) is not None:
        return _load_adapter(name, revision, llm, dtype, device, trained_llm)
    if _model_type(name, revision) == "llm2slm":
        return load_checkpoint(name, revision, llm, dtype, device)
    if llm is not None:
        raise ValueError(f"{name!r} needs no other model: --llm is for LLM-to-SLM checkpoints and adapters.")
    return _load_language_model(name, revision, dtype, device), _load_both_sides(name, revision)


def _load_adapter(name, revision, llm, dtype, device, trained_llm):
    check_installed("An adapter", "peft", install="pip install 'llm-to-slm[peft]'")
    from peft import PeftModel

    base, is_llm2slm = _find_base(name, revision, llm, trained_llm)
    if is_llm2slm:
        model, _ = load_checkpoint(base, None, llm, dtype, device)
        tokenizer = _load_adapters_tokenizer(name, revision, base, is_llm2slm)
    else:
        tokenizer = _load_adapters_tokenizer(name, revision, base, is_llm2slm)
        model = _load_language_model(base, None, dtype, device)
    # Merged, as one would deploy it: without the adapter's own matrix products in each step.
    merged = PeftModel.from_pretrained(model, name, revision=revision).merge_and_unload().eval()
    read_states_in_one_piece(merged)  # PEFT leaves all but the adapter frozen
    return merged, tokenizer


def _find_base(name, revision, llm, trained_llm) -> tuple[str, bool]:
    """The base model of an adapter, and whether it is an LLM-to-SLM checkpoint."""
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(name, revision=revision).base_model_name_or_path
    try:
        if base is not None and _model_type(base, None) == "llm2slm":
            return base, True
    except OSError:  # not there any more: --llm or the training may say where it is
        pass
    base = llm or trained_llm or base
    if base is None:
        raise ValueError(f"The adapter {name!r} does not name its base model: say where it is with --llm.")
    return base, False


def _load_adapters_tokenizer(name, revision, base, is_llm2slm) -> LLM2SLMTokenizer:
    has_own = _is_there(name, "tokenizer_config.json", revision)
    if is_llm2slm:
        source, revision = (name, revision) if has_own else (base, None)
        return LLM2SLMTokenizer.from_pretrained(source, revision=revision)
    return _load_both_sides(name, revision) if has_own else _load_both_sides(base, None)


def _is_there(name, file, revision) -> bool:
    """Whether a folder, or a repository on the Hub, has a file."""
    quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return cached_file(name, file, revision=revision, **quietly) is not None


def _load_language_model(name, revision, dtype, device):
    place = choose_device(device)
    _model_type(name, revision)  # a model that is not there, said plainly
    model = load_slm(name, revision=revision, dtype=dtype, trust_remote_code=False)
    return model.to(place).eval()


def gguf_argument(gguf_file: str | None) -> dict[str, str]:
    """The argument `gguf_file` of `from_pretrained`, if there is such a file."""
    return {} if gguf_file is None else {"gguf_file": gguf_file}


def _load_both_sides(name, revision):
    tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=False)
    return LLM2SLMTokenizer.from_tokenizers(tokenizer, tokenizer)


def _model_type(name, revision):
    check_folder(name)
    folder, gguf_file = split_gguf(name, None)
    if gguf_file is not None:  # reading the configuration out of a GGUF file takes seconds
        return None
    try:
        return AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=False).model_type
    except (OSError, ValueError) as error:
        raise OSError(f"There is no model {name!r}: {error}") from error


def check_folder(name: str) -> None:
    """
    Checks that a name that can only be a folder's is one.

    Raises:
        OSError: if it is not.
    """
    looks_like_a_folder = name.startswith((".", "~", os.sep)) or name.endswith(os.sep)
    if looks_like_a_folder and not os.path.exists(name):
        raise OSError(f"There is no folder {name!r}.")


# ------------------------------------------------------------------------------------------------------------- weights
def whole_model(config: LLM2SLMConfig) -> LLM2SLMForConditionalGeneration:
    """An LLM-to-SLM model without values, to count its weights by: with the LLM, which a slim checkpoint lacks."""
    config = copy.deepcopy(config)
    config.include_llm = True
    with torch.device("meta"):
        return LLM2SLMForConditionalGeneration(config)


def read_states_in_one_piece(model: PreTrainedModel) -> None:
    """
    Lets the model's head, if it has one, copy the states that it gets into one piece. Those of the responses, or of
    the last position alone, are a slice, which `torch.matmul` multiplies row by row of the batch with copies of a
    frozen weight (PyTorch 2.13, https://github.com/pytorch/pytorch/pull/166891): on a CPU up to hundreds of times
    slower.
    """
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(_make_contiguous)


def _make_contiguous(head, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(states.contiguous() for states in inputs)


# ------------------------------------------------------------------------------------------------------------- prompts
def few_shot_prompts(prompts: list[str], shots: list[dict[str, str]], instruction: str | None, tokenizer) -> list:
    r"""
    Puts an instruction and solved examples before each prompt: as a chat if the tokenizer has a template, which then
    says the instruction before each prompt of it, else as text.

    Args:
        prompts (`list[str]`): The prompts.
        shots (`list[dict[str, str]]`): The examples, each with `prompt` and `completion`.
        instruction (`str`, *optional*): What is to be done.
        tokenizer ([`LLM2SLMTokenizer`]): The model's.

    Returns:
        `list`: for each prompt a string or a list of messages.
    """
    if tokenizer.chat_template is None:
        parts = [instruction] if instruction else []
        parts += [f"{shot['prompt'].strip()}\n{shot['completion'].strip()}" for shot in shots]
        return [SHOT_SEPARATOR.join([*parts, f"{prompt.strip()}\n"]) for prompt in prompts]

    def user(prompt):
        text = f"{instruction}\n\n{prompt.strip()}" if instruction else prompt.strip()
        return {"role": "user", "content": text}

    turns = []
    for shot in shots:
        turns += [user(shot["prompt"]), {"role": "assistant", "content": shot["completion"].strip()}]
    return [[*turns, user(prompt)] for prompt in prompts]


class TooLong(NamedTuple):
    """A prompt and a response that need more positions than `part` of a model has."""

    part: str
    needed: int
    limit: int


def find_too_long(config, lengths: Iterable[tuple[int, int]]) -> list[TooLong]:
    r"""
    Those of some prompts and responses that do not fit the positions of a model: of what writes and, for LLM-to-SLM,
    of its LLM.

    Args:
        config (`PretrainedConfig`): The model's.
        lengths (`Iterable[tuple[int, int]]`): Tokens of each prompt and of its response.
    """
    is_llm2slm = config.model_type == "llm2slm"
    writer = config.slm_config if is_llm2slm else config
    writers_name = f"the {'SLM' if is_llm2slm else 'model'} ({writer.model_type})"
    found = []
    for prompt, response in lengths:
        written = max(prompt, response) if writer.is_encoder_decoder else prompt + response
        needed = [(writers_name, written, max_positions(writer.get_text_config()))]
        if is_llm2slm:
            llm = config.llm_text_config
            needed.insert(0, (f"the LLM ({llm.model_type})", prompt, max_positions(llm)))
        beyond = [TooLong(part, size, limit) for part, size, limit in needed if limit is not None and size > limit]
        found += beyond[:1]
    return found


def check_positions(config, lengths: Iterable[tuple[int, int]], what: str, remedy: str) -> None:
    """
    Checks that prompts and responses fit the positions of a model, as [`find_too_long`] finds them.

    Args:
        what (`str`): What the error calls the longest.
        remedy (`str`): What to do about it.

    Raises:
        ValueError: if one does not.
    """
    if found := find_too_long(config, lengths):
        part, needed, limit = max(found, key=lambda one: one.needed)
        raise ValueError(f"{what} needs {needed} positions, but {part} has {limit}: {remedy}.")


# -------------------------------------------------------------------------------------------------- loss and responses
@torch.no_grad()
def response_loss(model, batch: dict[str, torch.Tensor]) -> float:
    r"""
    The sum of the negative log-likelihoods (nats) of a batch's response tokens.

    Args:
        model: Any of this module's.
        batch (`dict[str, torch.Tensor]`):
            `input_ids`, `attention_mask` and `labels`, and for LLM-to-SLM maybe `prompt_hidden_states`. Prompts of a
            decoder-only model are padded on the left.
    """
    logits = response_logits(model, batch)
    loss = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), batch["labels"].to(logits.device).flatten(), ignore_index=-100, reduction="sum"
    )
    return loss.item()


@torch.no_grad()
def response_logits(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    r"""
    Logits of shape `(batch_size, response_length, vocab_size)`, of which those at `i` predict label `i`.

    Args:
        model, batch: As [`response_loss`] takes them.
    """
    return model(**batch).logits if model.config.is_encoder_decoder else _decoder_only_logits(model, batch)


def _decoder_only_logits(model, batch):
    """Of shape `(batch_size, response_length, vocab_size)`: the prompt's last position predicts the first label."""
    labels = batch["labels"]
    fed = labels[:, :-1]
    ids = torch.cat([batch["input_ids"], fed.clamp(min=0)], dim=1)  # (batch_size, prompt + response - 1)
    mask = torch.cat([batch["attention_mask"], (fed != -100).long()], dim=1)
    arguments = inspect.signature(model.forward).parameters
    optional: dict[str, Any] = {}
    if "position_ids" in arguments:
        optional["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    if "logits_to_keep" in arguments:  # no head for the prompt's positions
        optional["logits_to_keep"] = labels.shape[1]
    return model(input_ids=ids, attention_mask=mask, use_cache=False, **optional).logits[:, -labels.shape[1] :]


def says_no_length(config: GenerationConfig) -> bool:
    """Whether a generation configuration leaves the length of responses to Transformers' default."""
    return config.max_new_tokens is None and config.max_length in (None, GenerationConfig().max_length)


def response_limit(config: GenerationConfig, is_encoder_decoder: bool) -> int:
    """Tokens of a response at most, by a generation configuration; `MAX_NEW_TOKENS` if it says nothing."""
    if says_no_length(config):
        return MAX_NEW_TOKENS
    return config.max_new_tokens or config.max_length - is_encoder_decoder  # `max_length` counts a start token


def end_tokens(model: LLM2SLMForConditionalGeneration) -> list[int]:
    """The tokens that end a response. What the config of the pair leaves open, `generate` takes from the SLM's."""
    ends = model.generation_config.eos_token_id
    ends = model.slm.generation_config.eos_token_id if ends is None else ends
    return [] if ends is None else ends if isinstance(ends, list) else [ends]


def own_stop_strings(config: GenerationConfig) -> list[str]:
    """The strings at which a generation configuration ends a response."""
    return [config.stop_strings] if isinstance(config.stop_strings, str) else config.stop_strings or []


def cut_at(text: str, strings: Iterable[str]) -> str:
    """What comes before the first of the strings."""
    return text[: min((place for string in strings if (place := text.find(string)) >= 0), default=len(text))]


class EndAtString(StoppingCriteria):
    r"""
    Ends each response of `generate` whose text has one of the strings.

    Args:
        tokenizer ([`LLM2SLMTokenizer`]): The model's.
        strings (`list[str]`): The strings.
        prompt_length (`int`, *optional*, defaults to 0): Where in the ids the response begins.
    """

    def __init__(self, tokenizer: LLM2SLMTokenizer, strings: list[str], prompt_length: int = 0):
        self.tokenizer, self.strings, self.prompt_length = tokenizer, strings, prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.Tensor:
        """Says of each response whether it has ended."""
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :], skip_special_tokens=True)
        ended = [any(string in text for string in self.strings) for text in texts]
        return torch.tensor(ended, device=input_ids.device)


def set_generation(model, tokenizer, max_new_tokens: int, num_beams: int) -> list[str]:
    """
    Makes the model's generation configuration greedy or, with `num_beams`, beam search; its tokens remain. Its stop
    strings are taken out and returned: [`write_responses`] looks for them.
    """
    config = model.generation_config
    stop = own_stop_strings(config)
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    config.update(
        do_sample=False,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        max_length=None,
        stop_strings=None,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=sorted({tokenizer.eos_token_id, *eos} - {None}),
        pad_token_id=tokenizer.pad_token_id if config.pad_token_id is None else config.pad_token_id,
    )
    return stop


@torch.no_grad()
def write_responses(
    model, tokenizer, batch: dict[str, torch.Tensor], stop: Sequence[str] = ()
) -> tuple[list[str], list[int]]:
    r"""
    Writes a response to each prompt of a batch.

    Args:
        model: Any of this module's.
        tokenizer ([`LLM2SLMTokenizer`]): The model's.
        batch (`dict[str, torch.Tensor]`): `input_ids` and `attention_mask`.
        stop (`Sequence[str]`, *optional*):
            What ends a response besides the end-of-sequence token, and is no part of it.

    Returns:
        `tuple[list[str], list[int]]`: the responses, and how many tokens each has, its end included.
    """
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    is_llm2slm = model.config.model_type == "llm2slm"
    writer = model.config.slm_config if is_llm2slm else model.config
    before = 0 if is_llm2slm else batch["input_ids"].shape[1]
    if writer.is_encoder_decoder:
        before = 1  # the start token
    stopping = StoppingCriteriaList([EndAtString(tokenizer, [*stop], before)] if stop else [])
    ids = model.generate(**inputs, stopping_criteria=stopping)[:, before:]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [cut_at(text, stop) for text in texts], _count_tokens(ids, model)


def _count_tokens(ids, model):
    """Each row's tokens before the padding, the end-of-sequence token included; it may be the padding too."""
    config = model.generation_config
    ended = torch.isin(ids, torch.tensor(config.eos_token_id, device=ids.device))
    with_end = ended.int().argmax(dim=1) + 1
    without_end = ids.shape[1] - (ids.flip(1) != config.pad_token_id).int().argmax(dim=1)
    return torch.where(ended.any(dim=1), with_end, without_end).tolist()
