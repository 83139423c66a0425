"""From pairs of prompt and completion to batches: tokenization, with limits, and the collator of the trainers."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorWithPadding, PreTrainedModel

from ..modeling_llm2slm import response_mask
from ..tokenization_llm2slm import LLM2SLMTokenizer

logger = logging.getLogger(__name__)


# -------------------------------------------------------------------------------------------------------- tokenization
def tokenize_pairs(
    dataset,
    tokenizer: LLM2SLMTokenizer,
    prompt_max_length: int,
    response_max_length: int,
    truncate: bool = False,
    apply_prompt_format: bool = True,
):
    r"""
    Adds the columns `input_ids` (the prompt, LLM's tokenizer) and `labels` (the response, SLM's tokenizer, with its
    end-of-sequence token) to a data set. Pairs over a limit are dropped, and one warning says how many.

    Args:
        dataset (`datasets.Dataset`):
            With the columns `prompt` and `completion`: strings, or lists of messages as in TRL. A prompt of messages
            goes through the LLM's chat template; a completion of messages is one message, whose content is the
            response. Its format (`with_format`) is kept.
        tokenizer ([`LLM2SLMTokenizer`]): Both tokenizers.
        prompt_max_length (`int`): The longest prompt kept, in tokens of the LLM.
        response_max_length (`int`): The longest response kept, in tokens of the SLM, the end token among them.
        truncate (`bool`, *optional*, defaults to `False`):
            Whether pairs over a limit are cut rather than dropped: prompts on the `truncation_side` of
            `tokenizer.llm_tokenizer`, responses at their end, so that a cut one has no end token.
        apply_prompt_format (`bool`, *optional*, defaults to `True`):
            Whether prompts that are strings are put into the tokenizer's `prompt_format`. Not for prompts that are in
            that form already.

    Returns:
        `datasets.Dataset` with all columns of `dataset` and the two new ones.

    Raises:
        TypeError: if `dataset` is no `datasets.Dataset`, or `tokenizer` not one of both tokenizers.
        ValueError: if a column is missing, a prompt or completion is empty or neither text nor messages (the message
            names the row), or no pair is within the limits.
    """
    check_dataset(dataset)
    _check_tokenizer(tokenizer)
    if missing := {"prompt", "completion"} - set(dataset.column_names):
        raise ValueError(f"The data set lacks the column(s) {sorted(missing)}; it has {dataset.column_names}.")
    limits = {"input_ids": prompt_max_length, "labels": response_max_length}
    for name, limit in zip(("prompt_max_length", "response_max_length"), limits.values(), strict=True):
        if limit < 1:
            raise ValueError(f"`{name}` must be at least 1, got {limit}.")

    if (format_type := dataset.format["type"]) is not None:  # rows must be read as Python's objects
        plain = dataset.with_format(None)
        tokenized = tokenize_pairs(
            plain, tokenizer, prompt_max_length, response_max_length, truncate, apply_prompt_format
        )
        return tokenized.with_format(format_type, **dataset.format["format_kwargs"])

    def tokenize(batch: dict[str, list], rows: list[int]) -> dict[str, list]:
        return encode_pairs(batch["prompt"], batch["completion"], tokenizer, rows, apply_prompt_format)

    def cut(batch: dict[str, list], rows: list[int]) -> dict[str, list]:
        prompts, completions = batch["prompt"], batch["completion"]
        columns = encode_pairs(prompts, completions, tokenizer, rows, apply_prompt_format, prompt_max_length)
        return {**columns, "labels": [ids[:response_max_length] for ids in columns["labels"]]}

    tokenized = dataset.map(tokenize, batched=True, with_indices=True, desc="Tokenizing")
    too_long = {column: _lengths(tokenized, column) for column in limits}
    too_long = {column: lengths * (lengths > limits[column]) for column, lengths in too_long.items()}
    over = (too_long["input_ids"] > 0) | (too_long["labels"] > 0)
    if not over.any():
        return tokenized
    found = [
        f"{(lengths > 0).sum()} {name} over {limits[column]} tokens (the longest has {lengths.max()})"
        for (column, lengths), name in zip(too_long.items(), ("prompts", "responses"), strict=True)
        if lengths.any()
    ]
    counts = f"{over.sum()} of {len(over)} pairs are over the limits"
    if over.all() and not truncate:
        raise ValueError(f"{counts}: {', '.join(found)}. Raise the limits, or cut the pairs with `truncate=True`.")
    logger.warning("%s and were %s: %s.", counts, "cut" if truncate else "dropped", ", ".join(found))
    if truncate:
        return dataset.map(cut, batched=True, with_indices=True, desc="Cutting long pairs")
    return tokenized.select(np.flatnonzero(~over))


def check_dataset(dataset) -> None:
    """
    Checks that `dataset` is a `datasets.Dataset`, whose rows can be counted and read more than once.

    Raises:
        TypeError: if it is not, with how to make one.
    """
    if isinstance(dataset, Dataset):
        return
    advice = "make one with `Dataset.from_list`, `Dataset.from_pandas` or `Dataset.from_generator`"
    if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
        advice = f"choose one of its splits, {list(dataset)}"
    elif isinstance(dataset, IterableDataset):
        advice = (
            "load it without `streaming=True`, or make one with `Dataset.from_generator`. A trainer takes the "
            "streaming one as it is: `DataCollatorForLLM2SLM` tokenizes `prompt` and `completion` batch by batch"
        )
    raise TypeError(f"`dataset` must be a `datasets.Dataset`, got {type(dataset).__name__}: {advice}.")


def _check_tokenizer(tokenizer) -> None:
    if getattr(tokenizer, "llm_tokenizer", None) is None:
        raise TypeError(
            f"`tokenizer` must hold both tokenizers, got {type(tokenizer).__name__}: join them with "
            "`LLM2SLMTokenizer.from_tokenizers`."
        )


def _lengths(dataset, column: str) -> np.ndarray:
    if len(dataset) == 0:
        return np.zeros(0, dtype=np.int64)
    table = dataset.select_columns([column]).with_format("arrow")[:]
    return pyarrow.compute.list_value_length(table[column]).to_numpy()


def encode_pairs(
    prompts: list,
    completions: list,
    tokenizer: LLM2SLMTokenizer,
    rows: Iterable[int],
    apply_prompt_format: bool = True,
    prompt_max_length: int | None = None,
) -> dict[str, list]:
    """`input_ids` and `labels` of pairs, whatever their lengths; `rows` are their numbers in errors."""
    is_chat = not isinstance(prompts[0], str)
    texts = [_prompt_text(prompt, row, tokenizer, is_chat) for prompt, row in zip(prompts, rows, strict=True)]
    responses = [_response_text(completion, row) for completion, row in zip(completions, rows, strict=True)]
    input_ids = tokenizer(
        texts,
        add_special_tokens=not is_chat,  # a chat template brings them
        apply_prompt_format=apply_prompt_format and not is_chat,
        truncation=prompt_max_length is not None,
        max_length=prompt_max_length,
        verbose=False,
    )["input_ids"]
    for ids, text, row in zip(input_ids, texts, rows, strict=True):
        if not ids:
            raise ValueError(f"Row {row}: the LLM's tokenizer makes no token of the `prompt` {text!r}.")
    return {"input_ids": input_ids, "labels": tokenizer(text_target=responses, verbose=False)["input_ids"]}


def _prompt_text(prompt, row: int, tokenizer: LLM2SLMTokenizer, is_chat: bool) -> str:
    messages = None
    if is_chat or not isinstance(prompt, str):
        check_messages("prompt", prompt, f"Row {row}")
        messages, prompt = prompt, "".join(message["content"] for message in prompt)
    if not prompt.strip():
        raise ValueError(f"Row {row}: the `prompt` is empty.")
    if messages is None:
        return prompt
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _response_text(completion, row: int) -> str:
    if not isinstance(completion, str):
        check_messages("completion", completion, f"Row {row}")
        if len(completion) > 1:
            raise ValueError(f"Row {row}: the `completion` must be one message, got {len(completion)}.")
        completion = completion[0]["content"] if completion else ""
    if not completion.strip():
        raise ValueError(f"Row {row}: the `completion` is empty.")
    return completion


def check_messages(name: str, messages, where: str) -> None:
    """
    Checks that messages have a role and text each. `name` and `where` are what errors call them.

    Raises:
        ValueError: if they have not.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"{where}: the `{name}` must be text or a list of messages, got {messages!r}.")
    for message in messages:
        if not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f"{where}: a message of the `{name}` lacks a `role` or text as `content`: {message}.")


