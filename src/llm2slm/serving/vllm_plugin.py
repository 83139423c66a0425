"""Makes vLLM serve LLM-to-SLM checkpoints: `vllm serve CHECKPOINT`, `vllm.LLM(CHECKPOINT)`.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). To vLLM a pair is a multimodal
model whose one item is the prompt: what encodes it is the frozen LLM and the projector (vllm_encoder.py), the language
model is vLLM's own model of the SLM's kind (vllm_model.py). Texts become such items in vllm_rendering.py.

The registries of renderers, tokenizers and configurations are vLLM's internals: each of its releases needs the tests.
"""


def register() -> None:
    """Tells vLLM of the model, its configuration, its tokenizers and its renderer; a second call changes nothing."""
    from vllm import ModelRegistry
    from vllm.distributed.ec_transfer.ec_connector.factory import ECConnectorFactory
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from .vllm_config import ARCHITECTURE, PROMPT_FOLDER, TOKENIZER_MODE, LLM2SLMServing, ServedConfig
    from .vllm_rendering import refuse_unserved_parameters

    if ARCHITECTURE in ModelRegistry.get_supported_archs():
        return
    ModelRegistry.register_model(ARCHITECTURE, f"{__package__}.vllm_model:LLM2SLMForVLLM")
    MODELS_CONFIG_MAP[ARCHITECTURE] = LLM2SLMServing
    _CONFIG_REGISTRY[ServedConfig.model_type] = ServedConfig
    TokenizerRegistry.register(TOKENIZER_MODE, f"{__package__}.vllm_rendering", "ServedTokenizer")
    RENDERER_REGISTRY.register(TOKENIZER_MODE, f"{__package__}.vllm_rendering", "LLM2SLMRenderer")
    ECConnectorFactory.register_connector(PROMPT_FOLDER, f"{__package__}.vllm_connector", "PromptFolder")
    refuse_unserved_parameters()
