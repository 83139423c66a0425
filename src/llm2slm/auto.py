"""Makes the Auto classes and `pipeline` of Transformers know LLM-to-SLM."""

import transformers.pipelines
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer

from .configuration_llm2slm import LLM2SLMConfig
from .modeling_llm2slm import LLM2SLMForConditionalGeneration
from .pipeline_llm2slm import LLM2SLMText2TextGenerationPipeline
from .tokenization_llm2slm import LLM2SLMTokenizer

AutoConfig.register(LLM2SLMConfig.model_type, LLM2SLMConfig)
AutoModel.register(LLM2SLMConfig, LLM2SLMForConditionalGeneration)
AutoModelForSeq2SeqLM.register(LLM2SLMConfig, LLM2SLMForConditionalGeneration)
AutoTokenizer.register(LLM2SLMConfig, fast_tokenizer_class=LLM2SLMTokenizer)

# Transformers 5 removed the task; Transformers 4 has its own pipeline for it, which is left in place.
if transformers.pipelines.__dict__.get("REMOVED_TASKS", {}).pop("text2text-generation", None) is not None:
    transformers.pipelines.PIPELINE_REGISTRY.register_pipeline(
        "text2text-generation",
        pipeline_class=LLM2SLMText2TextGenerationPipeline,
        pt_model=AutoModelForSeq2SeqLM,
        type="text",
    )
