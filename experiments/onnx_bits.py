"""
What is lost when the SLM is exported to ONNX with 32 and with 8 bits: equal responses, and chrF beside `generate`'s.

    llm2slm export model_cards/simplify-smollm2-135m --onnx onnx-32
    llm2slm export model_cards/simplify-smollm2-135m --onnx onnx-8 --bits 8
    python experiments/onnx_bits.py --checkpoint model_cards/simplify-smollm2-135m --data data/simplify \\
        --folders onnx-32 onnx-8 --output results/onnx.json

All is greedy, in float32 on the CPU, by `generate` and by onnxruntime. chrF is of the responses to the data set's own.
"""

import argparse
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import onnxruntime
import sacrebleu
from datasets import load_from_disk

from llm2slm.language_models import load_checkpoint
from llm2slm.utils import check_new_file, cpu_model, versions, write_json

FILES = ("model.onnx", "embed_tokens.onnx")


def load_writer(folder: Path) -> Callable[[np.ndarray, int, int], list[int]]:
    """A function that writes greedily behind the embeddings `(length, hidden_size)` of a prompt."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0"))
    slm, embed = (onnxruntime.InferenceSession(folder / name, options) for name in FILES)
    shapes = {value.name: value.shape for value in slm.get_inputs() if value.name.startswith("past_key_values")}
    outputs = [value.name for value in slm.get_outputs()]

    def write(prompt_embeds: np.ndarray, end_token: int, max_new_tokens: int) -> list[int]:
        embeds, length, tokens = prompt_embeds[None], 0, []
        cache = {name: np.zeros((1, int(shape[1]), 0, int(shape[3])), np.float32) for name, shape in shapes.items()}
        while len(tokens) < max_new_tokens:
            positions = np.arange(length, length + embeds.shape[1])[None]
            length += embeds.shape[1]
            mask = np.ones((1, length), np.int64)
            given = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions, **cache}
            output = dict(zip(outputs, slm.run(None, given), strict=True))
            tokens.append(int(output["logits"][0, -1].argmax()))
            if tokens[-1] == end_token:
                break
            cache = {name: output[name.replace("past_key_values", "present")] for name in cache}
            (embeds,) = embed.run(None, {"input_ids": np.array([tokens[-1:]])})
        return tokens

    return write


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True, help="a folder with a test split")
    parser.add_argument("--folders", type=Path, nargs="+", required=True, help="written by llm2slm export --onnx")
    parser.add_argument("--prompts", type=int, default=100, help="the first of the test split")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args()
    check_new_file(arguments.output)
    model, tokenizer = load_checkpoint(arguments.checkpoint, dtype="float32", device="cpu")
    pairs = load_from_disk(arguments.data)["test"].select(range(arguments.prompts))
    writers = {folder.name: load_writer(folder) for folder in arguments.folders}
    written: dict[str, list[list[int]]] = {name: [] for name in ("generate", *writers)}
    end, limit = model.generation_config.eos_token_id, arguments.max_new_tokens
    for prompt in pairs["prompt"]:
        encoding = model.encode_prompt(**tokenizer(prompt, return_tensors="pt"))
        ids = model.generate(**encoding, do_sample=False, num_beams=1, max_new_tokens=limit)
        written["generate"].append(ids[0].tolist())
        for name, write in writers.items():
            written[name].append(write(encoding.prompt_embeds[0].detach().numpy(), end, limit))
    rows = {}
    for name, responses in written.items():
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        chrf = sacrebleu.corpus_chrf(texts, [list(pairs["completion"])]).score
        rows[name] = {"chrf": round(chrf, 2)}
        if name != "generate":
            equal = sum(map(list.__eq__, responses, written["generate"]))
            sizes = [(Path(folder) / file).stat().st_size for folder in arguments.folders for file in FILES
                     if folder.name == name]  # fmt: skip
            rows[name] |= {"equal_responses": equal, "size_mb": round(sum(sizes) / 1e6, 1)}
        print(name, rows[name], flush=True)
    packages = {name: metadata.version(name) for name in ("onnx", "onnxruntime", "onnxscript")}
    settings = {name: getattr(arguments, name) for name in ("checkpoint", "data", "prompts", "max_new_tokens")}
    write_json(arguments.output, {**settings, "cpu": cpu_model(), "versions": versions() | packages, "rows": rows})


if __name__ == "__main__":
    main()
