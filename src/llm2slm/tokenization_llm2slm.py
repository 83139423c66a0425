"""Two tokenizers, one object: prompts are read by the LLM's tokenizer, responses written by the SLM's.

One of the files copied into every checkpoint: it imports nothing but transformers and its siblings, and works on both
4.x and 5.x.
"""

import copy
import json
import os
import threading
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import LARGE_INTEGER
from transformers.utils import CONFIG_NAME, cached_file

from .configuration_llm2slm import check_prompt_format
from .loading_llm2slm import is_package, load_tokenizer

if TYPE_CHECKING:  # Transformers 4 copies what this file itself imports, and no more
    from .layers_llm2slm import without_head  # noqa: F401

LLM_FOLDER = "llm_tokenizer"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# A fast tokenizer keeps truncation and padding as settings that each call may change: calls of threads take turns.
_turn = threading.RLock()


def _after_fork():
    """A thread that is not in the new process may have had its turn."""
    global _turn
    _turn = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class LLM2SLMTokenizer(PreTrainedTokenizerFast):
    """
    The SLM's tokenizer (ids, special tokens, `decode`, `text_target`) whose prompt side is the LLM's tokenizer
    (`__call__`, `encode`, `decode_prompt`, `pad`, chat templates).

    `llm_tokenizer` and `slm_tokenizer` give the two apart. `padding_side` and `truncation_side` are set for prompts;
    responses are padded and cut at their end. `model_max_length` is the responses'; the prompts' is `llm_tokenizer`'s.

    A text is put into `prompt_format`, the form that the model was trained to read, before it is tokenized: never a
    response, and never a chat, which has its template.
    """

    # No `__init__`: Transformers 5 takes apart a fast tokenizer whose class defines one, and loses its pre-tokenizer.
    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    slow_tokenizer_class = None
    _auto_class = "AutoTokenizer"
    llm_tokenizer: Any = None  # a PreTrainedTokenizerBase, once joined or loaded

    @classmethod
    def from_tokenizers(
        cls,
        llm_tokenizer: "str | os.PathLike | PreTrainedTokenizerBase",
        slm_tokenizer: "str | os.PathLike | PreTrainedTokenizerBase",
        prompt_format: str | None = None,
    ) -> "LLM2SLMTokenizer":
        r"""
        Joins two tokenizers, which are copied. One without a padding token pads with its end-of-sequence token.

        Args:
            llm_tokenizer, slm_tokenizer (`str`, `os.PathLike` or `PreTrainedTokenizerBase`):
                Each a loaded tokenizer, or that of a model: its name on the Hub, folder, `.gguf` file, or
                `package:NAME` for an installed Python package that holds the model.
            prompt_format (`str`, *optional*):
                The form that texts are put into, such as `"{prompt}\n"`. As they are if omitted.

        Raises:
            OSError: if there is no tokenizer of that name.
            ValueError: if one of them is not a fast tokenizer, the SLM's has no end-of-sequence token, or
                `prompt_format` is not made of `{prompt}` alone.
        """
        if isinstance(llm_tokenizer, (str, os.PathLike)):
            llm_tokenizer = load_tokenizer(llm_tokenizer)
        if isinstance(slm_tokenizer, (str, os.PathLike)):
            slm_tokenizer = load_tokenizer(slm_tokenizer)
        for name, tokenizer in (("llm_tokenizer", llm_tokenizer), ("slm_tokenizer", slm_tokenizer)):
            if not getattr(tokenizer, "is_fast", False):
                raise ValueError(f"`{name}` must be a fast tokenizer, got {type(tokenizer).__name__}.")
        if slm_tokenizer.eos_token is None:
            raise ValueError("`slm_tokenizer` has no `eos_token`: a response could not end.")
        special = {name: getattr(slm_tokenizer, name) for name in SPECIAL_TOKENS if getattr(slm_tokenizer, name)}
        special.setdefault("pad_token", slm_tokenizer.eos_token)
        joined = cls(
            tokenizer_object=copy.deepcopy(slm_tokenizer.backend_tokenizer),
            model_max_length=slm_tokenizer.model_max_length,
            **special,
        )
        joined.llm_tokenizer = _as_prompt_tokenizer(copy.deepcopy(llm_tokenizer))
        if prompt_format is not None:
            joined.prompt_format = prompt_format
        return joined

    @property
    def slm_tokenizer(self) -> PreTrainedTokenizerFast:
        """The SLM's tokenizer by itself, for what matches text against the SLM's vocabulary."""
        special = {name: getattr(self, name) for name in SPECIAL_TOKENS if getattr(self, name)}
        return PreTrainedTokenizerFast(
            tokenizer_object=self.backend_tokenizer, model_max_length=self.model_max_length, **special
        )

    # -------------------------------------------------------------------------------------------------- load and save
    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        r"""
        Loads both tokenizers of a checkpoint. Takes what every `from_pretrained` takes, and `prompt_format` in place
        of the checkpoint's, `None` for none. A tokenizer that was saved without has the `prompt_format` of the model's
        config.json beside it.

        Raises:
            OSError: if there is no checkpoint, or not both tokenizers in it.
            ValueError: for the name of a Python package, which holds one model, and for a `prompt_format` that is not
                made of `{prompt}` alone.
        """
        if is_package(pretrained_model_name_or_path):
            raise ValueError(
                f"{pretrained_model_name_or_path!r} names one model, not a checkpoint of two tokenizers. To join it "
                "with another: `LLM2SLMTokenizer.from_tokenizers(llm_tokenizer, slm_tokenizer)`, which takes such "
                "names."
            )
        joined = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        names = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")
        nested = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        subfolder = "/".join(part for part in (kwargs.get("subfolder"), LLM_FOLDER) if part)
        joined.llm_tokenizer = _as_prompt_tokenizer(
            PreTrainedTokenizerFast.from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **nested)
        )
        if "prompt_format" in joined.init_kwargs:
            check_prompt_format(joined.prompt_format)
        else:
            config_file = cached_file(
                pretrained_model_name_or_path,
                CONFIG_NAME,
                subfolder=kwargs.get("subfolder") or "",
                _raise_exceptions_for_missing_entries=False,
                **nested,
            )
            if config_file is not None:
                with open(config_file, encoding="utf-8") as file:
                    joined.prompt_format = json.load(file).get("prompt_format")
        for name in ("padding_side", "truncation_side"):
            if name in kwargs:
                setattr(joined, name, kwargs[name])
        return joined

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Saves the SLM's tokenizer into `save_directory` and the LLM's into its folder `llm_tokenizer`."""
        llm_tokenizer, push_to_hub = self.llm_tokenizer, kwargs.pop("push_to_hub", False)
        # The LLM's folder first: a push then uploads both.
        folder = os.path.join(save_directory, LLM_FOLDER)
        llm_files = llm_tokenizer.save_pretrained(folder)
        path = os.path.join(folder, "tokenizer_config.json")
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
        # A name both major versions know; Transformers 5 writes its own, and the LLM's own code is not shipped.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config.pop("auto_map", None)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(config, file, indent=2, ensure_ascii=False)
        _without_indent(os.path.join(folder, "tokenizer.json"))
        # The LLM's is no field of this tokenizer's own configuration; others may use this one meanwhile.
        own = copy.copy(self)
        own.llm_tokenizer = None
        files = super(LLM2SLMTokenizer, own).save_pretrained(save_directory, *args, push_to_hub=push_to_hub, **kwargs)
        return tuple(files) + tuple(llm_files)

    # ---------------------------------------------------------------------------------------------------- prompt side
    @property
    def prompt_format(self) -> str | None:
        r"""
        The form that texts are put into, such as `"{prompt}\n"`, saved with the tokenizer; `None` for none. It can be
        set; `tokenizer(text, apply_prompt_format=False)` leaves it out once.
        """
        return self.init_kwargs.get("prompt_format")  # which save, load and copy keep

    @prompt_format.setter
    def prompt_format(self, value: str | None):
        check_prompt_format(value)
        self.init_kwargs["prompt_format"] = value

    def __call__(self, text=None, text_pair=None, text_target=None, *, apply_prompt_format=None, **kwargs):
        r"""
        Tokenizes prompts with the LLM's tokenizer and, as `labels`, responses with the SLM's.

        Args:
            text (`str`, `list[str]`, *optional*): The prompt or prompts.
            text_pair: Refused: a prompt is one text.
            text_target (`str`, `list[str]`, *optional*):
                The response or responses; an end-of-sequence token is put behind each.
            apply_prompt_format (`bool`, *optional*, defaults to `add_special_tokens`):
                Whether each prompt is put into `prompt_format`, if there is one. Not by default with
                `add_special_tokens=False`: such a text, a rendered chat for one, is complete already.
            kwargs: As for any tokenizer (`truncation`, `max_length`, `padding`, `return_tensors`), for both sides.

        Returns:
            `BatchEncoding` with `input_ids` and `attention_mask` of the prompts and, with both arguments, `labels`;
            with `text_target` alone, `input_ids` and `attention_mask` of the responses.

        Raises:
            ValueError: if there is neither a prompt nor a response, for pairs, and for pre-tokenized words, which
                `prompt_format` has no place for.
        """
        if text is None and text_target is None:
            raise ValueError("Pass `text` (prompts), `text_target` (responses) or both.")
        if text is None:
            return self._encode_response(text_target, **kwargs)
        _check_prompt_arguments(text_target, text_pair, **kwargs)
        text = self._in_format(text, apply_prompt_format, **kwargs)
        with _turn:
            encoding = self.llm_tokenizer(text, **kwargs)
        if text_target is not None:
            encoding["labels"] = self._encode_response(text_target, **kwargs)["input_ids"]
        return encoding

    def encode(
        self, text, text_pair=None, add_special_tokens=True, *, apply_prompt_format=None, **kwargs
    ) -> list[int]:
        """Prompt ids, with the arguments of a call."""
        _check_prompt_arguments(None, text_pair)
        text = self._in_format(text, apply_prompt_format, add_special_tokens, **kwargs)
        with _turn:
            return self.llm_tokenizer.encode(text, None, add_special_tokens, **kwargs)

    def tokenize(self, text, pair=None, add_special_tokens=False, *, apply_prompt_format=None, **kwargs) -> list[str]:
        """Prompt tokens, by default of the text alone: without special tokens and `prompt_format` around it."""
        _check_prompt_arguments(None, pair)
        text = self._in_format(text, apply_prompt_format, add_special_tokens, **kwargs)
        with _turn:
            return self.llm_tokenizer.tokenize(text, None, add_special_tokens, **kwargs)

    def _in_format(self, text, apply_prompt_format, add_special_tokens=True, is_split_into_words=False, **kwargs):
        wanted = add_special_tokens if apply_prompt_format is None else apply_prompt_format
        if self.prompt_format is None or not wanted:
            return text
        texts = [text] if isinstance(text, str) else text
        if is_split_into_words or not all(isinstance(prompt, str) for prompt in texts):
            raise ValueError(
                f"`prompt_format` {self.prompt_format!r} is the form of one text: words have no place in it. Pass "
                "each prompt as one string, or say `apply_prompt_format=False`."
            )
        texts = [self.prompt_format.format(prompt=prompt) for prompt in texts]
        return texts[0] if isinstance(text, str) else texts

    def decode_prompt(self, token_ids, skip_special_tokens: bool = False, **kwargs) -> str:
        """
        The text of one prompt's ids, `prompt_format` included, by the LLM's tokenizer; `decode` is for a response's,
        by the SLM's. For a batch of prompts: `tokenizer.llm_tokenizer.batch_decode`.
        """
        return self.llm_tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs)

    def pad(self, *args, **kwargs):
        """Pads prompts."""
        return self.llm_tokenizer.pad(*args, **kwargs)

    def apply_chat_template(self, *args, **kwargs):
        """The LLM's chat template: it is the LLM that reads the prompt."""
        with _turn:
            return self.llm_tokenizer.apply_chat_template(*args, **kwargs)

    @property
    def chat_template(self):
        """The LLM's."""
        return None if self.llm_tokenizer is None else self.llm_tokenizer.chat_template

    @chat_template.setter
    def chat_template(self, value):
        if self.llm_tokenizer is not None:
            self.llm_tokenizer.chat_template = value

    # -------------------------------------------------------------------------------------------------- response side
    def _encode_response(self, text, padding=False, truncation=None, max_length=None, return_tensors=None, **kwargs):
        if truncation and max_length is None and self.model_max_length < LARGE_INTEGER:
            max_length = self.model_max_length
        if truncation is None and padding:  # as for prompts: a length to pad to is none to cut at
            truncation = False
        if max_length is not None:
            max_length -= 1  # room for the end-of-sequence token
        kwargs.pop("add_special_tokens", None)  # a chat-templated prompt brings its own; a response never does
        texts = [text] if isinstance(text, str) else text
        with _turn:
            rows = super().__call__(texts, truncation=truncation, max_length=max_length, **kwargs)["input_ids"]
        rows = [self._ended(row) for row in rows]
        encoding = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
        if isinstance(text, str) and return_tensors is None and not padding:
            encoding = {name: value[0] for name, value in encoding.items()}
        max_length = None if max_length is None else max_length + 1
        multiple = kwargs.get("pad_to_multiple_of")
        return super().pad(
            encoding, padding, max_length=max_length, pad_to_multiple_of=multiple, return_tensors=return_tensors
        )

    def _ended(self, row: list[int]) -> list[int]:
        ended = bool(row) and row[-1] == self.eos_token_id
        while row and row[-1] == self.eos_token_id:
            row = row[:-1]
        # A tokenizer that puts a start but no end token is a decoder-only model's: the prompt is before the response.
        if not ended and row and row[0] == self.bos_token_id:
            row = row[1:]
        return [*row, self.eos_token_id]

    # ------------------------------------------------------------------------- what one tokenizer does, and two cannot
    @property
    def padding_side(self) -> str:
        """
        Set, the side that prompts are padded on, as on `llm_tokenizer`. Read, that of responses, which is always the
        right one: collators look here for the side of `labels`.
        """
        return "right"

    @padding_side.setter
    def padding_side(self, value):
        self._set_side("padding_side", value)

    @property
    def truncation_side(self) -> str:
        """Set, the side that prompts are cut on; read, that of responses, which are always cut at their end."""
        return "right"

    @truncation_side.setter
    def truncation_side(self, value):
        self._set_side("truncation_side", value)

    def _set_side(self, name: str, value: str):
        if value not in ("left", "right"):
            raise ValueError(f"`{name}` must be 'left' or 'right', got {value!r}.")
        if self.llm_tokenizer is not None:  # while it is being made, there is none yet
            setattr(self.llm_tokenizer, name, value)

    def encode_plus(self, text, *args, **kwargs):
        """As `__call__`; only Transformers 4 has it."""
        return self(text, *args, **kwargs)

    def as_target_tokenizer(self):
        """Gone from Transformers 5; 4 would tokenize the responses with the LLM's tokenizer."""
        raise NotImplementedError("Pass responses as `text_target`: `tokenizer(prompts, text_target=responses)`.")

    def prepare_seq2seq_batch(self, *args, **kwargs):
        """Likewise."""
        self.as_target_tokenizer()

    def train_new_from_iterator(self, *args, **kwargs):
        """One of the two is trained, and joined again."""
        raise NotImplementedError(
            "Train one of the two, `tokenizer.llm_tokenizer` or `tokenizer.slm_tokenizer`, and join them with "
            "`LLM2SLMTokenizer.from_tokenizers`."
        )


def _check_prompt_arguments(
    text_target, text_pair=None, text_pair_target=None, return_overflowing_tokens=False, **kwargs
):
    if text_pair is not None or text_pair_target is not None:
        raise ValueError(
            "A prompt is one text, without a `text_pair`. Responses are `text_target`: "
            "`tokenizer(prompts, text_target=responses)`."
        )
    if text_target is not None and return_overflowing_tokens:
        raise ValueError(
            "`return_overflowing_tokens=True` makes several prompts of one: tokenize the responses apart from them."
        )


def _without_indent(path: str) -> None:
    """Writes a JSON file anew: one of a large vocabulary is mostly indentation."""
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, separators=(",", ":"))


def _as_prompt_tokenizer(tokenizer):
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # no token_type_ids: one prompt is one segment
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


__all__ = ["LLM2SLMTokenizer"]
