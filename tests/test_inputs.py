"""Objects of neighbouring APIs at the door: they work, or are refused in words that say what to do."""

import copy
import io
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import (
    EOS,
    LLM_HIDDEN,
    PAD,
    SLM_HIDDEN,
    build_labels,
    build_llm_tokenizer,
    build_model,
    build_prompts,
    padded,
)
from datasets import Dataset, DatasetDict, load_from_disk
from transformers import BatchEncoding, Seq2SeqTrainer, Seq2SeqTrainingArguments

from llm2slm import LLM2SLMTokenizer
from llm2slm.data.collator import DataCollatorForLLM2SLM, tokenize_pairs
from llm2slm.data.pairs import load_pairs
from llm2slm.data.prompt_features import cache_prompt_features
from llm2slm.utils import read_json_lines, read_text

PROMPT, LABELS = padded(build_prompts()), build_labels()
IDS, MASK = PROMPT["input_ids"], PROMPT["attention_mask"]
GREEDY = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture(scope="module", params=["t5", "gpt2"])
def model(request):
    return build_model("llama", request.param)


@pytest.fixture
def every_way(model):
    """The ways into the model, each a function of `input_ids`."""
    return [
        lambda ids: model.generate(ids, **GREEDY),
        lambda ids: model(ids, labels=LABELS),
        model.encode_prompt,
        model.encode_hidden_states,
    ]


# ------------------------------------------------------------------------------------------------------------- prompts
def test_a_batch_is_passed_by_name(model, every_way):
    batches = [BatchEncoding(dict(PROMPT)), dict(PROMPT), model.encode_prompt(**PROMPT)]
    for batch in batches:
        for way in every_way:
            with pytest.raises(
                TypeError, match=rf"got {type(batch).__name__}: pass what it holds by name, .*\*\*batch"
            ):
                way(batch)
    expected = model.generate(**PROMPT, **GREEDY)
    assert model.generate(**batches[0], **GREEDY).equal(expected)
    assert model.generate(**batches[2], **GREEDY).equal(expected)


@pytest.mark.parametrize(
    ("prompt", "advice"),
    [
        (IDS.tolist(), "got list: convert it with `torch.tensor`"),
        (IDS.numpy(), "got ndarray: convert it with `torch.tensor`"),
        ("w1 w2", "got str: tokenize the text, as in"),
        (["w1", "w2"], "got list: tokenize the text, as in"),
        (IDS.float(), "must be token ids, integers, got torch.float32"),
        (MASK.bool(), "must be token ids, integers, got torch.bool"),
    ],
    ids=["list", "numpy", "text", "texts", "float", "bool"],
)
def test_what_is_no_tensor_of_ids(every_way, prompt, advice):
    for way in every_way:
        with pytest.raises(TypeError, match=f"`input_ids` must be .*{advice}|`input_ids` {advice}"):
            way(prompt)


def test_no_prompts_are_refused(every_way):
    for way in (every_way[0], *every_way[2:]):
        with pytest.raises(ValueError, match=r"with at least one token, got \(0, 9\)"):
            way(IDS[:0])


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float32, torch.float16, torch.uint8], ids=str)
def test_ids_and_masks_of_other_number_formats_are_the_same_prompt(model, dtype):
    ids = IDS.int() if dtype == torch.int32 else IDS
    expected = model.generate(**PROMPT, **GREEDY)
    assert model.generate(ids, attention_mask=MASK.to(dtype), **GREEDY).equal(expected)
    loss = model(ids, attention_mask=MASK.to(dtype), labels=LABELS.int()).loss
    assert loss.equal(model(**PROMPT, labels=LABELS).loss)


