"""
The prompts that a training on a part of the pairs leaves out, without their responses: for `llm2slm label`.

    python experiments/other_prompts.py --data data/simplify --max-train-pairs 7057 --max-prompts 10000 \
        --output data/simplify-others
"""

import argparse

from datasets import DatasetDict

from llm2slm import load_pairs
from llm2slm.data.pairs import spaced
from llm2slm.utils import check_new_file


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the pairs; their split `train` is read")
    parser.add_argument("--max-train-pairs", type=int, required=True, help="the training's number of pairs")
    parser.add_argument("--max-prompts", type=int, help="this many, evenly spaced (default: all)")
    parser.add_argument("--output", required=True, help="new folder for the data set")
    arguments = parser.parse_args()
    check_new_file(arguments.output)

    pairs = load_pairs(arguments.data, "train")
    learned = set(load_pairs(arguments.data, "train", max_examples=arguments.max_train_pairs)["prompt"])
    others = pairs.filter(lambda prompt: prompt not in learned, input_columns="prompt").select_columns("prompt")
    others = spaced(others, arguments.max_prompts)
    DatasetDict({"train": others}).save_to_disk(arguments.output)
    print(f"{len(others):,} of {len(pairs):,} prompts in {arguments.output}")


if __name__ == "__main__":
    main()
