"""One model called from eight threads: each caller gets the answer to its own prompt, whatever it calls."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import (
    FUSIONS,
    LLM_KINDS,
    build_labels,
    build_llm,
    build_llm_tokenizer,
    build_model,
    build_prompts,
    build_slm_tokenizer,
    count_hooks,
)

from llm2slm import (
    LLM2SLMForConditionalGeneration,
    LLM2SLMText2TextGenerationPipeline,
    LLM2SLMTokenizer,
    decoding_llm2slm,
)

THREADS, ROUNDS = 8, 2
LENGTHS = (5, 9, 3, 9, 12, 1, 9, 7)  # equal ones too: what is mixed up then has a shape that fits
PROMPTS = [prompt[None] for prompt in build_prompts(LENGTHS)]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "no_repeat_ngram_size": 1}


def assert_each_gets_its_own(call, inputs, alone=None):
    """`call` of each input in eight threads at once gives what it, or `alone`, gives by itself."""
    expected = [(alone or call)(given) for given in inputs]
    assert len({str(result) for result in expected}) > len(inputs) // 2  # what is mixed up would show
    with ThreadPoolExecutor(THREADS) as pool:
        for found in [list(pool.map(call, inputs)) for _ in range(ROUNDS)]:
            for i, (own, got) in enumerate(zip(expected, found, strict=True)):
                torch.testing.assert_close(got, own, atol=1e-5, rtol=1e-5, msg=f"caller {i}")


def entry_points(model):
    labels = build_labels(rows=1)

    def forward(prompt):
        with torch.no_grad():
            return model(prompt, labels=labels).logits

    def head_states(prompt):  # what TRL's trainers call
        decoder_input_ids = model.prepare_decoder_input_ids_from_labels(labels)
        return model.base_model(input_ids=prompt, decoder_input_ids=decoder_input_ids).last_hidden_state.detach()

    return {
        "encode_hidden_states": model.encode_hidden_states,
        "forward": forward,
        "greedy": lambda prompt: model.generate(prompt, **GREEDY),
        "encode_prompt": lambda prompt: model.encode_prompt(prompt).prompt_embeds.detach(),
        "base_model": head_states,
        "beams": lambda prompt: model.generate(prompt, **GREEDY, num_beams=3),
        # The one token that may be sampled is the best: random numbers are shared by all threads.
        "sampling": lambda prompt: model.generate(prompt, **(GREEDY | {"do_sample": True, "top_k": 1})),
        "static cache": lambda prompt: model.generate(prompt, **GREEDY, cache_implementation="static"),
    }


# What threads could mix up is the LLM's, by its kind, or the fusion's: each LLM once, and the fusions take turns.
MATRIX = list(zip(LLM_KINDS, itertools.cycle(FUSIONS), strict=False))


@pytest.mark.parametrize(("llm", "fusion"), MATRIX, ids=map("-".join, MATRIX))
def test_each_thread_gets_the_answer_to_its_own_prompt(llm, fusion):
    slm = "t5" if fusion == "replace" else "llama"
    model = build_model(llm, slm, llm_layer=[0, 1, -1], **FUSIONS[fusion])
    for name in ("encode_hidden_states", "forward", "greedy"):
        assert_each_gets_its_own(entry_points(model)[name], PROMPTS)


@pytest.mark.parametrize("slm", ["t5", "llama"])
def test_each_thread_gets_its_own_whatever_it_calls(slm):
    model = build_model("llama", slm)
    for call in entry_points(model).values():
        assert_each_gets_its_own(call, PROMPTS)


@pytest.mark.parametrize(
    ("slm", "options"), [("t5", {}), ("llama", {}), ("llama", {"num_beams": 2})], ids=["t5", "llama", "beams"]
)
def test_fast_decode_gives_each_thread_its_own(slm, options, monkeypatch):
    monkeypatch.setattr(decoding_llm2slm, "BACKEND", "eager")
    model = build_model("llama", slm)
    # Two numbers of rows, both compiled while other threads do so too.
    inputs = [torch.cat([prompt, prompt.flip(1)]) if i % 2 else prompt for i, prompt in enumerate(PROMPTS)]
    kwargs = GREEDY | {"eos_token_id": None} | options
    assert_each_gets_its_own(
        lambda prompt: model.generate(prompt, fast=True, **kwargs),
        inputs,
        alone=lambda prompt: model.generate(prompt, **kwargs),
    )
    compiled = decoding_llm2slm._compiled[model.slm].values()
    assert len(compiled) == 2 and not any(step.failed for step in compiled)


@pytest.mark.parametrize(
    ("llm", "fusion"),
    zip(["t5", "t5gemma", "bart", "llama", "gemma3", "gpt2"], 3 * ["replace", "add_shared"], strict=True),
)
def test_lossless_mode_gives_each_thread_its_own(llm, fusion):
    whole = build_llm(llm)
    model = build_model(llm, "llama", llm_layer=[0, 1], **(FUSIONS[fusion] | {"shared_tokenizer": True}))
    hooks = count_hooks(whole)
    assert_each_gets_its_own(
        lambda prompt: model.generate_lossless(prompt, llm=whole, max_new_tokens=5, no_repeat_ngram_size=1).sequences,
        PROMPTS,
    )
    assert count_hooks(whole) == hooks


def test_the_pipeline_gives_each_thread_its_own():
    model = build_model("llama", "t5")
    tokenizer = LLM2SLMTokenizer.from_tokenizers(build_llm_tokenizer(), build_slm_tokenizer())
    pipeline = LLM2SLMText2TextGenerationPipeline(model, tokenizer=tokenizer)
    texts = [" ".join(f"w{i * 7 + j}" for j in range(length % 6 + 1)) for i, length in enumerate(LENGTHS)]
    with ThreadPoolExecutor(THREADS) as pool:
        alone = [pipeline(text, **GREEDY) for text in texts]
        for _ in range(ROUNDS):
            assert list(pool.map(lambda text: pipeline(text, **GREEDY), texts)) == alone
    assert len(set(map(str, alone))) > len(texts) // 2


def test_the_tokenizer_cuts_and_pads_each_threads_text_as_it_asks():
    tokenizer = LLM2SLMTokenizer.from_tokenizers(build_llm_tokenizer(), build_slm_tokenizer())
    texts = [" ".join(f"w{(i * 7 + j) % 54}" for j in range(3 + i * 5)) for i in range(8)]

    def ids(i):
        options = {"truncation": True, "max_length": 4 + i} if i % 2 else {}
        if i % 3 == 0:
            options |= {"padding": "max_length", "max_length": 40}
        encoding = tokenizer(texts[i], text_target=texts[i], **options)
        return encoding["input_ids"], encoding["labels"], tokenizer.encode(texts[i], **options)

    alone = [ids(i) for i in range(8)]
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(50):
            assert list(pool.map(ids, range(8))) == alone


def test_the_tokenizer_reads_while_it_is_saved(tmp_path):
    tokenizer = LLM2SLMTokenizer.from_tokenizers(build_llm_tokenizer(), build_slm_tokenizer())
    expected = tokenizer("w1 w2")["input_ids"]
    with ThreadPoolExecutor(1) as pool:
        saved = pool.submit(lambda: [tokenizer.save_pretrained(tmp_path / str(i)) for i in range(5)])
        while not saved.done():
            assert tokenizer("w1 w2")["input_ids"] == expected
    assert len(saved.result()) == 5
    assert LLM2SLMTokenizer.from_pretrained(tmp_path / "4")("w1 w2")["input_ids"] == expected


@pytest.mark.parametrize("kind", LLM_KINDS)
def test_a_call_leaves_no_hook_and_changes_no_module(kind):
    llm = build_llm(kind)
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(llm, build_model().slm, llm_layer=[0, 1])

    def everything():
        return [(id(module), count_hooks(module), set(vars(module))) for module in (*llm.modules(), *model.modules())]

    before = everything()
    for name, call in entry_points(model).items():
        call(PROMPTS[0])
        # Of a static cache Transformers 4 keeps itself on the SLM, and Transformers 5 its length.
        names_kept = {"_cache", "_previous_max_cache_length"}
        after = [(i, hooks, names - names_kept) for i, hooks, names in everything()]
        assert after == before, name