@pytest.mark.parametrize(
    ("mask", "found"),
    [((1 - MASK.float()) * -1e9, "-1e"), (MASK * 0.5, "0.5"), (MASK * float("nan"), "nan"), (MASK * 2, "2")],
    ids=["added to scores", "weights", "nan", "numbers of segments"],
)
def test_a_mask_of_other_values_than_0_and_1(model, mask, found):
    with pytest.raises(ValueError, match=rf"`attention_mask` must be 1 for tokens and 0 for padding; found {found}"):
        model.generate(IDS, attention_mask=mask, **GREEDY)
    with pytest.raises(TypeError, match="`attention_mask` must be a `torch.Tensor`, got list"):
        model.generate(IDS, attention_mask=MASK.tolist(), **GREEDY)


def test_a_tokenizers_ids_of_segments_change_nothing_or_are_refused(model):
    segments = torch.zeros_like(IDS)
    assert model.generate(**PROMPT, token_type_ids=segments, **GREEDY).equal(model.generate(**PROMPT, **GREEDY))
    assert model(**PROMPT, token_type_ids=segments, labels=LABELS).loss.equal(model(**PROMPT, labels=LABELS).loss)
    segments[0, 5:] = 1
    for call in (model.generate, lambda **prompt: model(**prompt, labels=LABELS)):
        with pytest.raises(ValueError, match="A prompt is one segment: `token_type_ids` must all be 0"):
            call(**PROMPT, token_type_ids=segments)


def test_a_prompt_is_given_once(model):
    encoding, states = model.encode_prompt(**PROMPT), model.encode_hidden_states(**PROMPT)
    with pytest.raises(ValueError, match="`inputs` and `input_ids` are one argument"):
        model.generate(IDS, input_ids=IDS)
    for twice in ({"input_ids": IDS}, {"prompt_hidden_states": states}):
        for call in (model.generate, lambda **prompt: model(**prompt, labels=LABELS)):
            with pytest.raises(ValueError, match="`prompt_embeds` are the prompt, already encoded: pass neither"):
                call(**encoding, **twice)
    with pytest.raises(
        ValueError, match=r"`input_ids` \(3, 8\) and `prompt_hidden_states` \(3, 9, 24\) must be of one"
    ):
        model.generate(IDS[:, 1:], prompt_hidden_states=states, attention_mask=MASK)


def test_embeddings_go_by_their_own_name(model):
    embeds = torch.zeros(3, 9, SLM_HIDDEN)
    for call in (model.generate, lambda **prompt: model(**prompt, labels=LABELS)):
        with pytest.raises(ValueError, match="not `inputs_embeds`. A prompt that is already encoded.*`prompt_embeds`"):
            call(inputs_embeds=embeds)


@pytest.mark.parametrize("name", ["prompt_embeds", "prompt_hidden_states"])
def test_states_of_other_number_formats(model, name):
    states = model.encode_prompt(**PROMPT)[0] if name == "prompt_embeds" else model.encode_hidden_states(**PROMPT)
    expected = model(**{name: states}, attention_mask=MASK, labels=LABELS).loss
    found = model(**{name: states.double()}, attention_mask=MASK, labels=LABELS).loss
    assert found.dtype == torch.float32 and found.equal(expected)
    found = model(**{name: states.half()}, attention_mask=MASK, labels=LABELS).loss
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)
    with pytest.raises(TypeError, match=f"`{name}` must be floating point, got torch.int64"):
        model.generate(**{name: states.long()}, **GREEDY)
    with pytest.raises(TypeError, match=f"`{name}` must be a `torch.Tensor`, got ndarray"):
        model.generate(**{name: states.detach().numpy()}, **GREEDY)


def test_a_response_that_is_no_tensor_of_ids(model):
    for labels, found in ((LABELS.tolist(), "a `torch.Tensor`, got list"), (LABELS.float(), "token ids, integers")):
        with pytest.raises(TypeError, match=f"`labels` must be {found}"):
            model(**PROMPT, labels=labels)
    with pytest.raises(
        ValueError, match=r"`decoder_attention_mask` must have shape \(3, 6\) like the response, got \("
    ):
        model(**PROMPT, labels=LABELS, decoder_attention_mask=torch.ones(3, 5))


