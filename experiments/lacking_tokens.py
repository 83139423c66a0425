"""
How many of a data set's prompt tokens an SLM with a trimmed vocabulary lacks.

    python experiments/lacking_tokens.py --model model_cards/translate-en-it-gemma3-270m --data data/translate-en-it \
        --output results/translate/lacking_tokens.json
"""

import argparse
import json
from pathlib import Path

from tqdm.auto import tqdm

from llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMTokenizer
from llm2slm.data.pairs import load_pairs
from llm2slm.utils import versions


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="LLM-to-SLM checkpoint whose SLM has the LLM's tokens, trimmed")
    parser.add_argument("--data", required=True, help="data set whose prompts are read")
    parser.add_argument("--splits", nargs="+", default=["train", "validation", "test"], help="(default: all three)")
    parser.add_argument("--prompt-format", default="{prompt}\n", help="(default: the prompt and a line break)")
    parser.add_argument("--output", type=Path, required=True, help="the report, JSON")
    arguments = parser.parse_args()

    model = LLM2SLMForConditionalGeneration.from_pretrained(arguments.model, load_llm=False)
    tokenizer = LLM2SLMTokenizer.from_pretrained(arguments.model)
    report = {"model": arguments.model, "splits": {}, "versions": versions()}
    for split in arguments.splits:
        prompts = load_pairs(arguments.data, split, arguments.prompt_format, None, None)["prompt"]
        lacking = [
            model.prompt_token_map[tokenizer.encode(prompt, apply_prompt_format=False, return_tensors="pt")[0]] < 0
            for prompt in tqdm(prompts, desc=split)
        ]
        report["splits"][split] = {
            "prompts": len(prompts),
            "with a token that the SLM lacks": sum(bool(row.any()) for row in lacking),
            "tokens": sum(len(row) for row in lacking),
            "that the SLM lacks": sum(int(row.sum()) for row in lacking),
        }
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
