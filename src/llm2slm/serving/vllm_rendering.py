"""What becomes of a request before it reaches vLLM's engine: text, chat or ids to one item, and what is refused."""

import functools
from dataclasses import replace
from functools import cached_property

from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole
from vllm.distributed.ec_transfer.ec_connector.factory import ECConnectorFactory
from vllm.exceptions import VLLMValidationError
from vllm.renderers.hf import HfRenderer
from vllm.sampling_params import SamplingParams
from vllm.tokenizers.hf import get_cached_tokenizer

from ..tokenization_llm2slm import LLM2SLMTokenizer
from .vllm_config import (
    ARCHITECTURE,
    PROMPT,
    PROMPT_FOLDER,
    SEEDS_REFUSED,
    max_prompt_length,
    placeholder_id,
    writes_only,
)

# How the text of a chat is tokenized: a key of the prompt, until it is.
CHAT = "llm2slm_chat"
ONE_TEXT, TEMPLATE = "one text", "template"
# A pair that was trained on texts in a format reads one text: the chat's last message.
ONE_TEXT_TEMPLATE = (
    "{% if messages[-1]['role'] != 'user' %}{{ raise_exception('The last message must be the user\\'s.') }}{% endif %}"
    "{{ messages[-1]['content'] }}"
)


class ServedTokenizer:
    """A pair's two tokenizers: prompts are read with the LLM's, responses written with the SLM's."""

    @classmethod
    def from_pretrained(cls, name, *args, revision=None, truncation_side="left", download_dir=None, **kwargs):
        """Loads them as vLLM asks; what else it says is for other kinds of tokenizers."""
        tokenizer = LLM2SLMTokenizer.from_pretrained(
            name, revision=revision, cache_dir=download_dir, truncation_side=truncation_side
        )
        llm_tokenizer = tokenizer.llm_tokenizer
        longest = max(len(token) for token in [*llm_tokenizer.get_vocab(), *tokenizer.get_vocab()])
        tokenizer = get_cached_tokenizer(tokenizer)

        class OfPrompts(type(tokenizer)):  # type: ignore[misc]
            """What vLLM asks a tokenizer for when it measures and cuts prompts is the LLM's."""

            truncation_side = llm_tokenizer.truncation_side
            max_chars_per_token = longest

        tokenizer.__class__ = OfPrompts
        return tokenizer


