"""Pairs become ids: within limits, through the chat template or not, and never an empty side."""

import logging

import pytest
import torch
from conftest import BOS, EOS, build_llm_tokenizer, build_model
from datasets import Dataset
from tokenizers import processors

from llm2slm import LLM2SLMTokenizer
from llm2slm.data.collator import DataCollatorForLLM2SLM, tokenize_pairs


def pairs(prompts, completions) -> Dataset:
    return Dataset.from_dict({"prompt": prompts, "completion": completions})


def chat(role, *contents) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for content in contents]


# ------------------------------------------------------------------------------------------------------------- tokens
def test_prompts_are_the_llms_ids_and_responses_the_slms_with_an_end(tokenizer):
    rows = pairs(["w1 w2", "w3"], ["ab", "c"]).add_column("source", ["x", "y"])
    tokenized = tokenize_pairs(rows, tokenizer, 16, 16)
    assert tokenized["input_ids"][:] == tokenizer.llm_tokenizer(["w1 w2", "w3"])["input_ids"]
    assert tokenized["labels"][:] == [[*tokenizer.slm_tokenizer(text)["input_ids"], EOS] for text in ("ab", "c")]
    assert tokenized["source"][:] == ["x", "y"]


def test_chats_go_through_the_llms_template_and_the_answer_is_the_response(tokenizer):
    rows = pairs([chat("user", "w1", "w2"), chat("user", "w3")], [chat("assistant", "ab"), chat("assistant", "c")])
    tokenized = tokenize_pairs(rows, tokenizer, 16, 16)
    llm_tokenizer = tokenizer.llm_tokenizer
    expected = [llm_tokenizer.convert_tokens_to_ids(text.split()) for text in ("user w1 user w2 assistant",)]
    assert tokenized["input_ids"][:1] == expected
    assert tokenized["labels"][:] == tokenize_pairs(pairs(["w1", "w3"], ["ab", "c"]), tokenizer, 16, 16)["labels"][:]


def test_special_tokens_that_a_chat_template_writes_are_not_doubled(slm_tokenizer):
    llm_tokenizer = build_llm_tokenizer()
    llm_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[START] $A", special_tokens=[("[START]", BOS)]
    )
    llm_tokenizer.chat_template = "{{ bos_token }} {% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer = LLM2SLMTokenizer.from_tokenizers(llm_tokenizer, slm_tokenizer)
    rows = tokenize_pairs(pairs([chat("user", "w1 w2")], ["a"]), tokenizer, 16, 16)
    assert rows[0]["input_ids"] == llm_tokenizer("w1 w2")["input_ids"]
    assert rows[0]["input_ids"].count(BOS) == 1


# ------------------------------------------------------------------------------------------------------------- limits
LONG = pairs(["w1 w2", "w1 " * 30, "w3", "w4 " * 20], ["ab", "a", "abcdefgh" * 3, "a" * 25])


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "llm2slm.data.collator"]