# --------------------------------------------------------------------------------------------------------- inheritance
def test_a_copied_or_pickled_model_writes_the_same(model):
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    expected = model.generate(**PROMPT, **GREEDY)
    copies = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False))
    assert all(copied.generate(**PROMPT, **GREEDY).equal(expected) for copied in copies)


@pytest.mark.parametrize("name", ["bfloat16", "double", "half"])
def test_a_model_changes_its_number_format_as_a_whole(model, name):
    changed = getattr(copy.deepcopy(model), name)()
    assert len({parameter.dtype for parameter in changed.parameters()}) == 1
    assert torch.isfinite(changed(**PROMPT, labels=LABELS).loss)
    assert changed.generate(**PROMPT, **GREEDY).shape[0] == 3


def test_transition_scores_are_those_of_the_response(model):
    beams = {"num_beams": 2, "return_dict_in_generate": True, "output_scores": True, "length_penalty": 0.0}
    output = model.generate(**PROMPT, **GREEDY, **beams)
    scores = model.compute_transition_scores(output.sequences, output.scores, output.beam_indices)
    torch.testing.assert_close(scores.sum(dim=1), output.sequences_scores)


def test_what_a_pair_cannot_do_says_what_can(model):
    for method in (model.generate_batch, model.init_continuous_batching, model.continuous_batching_context_manager):
        with pytest.raises(NotImplementedError, match="takes token ids.*call `generate` on padded batches"):
            method([[5, 6]])
    with pytest.raises(NotImplementedError, match="encoded by the LLM: `load_llm` loads it"):
        model.set_encoder(model.llm)
    with pytest.raises(NotImplementedError, match="decoder of the SLM by itself"):
        model.set_decoder(model.get_decoder())
    with pytest.raises(NotImplementedError, match="Prune the SLM by itself"):
        model.prune_heads({0: [0]})