class LLM2SLMRenderer(HfRenderer):
    """Makes of each prompt the one item that the pair's encoder takes."""

    def __init__(self, config, tokenizer):
        super().__init__(config, tokenizer)
        self._folder = None
        if writes_only(config) and config.ec_transfer_config.ec_connector == PROMPT_FOLDER:
            self._folder = ECConnectorFactory.create_connector(config, ECConnectorRole.SCHEDULER)

    # ------------------------------------------------------------------------------------------------- text and chats
    @cached_property
    def default_chat_tok_params(self):
        """A template brings its own special tokens."""
        return super().default_chat_tok_params.with_kwargs(add_special_tokens=False)

    def render_messages(self, messages, params):
        """A chat to its text: by the LLM's chat template, or the one text of a model trained on such."""
        params, kind = self._template_of(params)
        conversation, prompt = super().render_messages(messages, params)
        return conversation, {**prompt, CHAT: kind}

    async def render_messages_async(self, messages, params):
        """Likewise."""
        params, kind = self._template_of(params)
        conversation, prompt = await super().render_messages_async(messages, params)
        return conversation, {**prompt, CHAT: kind}

    def _template_of(self, params):
        if params.chat_template is None and self.get_tokenizer().prompt_format is not None:
            return replace(params, chat_template=ONE_TEXT_TEMPLATE), ONE_TEXT
        return params, TEMPLATE

    def _can_produce_offsets(self):
        return False  # `prompt_format` moves them

    def _tokenize_prompt(self, prompt, params):
        kind, kwargs = prompt.pop(CHAT, None), params.get_encode_kwargs()
        if not prompt["prompt"].strip():
            raise VLLMValidationError("The prompt is empty.", parameter="prompt")
        if kind == ONE_TEXT:  # as the same text outside of a chat
            kwargs["add_special_tokens"] = True
        elif kind == TEMPLATE:
            kwargs["apply_prompt_format"] = False
        ids = self.get_tokenizer()(prompt["prompt"], **kwargs)["input_ids"]
        return self._build_tokens_prompt(ids, prompt)

    def _detokenize_prompt(self, prompt):
        prompt["prompt"] = self.get_tokenizer().decode_prompt(prompt["prompt_token_ids"])
        return prompt

    async def _detokenize_prompt_async(self, prompt):
        return self._detokenize_prompt(prompt)

    # ------------------------------------------------------------------------------------------------- ids to the item
    def _process_tokens(self, prompt, **kwargs):
        return self._encoded(super()._process_tokens(self._as_item(prompt), **kwargs))

    async def _process_tokens_async(self, prompt, **kwargs):
        return self._encoded(await super()._process_tokens_async(self._as_item(prompt), **kwargs))

    def _encoded(self, engine_input):
        if self._folder is not None and not self._folder.has_cache_item(engine_input["mm_hashes"][PROMPT][0]):
            raise VLLMValidationError(
                "This server has no LLM, and the prompt has not been encoded: send it to a server that encodes first.",
                parameter="prompt",
            )
        return engine_input

    def _as_item(self, prompt):
        if prompt.get("multi_modal_data") or prompt.get("multi_modal_uuids"):
            raise VLLMValidationError("This model reads text, and no images, sounds or videos.", parameter="prompt")
        ids, config = prompt["prompt_token_ids"], self.model_config.hf_config
        if not ids:
            raise VLLMValidationError("The prompt is empty.", parameter="prompt")
        vocab_size = config.llm_text_config.vocab_size
        if not all(isinstance(token, int) and 0 <= token < vocab_size for token in ids):
            raise VLLMValidationError(
                f"A prompt's token ids are the LLM's, from 0 to {vocab_size - 1}: one of these is not.",
                parameter="prompt",
            )
        longest = max_prompt_length(config, self.model_config.max_model_len)
        if len(ids) > longest:
            raise VLLMValidationError(
                f"The prompt has {len(ids)} tokens, and this model reads at most {longest}.", parameter="prompt"
            )
        return {**prompt, "multi_modal_data": {PROMPT: [ids]}}

    def validate_token_ids(self, token_ids, *, parameter=None):
        """
        The engine's prompts are placeholders. Others are what beam search makes of them, and ids that a client passes
        around the encoder: the SLM would read both without the prompt.
        """
        placeholder = placeholder_id(self.model_config.hf_config)
        if any(token != placeholder for token in token_ids):
            raise VLLMValidationError(
                "Of an LLM-to-SLM model vLLM serves greedy search and sampling: no beam search, and no prompt that "
                "did not pass its tokenizer. For beams call the checkpoint's own `generate`.",
                parameter=parameter,
            )


def refuse_unserved_parameters() -> None:
    """
    Makes vLLM refuse two things asked of a pair: prompt logprobs, since the prompt's tokens are the LLM's and the SLM
    would score their placeholders; and, on a CPU that reads prompts in parts, seeds, which could end the engine. vLLM
    has no hook for a model's own checks of a request's parameters.
    """
    verify = SamplingParams.verify

    @functools.wraps(verify)
    def verify_for_pairs(self, model_config, *args, **kwargs):
        if self.prompt_logprobs is not None and model_config.architecture == ARCHITECTURE:
            raise VLLMValidationError(
                "The SLM does not score the prompt, which the LLM reads: leave out `prompt_logprobs`, and `echo` with "
                "`logprobs`.",
                parameter="prompt_logprobs",
            )
        refused = getattr(model_config.hf_config, SEEDS_REFUSED, False)
        if refused and self.seed is not None and self.temperature > 0:
            raise VLLMValidationError(
                "On a CPU a seed needs prompts that are read in one piece: start the server with "
                "`--no-enable-chunked-prefill`.",
                parameter="seed",
            )
        return verify(self, model_config, *args, **kwargs)

    SamplingParams.verify = verify_for_pairs