# ------------------------------------------------------------------------------------------------------------- batches
@dataclass
class DataCollatorForLLM2SLM:
    r"""
    Makes a batch for [`LLM2SLMForConditionalGeneration`] of a list of examples, for `Seq2SeqTrainer` and for TRL's
    `SFTTrainer`.

    Each example has `input_ids` (prompt, LLM's tokenizer) and `labels` (response, SLM's tokenizer), from
    [`tokenize_pairs`], or else `prompt` and `completion`, which are tokenized here, without a limit and, if they are
    strings, in the tokenizer's `prompt_format`. It may have
    `prompt_hidden_states` of shape `(prompt_length, prompt_hidden_size)` from
    [`~llm2slm.data.prompt_features.cache_prompt_features`]. Other columns are left out.

    `Seq2SeqTrainer` needs `remove_unused_columns=False` to hand on `prompt` and `completion`. `SFTTrainer` needs it
    for `prompt_hidden_states` too, and tokenizes data sets without `input_ids` itself, as one sequence of one
    tokenizer, unless told not to:

    ```python
    SFTTrainer(
        model,
        args=SFTConfig(remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=pairs,
        processing_class=tokenizer,
        data_collator=DataCollatorForLLM2SLM(tokenizer, model=model),
    )
    ```

    Args:
        tokenizer ([`LLM2SLMTokenizer`]): Pads the prompts on its LLM tokenizer's side.
        model ([`LLM2SLMForConditionalGeneration`], *optional*):
            The model to train. `SFTTrainer` needs it, and so does `Seq2SeqTrainer` for `label_smoothing_factor` and
            `compute_loss_func`: the batch then has `decoder_input_ids`, `decoder_attention_mask` and `shift_labels`
            too. `SFTTrainer`, known by the tag that it puts on the model, gets `labels` as in all of TRL, each row
            beginning with -100: `logits[:, i]` predicts `labels[:, i + 1]`, and so its label smoothing,
            `compute_loss_func` and `compute_metrics` meet them. Elsewhere `logits[:, i]` predicts `labels[:, i]`.
        pad_to_multiple_of (`int`, *optional*): Lengths of prompts and responses are rounded up to this.

    Raises:
        TypeError: if `tokenizer` is not one of both tokenizers.
        ValueError: for an empty side, for examples without the columns, for those that `SFTTrainer` tokenized, and for
            states that are none, or of another length than the prompt.
    """

    tokenizer: LLM2SLMTokenizer
    model: PreTrainedModel | None = None
    pad_to_multiple_of: int | None = None

    def __post_init__(self):
        _check_tokenizer(self.tokenizer)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The examples as one batch of tensors."""
        columns = {name: [row[name] for row in examples] for name in examples[0]}
        if "input_ids" not in columns:
            if missing := {"prompt", "completion"} - set(columns):
                raise ValueError(
                    f"The examples have neither `input_ids` nor {sorted(missing)}, only {sorted(columns)}. If the "
                    "data set has them, the trainer has dropped them: pass it `remove_unused_columns=False`."
                )
            columns |= encode_pairs(columns["prompt"], columns["completion"], self.tokenizer, range(len(examples)))
        pad = DataCollatorWithPadding(self.tokenizer.llm_tokenizer, pad_to_multiple_of=self.pad_to_multiple_of)
        batch = dict(pad([{"input_ids": ids} for ids in columns["input_ids"]]))
        if "labels" in columns:
            self._check_tokenized_apart(columns)
            batch |= self._response(columns["labels"])
        if "prompt_hidden_states" in columns:
            if isinstance(columns["prompt_hidden_states"][0], str):
                raise ValueError(
                    "`prompt_hidden_states` are only where the states are kept: the data set was made table or text "
                    "(by `to_pandas`, `to_list` or `to_json`). Call `cache_prompt_features` on it to find them again."
                )
            states = [torch.as_tensor(row) for row in columns["prompt_hidden_states"]]
            batch["prompt_hidden_states"] = _pad_states(states, batch["attention_mask"])
        return batch

    def _check_tokenized_apart(self, columns: dict[str, list]):
        pairs = list(zip(columns["input_ids"], columns["labels"], strict=True))
        # Where one tokenizer makes both, a response may be its prompt, but not every one of a batch.
        may_be_equal = self.model is None or (self.model.config.shared_tokenizer and len(pairs) == 1)
        if any(len(response) and response[0] == -100 for _, response in pairs):
            found = "begin with -100"
        elif not may_be_equal and all(list(prompt) == list(response) for prompt, response in pairs):
            found = "are the `input_ids`"
        else:
            return
        raise ValueError(
            f"`labels` that {found} are SFTTrainer's own: it tokenized prompt and completion as one sequence of one "
            "tokenizer. Tokenize the data set with `tokenize_pairs` first, or leave it to this collator: "
            "`SFTConfig(remove_unused_columns=False, dataset_kwargs={'skip_prepare_dataset': True})`."
        )

    def _response(self, labels: list) -> dict[str, torch.Tensor]:
        if empty := [row for row, ids in enumerate(labels) if len(ids) == 0]:
            raise ValueError(f"Example {empty[0]} of the batch has no `labels`: its response is empty.")
        rows = [torch.as_tensor(ids) for ids in labels]
        padded = pad_sequence(rows, batch_first=True, padding_value=-100)  # (batch_size, response_length)
        for_sft = self.model is not None and "sft" in (self.model.model_tags or ())
        length = padded.shape[1] + for_sft
        length += -length % (self.pad_to_multiple_of or 1)
        padded = F.pad(padded, (0, length - padded.shape[1]), value=-100)
        if self.model is None:
            return {"labels": padded}
        return {
            "labels": padded.roll(1, dims=1) if for_sft else padded,
            "shift_labels": padded,
            "decoder_input_ids": self.model.prepare_decoder_input_ids_from_labels(padded),
            "decoder_attention_mask": response_mask(padded),
        }


def _pad_states(rows: list[torch.Tensor], attention_mask: torch.Tensor) -> torch.Tensor:
    lengths, found = attention_mask.sum(dim=1).tolist(), [len(row) for row in rows]
    if lengths != found:
        raise ValueError(
            f"`prompt_hidden_states` of {found} positions do not belong to prompts of {lengths} tokens: cache the "
            "features of the prompts as they are now."
        )
    states = torch.cat(rows)
    padded = states.new_zeros(*attention_mask.shape, states.shape[-1])  # (batch, prompt_length, prompt_hidden_size)
    padded[attention_mask.bool()] = states
    return padded
