"""vLLM in this process, for many prompts at a time: what `llm2slm generate --engine vllm` writes with."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, GenerationConfig

from ..configuration_llm2slm import LLM_PLACE, LLM2SLMConfig
from ..language_models import response_limit
from ..tokenization_llm2slm import LLM2SLMTokenizer
from .offline import Answer, Writer, check_lengths
from .prompt_files import Prompts

TOP_K = 50  # Transformers', of a checkpoint that samples and does not say
# Of a generation config: what vLLM does not do, or not as `generate` does, with the value by which it says nothing.
NOT_SERVED: dict[str, Any] = {
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size", "epsilon_cutoff", "eta_cutoff"), 0),
    **dict.fromkeys(("encoder_repetition_penalty", "guidance_scale", "typical_p"), 1),
    **dict.fromkeys(("bad_words_ids", "begin_suppress_tokens", "exponential_decay_length_penalty", "max_time")),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "sequence_bias", "stop_strings")),
    **dict.fromkeys(("suppress_tokens", "top_h", "watermarking_config")),
}


@dataclass
class Choice:
    r"""
    How tokens are chosen. What is `None` is as the checkpoint says.

    Args:
        max_new_tokens (`int`, *optional*): Tokens of a response at most.
        do_sample (`bool`, *optional*): Whether to sample, or to take the likeliest.
        temperature, top_p (`float`, *optional*): Of sampling.
        seed (`int`, *optional*): Of samples. Each prompt has its own: this one and the number of its row.
    """

    max_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None


def vllm_writer(
    checkpoint: str,
    prompts: Prompts,
    choice: Choice,
    revision: str | None = None,
    llm: str | None = None,
    dtype: str = "auto",
    prompt_max_length: int | None = None,
) -> Writer:
    r"""
    Starts vLLM's engine in this process.

    Args:
        checkpoint (`str`): A folder, or a name on the Hub.
        prompts ([`Prompts`]): What it will be given.
        choice ([`Choice`]): How tokens are chosen. Beams are not served: a checkpoint that asks for them is greedy.
        revision (`str`, *optional*): Branch, tag or commit of its repository.
        llm (`str`, *optional*): Where its LLM is, if not where it says.
        dtype (`str`, *optional*, defaults to `"auto"`): Number format of the weights; as they are stored.
        prompt_max_length (`int`, *optional*): Cuts prompts to this many tokens of the LLM.

    Raises:
        OSError: if there is no such checkpoint, or not its LLM.
        ValueError: if it is another kind of model, its LLM is not the one it was trained with, its SLM is an
            encoder-decoder, its generation config asks for what vLLM does not do, or a prompt is too long.
    """
    config = _read_config(checkpoint, revision)
    own = _generation_config(checkpoint, revision, config)
    params = sampling_params(own, choice)
    if own.num_beams not in (None, 1):
        print(f"Without beams: the {own.num_beams} that this checkpoint asks for are not vLLM's.", file=sys.stderr)
    tokenizer = LLM2SLMTokenizer.from_pretrained(checkpoint, revision=revision)
    check_lengths(prompts, tokenizer, config, params["max_tokens"], prompt_max_length)
    # In one process an error is raised as it is, and Ctrl-C ends the engine too. Standard output is for responses.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its warnings would tear the progress bar
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB; without a GPU it would ask for nearly all there are
    import vllm
    from vllm.exceptions import VLLMValidationError
    from vllm.platforms import current_platform

    from .vllm_plugin import register

    register()
    try:
        vllm.SamplingParams(**params)
    except VLLMValidationError as error:
        raise ValueError(str(error)) from error
    if dtype == "auto" and config.dtype is not None:  # vLLM would make bfloat16 of float32
        dtype = str(config.dtype).removeprefix("torch.")
    options: dict[str, Any] = {}
    if choice.seed is not None and current_platform.is_cpu():
        # vLLM 0.32 stops at a prompt with a seed that is read in parts: it takes back a random number, which it can on
        # a GPU only.
        options["enable_chunked_prefill"] = False
    elsewhere = {**dict.fromkeys(LLM_PLACE), "llm_name_or_path": llm, "llm_alternatives": None}
    engine = vllm.LLM(
        checkpoint,
        revision=revision,
        dtype=dtype,
        hf_overrides={} if llm is None else elsewhere,
        distributed_executor_backend="uni",
        **options,
    )
    truncation = {"truncation": True, "max_length": prompt_max_length} if prompt_max_length else {}

    def write(prompts: list[str], rows: list[int], tell: Callable[[int], None]) -> list[Answer]:
        ids = tokenizer(prompts, **truncation)["input_ids"]
        ways = [vllm.SamplingParams(**params, seed=None if choice.seed is None else choice.seed + row) for row in rows]
        engine.enqueue([{"prompt_token_ids": prompt} for prompt in ids], ways, use_tqdm=False)
        finished = []
        while engine.llm_engine.has_unfinished_requests():
            for output in engine.llm_engine.step():
                if output.finished:
                    finished.append(output)
                    tell(len(output.outputs[0].token_ids))
        # vLLM numbers requests as they come.
        responses = [output.outputs[0] for output in sorted(finished, key=lambda output: int(output.request_id))]
        texts = tokenizer.batch_decode([response.token_ids for response in responses], skip_special_tokens=True)
        return [
            Answer(text, response.finish_reason, len(response.token_ids))
            for text, response in zip(texts, responses, strict=True)
        ]

    return write


def sampling_params(own: GenerationConfig, choice: Choice) -> dict[str, Any]:
    """
    Arguments of vLLM's `SamplingParams` for what is asked for and, where nothing is, the checkpoint's own config.

    Raises:
        ValueError: if that asks for what vLLM does not do.
    """
    for name, off in NOT_SERVED.items():
        if (value := getattr(own, name, None)) not in (None, off, [], {}):
            raise ValueError(
                f"The checkpoint's generation config says `{name}` {value!r}, which --engine vllm does not do: leave "
                "it out."
            )
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    params: dict[str, Any] = {
        "temperature": 0.0,
        "max_tokens": response_limit(own, is_encoder_decoder=False),
        "repetition_penalty": own.repetition_penalty or 1.0,
        # The ends that `generate` knows, and not those that vLLM finds besides.
        "ignore_eos": True,
        "stop_token_ids": [end for end in ends if end is not None],
        "detokenize": False,
    }
    if choice.max_new_tokens is not None:
        params["max_tokens"] = choice.max_new_tokens
    if own.do_sample if choice.do_sample is None else choice.do_sample:
        for name, asked in (("temperature", choice.temperature), ("top_p", choice.top_p)):
            said = getattr(own, name) if asked is None else asked
            params[name] = 1.0 if said is None else said
        params |= {"top_k": TOP_K if own.top_k is None else own.top_k, "min_p": own.min_p or 0.0}
    return params


def _read_config(checkpoint: str, revision: str | None) -> LLM2SLMConfig:
    try:
        config = AutoConfig.from_pretrained(checkpoint, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise OSError(f"There is no checkpoint {checkpoint!r}: {error}") from error
    if config.model_type != "llm2slm":
        raise ValueError(f"{checkpoint!r} is a {config.model_type} model, not an LLM-to-SLM checkpoint.")
    if config.slm_config.is_encoder_decoder:
        raise ValueError(
            f"vLLM serves decoder-only SLMs, and this pair's is an encoder-decoder ({config.slm_config.model_type}): "
            "leave out --engine."
        )
    return config


def _generation_config(checkpoint: str, revision: str | None, config: LLM2SLMConfig) -> GenerationConfig:
    try:
        own = GenerationConfig.from_pretrained(checkpoint, revision=revision)
    except OSError:  # it is the model's then, as everywhere in Transformers
        own = GenerationConfig.from_model_config(config)
    if own.eos_token_id is None:  # `generate` ends at the SLM's own then
        own.eos_token_id = config.slm_config.eos_token_id
    return own