def test_pairs_over_the_limits_are_dropped_and_counted(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        tokenized = tokenize_pairs(LONG, tokenizer, prompt_max_length=16, response_max_length=10)
    assert tokenized["prompt"][:] == ["w1 w2"]
    assert warnings_of(caplog) == [
        "3 of 4 pairs are over the limits and were dropped: 2 prompts over 16 tokens (the longest has 31), 2 "
        "responses over 10 tokens (the longest has 26)."
    ]


def test_pairs_over_the_limits_are_cut_if_asked_to(tokenizer, caplog):
    whole = tokenize_pairs(LONG, tokenizer, 64, 64)
    with caplog.at_level(logging.WARNING):
        cut = tokenize_pairs(LONG, tokenizer, prompt_max_length=16, response_max_length=10, truncate=True)
    assert [len(ids) for ids in cut["input_ids"]] == [3, 16, 2, 16]
    assert all(ids[-1] == EOS for ids in cut["input_ids"])  # the LLM's own end token stays
    assert cut["labels"][:] == [ids[:10] for ids in whole["labels"]]
    assert [ids[-1] == EOS for ids in cut["labels"]] == [True, True, False, False]
    assert "3 of 4 pairs are over the limits and were cut" in warnings_of(caplog)[0]


def test_pairs_that_fit_exactly_are_kept_in_silence(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        assert len(tokenize_pairs(LONG, tokenizer, prompt_max_length=31, response_max_length=26)) == 4
    assert warnings_of(caplog) == []


def test_limits_that_leave_nothing(tokenizer):
    with pytest.raises(ValueError, match=r"4 of 4 pairs are over the limits: 4 prompts over 1 tokens \(the longest"):
        tokenize_pairs(LONG, tokenizer, prompt_max_length=1, response_max_length=64)
    for limit in ("prompt_max_length", "response_max_length"):
        with pytest.raises(ValueError, match=f"`{limit}` must be at least 1, got 0"):
            tokenize_pairs(LONG, tokenizer, **{"prompt_max_length": 8, "response_max_length": 8, limit: 0})


# ---------------------------------------------------------------------------------------------------------- bad input
def test_a_data_set_without_the_columns(tokenizer):
    with pytest.raises(ValueError, match=r"lacks the column\(s\) \['completion'\]; it has \['prompt'\]"):
        tokenize_pairs(Dataset.from_dict({"prompt": ["a"]}), tokenizer, 8, 8)


@pytest.mark.parametrize(
    ("prompt", "completion", "message"),
    [
        ("", "a", "the `prompt` is empty"),
        (" \n", "a", "the `prompt` is empty"),
        ("w1", "", "the `completion` is empty"),
        (None, "a", "the `prompt` must be text or a list of messages, got None"),
        ("w1", None, "the `completion` must be text or a list of messages, got None"),
    ],
)
def test_an_empty_side_names_its_row(tokenizer, prompt, completion, message):
    rows = pairs(["w1"] * 1500 + [prompt], ["a"] * 1500 + [completion])
    with pytest.raises(ValueError, match=f"Row 1500: {message}"):
        tokenize_pairs(rows, tokenizer, 8, 8)


@pytest.mark.parametrize(
    ("prompt", "completion", "message"),
    [
        ([], chat("assistant", "a"), "the `prompt` is empty"),
        (chat("user", ""), chat("assistant", "a"), "the `prompt` is empty"),
        (chat("user", "w1"), [], "the `completion` is empty"),
        (chat("user", "w1"), chat("assistant", " "), "the `completion` is empty"),
        (chat("user", "w1"), chat("assistant", "a", "b"), "the `completion` must be one message, got 2"),
        (chat("user", None), chat("assistant", "a"), "a message of the `prompt` lacks a `role` or text as `content`"),
    ],
)
def test_chats_that_are_none_name_their_row(tokenizer, prompt, completion, message):
    rows = pairs([chat("user", "w1"), prompt], [chat("assistant", "a"), completion])
    with pytest.raises(ValueError, match=f"Row 1: {message}"):
        tokenize_pairs(rows, tokenizer, 8, 8)


def test_a_prompt_without_a_token(tokenizer):
    tokenizer.llm_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    tokenizer.llm_tokenizer.chat_template = " "
    with pytest.raises(ValueError, match="Row 0: the LLM's tokenizer makes no token of the `prompt` ' '"):
        tokenize_pairs(pairs([chat("user", "w1")], ["a"]), tokenizer, 8, 8)


# ------------------------------------------------------------------------------------------------------------- batches
ROWS = [{"input_ids": [4, 5, 6], "labels": [7, EOS]}, {"input_ids": [8], "labels": [9, 10, 11, EOS]}]


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_are_padded_on_the_llms_side_and_labels_at_their_end(tokenizer, side):
    tokenizer.llm_tokenizer.padding_side = tokenizer.padding_side = side
    batch = DataCollatorForLLM2SLM(tokenizer)(ROWS)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1] if side == "left" else [1, 0, 0]]
    assert batch["input_ids"][batch["attention_mask"] == 1].tolist() == [4, 5, 6, 8]
    assert batch["labels"].tolist() == [[7, EOS, -100, -100], [9, 10, 11, EOS]]


