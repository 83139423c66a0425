"""
A fine-tuned LLM that keeps only the tokens of some texts: the same layers, a smaller table, faster labels.

    python experiments/trimmed_llm.py --llm runs/it-teacher --data data/translate-en-it data/outside-sentences \
        data/outside-translate-en-it --output runs/it-teacher-trimmed
    llm2slm label --llm runs/it-teacher-trimmed --prompt-format $'{prompt}\n' --data data/outside-sentences ...

Two thirds of Gemma 3 270M are its table of 262,144 tokens. A word that is in none of the texts can still be written,
in more tokens.
"""

import argparse

from llm2slm.building import slice_lm, trim_tokenizer
from llm2slm.data.pairs import load_rows, make_texts
from llm2slm.language_models import load_model
from llm2slm.training.run_folder import read_run
from llm2slm.utils import check_new_file


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", required=True, help="folder of a training with --arm llm")
    parser.add_argument("--data", nargs="+", required=True, help="data sets, of which all texts of `train` are kept")
    parser.add_argument("--output", required=True, help="new folder for the LLM, in bfloat16")
    arguments = parser.parse_args()
    check_new_file(arguments.output)

    run = read_run(arguments.llm)
    texts = []
    for name in arguments.data:
        rows = load_rows(name, "train")
        # With what stands around a prompt: the line break at its end is a token, too.
        texts += make_texts(rows, {"prompt": run["data"]["prompt_format"]}, name)["prompt"]
        texts += rows["completion"] if "completion" in rows.column_names else []
    model, tokenizer = load_model(arguments.llm, dtype="bfloat16", trained_llm=run["llm"]["name_or_path"])
    trimmed, token_ids = trim_tokenizer(tokenizer.llm_tokenizer, texts)
    slice_lm(model, range(model.config.num_hidden_layers), token_ids).save_pretrained(arguments.output)
    trimmed.save_pretrained(arguments.output)
    print(f"{len(token_ids):,} of {model.config.vocab_size:,} tokens in {arguments.output}")


if __name__ == "__main__":
    main()
