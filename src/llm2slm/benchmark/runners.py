"""What `llm2slm benchmark` measures side by side: LLM-to-SLM in its modes, its two models alone, and the alternatives.

Each runner reads a batch of the same random prompts and writes exactly as many tokens as asked for, greedily or by
beam search; each token is announced to a streamer. Whatever its checkpoint says of how to generate is left out.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LogitsProcessor,
    PreTrainedModel,
)

from ..arguments_llm2slm import only_special_tokens
from ..language_models import check_positions, load_checkpoint
from ..loading_llm2slm import load_slm, load_tokenizer, split_gguf
from ..modeling_llm2slm import LLM2SLMForConditionalGeneration
from ..utils import check_installed
from .random_models import SIZES, load_config

# Systems of other packages: the name it is imported by, and installed by.
OTHERS = {"ctranslate2": ("ctranslate2", "ctranslate2"), "llama.cpp": ("llama_cpp", "llama-cpp-python")}


_NO_GGUF = "The system 'llama.cpp' needs --gguf FILE: the LLM as a GGUF file."


@dataclass(frozen=True)
class Workload:
    """
    What each system is given to do.

    Args:
        prompt_length, response_length (`int`): Tokens.
        batch_size (`int`): Prompts at a time.
        num_beams (`int`): Of the systems with beam search.
        dtype (`str`): Number format of the weights.
        device (`torch.device`): Where they are.
    """

    prompt_length: int
    response_length: int
    batch_size: int
    num_beams: int
    dtype: str
    device: torch.device


@dataclass
class Runner:
    """
    Something that writes responses.

    Args:
        name (`str`): One of [`~llm2slm.benchmark.report.SYSTEMS`].
        config (`PretrainedConfig`, *optional*): Of the model whose costs can be counted.
        parameters (`int`): Its number of weights, shared ones once.
        weight_bytes (`int`): Their size.
        generate (`Callable`):
            `generate(num_tokens, streamer)` writes that many tokens for each prompt and returns how many it wrote;
            `streamer.put` is called once for each.
        facts (`dict`): What the last run said of itself, such as an acceptance rate.
    """

    name: str
    config: Any
    parameters: int
    weight_bytes: int
    generate: Callable[[int, Any], int]
    facts: dict[str, float]


def load_runners(
    systems: Sequence[str],
    work: Workload,
    model: str | None,
    llm: str | None,
    slm: str | None,
    revision: str | None,
    assistant: str | None,
    gguf: str | None,
) -> list[Runner]:
    """
    The systems, in their order; arguments are those of [`~llm2slm.benchmark.measure.benchmark`].

    Raises:
        OSError: if a model is missing.
        ValueError: if a system cannot be had with these models, or the lengths are more than a model takes.
        ImportError: if the package of a system is missing.
    """
    names = list(dict.fromkeys(systems))
    for name, (module, package) in OTHERS.items():
        if name in names:
            check_installed(f"The system {name!r}", module, install=f"pip install {package}")
    if "llama.cpp" in names and gguf is None:
        raise ValueError(_NO_GGUF)
    whole_llm, alone, llm2slm = _load_models(names, work, model, llm, slm, revision)
    makers: dict[str, Callable[[], Runner]] = {
        "slm": lambda: _transformers("slm", alone, work),
        "llm2slm": lambda: _transformers("llm2slm", llm2slm, work),
        "llm": lambda: _transformers("llm", whole_llm, work),
        "fast": lambda: _transformers("fast", llm2slm, work, fast=True),
        "beams": lambda: _transformers("beams", llm2slm, work, work.num_beams),
        "fast_beams": lambda: _transformers("fast_beams", llm2slm, work, work.num_beams, fast=True),
        "reuse": lambda: _reuse(llm2slm, work),
        "assisted": lambda: _assisted(whole_llm, work, llm or llm2slm.config.llm_name_or_path, assistant),
        "lossless": lambda: _lossless(llm2slm, whole_llm, work),
        "ctranslate2": lambda: _ctranslate2(whole_llm, work),
        "llama.cpp": lambda: _llama_cpp(gguf, work),
    }
    runners = []
    for name in names:
        if name in ("llm", "assisted", "lossless", "ctranslate2") and whole_llm is None:
            print(f"Left out: {name}. The checkpoint holds what reads the prompt; give --llm.", file=sys.stderr)
            continue
        runners.append(makers[name]())
    return runners


# ------------------------------------------------------------------------------------------------------------- models
def _load_models(
    names: list[str], work: Workload, model: str | None, llm: str | None, slm: str | None, revision: str | None
):
    """LLM (`None` if it cannot write by itself), SLM and LLM-to-SLM; the last shares what it can with the others."""
    torch.manual_seed(0)
    if model is None:
        whole_llm, alone = _load(llm, work), _load(slm, work)
        # Read as the lossless mode needs it: the same ids on both sides.
        shared = "lossless" in names
        llm2slm = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(whole_llm, alone, shared_tokenizer=shared)
    else:
        llm2slm, _ = load_checkpoint(model, revision, llm, work.dtype, str(work.device))
        config, whole_llm, alone = llm2slm.config, None, llm2slm.slm
        if {"llm", "assisted", "lossless", "ctranslate2"} & set(names):
            if llm is not None:
                whole_llm = _load(llm, work)
            elif config.llm_name_or_path is not None:
                source = {"revision": config.llm_revision, "gguf_file": config.llm_gguf_file}
                whole_llm = _load(config.llm_name_or_path, work, **source)
    for name, loaded in (("slm", alone), ("llm2slm", llm2slm), ("llm", whole_llm)):
        if loaded is not None:
            _forget_generation_settings(loaded)
            check_positions(
                loaded.config.slm_config if name == "llm2slm" else loaded.config,
                [(work.prompt_length, work.response_length)],
                f"{name}: --prompt-length {work.prompt_length} with --response-length {work.response_length}",
                "lower one of them",
            )
    return whole_llm, alone, llm2slm


def _load(name, work: Workload, **kwargs) -> PreTrainedModel:
    if name not in SIZES:  # whatever writes by itself is loaded in one way, LLM or SLM
        return load_slm(name, dtype=work.dtype, **kwargs).to(work.device).eval()
    config = load_config(name)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    dtype = None if work.dtype == "auto" else getattr(torch, work.dtype)
    return auto_class.from_config(config).to(work.device, dtype).eval()


def _forget_generation_settings(model) -> None:
    """Leaves nothing but the special tokens of a checkpoint's generation configuration."""
    config = only_special_tokens(model.generation_config)
    if config.eos_token_id is None:  # some token has to be the one that is ruled out
        config.eos_token_id = 0
    if config.pad_token_id is None:
        eos = config.eos_token_id
        config.pad_token_id = eos[0] if isinstance(eos, list) else eos
    model.generation_config = config


