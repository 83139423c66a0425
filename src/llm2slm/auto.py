"""Makes the Auto classes and `pipeline` of Transformers, and `datasets`, know LLM-to-SLM."""

import contextlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder, SourceFileLoader

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


def _register_feature() -> None:
    """The column type of cached prompt features; without what it needs there is none, and `datasets` works as ever."""
    with contextlib.suppress(ImportError):
        from .data import prompt_features  # noqa: F401


class _AfterDatasets(MetaPathFinder):
    """
    Registers the column type once `datasets` is imported: a data set saved with cached prompt features is then loaded
    by any script that imports this package. To import `datasets` here would take a second of every other script, too.
    """

    @staticmethod
    def find_spec(fullname, path=None, target=None):
        """Finds `datasets` as Python does, and looks away from everything else."""
        spec = PathFinder.find_spec(fullname, path) if fullname == "datasets" else None
        if spec is None or not isinstance(spec.loader, SourceFileLoader):
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            _register_feature()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if "datasets" in sys.modules:
    _register_feature()
else:
    sys.meta_path.insert(0, _AfterDatasets())
