"""The SLM of a checkpoint as ONNX, beside a page on which it writes in a browser.

Choices made here:
- Transformers' own exporter traces the SLM. `optimum-onnx` 0.1.0, which does the same, ends at Transformers 4.57.
- Two graphs, named as Optimum and Transformers.js name theirs: the SLM takes embeddings, those of a prompt or of a
  token, and a small one gives the embedding of a token. Neither knows of an LLM.
- 8 bits: each matrix is stored as 8-bit integers, and what it is multiplied with becomes such at each step. Weights
  alone in 8 bits (`MatMulNBits`) are slower than 32 bits in ONNX Runtime Web 1.30.
- The page lies in the package, so that a command writes a folder which is ready to be served.
"""

import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from ..inputs_llm2slm import CACHE
from ..language_models import end_tokens, response_limit
from ..modeling_llm2slm import LLM2SLMForConditionalGeneration
from ..tokenization_llm2slm import LLM2SLMTokenizer
from ..utils import check_new_file, write_folder

SLM_FILE, EMBEDDINGS_FILE = "model.onnx", "embed_tokens.onnx"
PAGE = Path(__file__).parent / "browser"
EXPORTED = ("llama", "qwen2", "gemma3_text")
MAX_BYTES = 2**31  # of an ONNX file that holds its weights itself, as a browser wants it
_CACHE_NAME = re.compile(r"(input|output)\.(?:past_key_values|cache)\.layers\.(\d+)\.(key|value)s")


def export_onnx(
    model: LLM2SLMForConditionalGeneration,
    tokenizer: LLM2SLMTokenizer,
    folder: str | os.PathLike,
    bits: Literal[8, 32] = 32,
) -> Path:
    r"""
    Writes the SLM as ONNX, its tokenizer and configuration, and a page for the browser, into a new folder.

    `model.onnx` takes `inputs_embeds` `(1, length, hidden_size)`, `attention_mask` `(1, past_length + length)`,
    `position_ids` `(1, length)`, and for each layer N the cache `past_key_values.N.key` and `.value`
    `(1, num_key_value_heads, past_length, head_dim)`, empty at first. It gives `logits` `(1, 1, vocab_size)` of the
    last position, and the cache as `present.N.key` and `.value`. `embed_tokens.onnx` gives the `inputs_embeds` of
    `input_ids` `(1, length)`. Numbers are 32-bit floats, ids 64-bit integers.

    Args:
        model ([`LLM2SLMForConditionalGeneration`]): On the CPU, in float32; its LLM is not needed.
        tokenizer ([`LLM2SLMTokenizer`]): The checkpoint's.
        folder (`str` or `os.PathLike`): A new folder.
        bits (`int`, *optional*, defaults to 32): Of each weight in a matrix. With 8 the file is a quarter as large.

    Returns:
        `Path`: the folder.

    Raises:
        ImportError: if Transformers is too old to export.
        OSError: if the folder exists, or cannot be written.
        ValueError: if the SLM is none of those that are exported, or too large for one file.
    """
    _check_slm(model.slm, bits)
    folder = Path(folder)
    check_new_file(folder)
    try:
        from transformers.exporters import OnnxConfig, OnnxExporter, OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer
    except ImportError as error:
        raise ImportError("Exporting to ONNX needs Transformers 5.23 or newer: pip install -U transformers") from error
    import onnx_ir

    quantizer = None
    if bits == 8:
        # The exporter's shapes are symbols where onnxruntime looks for numbers, so it is told the type.
        dynamic = OnnxRuntimeDynamicConfig(
            op_types_to_quantize=["MatMul"], per_channel=True, extra_options={"DefaultTensorType": 1}
        )
        quantizer = OnnxRuntimeQuantizer(dynamic)
    with _quiet():
        slm = OnnxExporter().export(model.slm, _step(model.slm), OnnxConfig(dynamic=True, quantizer=quantizer)).program
        embed = torch.onnx.export(
            _Embedding(model.slm, bits).eval(),
            (torch.zeros(1, 3, dtype=torch.long),),
            dynamo=True,
            input_names=["input_ids"],
            output_names=["inputs_embeds"],
            dynamic_shapes=({1: "length"},),
            verbose=False,
        )
    assert embed is not None  # which it is with dynamo alone
    for value in [*slm.graph.inputs, *slm.graph.outputs]:
        if match := _CACHE_NAME.fullmatch(value.name or ""):
            side, layer, kind = match.groups()
            value.name = f"{'past_key_values' if side == 'input' else 'present'}.{layer}.{kind}"

    def write(part: Path) -> None:
        shutil.copytree(PAGE, part)
        onnx_ir.save(slm, part / SLM_FILE)
        onnx_ir.save(embed.model, part / EMBEDDINGS_FILE)
        _write_settings(model, tokenizer, part)

    write_folder(folder, write)
    return folder