# ---------------------------------------------------------------------------------------------------------- tokenizers
def test_sides_that_are_set_are_the_prompts(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    sides = {"padding_side": "left", "truncation_side": "left"}
    loaded = LLM2SLMTokenizer.from_pretrained(tmp_path, **sides)
    for name, side in sides.items():
        setattr(tokenizer, name, side)
        with pytest.raises(ValueError, match=f"`{name}` must be 'left' or 'right', got 'top'"):
            setattr(tokenizer, name, "top")
    for changed in (tokenizer, loaded):
        assert changed(["w1 w2", "w1"], padding=True)["attention_mask"][1] == [0, 1, 1]
        assert changed("w1 w2 w3", truncation=True, max_length=2)["input_ids"] == changed("w3")["input_ids"]
        labels = changed(text_target=["abc", "a"], padding=True, truncation=True, max_length=3)["input_ids"]
        assert labels[0][0] == labels[1][0] and labels[1][-1] == PAD
        assert (changed.padding_side, changed.truncation_side) == ("right", "right")  # of `labels`, for collators


def test_a_prompt_is_one_text(tokenizer):
    for pair in (lambda: tokenizer("w1", "a"), lambda: tokenizer("w1", text_target="a", text_pair_target="b")):
        with pytest.raises(ValueError, match="A prompt is one text.*Responses are `text_target`"):
            pair()
    with pytest.raises(ValueError, match="makes several prompts of one"):
        tokenizer(["w1 w2 w3"], text_target=["a"], truncation=True, max_length=2, return_overflowing_tokens=True)


def test_a_response_ends_within_the_slm_tokenizers_own_limit(tokenizer):
    tokenizer.model_max_length = 4
    ids = tokenizer(text_target="abcdefgh", truncation=True)["input_ids"]
    assert len(ids) == 4 and ids[-1] == EOS


def test_responses_are_padded_to_a_multiple(tokenizer):
    found = tokenizer(["w1"], text_target=["abc"], padding=True, pad_to_multiple_of=8)
    assert [len(found[name][0]) for name in ("input_ids", "labels")] == [8, 8]


def test_what_two_tokenizers_cannot_do_says_what_can(tokenizer):
    for refused in (tokenizer.as_target_tokenizer, tokenizer.prepare_seq2seq_batch):
        with pytest.raises(NotImplementedError, match="Pass responses as `text_target`"):
            refused()
    with pytest.raises(NotImplementedError, match="Train one of the two.*`LLM2SLMTokenizer.from_tokenizers`"):
        tokenizer.train_new_from_iterator(["a b"], 40)
    assert tokenizer.encode_plus("w1 w2") == tokenizer("w1 w2")


# ----------------------------------------------------------------------------------------------------------- data sets
ROWS = [{"prompt": f"w{i} w2", "completion": "ab"} for i in range(4)]
NO_DATA_SETS = {
    "IterableDataset": (Dataset.to_iterable_dataset, "load it without `streaming=True`, or.*A trainer takes"),
    "DatasetDict": (lambda rows: DatasetDict(train=rows, test=rows), r"choose one of its splits, \['train', 'test'\]"),
    "DataFrame": (Dataset.to_pandas, "make one with `Dataset.from_list`, `Dataset.from_pandas`"),
    "list": (Dataset.to_list, "make one with `Dataset.from_list`"),
    "generator": (lambda rows: (row for row in rows), "make one with .* or `Dataset.from_generator`"),
}


@pytest.mark.parametrize("name", NO_DATA_SETS)
def test_what_is_no_data_set_of_known_length(name, tokenizer, tmp_path):
    make, advice = NO_DATA_SETS[name]
    dataset = make(Dataset.from_list(ROWS))
    calls = (
        lambda: tokenize_pairs(dataset, tokenizer, 8, 8),
        lambda: cache_prompt_features(dataset, build_model(), tmp_path),
    )
    for call in calls:
        with pytest.raises(TypeError, match=f"`dataset` must be a `datasets.Dataset`, got {name}: {advice}"):
            call()


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("format_type", ["torch", "numpy", "pandas", "arrow"])
def test_a_data_sets_format_changes_no_token_and_is_kept(format_type, chat, tokenizer):
    rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS] if chat else ROWS
    rows = Dataset.from_list(rows)
    found = tokenize_pairs(rows.with_format(format_type), tokenizer, 8, 8)
    assert found.format["type"] == format_type
    assert found.with_format(None).to_list() == tokenize_pairs(rows, tokenizer, 8, 8).to_list()


@pytest.mark.parametrize("format_type", ["torch", "numpy"])
def test_formatted_rows_with_cached_states_make_a_batch(format_type, tokenizer, tmp_path):
    model = build_model()
    rows = tokenize_pairs(Dataset.from_list(ROWS), tokenizer, 8, 8)
    cached = cache_prompt_features(rows.with_format(format_type), model, tmp_path)
    collate = DataCollatorForLLM2SLM(tokenizer)
    batch, plain = collate([cached[0], cached[1]]), collate([cached.with_format(None)[i] for i in range(2)])
    assert all(batch[name].equal(plain[name]) for name in plain) and set(batch) == set(plain)
    assert torch.isfinite(model(**batch).loss)


def test_a_streaming_data_set_trains_as_it_is(tokenizer, tmp_path):
    args = Seq2SeqTrainingArguments(
        tmp_path, max_steps=2, use_cpu=True, report_to="none", remove_unused_columns=False, save_strategy="no"
    )
    trainer = Seq2SeqTrainer(
        build_model(),
        args,
        train_dataset=Dataset.from_list(ROWS).to_iterable_dataset(),
        data_collator=DataCollatorForLLM2SLM(tokenizer),
    )
    assert trainer.train().training_loss > 0


