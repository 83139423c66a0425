"""The text2text-generation task: in process on both major versions, and from a checkpoint's own files."""

import numpy as np
import pytest
import torch
from conftest import build_llm, build_model, build_slm_tokenizer
from datasets import Dataset
from transformers import TextStreamer, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from llm2slm import LLM2SLMText2TextGenerationPipeline, LLM2SLMTokenizer

TASK = "text2text-generation"
TEXTS = ["w1 w2 w3", "w4", "w5 w6"]
CHATS = [[{"role": "user", "content": text}] for text in TEXTS]
# Transformers 4 has a pipeline of its own for the task, whose default is 4 beams.
LENGTH = {"max_new_tokens": 6, "do_sample": False, "num_beams": 1}


@pytest.fixture(params=["t5", "llama"])
def model(request):
    return build_model(slm=request.param)


@pytest.fixture
def generate(model, tokenizer):
    """The pipeline that a checkpoint brings, the same in both major versions."""
    return pipeline(TASK, model=model, tokenizer=tokenizer, pipeline_class=LLM2SLMText2TextGenerationPipeline)


@pytest.fixture
def expected(model, tokenizer):
    """A function that gives the response to one text without a pipeline."""

    def respond(text, **kwargs):
        ids = model.generate(**tokenizer(text, return_tensors="pt", **kwargs), **LENGTH)
        return {"generated_text": tokenizer.decode(ids[0], skip_special_tokens=True)}

    return respond


def test_the_task_takes_a_model_object(model, tokenizer, expected):
    generate = pipeline(TASK, model=model, tokenizer=tokenizer)
    assert generate(TEXTS[0], **LENGTH) == [expected(TEXTS[0])]
    assert generate(TEXTS, **LENGTH) == [expected(text) for text in TEXTS]
    assert len({response["generated_text"] for response in generate(TEXTS, **LENGTH)}) > 1


def test_the_task_takes_the_folder_of_a_checkpoint(tokenizer, tmp_path):
    build_llm().save_pretrained(tmp_path / "llm")
    model = build_model(tmp_path / "llm")
    model.save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    generate = pipeline(TASK, model=str(tmp_path / "checkpoint"), trust_remote_code=True)
    assert type(generate).__name__ == "LLM2SLMText2TextGenerationPipeline"
    ids = model.generate(**tokenizer(TEXTS[0], return_tensors="pt"), **LENGTH)
    response = {"generated_text": tokenizer.decode(ids[0], skip_special_tokens=True)}
    assert generate(TEXTS[0], **LENGTH) == generate(TEXTS[:1], **LENGTH) == [response]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_write_what_single_texts_write(generate, expected, batch_size, side):
    generate.tokenizer.llm_tokenizer.padding_side = side
    responses = generate(TEXTS, batch_size=batch_size, **LENGTH)
    assert responses == [expected(text) for text in TEXTS]


def test_batches_need_no_padding_token_that_the_llm_knows(model, llm_tokenizer):
    slm_tokenizer = build_slm_tokenizer()
    slm_tokenizer.add_special_tokens({"pad_token": "<padding>"})  # id 64; the LLM knows 60
    tokenizer = LLM2SLMTokenizer.from_tokenizers(llm_tokenizer, slm_tokenizer)
    for kwargs in ({}, {"pipeline_class": LLM2SLMText2TextGenerationPipeline}):
        generate = pipeline(TASK, model=model, tokenizer=tokenizer, **kwargs)
        assert generate(TEXTS, batch_size=3, **LENGTH) == generate(TEXTS, **LENGTH)


def test_chats_go_through_the_llms_template(generate, expected):
    responses = [expected(f"user {text} assistant", add_special_tokens=False) for text in TEXTS]
    assert generate(CHATS[0], **LENGTH) == [responses[0]]
    assert generate(CHATS, **LENGTH) == [[response] for response in responses]
    assert generate(CHATS, batch_size=2, **LENGTH) == [[response] for response in responses]
    assert responses[0] != expected(TEXTS[0])


def test_several_messages_are_one_chat(generate, expected):
    chat = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": "w3"},
    ]
    text = "user w1 assistant w2 user w3 assistant"
    assert generate(chat, **LENGTH) == [expected(text, add_special_tokens=False)]


def test_arguments_reach_the_chat_template(generate, expected):
    generate.tokenizer.chat_template = "{{ extra }} {{ messages[0]['content'] }}"
    response = generate(CHATS[0], chat_template_kwargs={"extra": "w7"}, **LENGTH)
    assert response == [expected("w7 w1 w2 w3", add_special_tokens=False)]


def test_generators_and_data_sets_are_streamed(generate, expected):
    responses = [[expected(text)] for text in TEXTS]
    assert list(generate((text for text in TEXTS), **LENGTH)) == responses
    data = Dataset.from_dict({"prompt": TEXTS})
    assert list(generate(KeyDataset(data, "prompt"), **LENGTH)) == responses
    assert list(generate(KeyDataset(data, "prompt"), batch_size=2, **LENGTH)) == responses


