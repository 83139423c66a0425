"""What vLLM is told of a pair before it starts, and what it refuses to start with."""

from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from ..configuration_llm2slm import LLM2SLMConfig
from ..loading_llm2slm import max_positions

ARCHITECTURE = "LLM2SLMForConditionalGeneration"
TOKENIZER_MODE = "llm2slm"  # vLLM's name for the pair of a tokenizer and a renderer
PROMPT_FOLDER = "LLM2SLMPromptFolder"  # the name of what joins two servers (vllm_connector.py)
SEEDS_REFUSED = "seeds_are_refused"  # on the configuration of a server for which one is no good
PROMPT = "prompt"  # vLLM's name for the one kind of item that is encoded
SPECULATION = ("ngram",)  # drafts from the text itself; other methods load a model that cannot read the encoded prompt


class ServedConfig(LLM2SLMConfig):
    """To vLLM a pair is a decoder-only model, the SLM, that takes embeddings: not an encoder-decoder."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "is_encoder_decoder": False})


def placeholder_id(config: LLM2SLMConfig) -> int:
    """
    The id that stands for each token of a prompt, where vLLM counts tokens: one that ends no response, and that no
    response has if possible, since penalties count the prompt's tokens.
    """
    ends = config.eos_token_id if isinstance(config.eos_token_id, (list, tuple)) else [config.eos_token_id]
    candidates = (config.bos_token_id, config.pad_token_id)
    return next((token for token in candidates if token is not None and token not in ends), 0)


def max_prompt_length(config: LLM2SLMConfig, max_model_len: int) -> int:
    """Tokens of the longest prompt: what the LLM has positions for, and vLLM memory."""
    return min(max_model_len, max_positions(config.llm_text_config) or max_model_len)


class LLM2SLMServing(VerifyAndUpdateConfig):
    """vLLM calls these when the command line is read, before it loads anything."""

    @staticmethod
    def verify_and_update_model_config(model_config) -> None:
        """
        Chooses the tokenizer and greedy search, what the checkpoint's own `generate` does by default.

        Raises:
            ValueError: for an encoder-decoder SLM, and what would leave the prompt out.
        """
        config = model_config.hf_config
        if config.slm_config.is_encoder_decoder:
            raise ValueError(
                f"vLLM serves decoder-only SLMs, and this pair's is an encoder-decoder: {config.slm_config.model_type}"
            )
        if model_config.runner_type != "generate":
            raise ValueError("An LLM-to-SLM pair writes: it has no embeddings and no scores for `--runner pooling`.")
        if model_config.tokenizer_mode not in ("auto", TOKENIZER_MODE):
            raise ValueError(
                f"A pair has two tokenizers, which `--tokenizer-mode {model_config.tokenizer_mode}` does not read: "
                "leave it out."
            )
        if model_config.skip_tokenizer_init:
            raise ValueError("A pair's prompts pass its tokenizers: leave out `--skip-tokenizer-init`.")
        if model_config.enable_prompt_embeds:
            raise ValueError("The prompt's embeddings are made here, by the LLM: leave out `--enable-prompt-embeds`.")
        if model_config.multimodal_config.get_limit_per_prompt(PROMPT) == 0:
            raise ValueError(
                "Without its LLM a pair reads no prompt: leave out `--language-model-only` and "
                f"`--limit-mm-per-prompt` for {PROMPT!r}."
            )
        model_config.tokenizer_mode = TOKENIZER_MODE
        generation = model_config.try_get_generation_config()
        if not generation.get("do_sample", False):
            model_config.override_generation_config = {"temperature": 0.0, **model_config.override_generation_config}
        if current_platform.is_cpu():  # only a GPU's memory is measured by encoding the longest prompt there may be
            model_config.multimodal_config.skip_mm_profiling = True

    @staticmethod
    def verify_and_update_config(vllm_config) -> None:
        """
        Raises a `ValueError` for speculation with a draft model, for pipeline parallelism, for a connector that a
        prompt which was never encoded ends, and for adapters on a CPU.
        """
        speculation = vllm_config.speculative_config
        if speculation is not None and speculation.method not in SPECULATION:
            raise ValueError(
                f"Speculation by {speculation.method!r} needs a model that reads the prompt's tokens, and here the "
                f"SLM reads encoded states. Served is {', '.join(SPECULATION)}."
            )
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ValueError(
                "A pair is not split by layers: leave out `--pipeline-parallel-size`; `--tensor-parallel-size` is "
                "served."
            )
        if vllm_config.lora_config is not None and current_platform.is_cpu():
            # vLLM 0.32 takes -1, which stands for none, for the last adapter.
            raise ValueError(
                "On a CPU vLLM writes a request without an adapter with that of another in its batch: leave out "
                "`--enable-lora`, merge the adapter into the SLM, and serve that checkpoint."
            )
        transfer = vllm_config.ec_transfer_config
        if transfer is not None and transfer.ec_connector == "ECExampleConnector":
            raise ValueError(
                f"A prompt that was never encoded would end this server: its connector is {PROMPT_FOLDER!r} instead, "
                "with the same settings."
            )
        # vLLM 0.32 on a CPU ends at a seed whose prompt it reads in parts: it takes back a random number, which it can
        # on a GPU only.
        in_parts = current_platform.is_cpu() and vllm_config.scheduler_config.enable_chunked_prefill
        setattr(vllm_config.model_config.hf_config, SEEDS_REFUSED, in_parts)


def writes_only(vllm_config) -> bool:
    """Whether this server has no LLM: another one encodes its prompts."""
    transfer = vllm_config.ec_transfer_config
    return transfer is not None and transfer.is_ec_consumer and not transfer.is_ec_producer