@pytest.mark.parametrize("slm", ["t5", "bart", "llama"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_lengths_are_rounded_up_without_another_loss(slm_tokenizer, side, slm):
    tokenizer = LLM2SLMTokenizer.from_tokenizers(build_llm_tokenizer(padding_side=side), slm_tokenizer)
    rows = tokenize_pairs(pairs(["w1 w2 w3", "w4"], ["ab", "abcde"]), tokenizer, 16, 16).to_list()
    rows = [{**row, "prompt_hidden_states": torch.randn(len(row["input_ids"]), 24)} for row in rows]
    exact = DataCollatorForLLM2SLM(tokenizer)(rows)
    rounded = DataCollatorForLLM2SLM(tokenizer, pad_to_multiple_of=8)(rows)
    assert exact["input_ids"].shape[1] < 8 and exact["labels"].shape[1] < 8
    assert rounded["input_ids"].shape == rounded["attention_mask"].shape == rounded["labels"].shape == (2, 8)
    assert rounded["prompt_hidden_states"].shape == (2, 8, 24)
    model = build_model(slm=slm).eval()
    torch.testing.assert_close(model(**rounded).loss, model(**exact).loss)


@pytest.mark.parametrize("slm", ["t5", "bart", "llama"])
def test_with_the_model_a_batch_has_what_the_decoder_is_fed(tokenizer, slm):
    model = build_model(slm=slm)
    batch = DataCollatorForLLM2SLM(tokenizer, model=model)(ROWS)
    start = model.config.decoder_start_token_id
    assert batch["decoder_input_ids"].tolist() == [[start, 7, EOS, 0], [start, 9, 10, 11]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["shift_labels"].equal(batch["labels"])
    expected = model(**DataCollatorForLLM2SLM(tokenizer)(ROWS)).loss
    torch.testing.assert_close(model(**batch).loss, expected)


def test_text_is_tokenized_as_beforehand(tokenizer):
    rows = pairs(["w1 w2", "w3"], ["ab", "c"])
    tokenized = tokenize_pairs(rows, tokenizer, 16, 16)
    collate = DataCollatorForLLM2SLM(tokenizer)
    found, expected = collate([rows[i] for i in range(2)]), collate([tokenized[i] for i in range(2)])
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_states_stand_where_their_tokens_do(tokenizer, dtype):
    tokenizer.llm_tokenizer.padding_side = "left"
    states = [torch.full((len(row["input_ids"]), 2), i + 1, dtype=dtype) for i, row in enumerate(ROWS)]
    rows = [{**row, "prompt_hidden_states": state} for row, state in zip(ROWS, states, strict=True)]
    batch = DataCollatorForLLM2SLM(tokenizer)(rows)["prompt_hidden_states"]
    assert batch.dtype == dtype and batch[:, :, 0].tolist() == [[1, 1, 1], [0, 0, 2]]
    rows[1]["prompt_hidden_states"] = states[0]
    with pytest.raises(
        ValueError, match=r"`prompt_hidden_states` of \[3, 3\] positions .* prompts of \[3, 1\] tokens"
    ):
        DataCollatorForLLM2SLM(tokenizer)(rows)


def test_a_row_without_a_response(tokenizer):
    with pytest.raises(ValueError, match="Example 1 of the batch has no `labels`"):
        DataCollatorForLLM2SLM(tokenizer)([ROWS[0], {"input_ids": [4], "labels": []}])
    assert "labels" not in DataCollatorForLLM2SLM(tokenizer)([{"input_ids": [4]}])
