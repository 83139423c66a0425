"""Composing a pair: a pretrained LLM, a pretrained SLM, and a projector between them that starts at random.

One of the files copied into every checkpoint: it imports nothing but torch, transformers and its siblings, and works
on Transformers 4.x and 5.x.
"""

import inspect
import os

import torch
from transformers import PreTrainedModel

from .configuration_llm2slm import LLM2SLMConfig
from .loading_llm2slm import (
    compute_device,
    fingerprint,
    install_line,
    is_package,
    load_llm,
    load_slm,
    loading_lock,
    resolve_revision,
    shared_parameter,
    split_gguf,
)
from .projector_llm2slm import init_linear


class LLM2SLMComposingMixin(PreTrainedModel):
    """Gives [`LLM2SLMForConditionalGeneration`] its `from_llm_slm_pretrained`."""

    @classmethod
    def from_llm_slm_pretrained(
        cls,
        llm: "str | os.PathLike | PreTrainedModel",
        slm: "str | os.PathLike | PreTrainedModel",
        *,
        fusion: str = "replace",
        prompt_token_map: torch.Tensor | list[int] | None = None,
        llm_kwargs: dict | None = None,
        slm_kwargs: dict | None = None,
        **config_kwargs,
    ) -> PreTrainedModel:
        r"""
        Composes a pretrained LLM and a pretrained SLM; the projector between them starts at random.

        Args:
            llm (`str`, `os.PathLike` or `PreTrainedModel`):
                Name on the Hub, folder, `.gguf` file or folder with one, or a loaded model. It is frozen; a model
                passed as an object is shared, not copied. The SLM's generation config becomes the pair's.
            slm (`str`, `os.PathLike` or `PreTrainedModel`):
                Likewise; anything `AutoModelForSeq2SeqLM` or `AutoModelForCausalLM` loads.
            fusion (`str`, *optional*, defaults to `"replace"`):
                `"replace"` or `"add"`, see [`LLM2SLMConfig`].
            prompt_token_map (`torch.LongTensor` or `list[int]` of shape `(llm_vocab_size,)`, *optional*):
                With `shared_tokenizer=True` and an SLM vocabulary smaller than the LLM's: the SLM's id of each token
                of the LLM, -1 for those it lacks, which `fusion="add"` embeds as the mean of all.
            llm_kwargs, slm_kwargs (`dict`, *optional*):
                Arguments of each `from_pretrained`: `dtype`, `device_map`, `revision`, `quantization_config`, ...
            config_kwargs:
                Further fields of [`LLM2SLMConfig`], such as `llm_layer` and `shared_tokenizer`.

        Raises:
            ValueError: if the two models share a parameter (training the SLM would change the LLM), the SLM does more
                with its tokens than look up their embeddings, a field of the configuration is unknown or invalid, or
                `prompt_token_map` is missing, not needed or invalid.
        """
        known = set(inspect.signature(LLM2SLMConfig.__init__).parameters) - {"self", "kwargs"}
        if unknown := set(config_kwargs) - known:
            raise ValueError(f"Unknown configuration field(s) {sorted(unknown)}; known are {sorted(known)}.")

        llm_source: dict = {}
        if not isinstance(llm, PreTrainedModel):
            llm_kwargs = dict(llm_kwargs or {})
            llm_name = llm
            name, gguf_file = split_gguf(llm, llm_kwargs.pop("gguf_file", None))
            llm, llm_config = load_llm(name, gguf_file, **llm_kwargs)
            revision = resolve_revision(name, gguf_file, llm_kwargs)
            llm_source = {
                "llm_name_or_path": str(llm_name) if is_package(llm_name) else name,
                "llm_install": install_line(llm_name, gguf_file),
                "llm_revision": revision,
                "llm_gguf_file": gguf_file,
            }
        elif llm_kwargs:
            raise ValueError("`llm_kwargs` are for loading the LLM by name, but `llm` is a loaded model.")
        else:
            llm_config = llm.config
        if not isinstance(slm, PreTrainedModel):
            slm = load_slm(slm, **(slm_kwargs or {}))
        elif slm_kwargs:
            raise ValueError("`slm_kwargs` are for loading the SLM by name, but `slm` is a loaded model.")

        if not slm.can_generate():
            raise ValueError(
                f"`slm` must be a model that generates (with a language model head), got {type(slm).__name__}."
            )
        if shared := shared_parameter(llm, slm):
            raise ValueError(
                f"LLM and SLM share the parameter {shared!r}: training the SLM would change the frozen LLM. Pass a "
                "copy, e.g. `slm=copy.deepcopy(slm)`."
            )
        _check_reads_embeddings(slm)
        config = LLM2SLMConfig.from_sub_configs(llm_config, slm.config, fusion=fusion, **llm_source, **config_kwargs)
        token_map = _check_token_map(prompt_token_map, config)
        generation_config = slm.generation_config
        with loading_lock:
            model = cls(config, llm=llm, slm=slm)
        if token_map is not None:
            model.prompt_token_map.copy_(token_map)
        config.llm_fingerprint = fingerprint(model.llm)
        model.generation_config = generation_config
        model.projector.to(compute_device(slm.get_input_embeddings()), slm.dtype)
        model._match_embedding_scale()
        return model.eval()

    @torch.no_grad()
    def _match_embedding_scale(self):
        """Gives projections the standard deviation of the SLM's own embeddings, which it was pretrained on."""
        embeddings = self.slm.get_input_embeddings()
        ids = torch.arange(min(embeddings.num_embeddings, 4096), device=compute_device(embeddings))
        std = self._embed_with_slm(ids).float().std().item()
        init_linear(self.projector.out, output_std=std)
        if self.projector.llm_embeddings is not None:
            llm_embeddings = self.llm.get_input_embeddings()
            ids = torch.arange(min(llm_embeddings.num_embeddings, 4096), device=compute_device(llm_embeddings))
            llm_std = llm_embeddings(ids).float().std().item()
            init_linear(self.projector.llm_embeddings, output_std=std / max(llm_std, 1e-6))