def _check_slm(slm: PreTrainedModel, bits: int) -> None:
    kind = slm.config.get_text_config().model_type
    if kind not in EXPORTED:
        raise ValueError(f"SLMs of the kinds {', '.join(EXPORTED)} can be exported to ONNX, and this one is {kind}.")
    size = sum(parameter.numel() for parameter in slm.parameters()) * bits // 8
    if size >= MAX_BYTES:
        raise ValueError(f"The SLM takes {size / 2**30:.1f} GiB in {bits} bits; one ONNX file holds 2.")


@torch.no_grad()
def _step(slm: PreTrainedModel) -> dict[str, Any]:
    """What a call of the SLM takes: two more positions behind three in the cache."""
    width = slm.config.get_text_config().hidden_size
    cache = DynamicCache()  # made without a configuration: it keeps all of the past, in layers with a window too
    slm(inputs_embeds=torch.zeros(1, 3, width), use_cache=True, **{CACHE: cache})
    return {
        "inputs_embeds": torch.zeros(1, 2, width),
        "attention_mask": torch.ones(1, 5, dtype=torch.long),
        "position_ids": torch.tensor([[3, 4]]),
        CACHE: cache,
        "use_cache": True,
        "logits_to_keep": 1,
    }


class _Embedding(nn.Module):
    """The SLM's token embeddings; in 8 bits with a scale for each token."""

    table: torch.Tensor  # (vocab_size, hidden_size)
    scale: torch.Tensor  # (vocab_size, 1)

    def __init__(self, slm: PreTrainedModel, bits: int):
        super().__init__()
        self.embeddings = slm.get_input_embeddings()
        self.bits = bits
        if bits == 8:
            with torch.no_grad():
                ids = torch.arange(self.embeddings.num_embeddings)
                table = self.embeddings(ids)  # scaled as the SLM does it
            scale = (table.abs().amax(dim=-1, keepdim=True) / 127).clamp(min=1e-12)
            self.embeddings = None
            self.register_buffer("table", (table / scale).round().to(torch.int8))
            self.register_buffer("scale", scale)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.bits == 8:
            return self.table[input_ids].float() * self.scale[input_ids]  # (1, length, hidden_size)
        return self.embeddings(input_ids)


def _write_settings(model: LLM2SLMForConditionalGeneration, tokenizer: LLM2SLMTokenizer, folder: Path) -> None:
    """The files that say of an SLM alone what it is, under the names they have in any checkpoint."""
    config, own = model.slm.config, model.generation_config
    config.save_pretrained(folder)
    GenerationConfig(
        eos_token_id=own.eos_token_id if own.eos_token_id is not None else end_tokens(model) or None,
        bos_token_id=own.bos_token_id,
        pad_token_id=own.pad_token_id,
        max_new_tokens=response_limit(own, is_encoder_decoder=False),
    ).save_pretrained(folder)
    tokenizer.slm_tokenizer.save_pretrained(folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say of operators that are not used here."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