def test_whatever_else_holds_texts_is_a_list_of_them(generate):
    several = generate(list(TEXTS), **LENGTH)
    assert generate(Dataset.from_dict({"prompt": TEXTS})["prompt"], **LENGTH) == several
    assert generate(tuple(TEXTS), **LENGTH) == generate(np.array(TEXTS), **LENGTH) == several
    assert generate([], **LENGTH) == generate((), **LENGTH) == []


@pytest.mark.parametrize("none", [None, 3, {"prompt": "w1"}, [3], [["w1", "w2"]], [{"prompt": "w1"}]])
def test_what_is_no_prompt_is_refused_in_words(generate, none):
    with pytest.raises(TypeError, match="A prompt must be a string, or a chat"):
        generate(none, **LENGTH)


def test_the_llms_ids_are_not_decoded_with_the_slms_tokenizer(generate, model):
    with pytest.raises(ValueError, match="the ids of a response are the LLM's"):
        generate(TEXTS[0], llm=model.llm, **LENGTH)


def test_several_responses_to_each_text(generate):
    sampled = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 6}
    one = generate(TEXTS[0], **sampled)
    assert len(one) == 3 and len({response["generated_text"] for response in one}) > 1
    for batch_size in (1, 2):
        responses = generate(TEXTS, batch_size=batch_size, **sampled)
        assert [len(row) for row in responses] == [3, 3, 3]
    beams = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 6}
    assert generate(TEXTS, batch_size=3, **beams) == [generate(text, **beams) for text in TEXTS]


def test_ids_instead_of_text(generate, model, tokenizer):
    (response,) = generate(TEXTS[0], return_tensors=True, **LENGTH)
    ids = model.generate(**tokenizer(TEXTS[0], return_tensors="pt"), **LENGTH)
    assert torch.as_tensor(response["generated_token_ids"]).equal(ids[0])


def test_prompts_can_be_cut(generate, expected):
    text = "w1 w2 w3 w4 w5"
    response = generate(text, truncation=True, prompt_max_length=3, **LENGTH)
    assert response == [expected(text, truncation=True, max_length=3)]
    assert response != [expected(text)]
    with pytest.raises(ValueError, match="70 tokens.*LLM.*64 positions"):
        generate(" ".join(["w1"] * 69), **LENGTH)


def test_arguments_of_generate_can_stand_in_the_pipeline(model, tokenizer):
    generate = pipeline(TASK, model=model, tokenizer=tokenizer, pipeline_class=LLM2SLMText2TextGenerationPipeline)
    set_before = pipeline(
        TASK, model=model, tokenizer=tokenizer, pipeline_class=LLM2SLMText2TextGenerationPipeline, **LENGTH
    )
    assert set_before(TEXTS) == generate(TEXTS, **LENGTH)
    assert set_before(TEXTS, max_new_tokens=1) == generate(TEXTS, **LENGTH | {"max_new_tokens": 1})
    details = {"return_dict_in_generate": True, "output_scores": True}
    assert set_before(TEXTS, **details) == generate(TEXTS, **LENGTH)


def test_a_text_can_be_streamed_while_it_is_written(generate, tokenizer, capsys):
    (response,) = generate(TEXTS[0], streamer=TextStreamer(tokenizer, skip_special_tokens=True), **LENGTH)
    assert capsys.readouterr().out.strip() == response["generated_text"].strip() != ""


def test_texts_are_put_into_the_form_of_the_training_and_chats_are_not(generate, tokenizer, expected):
    in_form, chat = expected("so w1 w2 w3 {} w0"), generate(CHATS[0], **LENGTH)
    assert in_form != expected(TEXTS[0])
    tokenizer.prompt_format = "so {prompt} {{}} w0"
    assert generate(TEXTS[0], **LENGTH) == [in_form]
    assert generate(CHATS[0], **LENGTH) == chat


@pytest.mark.parametrize("pipeline_class", [None, LLM2SLMText2TextGenerationPipeline], ids=["the task's", "ours"])
def test_a_checkpoints_own_way_of_writing_is_the_default(model, tokenizer, pipeline_class):
    tokenizer.prompt_format = "so {prompt} w0"
    # Four, since the pipeline of Transformers 4 has four of its own, whatever the checkpoint says.
    model.generation_config.update(max_length=24, num_beams=4, eos_token_id=None)
    ids = model.generate(**tokenizer(TEXTS[0], return_tensors="pt"), max_length=24, num_beams=4)
    assert ids.shape[1] == 24
    write = pipeline(TASK, model=model, tokenizer=tokenizer, pipeline_class=pipeline_class)
    assert write(TEXTS[0]) == [{"generated_text": tokenizer.decode(ids[0], skip_special_tokens=True)}]
    greedy = model.generate(**tokenizer(TEXTS[0], return_tensors="pt"), **LENGTH)
    assert write(TEXTS[0], **LENGTH) == [{"generated_text": tokenizer.decode(greedy[0], skip_special_tokens=True)}]


@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_text_is_refused(generate, empty):
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(empty, **LENGTH)
    with pytest.raises(ValueError, match="prompt is empty"):
        generate([TEXTS[0], empty], **LENGTH)
