"""
A drafter that is refreshed: does it help if it reads the LLM's states of the response so far, too?

    python experiments/refreshed_drafter.py cut --data data/simplify --pairs 7057 --output data/simplify-cut
    llm2slm train ... --data data/simplify-cut --prompt-format "{prompt}" --num-train-epochs 1 --output-dir runs/cut
    python experiments/refreshed_drafter.py measure --models runs/plain runs/cut --adapter runs/llm \
        --data data/simplify --output refreshed.json

In lossless mode the LLM reads the response while it verifies. Its states of these tokens could go through the
projector and replace the SLM's own embeddings. `cut` makes the pairs that teach this: each pair as it is, and
once more with a part of its response moved to the end of the prompt. `measure` counts the tokens that stand for each
run of the LLM, with each pair's drafts as they are and refreshed. It measures no time: here all states are computed
anew for each draft, where the product would keep those of verification.
"""

import argparse
import functools
import json
import random
from pathlib import Path
from unittest import mock

import torch
from datasets import Dataset, DatasetDict
from lossless import load_llm_with_head
from tqdm.auto import tqdm

from llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMTokenizer
from llm2slm.data.pairs import load_pairs
from llm2slm.drafter_llm2slm import Draft, Drafter
from llm2slm.layers_llm2slm import LayerStates, truncate
from llm2slm.utils import machine, versions


class RefreshedDrafter(Drafter):
    """Drafts behind the LLM's states of the prompt and of the response, but for its last token."""

    def __init__(self, model, prompt_embeds, dial, *, prompt_ids, llm):
        super().__init__(model, prompt_embeds, dial)
        self.model, self.prompt_ids = model, prompt_ids
        layers, num_layers = model.config.prompt_layers, model.config.llm_text_config.num_hidden_layers
        self.reading = LayerStates(truncate(llm.base_model, num_layers, max(layers)), layers, num_layers)

    def draft(self, response, limit, ends, process=None, do_sample=False) -> Draft:
        """As [`Drafter.draft`]. The LLM has not read the last token: it wrote it itself, in the run that verified."""
        read = torch.cat([self.prompt_ids, self.prompt_ids.new_tensor([response[:-1]])], dim=1)
        self.reading.model(input_ids=read, use_cache=False, return_dict=True)
        prompt_embeds = self.model.encode_prompt(read, None, self.reading.states()).prompt_embeds
        return Drafter(self.model, prompt_embeds, self.dial).draft(response[-1:], limit, ends, process, do_sample)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    cutting = commands.add_parser("cut", help="make the pairs with a part of the response in the prompt")
    cutting.add_argument("--data", required=True, help="data set with the columns prompt and completion")
    cutting.add_argument("--pairs", type=int, help="training pairs (default: all)")
    cutting.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    cutting.add_argument("--output", type=Path, required=True, help="folder for the data set")
    measuring = commands.add_parser("measure", help="count the tokens for each run of the LLM")
    measuring.add_argument("--models", nargs="+", required=True, help="checkpoints with the LLM's tokenizer")
    measuring.add_argument("--adapter", required=True, help="folder of a LoRA adapter of their LLM, which is merged")
    measuring.add_argument("--data", required=True, help="data set whose test prompts are read")
    measuring.add_argument("--examples", type=int, default=200, help="prompts, evenly spaced (default: %(default)s)")
    measuring.add_argument("--max-new-tokens", type=int, default=128, help="(default: %(default)s)")
    measuring.add_argument("--output", type=Path, required=True, help="the report, JSON")
    for command in (cutting, measuring):
        command.add_argument("--prompt-format", default="{prompt}\n", help="(default: the prompt and a line break)")
    arguments = parser.parse_args()
    cut(arguments) if arguments.command == "cut" else measure(arguments)


def cut(arguments: argparse.Namespace) -> None:
    """Writes the data set: `prompt` has the prompt format and, in half of the rows, words of the response."""
    generator = random.Random(arguments.seed)
    splits = {}
    for split, most in {"train": arguments.pairs, "validation": None}.items():
        rows = []
        for pair in load_pairs(arguments.data, split, arguments.prompt_format, None, most):
            rows.append({"prompt": pair["prompt"], "completion": pair["completion"]})
            words = pair["completion"].split(" ")
            if split == "train" and len(words) > 1:
                place = generator.randrange(1, len(words))
                begun = pair["prompt"] + " ".join(words[:place])
                rows.append({"prompt": begun, "completion": " " + " ".join(words[place:])})
        splits[split] = Dataset.from_list(rows)
    DatasetDict(splits).save_to_disk(arguments.output)
    print({split: len(rows) for split, rows in splits.items()})


def measure(arguments: argparse.Namespace) -> None:
    """Writes the report: each model's drafts as they are and refreshed, over the same prompts."""
    report = {
        "prompt_format": arguments.prompt_format,
        "adapter": arguments.adapter,
        "max_new_tokens": arguments.max_new_tokens,
        "models": {name: measure_model(arguments, name) for name in arguments.models},
        "machine": machine(),
        "versions": versions(),
    }
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


def measure_model(arguments: argparse.Namespace, name: str) -> dict:
    """The counts of one checkpoint."""
    model = LLM2SLMForConditionalGeneration.from_pretrained(name, dtype="float32", load_llm=False)
    tokenizer = LLM2SLMTokenizer.from_pretrained(name)
    llm = load_llm_with_head(model.config, None, arguments.adapter, "float32")
    prompts = load_pairs(arguments.data, "test", arguments.prompt_format, None, arguments.examples)["prompt"]
    settings = {
        "max_new_tokens": arguments.max_new_tokens,
        "eos_token_id": tokenizer.llm_tokenizer.eos_token_id,
        "pad_token_id": tokenizer.llm_tokenizer.pad_token_id,
    }
    counts = {way: {"tokens": 0, "llm_calls": 0, "draft_tokens": 0, "accepted_tokens": 0} for way in ("once", "fresh")}
    differ = 0
    for prompt in tqdm(prompts, desc=name):
        ids = tokenizer(prompt, apply_prompt_format=False, return_tensors="pt")["input_ids"]
        fresh = functools.partial(RefreshedDrafter, prompt_ids=ids, llm=llm)
        outputs = {"once": model.generate_lossless(ids, llm=llm, **settings)}
        with mock.patch("llm2slm.drafting_llm2slm.Drafter", fresh):
            outputs["fresh"] = model.generate_lossless(ids, llm=llm, **settings)
        differ += not torch.equal(outputs["once"].sequences, outputs["fresh"].sequences)
        for way, output in outputs.items():
            counts[way]["tokens"] += output.sequences.shape[1]
            for count in ("llm_calls", "draft_tokens", "accepted_tokens"):
                counts[way][count] += output[count]
    for count in counts.values():
        count["tokens_per_llm_call"] = count["tokens"] / count["llm_calls"]
    print(name, json.dumps(counts))
    return {"prompts": len(prompts), "differ": differ, **counts}


if __name__ == "__main__":
    main()