def test_examples_that_make_no_batch(tokenizer):
    collate = DataCollatorForLLM2SLM(tokenizer)
    with pytest.raises(
        ValueError, match=r"neither `input_ids` nor \['completion'\], only \['prompt'\].*remove_unused_"
    ):
        collate([{"prompt": "w1"}])
    with pytest.raises(ValueError, match="only where the states are kept.*Call `cache_prompt_features` on it"):
        collate([{"input_ids": [5], "labels": [5], "prompt_hidden_states": "a.safetensors:0:1"}])
    for make in (DataCollatorForLLM2SLM, lambda one: tokenize_pairs(Dataset.from_list(ROWS), one, 8, 8)):
        with pytest.raises(TypeError, match="`tokenizer` must hold both tokenizers, got .*: join them with"):
            make(build_llm_tokenizer())


def test_states_of_two_number_formats_make_one_batch(tokenizer):
    states = [np.ones((1, LLM_HIDDEN), dtype=np.float16), torch.ones(1, LLM_HIDDEN)]
    rows = [{"input_ids": [5], "labels": [5], "prompt_hidden_states": row} for row in states]
    assert DataCollatorForLLM2SLM(tokenizer)(rows)["prompt_hidden_states"].dtype == torch.float32


# By itself llm2slm does not import `datasets`, and it makes no difference that others look whether there is one.
LLM2SLM_FIRST = """import importlib.util, sys, llm2slm
assert importlib.util.find_spec("datasets") and "datasets" not in sys.modules
import datasets"""


@pytest.mark.parametrize(
    "imports", [LLM2SLM_FIRST, "import datasets, llm2slm"], ids=["llm2slm first", "datasets first"]
)
def test_a_saved_data_set_with_cached_states_loads_where_llm2slm_is_imported(imports, tmp_path):
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7]]})
    cached = cache_prompt_features(rows, build_model(), tmp_path / "cache")
    cached.save_to_disk(tmp_path / "rows")
    code = f"{imports}\nprint(*datasets.load_from_disk({str(tmp_path / 'rows')!r})[0]['prompt_hidden_states'].shape)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.split() == ["3", str(LLM_HIDDEN)], found.stderr
    # Without it, all that `datasets` says is the type's name.
    assert cached.features.to_dict()["prompt_hidden_states"]["_type"].startswith("llm2slm.")
    assert load_from_disk(tmp_path / "rows").features == cached.features


# ---------------------------------------------------------------------------------------------------------- text files
PAIRS = [{"prompt": "été – “q”", "completion": "naïve"}, {"prompt": "ü", "completion": "x"}]
TEXTS = {
    "jsonl": "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in PAIRS),
    "json": json.dumps(PAIRS, ensure_ascii=False),
    "csv": "prompt,completion\nété – “q”,naïve\nü,x\n",
}


@pytest.mark.parametrize("suffix", TEXTS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_pairs_are_read_with_a_byte_order_mark_and_windows_line_ends(suffix, encoding, tmp_path):
    path = tmp_path / f"pairs.{suffix}"
    path.write_bytes(TEXTS[suffix].replace("\n", "\r\n").encode(encoding))
    assert load_pairs(path, "all").to_list() == PAIRS
    assert read_text(path) == TEXTS[suffix]
    if suffix == "jsonl":
        assert read_json_lines(str(path)) == PAIRS


@pytest.mark.parametrize(
    ("encoding", "found"),
    [("cp1252", "WINDOWS-1252"), ("utf-16", "UTF-16"), ("utf-16-le", "UTF-16"), ("utf-16-be", "UTF-16")],
)
def test_text_in_another_encoding_is_refused(encoding, found, tmp_path):
    for suffix, text in TEXTS.items():
        path = tmp_path / f"pairs.{suffix}"
        path.write_bytes(text.encode(encoding))
        message = rf"{path} is not UTF-8 text\. Save it as UTF-8.*`iconv -f {found} -t UTF-8`"
        with pytest.raises(ValueError, match=message):
            load_pairs(path, "all")
        with pytest.raises(ValueError, match=message):
            read_text(path)
