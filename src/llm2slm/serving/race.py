"""A race: the LLM and LLM-to-SLM write to the same prompt, live, and each is timed.

Choices made here:
- One after another, never at once. They would share the cores, and none would be as fast as it is; so each has the
  machine for itself, as a user of one of them has it.
- Times are those of tokens where they are made: from the call of `generate` to each token, the prompt's reading
  included. What is shown follows a tenth of a second behind at most, so that showing costs the writer next to nothing.
- All write greedily, at most the same number of tokens. Nothing waits but for the model.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer
from transformers.utils import cached_file

from ..language_models import (
    EndAtString,
    check_positions,
    cut_at,
    few_shot_prompts,
    find_too_long,
    load_checkpoint,
    load_model,
    response_limit,
    set_generation,
)
from ..loading_llm2slm import split_gguf
from ..modeling_llm2slm import LLM2SLMForConditionalGeneration
from ..tokenization_llm2slm import LLM2SLMTokenizer
from ..utils import machine

TITLES = {
    "llm": "LLM",
    "llm2slm": "LLM-to-SLM",
    "fast": "LLM-to-SLM, fast decode",
    "lossless": "Lossless: the LLM's own words, drafted",
}
MAX_CHARACTERS = 8000  # of a prompt
UPDATE_SECONDS = 0.1  # between two looks at a response
WARM_UP_LENGTHS = (2, 300)  # tokens: fast decode compiles one step for short caches, and one for all longer ones


@dataclass(frozen=True)
class Progress:
    r"""
    A response so far.

    Args:
        text (`str`): What is written.
        tokens (`int`): How many, the end-of-sequence token included.
        first_token_s (`float`, *optional*): Seconds from the call to the first token.
        seconds (`float`, *optional*): Seconds from the call to the last token, once it is written.
        is_cut (`bool`): Whether it ended at its limit.
    """

    text: str = ""
    tokens: int = 0
    first_token_s: float | None = None
    seconds: float | None = None
    is_cut: bool = False


@dataclass(frozen=True)
class Racer:
    r"""
    Something that writes.

    Args:
        title (`str`): What it is called.
        configs (`list[PretrainedConfig]`): Of the models that must hold prompt and response.
        read (`Callable`): From a text to `input_ids` and `attention_mask`.
        generate (`Callable`): Writes one response, with these and a `streamer`.
        tokenizer: Of what it writes.
        skips_first (`bool`): Whether the first that its streamer gets is the prompt, or a start token.
        goes_on (`bool`): Whether its ids are the prompt's and then the response's.
        ends (`list[int]`): The tokens that end a response.
        stop (`list[str]`): The strings that do.
        max_new_tokens (`int`): Tokens of a response at most.
    """

    title: str
    configs: list[Any]
    read: Callable[[str], dict[str, torch.Tensor]]
    generate: Callable[..., Any]
    tokenizer: Any
    skips_first: bool
    goes_on: bool
    ends: list[int]
    stop: list[str]
    max_new_tokens: int

    def check(self, prompt: str) -> dict[str, torch.Tensor]:
        """
        The prompt as the model reads it.

        Raises:
            ValueError: if it is empty or too long.
        """
        if not prompt.strip():
            raise ValueError("The prompt is empty.")
        if len(prompt) > MAX_CHARACTERS:
            raise ValueError(f"The prompt has {len(prompt):,} characters, and may have {MAX_CHARACTERS:,} at most.")
        inputs = self.read(prompt)
        lengths = [(inputs["input_ids"].shape[1], self.max_new_tokens)]
        for config in self.configs:
            check_positions(config, lengths, "The prompt with its response", "shorten the prompt")
        return inputs

    def write(self, inputs: dict[str, torch.Tensor]) -> Iterator[Progress]:
        """
        Writes a response, and shows it before the start, now and then, and at last whole. Whoever stops looking
        (`close` of the iterator) ends it at its next token.
        """
        yield Progress()
        streamer, left = _Watch(self.tokenizer, self.skips_first), threading.Event()
        stopping = StoppingCriteriaList([_Left(left)])
        if self.stop:
            before = inputs["input_ids"].shape[1] if self.goes_on else 0
            stopping.append(EndAtString(self.tokenizer, self.stop, before))
        thread = threading.Thread(target=streamer.watch, args=(self.generate, inputs, stopping), daemon=True)
        text, last_look = "", 0.0
        thread.start()
        try:
            for part in streamer:
                text += part
                if (now := time.perf_counter()) - last_look >= UPDATE_SECONDS and streamer.times:
                    last_look = now
                    yield streamer.progress(text)
            thread.join()
            if streamer.error is not None:
                raise streamer.error
            tokens = len(streamer.times)
            is_cut = tokens >= self.max_new_tokens and streamer.last_token not in self.ends
            shown = cut_at(text, self.stop)
            is_cut = is_cut and shown == text
            yield replace(streamer.progress(shown), seconds=streamer.times[-1] if tokens else 0.0, is_cut=is_cut)
        finally:
            left.set()
            thread.join()

    def warm_up(self, device: torch.device, lengths: Sequence[int]) -> None:
        """Writes two tokens to prompts of these lengths: what is slow the first time, such as compiling, is done."""
        for length in lengths:
            if not any(find_too_long(config, [(length, 2)]) for config in self.configs):
                ids = torch.tensor([[i % 2 for i in range(length)]], device=device)
                inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                self.generate(**inputs, max_new_tokens=2, min_new_tokens=2)


class Race:
    r"""
    Racers that write to one prompt, one after another.

    Args:
        racers (`Sequence[Racer]`): In the order in which they start.
        reference (`int`): The index of the one that the others' speeds are compared with.
        setting (`str`): What they run on, and how.
    """

    def __init__(self, racers: Sequence[Racer], reference: int, setting: str):
        self.racers, self.reference, self.setting = list(racers), reference, setting
        self._turn = threading.Lock()

    def run(self, prompt: str) -> Iterator[tuple[int, Progress]]:
        """
        Each racer's index and its response so far, until all have written. Two races do not run at once: the second
        waits.

        Raises:
            ValueError: if the prompt is empty, or too long for one of them; then none has begun.
        """
        all_inputs = [racer.check(prompt) for racer in self.racers]
        with self._turn:
            for index, (racer, inputs) in enumerate(zip(self.racers, all_inputs, strict=True)):
                for progress in racer.write(inputs):
                    yield index, progress


# ------------------------------------------------------------------------------------------------------------- loading
def load_race(
    checkpoint: str,
    systems: Sequence[str] = ("llm", "llm2slm", "fast"),
    llm: str | None = None,
    adapter: str | None = None,
    instruction: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    max_new_tokens: int | None = None,
) -> Race:
    r"""
    Loads what races, and warms it up.

    Args:
        checkpoint (`str`): An LLM-to-SLM checkpoint: folder, or name on the Hub.
        systems (`Sequence[str]`, *optional*): Names of `TITLES`, in the order in which they start.
        llm (`str`, *optional*): Where the LLM is, if not where the checkpoint says.
        adapter (`str`, *optional*): A PEFT adapter of the LLM for the same task: folder, or name on the Hub.
        instruction (`str`, *optional*):
            What the LLM is told before the prompt, as a chat if it has a template. Without one it reads the prompt in
            the checkpoint's `prompt_format`, as the pair does.
        revision (`str`, *optional*): Branch, tag or commit of the checkpoint's repository.
        dtype (`str`, *optional*, defaults to `"auto"`): Number format of all weights; the checkpoint's.
        device (`str`, *optional*): See [`~llm2slm.language_models.choose_device`].
        max_new_tokens (`int`, *optional*): Tokens of a response at most; as the checkpoint says if omitted.

    Raises:
        OSError: if there is no such checkpoint, LLM or adapter.
        ValueError: if one is another kind of model, or options disagree.
    """
    if instruction is not None and "lossless" in systems:
        raise ValueError("The lossless mode writes without --instruction: leave out one of them.")
    pair, tokenizer = load_checkpoint(checkpoint, revision, llm, dtype, device)
    if max_new_tokens is None:
        max_new_tokens = response_limit(pair.generation_config, pair.config.slm_config.is_encoder_decoder)
    pair_stop, llm_stop = set_generation(pair, tokenizer, max_new_tokens, num_beams=1), []
    whole_llm: Any = None
    llm_tokenizer = tokenizer
    if "llm" in systems or "lossless" in systems:
        whole_llm, llm_tokenizer = _load_llm(pair, tokenizer, llm, adapter, instruction)
        llm_stop = set_generation(whole_llm, llm_tokenizer, max_new_tokens, num_beams=1)
    elif adapter is not None or instruction is not None:
        raise ValueError("--adapter and --instruction are about the LLM: add 'llm' to --systems.")

    def read(prompt):
        return _as_inputs(tokenizer(prompt, return_tensors="pt"), pair)

    def read_with_llm(prompt):
        if instruction is None:
            return _as_inputs(llm_tokenizer(prompt, return_tensors="pt"), whole_llm)
        (told,) = few_shot_prompts([prompt], [], instruction, llm_tokenizer)
        if isinstance(told, str):
            return _as_inputs(llm_tokenizer(told, return_tensors="pt"), whole_llm)
        arguments = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return _as_inputs(llm_tokenizer.apply_chat_template(told, **arguments), whole_llm)

    def write_lossless(**kwargs):
        return pair.generate_lossless(llm=whole_llm, fast=True, **kwargs)

    def write_fast(**kwargs):
        return pair.generate(fast=True, **kwargs)

    starts = pair.config.slm_config.is_encoder_decoder
    titles = TITLES | ({} if adapter is None else {"llm": "LLM with an adapter"})

    def make(name, models, reads, writes, writers_tokenizer, skips_first) -> Racer:
        configs, writer = [model.config for model in models], models[0]
        goes_on = writer is not pair and not writer.config.is_encoder_decoder
        ends, stop = writer.generation_config.eos_token_id, pair_stop if writer is pair else llm_stop
        how = (skips_first, goes_on, ends, stop, max_new_tokens)
        return Racer(titles[name], configs, reads, writes, writers_tokenizer, *how)

    makers: dict[str, Callable[[], Racer]] = {
        "llm": lambda: make("llm", [whole_llm], read_with_llm, whole_llm.generate, llm_tokenizer, True),
        "llm2slm": lambda: make("llm2slm", [pair], read, pair.generate, tokenizer, starts),
        "fast": lambda: make("fast", [pair], read, write_fast, tokenizer, starts),
        "lossless": lambda: make("lossless", [whole_llm, pair], read, write_lossless, llm_tokenizer, True),
    }
    names = list(dict.fromkeys(systems))
    racers = [makers[name]() for name in names]
    for racer in racers:
        racer.warm_up(pair.device, WARM_UP_LENGTHS[:1])
    if "fast" in names or "lossless" in names:  # one compiled step writes for both
        makers["fast"]().warm_up(pair.device, WARM_UP_LENGTHS)
    reference = names.index("llm") if "llm" in names else 0
    said = [f"All write greedily, {max_new_tokens} tokens at most, {_describe_machine(pair)}."]
    if instruction is not None:
        said.append(f"The LLM is told first: {instruction}")
    elif adapter is None and "llm" in names:
        said.append("The LLM was not trained for this task: it goes on from the prompt as it likes.")
    if not pair.config.shared_tokenizer:
        said.append("LLM and SLM have tokenizers of their own, so their tokens are not of one length.")
    return Race(racers, reference, " ".join(said))


def _describe_machine(model) -> str:
    here, dtype = machine(), str(model.dtype).removeprefix("torch.")
    if model.device.type == "cpu":
        return f"in {dtype} on {here['cpu']}, {here['threads']} thread{'s' * (here['threads'] != 1)}"
    return f"in {dtype} on {here['gpu'] or model.device}"


def _as_inputs(encoded, model) -> dict[str, torch.Tensor]:
    return {part: encoded[part].to(model.device) for part in ("input_ids", "attention_mask")}


def _load_llm(
    pair: LLM2SLMForConditionalGeneration,
    tokenizer: LLM2SLMTokenizer,
    llm: str | None,
    adapter: str | None,
    instruction: str | None,
) -> tuple[PreTrainedModel, LLM2SLMTokenizer]:
    """The LLM with its head, on the pair's device and in its number format, and a tokenizer that reads as the pair."""
    config, dtype = pair.config, str(pair.dtype).removeprefix("torch.")
    name, revision = llm, None
    if name is None and config.llm_name_or_path is not None:
        name, revision = config.llm_name_or_path, config.llm_revision
        if config.llm_gguf_file is not None:
            folder, file = split_gguf(name, config.llm_gguf_file, config.llm_install)
            name, revision = cached_file(folder, file, revision=revision), None
    if adapter is not None:
        model, llm_tokenizer = load_model(adapter, None, llm, dtype, str(pair.device), name)
    elif name is None:
        raise ValueError(
            "The checkpoint holds of its LLM what reads the prompt, without a head: say with --llm where the whole "
            "LLM is, or choose --systems without it."
        )
    else:
        model, llm_tokenizer = load_model(name, revision, None, dtype, str(pair.device))
    if model.config.model_type == "llm2slm":
        raise ValueError(f"{adapter or name!r} is an LLM-to-SLM checkpoint, not its LLM.")
    if instruction is None and llm_tokenizer.prompt_format is None:
        llm_tokenizer.prompt_format = tokenizer.prompt_format
    return model, llm_tokenizer


