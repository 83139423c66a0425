"""What of an LLM-to-SLM model is stored, and where it comes from: slim checkpoints, and the frozen LLM's own place.

One of the files copied into every checkpoint: it imports nothing but torch, transformers and its siblings, and works
on Transformers 4.x and 5.x.
"""

import copy
import os

from transformers import PreTrainedModel

from .configuration_llm2slm import LLM2SLMConfig
from .loading_llm2slm import (
    check_fingerprint,
    check_loading_info,
    check_same_architecture,
    compute_device,
    load_llm,
    split_gguf,
    sub_device_map,
)


class LLM2SLMPreTrainedModel(PreTrainedModel):
    """Loading and saving: a checkpoint holds projector and SLM, and names the frozen LLM; or it holds all three."""

    config_class = LLM2SLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _auto_class = "AutoModelForSeq2SeqLM"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True  # the name in Transformers 4
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args,
        llm_name_or_path: str | os.PathLike | None = None,
        llm_kwargs: dict | None = None,
        load_llm: bool = True,
        **kwargs,
    ):
        r"""
        Loads a checkpoint, and its frozen LLM from the LLM's own place. Takes what every `from_pretrained` takes, and:

        Args:
            llm_name_or_path (`str` or `os.PathLike`, *optional*):
                Where the LLM is on this machine, if not where the checkpoint says.
            llm_kwargs (`dict`, *optional*):
                Arguments of the LLM's own `from_pretrained`. This call's `revision`, `subfolder` and
                `trust_remote_code` are never passed on to the LLM's repository.
            load_llm (`bool`, *optional*, defaults to `True`):
                `False` leaves a slim checkpoint without its LLM, for use with cached prompt features.

        Raises:
            OSError: if the weights are missing, cut off or not safetensors.
            ValueError: if the weights are another model's, or the LLM is not the one the checkpoint was trained with.
        """
        return_info = kwargs.pop("output_loading_info", False)
        kwargs["use_safetensors"] = True
        kwargs["ignore_mismatched_sizes"] = True  # reported below, by name
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "projector" in device_map:  # Transformers 4 wants a place for a buffer too
            kwargs["device_map"] = {"prompt_token_map": device_map["projector"], **device_map}
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        except Exception as error:
            if type(error).__name__ != "SafetensorError":
                raise
            raise OSError(
                f"The weights in {str(pretrained_model_name_or_path)!r} are cut off or damaged: {error}"
            ) from error
        check_loading_info(info, f"The weights in {str(pretrained_model_name_or_path)!r}")
        if model.llm is None and load_llm:
            inherited = ("token", "cache_dir", "local_files_only", "dtype", "device_map", "force_download", "proxies")
            nested_kwargs = {name: kwargs[name] for name in inherited if kwargs.get(name) is not None}
            if "torch_dtype" in kwargs:  # the name before Transformers 4.56
                nested_kwargs["dtype"] = kwargs["torch_dtype"]
            if isinstance(nested_kwargs.get("device_map"), dict):
                nested_kwargs["device_map"] = sub_device_map(nested_kwargs["device_map"], "llm")
            model.load_llm(llm_name_or_path, **(nested_kwargs | (llm_kwargs or {})))
        if model.llm is not None:
            model.llm.requires_grad_(False)  # Transformers 5 makes new parameters when it loads
        model.eval()
        return (model, info) if return_info else model

    def load_llm(self, llm_name_or_path: str | os.PathLike | None = None, *, check: bool = True, **llm_kwargs):
        r"""
        Loads the frozen LLM of a slim model and checks that it is the one the model was trained with.

        Args:
            llm_name_or_path (`str` or `os.PathLike`, *optional*):
                Name, folder or `.gguf` file. Defaults to `config.llm_name_or_path` at `config.llm_revision`.
            check (`bool`, *optional*, defaults to `True`):
                Whether the LLM's weights must match `config.llm_fingerprint`. Switch it off only for other versions
                of the same weights, such as a quantized one.
            llm_kwargs:
                Arguments of the LLM's `from_pretrained`.

        Raises:
            OSError: if there is no LLM at that place.
            ValueError: if it is another LLM than the one the model was trained with.
        """
        source = llm_name_or_path if llm_name_or_path is not None else self.config.llm_name_or_path
        if source is None:
            raise ValueError("The configuration names no LLM: pass `llm_name_or_path`.")
        llm_kwargs = dict(llm_kwargs)
        if llm_name_or_path is None:
            llm_kwargs.setdefault("revision", self.config.llm_revision)
            llm_kwargs.setdefault("gguf_file", self.config.llm_gguf_file)
        attention = getattr(self.config.llm_config, "_attn_implementation", None)
        if attention is not None:
            llm_kwargs.setdefault("attn_implementation", attention)
        llm_kwargs.setdefault("dtype", self.dtype)
        name, gguf_file = split_gguf(source, llm_kwargs.pop("gguf_file", None))
        if gguf_file is not None:  # reading the configuration out of a GGUF file takes seconds, and it is known
            llm_kwargs["config"] = copy.deepcopy(self.config.llm_config)
        try:
            llm, llm_config = load_llm(name, gguf_file, **llm_kwargs)
        except OSError as error:
            raise OSError(
                f"This checkpoint's frozen LLM was not found at {str(source)!r}: {error}\nSay where it is on this "
                "machine with `from_pretrained(..., llm_name_or_path=...)`."
            ) from error
        check_same_architecture(llm_config, self.config.llm_config, source)
        self._set_llm(llm)
        if check and self.config.llm_fingerprint:
            check_fingerprint(self.llm, self.config.llm_fingerprint, source)
        if "device_map" not in llm_kwargs and self.llm.device != (device := compute_device(self.projector)):
            self.llm.to(device)
        self._skip_llm_when_saving()
        return self

    def save_pretrained(self, save_directory, *args, include_llm: bool | None = None, **kwargs):
        r"""
        Saves projector and SLM (slim), or everything. Takes what every `save_pretrained` takes, and:

        Args:
            include_llm (`bool`, *optional*):
                Whether the LLM's weights go into the checkpoint. Defaults to `False` for an LLM that can be loaded
                again from its own place, and to `True` for one that has none (it was passed as an object).

        Raises:
            ValueError: for `include_llm=True` on a model without its LLM, for `include_llm=False` on one whose LLM has
                no place of its own, for `safe_serialization=False`, and for a model that PEFT has put its layers in.
        """
        if kwargs.pop("safe_serialization", True) is not True:
            raise ValueError("Checkpoints are safetensors only: `safe_serialization=False` is not supported.")
        adapted = next((name for name, _ in self.named_modules() if name.endswith(".base_layer")), None)
        if adapted is not None and not getattr(self, "_hf_peft_config_loaded", False):
            raise ValueError(
                f"PEFT has put its layers in this model ({adapted!r}): a checkpoint of it could not be loaded. Save "
                "what `merge_and_unload()` of the PEFT model returns (`trainer.model` after a training), or that PEFT "
                "model for its adapter alone."
            )
        if include_llm is None:
            include_llm = self.config.include_llm or self.config.llm_name_or_path is None
        if include_llm and self.llm is None:
            raise ValueError("`include_llm=True`, but the LLM is not loaded: call `load_llm()` first.")
        if not include_llm and self.config.llm_name_or_path is None:
            raise ValueError(
                "A slim checkpoint names its LLM, but `config.llm_name_or_path` is None. Set it to where the LLM can "
                "be loaded from, or save with `include_llm=True`."
            )
        included_before = self.config.include_llm
        self.config.include_llm = include_llm
        self._skip_llm_when_saving()
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
            card = os.path.join(save_directory, "README.md")
            if kwargs.get("is_main_process", True) and not os.path.exists(card):
                _write_default_card(card, self.config)
        finally:
            self.config.include_llm = included_before
            self._skip_llm_when_saving()

    def push_to_hub(self, repo_id, *args, include_llm: bool | None = None, **kwargs):
        """As every `push_to_hub`, with `include_llm` as in `save_pretrained`."""
        included_before = self.config.include_llm
        self.config.include_llm = included_before if include_llm is None else include_llm
        try:
            return super().push_to_hub(repo_id, *args, **kwargs)
        finally:
            self.config.include_llm = included_before

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        # Transformers pushes a card of its own, which says nothing, into a repository that has none.
        card = os.path.join(working_dir, "README.md")
        if os.path.exists(card):
            with open(card, encoding="utf-8") as file:
                generic = "This model card has been automatically generated" in file.read()
            if generic:
                _write_default_card(card, self.config)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _skip_llm_when_saving(self):
        """The Trainer asks for exactly these keys too, when it loads one of its checkpoints back."""
        slim = self.llm is not None and not self.config.include_llm and self.config.llm_name_or_path is not None
        keys = {f"llm.{key}" for key in self.llm.state_dict()} if slim else set()
        self._keys_to_ignore_on_save = keys


def _write_default_card(path, config):
    """What can be said of a checkpoint without knowing its training."""
    llm = config.llm_name_or_path or f"a {config.llm_config.model_type} model"
    where = "included" if config.include_llm else f"loaded from `{llm}`"
    revision = f" at revision `{config.llm_revision}`" if config.llm_revision else ""
    # A folder's path is no name on the Hub.
    base_model = f"base_model: {llm}\n" if config.llm_name_or_path and not os.path.exists(llm) else ""
    text = f"""---
library_name: transformers
pipeline_tag: text2text-generation
tags:
- llm2slm
- custom_code
{base_model}---

# LLM-to-SLM

A frozen LLM ({config.llm_config.model_type}, {where}{revision}) encodes the prompt once; a projector maps its hidden
states (`llm_layer={config.llm_layer}`, `fusion="{config.fusion}"`) to the width of a small language model
({config.slm_config.model_type}), which writes the response. Method: [arXiv 2402.16844](https://arxiv.org/abs/2402.16844).

```python
from transformers import pipeline

generate = pipeline("text2text-generation", model="<this repository>", trust_remote_code=True)
print(generate("A prompt.", max_new_tokens=64))
```
"""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
