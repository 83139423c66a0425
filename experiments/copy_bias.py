"""
Words that must be copied: does it help to favour the rest of a prompt's word once a response has begun it?

    python experiments/copy_bias.py --model model_cards/translate-en-it-gemma3-270m --data data/translate-en-it \
        --examples 400 --biases 0 2 4 --output results/translate/copy_bias.json

A rare word takes several tokens, and a small model that has begun it may go on with a commoner one: "Helo". Where the
tokens written so far are the beginning of a word of the prompt, the bias is added to the score of that word's next
token. It never begins a word. A logits processor does this, from the prompt's text alone.
"""

import argparse
import json
import re
from pathlib import Path

import torch
from transformers import LogitsProcessor

from llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMTokenizer
from llm2slm.data.pairs import load_pairs
from llm2slm.evaluation.metrics import compare, compute_statistics, interval
from llm2slm.evaluation.run import batches
from llm2slm.utils import machine, versions

METRICS = ("bleu", "chrf", "copied_words")


class FavourPromptWords(LogitsProcessor):
    """
    Adds `bias` to the token that goes on with a word of the row's prompt which the response has begun.

    Args:
        words (`list[list[list[int]]]`): Of each prompt, its words as the SLM's ids.
        num_beams (`int`): Rows of a prompt.
        bias (`float`): What is added to the logarithm of the token's probability, before normalisation.
    """

    def __init__(self, words: list[list[list[int]]], num_beams: int, bias: float):
        self.bias, self.num_beams = bias, num_beams
        self.next = [{} for _ in words]  # of each prompt: a word's first tokens, and those that may follow
        for following, of_prompt in zip(self.next, words, strict=True):
            for word in of_prompt:
                for place in range(1, len(word)):
                    following.setdefault(tuple(word[:place]), set()).add(word[place])
        self.longest = max((len(begun) for following in self.next for begun in following), default=0)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """`scores`, `(rows, vocab_size)`, behind `input_ids`, `(rows, length)`; a new tensor."""
        scores = scores.clone()
        for row, ids in enumerate(input_ids[:, -self.longest :].tolist() if self.longest else []):
            following = self.next[row // self.num_beams]
            # The longest beginning: "_un" "der" goes on with "_un" "der" "stand", not with "der" of another word.
            found = next((following[end] for n in range(len(ids)) if (end := tuple(ids[n:])) in following), None)
            if found is not None:
                scores[row, list(found)] += self.bias
        return scores


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="LLM-to-SLM checkpoint")
    parser.add_argument("--data", required=True, help="data set whose pairs are written and scored")
    parser.add_argument("--split", default="test", help="(default: %(default)s)")
    parser.add_argument("--examples", type=int, help="evenly spaced (default: all)")
    parser.add_argument("--biases", type=float, nargs="+", default=[0, 1, 2, 4, 8], help="0 first, to compare with")
    parser.add_argument("--num-beams", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=160, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="the report, JSON")
    arguments = parser.parse_args()
    if arguments.biases[0] != 0:
        parser.error("--biases must begin with 0")

    model = LLM2SLMForConditionalGeneration.from_pretrained(arguments.model, dtype="float32").eval()
    tokenizer = LLM2SLMTokenizer.from_pretrained(arguments.model)
    pairs = load_pairs(arguments.data, arguments.split, None, None, arguments.examples)
    prompts, references = pairs["prompt"][:], pairs["completion"][:]
    responses = write(model, tokenizer, prompts, arguments)
    statistics = [[compute_statistics(name, texts, references, prompts) for name in METRICS] for texts in responses]
    rows = []
    for bias, of_bias in zip(arguments.biases, statistics, strict=True):
        scores = {}
        for name, found, without in zip(METRICS, of_bias, statistics[0], strict=True):
            low, high = interval(found)
            scores[name] = {"score": found.score, "low": low, "high": high, "minus_none": compare(found, without)}
        rows.append({"bias": bias, "scores": scores})
        print(bias, {name: round(of_name["score"], 2) for name, of_name in scores.items()})
    report = {
        "model": arguments.model,
        "data": Path(arguments.data).name,
        "split": arguments.split,
        "examples": len(prompts),
        "num_beams": arguments.num_beams,
        "max_new_tokens": arguments.max_new_tokens,
        "biases": rows,
        "changed": [
            {"prompt": prompts[n], "reference": references[n], "responses": [texts[n] for texts in responses]}
            for n in range(len(prompts))
            if len({texts[n] for texts in responses}) > 1
        ][:20],
        "machine": machine(),
        "versions": versions(),
    }
    arguments.output.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def write(model, tokenizer, prompts: list[str], arguments: argparse.Namespace) -> list[list[str]]:
    """The responses to all prompts with each bias. A prompt is encoded once."""
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    responses = [[""] * len(prompts) for _ in arguments.biases]
    for numbers in batches(order, arguments.batch_size, "Writing responses"):
        inputs = tokenizer([prompts[n] for n in numbers], padding=True, return_tensors="pt")
        encoding = model.encode_prompt(**inputs)
        words = [prompt_words(tokenizer.slm_tokenizer, prompts[n]) for n in numbers]
        for texts, bias in zip(responses, arguments.biases, strict=True):
            ids = model.generate(
                prompt_embeds=encoding.prompt_embeds,
                attention_mask=encoding.attention_mask,
                max_new_tokens=arguments.max_new_tokens,
                num_beams=arguments.num_beams,
                logits_processor=[FavourPromptWords(words, arguments.num_beams, bias)],
            )
            for number, text in zip(numbers, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
                texts[number] = text
    return responses


def prompt_words(slm_tokenizer, prompt: str) -> list[list[int]]:
    """The prompt's words as the SLM writes them in the middle of a line and at its beginning."""
    words = dict.fromkeys(re.findall(r"\w[\w.'+-]*\w|\w", prompt))
    forms = [form for word in words for form in (" " + word, word)]
    return slm_tokenizer(forms, add_special_tokens=False)["input_ids"] if forms else []


if __name__ == "__main__":
    main()