# ------------------------------------------------------------------------------------------------------------ watching
class _Left(StoppingCriteria):
    """Ends a response that nobody waits for."""

    def __init__(self, left: threading.Event):
        self.left = left

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), self.left.is_set(), dtype=torch.bool, device=input_ids.device)


class _Watch(TextIteratorStreamer):
    """The text of a response for another thread, and when each of its tokens came, in seconds from the call."""

    def __init__(self, tokenizer, skips_first: bool):
        super().__init__(tokenizer, skip_prompt=skips_first, skip_special_tokens=True)
        self.times: list[float] = []
        self.last_token: int | None = None
        self.error: Exception | None = None
        self._start = 0.0

    def watch(self, generate, inputs, stopping) -> None:
        """Writes a response, in a thread of its own."""
        self._start = time.perf_counter()
        try:
            generate(**inputs, streamer=self, stopping_criteria=stopping)
        except Exception as error:  # raised where the response is waited for
            self.error = error
            self.on_finalized_text("", stream_end=True)

    def put(self, value):
        """Takes new tokens; nothing of a decoder-only SLM's prompt, which is no tokens of its own."""
        if value.numel() and not (self.skip_prompt and self.next_tokens_are_prompt):
            self.times.append(time.perf_counter() - self._start)
            self.last_token = int(value.flatten()[-1])
        super().put(value)

    def progress(self, text: str) -> Progress:
        """What there is now."""
        return Progress(text, len(self.times), self.times[0] if self.times else None)
