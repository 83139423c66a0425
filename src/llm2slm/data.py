"""From prompt/completion pairs to batches: tokenization and the collator."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase


def tokenize_pairs(dataset, tokenizer, prompt_max_length: int, response_max_length: int):
    r"""
    Adds the columns `input_ids` (the prompt, LLM's tokenizer) and `labels` (the response, SLM's tokenizer, with its
    end-of-sequence token) to a data set with the columns `prompt` and `completion`, and drops the rows with an empty
    side or over a limit.

    Args:
        dataset (`datasets.Dataset`): The pairs, as strings.
        tokenizer ([`LLM2SLMTokenizer`]): Both tokenizers.
        prompt_max_length (`int`): The longest prompt kept, in tokens of the LLM.
        response_max_length (`int`): The longest response kept, in tokens of the SLM.

    Raises:
        ValueError: if a column is missing.
    """
    if missing := {"prompt", "completion"} - set(dataset.column_names):
        raise ValueError(f"The data set lacks the column(s) {sorted(missing)}; it has {dataset.column_names}.")

    def tokenize(batch: dict[str, list]) -> dict[str, list]:
        encoding = tokenizer(batch["prompt"], text_target=batch["completion"])
        return {"input_ids": encoding["input_ids"], "labels": encoding["labels"]}

    def fits(row: dict[str, list]) -> bool:
        return 1 <= len(row["input_ids"]) <= prompt_max_length and 2 <= len(row["labels"]) <= response_max_length

    return dataset.map(tokenize, batched=True, desc="Tokenizing").filter(fits, desc="Dropping long pairs")


@dataclass
class DataCollatorForLLM2SLM:
    r"""
    Pads a list of examples to a batch for [`LLM2SLMForConditionalGeneration`].

    Each example has `input_ids` (prompt, LLM's tokenizer) and `labels` (response, SLM's tokenizer), and may have
    `prompt_hidden_states` of shape `(prompt_length, prompt_hidden_size)` from
    [`~llm2slm.features.cache_prompt_features`]; other columns are left out.

    Args:
        tokenizer ([`LLM2SLMTokenizer`]): Pads the prompts on its LLM tokenizer's side.
        label_pad_token_id (`int`, *optional*, defaults to -100): What the labels are padded with.
    """

    tokenizer: PreTrainedTokenizerBase
    label_pad_token_id: int = -100

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The examples as one batch of tensors."""
        collate = DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=self.label_pad_token_id)
        rows = [{name: row[name] for name in ("input_ids", "labels") if name in row} for row in examples]
        batch = dict(collate(rows, return_tensors="pt"))
        if "prompt_hidden_states" in examples[0]:
            batch["prompt_hidden_states"] = self._pad_states(
                [row["prompt_hidden_states"] for row in examples], batch["attention_mask"]
            )
        return batch

    def _pad_states(self, rows: list, attention_mask: torch.Tensor) -> torch.Tensor:
        first = torch.from_numpy(np.ascontiguousarray(rows[0]))
        padded = first.new_zeros(*attention_mask.shape, first.shape[-1])  # (batch, prompt_length, prompt_hidden_size)
        padded[attention_mask.bool()] = torch.from_numpy(np.concatenate([np.asarray(row) for row in rows]))
        return padded