def _prompts(config, work: Workload) -> dict[str, torch.Tensor]:
    # Those who read with the LLM take its ids; LLM-to-SLM says which configuration that is.
    config = config.llm_text_config if config.model_type == "llm2slm" else config.get_text_config()
    shape, generator = (work.batch_size, work.prompt_length), torch.Generator().manual_seed(0)
    input_ids = torch.randint(config.vocab_size // 2, config.vocab_size, shape, generator=generator).to(work.device)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def _settings(num_tokens: int) -> dict[str, Any]:
    return {"do_sample": False, "num_beams": 1, "min_new_tokens": num_tokens, "max_new_tokens": num_tokens}


def _runner(name: str, model, generate, facts=None) -> Runner:
    parameters = list(model.parameters())
    return Runner(
        name=name,
        config=model.config,
        parameters=sum(p.numel() for p in parameters),
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
        generate=generate,
        facts={} if facts is None else facts,
    )


# --------------------------------------------------------------------------------------------------------- systems
class _Announcer(LogitsProcessor):
    """Announces each step to a streamer, which beam search does not take."""

    def __init__(self, streamer):
        self.streamer = streamer

    def __call__(self, input_ids, scores):
        self.streamer.put(None)
        return scores


def _transformers(name: str, model, work: Workload, num_beams: int = 1, **options) -> Runner:
    inputs = _prompts(model.config, work)
    repeated = 0 if model.config.is_encoder_decoder else work.prompt_length  # a decoder-only model's prompt

    def generate(num_tokens: int, streamer) -> int:
        told = {"streamer": streamer} if num_beams == 1 else {"logits_processor": [_Announcer(streamer)]}
        settings = _settings(num_tokens) | {"num_beams": num_beams} | told
        return model.generate(**inputs, **settings, **options).shape[1] - repeated

    return _runner(name, model, generate)


def _reuse(model, work: Workload) -> Runner:
    encoding = model.encode_prompt(**_prompts(model.config, work))

    def generate(num_tokens: int, streamer) -> int:
        return model.generate(**encoding, streamer=streamer, **_settings(num_tokens)).shape[1]

    return _runner("reuse", model.slm, generate)


def _assisted(llm, work: Workload, name: str | None, assistant_name: str | None) -> Runner:
    if assistant_name is None:
        raise ValueError("The system 'assisted' needs --assistant: a language model that drafts for the LLM.")
    if work.batch_size > 1:
        raise ValueError("The system 'assisted' takes one prompt at a time: --batch-size 1.")
    assistant, inputs, options = _load(assistant_name, work), _prompts(llm.config, work), {}
    if assistant.config.get_text_config().vocab_size != llm.config.get_text_config().vocab_size:
        # Universal assisted generation, which translates the drafts through text.
        if name is None:
            raise ValueError("The system 'assisted' needs --llm: where the LLM's tokenizer is.")
        options = {"tokenizer": load_tokenizer(name), "assistant_tokenizer": load_tokenizer(assistant_name)}

    def generate(num_tokens: int, streamer) -> int:
        settings = {"streamer": streamer, **_settings(num_tokens), **options}
        # Transformers 4 rules out no token of a draft: the length is kept by an end token that does not exist.
        settings.pop("min_new_tokens")
        settings["eos_token_id"] = -1
        ids = llm.generate(**inputs, assistant_model=assistant, **settings)
        return ids.shape[1] - (0 if llm.config.is_encoder_decoder else work.prompt_length)

    return _runner("assisted", llm, generate)


def _lossless(model, llm, work: Workload) -> Runner:
    if work.batch_size > 1:
        raise ValueError("The system 'lossless' takes one prompt at a time: --batch-size 1.")
    inputs = _prompts(model.config, work)
    facts: dict[str, float] = {}

    def generate(num_tokens: int, streamer) -> int:
        settings = _settings(num_tokens)
        output = model.generate_lossless(**inputs, llm=llm, streamer=streamer, **settings)
        facts.update(acceptance_rate=output.acceptance_rate, llm_calls=output.llm_calls)
        return output.sequences.shape[1]

    return _runner("lossless", llm, generate, facts)


def _ctranslate2(llm, work: Workload) -> Runner:
    import ctranslate2

    if llm.config.model_type != "t5":
        raise ValueError(f"The system 'ctranslate2' is for LLMs of T5's kind, got {llm.config.model_type}.")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"t{i}": i for i in range(llm.config.vocab_size)}
    with tempfile.TemporaryDirectory(prefix="llm2slm-ctranslate2-") as name:
        folder = Path(name)
        llm.save_pretrained(folder / "llm")  # the converter reads a folder, with some tokenizer
        PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t2")),
            eos_token="t1",
            pad_token="t0",
            unk_token="t2",
        ).save_pretrained(folder / "llm")
        converter = ctranslate2.converters.TransformersConverter(str(folder / "llm"))
        converter.convert(str(folder / "converted"), quantization="int8")
        translator = ctranslate2.Translator(str(folder / "converted"), intra_threads=torch.get_num_threads())
        weight_bytes = (folder / "converted" / "model.bin").stat().st_size
    prompts = [[f"t{i}" for i in row] for row in _prompts(llm.config, work)["input_ids"].tolist()]

    def generate(num_tokens: int, streamer) -> int:
        results = translator.translate_batch(
            prompts,
            beam_size=1,
            min_decoding_length=num_tokens,
            max_decoding_length=num_tokens,
            callback=lambda step: streamer.put(step.token_id) if step.batch_id == 0 else None,
        )
        return min(len(result.hypotheses[0]) for result in results)

    runner = _runner("ctranslate2", llm, generate)
    runner.config, runner.weight_bytes = None, weight_bytes
    return runner


def _llama_cpp(gguf: str | None, work: Workload) -> Runner:
    import llama_cpp

    if gguf is None:
        raise ValueError(_NO_GGUF)
    folder, name = split_gguf(gguf, None)
    path = os.path.join(folder, name) if name is not None else gguf
    if work.batch_size > 1:
        raise ValueError("The system 'llama.cpp' takes one prompt at a time: --batch-size 1.")
    llm = llama_cpp.Llama(
        path,
        n_ctx=work.prompt_length + work.response_length + 8,
        n_threads=torch.get_num_threads(),
        n_threads_batch=torch.get_num_threads(),
        verbose=False,
    )
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(llm.n_vocab() // 2, llm.n_vocab(), (work.prompt_length,), generator=generator).tolist()

    def generate(num_tokens: int, streamer) -> int:
        llm.reset()
        llm.eval(prompt)
        for i in range(num_tokens):
            token = llm.sample(temp=0.0)
            streamer.put(token)
            if i + 1 < num_tokens:
                llm.eval([token])
        return num_tokens

    size = os.path.getsize(path)
    parameters = llama_cpp.llama_model_n_params(llm._model.model)
    return Runner("llama.cpp", None, parameters, size, generate, {})
