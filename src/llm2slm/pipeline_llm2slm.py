"""The text2text-generation pipeline, which Transformers 5 removed and an LLM-to-SLM checkpoint brings back.

One of the files copied into every checkpoint: it imports nothing but torch and transformers, and works on both 4.x and
5.x.
"""

from collections.abc import Generator, Iterable

from torch.utils.data import Dataset
from transformers import Pipeline


class LLM2SLMText2TextGenerationPipeline(Pipeline):
    """
    Writes a response to each prompt.

    ```python
    >>> from transformers import pipeline

    >>> rewrite = pipeline("text2text-generation", model=folder_or_name, trust_remote_code=True)
    >>> rewrite("And God said, Let there be light: and there was light.", max_new_tokens=40)
    [{'generated_text': '...'}]
    ```

    Prompts are strings (which the tokenizer puts into its `prompt_format`), lists of strings, chats (lists of
    messages, put through the LLM's chat template), lists of chats, or anything that iterates over them. Every other
    argument is one of `generate`, whose defaults are the checkpoint's generation config, but `truncation` and
    `prompt_max_length` (prompt tokens), `chat_template_kwargs`, `return_tensors` (ids instead of text) and
    `clean_up_tokenization_spaces`. It has no `llm`: what `generate` then returns are the LLM's ids.
    """

    _load_tokenizer = True
    _load_processor = _load_image_processor = _load_video_processor = _load_feature_extractor = False
    _pipeline_calls_generate = False  # generate's arguments go to it as they are, in both major versions

    def _sanitize_parameters(
        self,
        truncation=None,
        prompt_max_length=None,
        chat_template_kwargs=None,
        return_tensors=None,
        return_text=None,
        clean_up_tokenization_spaces=None,
        **generate_kwargs,
    ):
        if generate_kwargs.get("llm") is not None:
            raise ValueError(
                "With `llm` the ids of a response are the LLM's, which this pipeline cannot decode: call "
                "`model.generate`, and decode with the LLM's tokenizer."
            )
        preprocess = {
            "truncation": truncation,
            "max_length": prompt_max_length,
            "chat_template_kwargs": chat_template_kwargs,
        }
        postprocess = {
            "return_tensors": return_tensors if return_text is None else not return_text,
            "clean_up_tokenization_spaces": clean_up_tokenization_spaces,
        }
        return _given(preprocess), generate_kwargs, _given(postprocess)

    def __call__(self, inputs, **kwargs):
        """
        Returns:
            For one prompt a list of `{"generated_text": str}`, one for each of `num_return_sequences`; for a list of
            prompts a list of them, flat where each prompt has one response.
        """
        if isinstance(inputs, (list, tuple)) and inputs and _is_message(inputs[0]):
            return super().__call__([list(inputs)], **kwargs)[0]  # one chat
        if isinstance(inputs, Iterable) and not isinstance(inputs, (str, dict, list, Generator, Dataset)):
            inputs = list(inputs)  # Transformers would take a tuple, an array or a data set's column for one prompt
        if isinstance(inputs, list) and not inputs:
            return []
        outputs = super().__call__(inputs, **kwargs)
        # The built-in task of Transformers 4 flattens a list of strings, and evaluate relies on it.
        strings = isinstance(inputs, list) and all(isinstance(text, str) for text in inputs)
        if strings and all(len(responses) == 1 for responses in outputs):
            return [responses[0] for responses in outputs]
        return outputs

    def preprocess(self, inputs, chat_template_kwargs=None, **tokenizer_kwargs):
        """A prompt, or a chat, to ids of the LLM's tokenizer."""
        if isinstance(inputs, str):
            if not inputs.strip():
                raise ValueError("The prompt is empty.")
        else:  # a chat: a list of messages, or the Chat that Transformers 5 wraps around it
            messages = getattr(inputs, "messages", inputs)
            if not isinstance(messages, (list, tuple)) or not messages or not all(map(_is_message, messages)):
                raise TypeError(
                    "A prompt must be a string, or a chat: a list of messages with `role` and `content`. Got "
                    f"{type(messages).__name__}: {messages!r:.200}."
                )
            inputs = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **(chat_template_kwargs or {})
            )
            tokenizer_kwargs["add_special_tokens"] = False  # nor `prompt_format`: the template brings all
        return dict(self.tokenizer(inputs, return_tensors="pt", **tokenizer_kwargs))

    def _forward(self, model_inputs, **generate_kwargs):
        batch_size = model_inputs["input_ids"].shape[0]
        output = self.model.generate(**model_inputs, **generate_kwargs)
        ids = output if not hasattr(output, "sequences") else output.sequences
        return {"output_ids": ids.reshape(batch_size, ids.shape[0] // batch_size, -1)}

    def postprocess(self, model_outputs, return_tensors=False, clean_up_tokenization_spaces=False):
        """The responses to one prompt, decoded by the SLM's tokenizer."""
        responses = model_outputs["output_ids"][0]  # (num_return_sequences, response_length)
        if return_tensors:
            return [{"generated_token_ids": ids} for ids in responses]
        return [
            {
                "generated_text": self.tokenizer.decode(
                    ids, skip_special_tokens=True, clean_up_tokenization_spaces=clean_up_tokenization_spaces
                )
            }
            for ids in responses
        ]


def _given(arguments: dict) -> dict:
    return {name: value for name, value in arguments.items() if value is not None}


def _is_message(item) -> bool:
    return isinstance(item, dict) and "role" in item


__all__ = ["LLM2SLMText2TextGenerationPipeline"]