@torch.no_grad()
def _check_reads_embeddings(slm: PreTrainedModel):
    """A decoder-only SLM learns responses from their embeddings, and writes them from their ids."""
    if slm.config.is_encoder_decoder or slm.device.type == "meta":
        return
    ids, training = torch.tensor([[0, 1, 2]], device=compute_device(slm)), slm.training
    slm.eval()
    by_ids = slm(input_ids=ids).logits
    by_embeddings = slm(inputs_embeds=slm.get_input_embeddings()(ids)).logits
    slm.train(training)
    if not torch.allclose(by_ids, by_embeddings, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"The SLM ({slm.config.model_type}) does more with its tokens than look up their embeddings: it would "
            "learn responses from other inputs than it writes them from. Choose another SLM."
        )


def _check_token_map(token_map, config: LLM2SLMConfig) -> torch.Tensor | None:
    llm_vocab_size, slm_vocab_size = config.llm_text_config.vocab_size, config.vocab_size
    sizes = f"the LLM's vocabulary has {llm_vocab_size} tokens, the SLM's {slm_vocab_size}"
    if token_map is None:
        if config.maps_prompt_tokens:
            raise ValueError(
                f"`shared_tokenizer=True` with a trimmed vocabulary ({sizes}) needs `prompt_token_map`: the SLM's id "
                "of each token of the LLM, -1 for none. With different tokenizers leave `shared_tokenizer=False`: "
                "`fusion='add'` then adds to a learned projection of the LLM's input embeddings."
            )
        return None
    if not config.maps_prompt_tokens:
        raise ValueError(
            "`prompt_token_map` is for `shared_tokenizer=True` with an SLM vocabulary smaller than the LLM's, got "
            f"`shared_tokenizer={config.shared_tokenizer}` where {sizes}."
        )
    token_map = torch.as_tensor(token_map)
    if token_map.is_floating_point() or token_map.shape != (llm_vocab_size,):
        raise ValueError(
            f"`prompt_token_map` must be integers of shape ({llm_vocab_size},), one for each token of the LLM, got "
            f"{token_map.dtype} of shape {tuple(token_map.shape)}."
        )
    lowest, highest = int(token_map.min()), int(token_map.max())
    if lowest < -1 or highest >= slm_vocab_size:
        raise ValueError(
            f"`prompt_token_map` must hold ids of the SLM's tokenizer, from 0 to {slm_vocab_size - 1}, or -1; found "
            f"{lowest if lowest < -1 else highest}."
        )
    return token_map
