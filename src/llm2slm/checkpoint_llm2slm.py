"""What of an LLM-to-SLM model is stored, and where it comes from: slim checkpoints, and the frozen LLM's own place.

One of the files copied into every checkpoint: it imports nothing but torch, transformers and its siblings, and works
on Transformers 4.x and 5.x.
"""

import copy
import fnmatch
import os
import shutil
import sys
import tempfile

from transformers import PreTrainedModel

from .configuration_llm2slm import LLM2SLMConfig
from .loading_llm2slm import (
    check_fingerprint,
    check_gguf,
    check_loading_info,
    check_offloaded,
    check_same_architecture,
    check_same_scale,
    check_shards,
    compute_device,
    is_offloaded,
    is_packed,
    load_llm,
    loading_lock,
    onloaded,
    readable_weights,
    split_gguf,
    sub_device_map,
)

INCOMPLETE = ".incomplete"  # folder of a save that is going on


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
            ValueError: if the weights are another model's, the LLM is not the one the checkpoint was trained with, or
                a place of the LLM is given where none is loaded from it.
        """
        if llm_name_or_path is not None and not load_llm:
            raise ValueError(
                "`llm_name_or_path` says where to load the LLM from, and `load_llm=False` not to load it."
            )
        return_info = kwargs.pop("output_loading_info", False)
        kwargs["use_safetensors"] = True
        kwargs["ignore_mismatched_sizes"] = True  # reported below, by name
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "projector" in device_map:  # Transformers 4 wants a place for a buffer too
            kwargs["device_map"] = {"prompt_token_map": device_map["projector"], **device_map}
        place = str(pretrained_model_name_or_path)
        folder = os.path.join(place, kwargs.get("subfolder") or "")
        check_shards(folder, kwargs.get("variant"))
        heads = [head for head in weight_files((), kwargs.get("variant"))[0] if os.path.exists(f"{folder}/{head}")]
        if len(heads) > 1:
            raise ValueError(
                f"{folder!r} has the weights of two saves, {heads[0]} and {heads[1]}: delete those that are not this "
                "model's."
            )
        with loading_lock, readable_weights(f"The weights in {place!r}"):
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        check_loading_info(info, f"The weights in {place!r}")
        check_same_scale(model.config.slm_config.model_type, model.config.transformers_version, place)
        for part in filter(None, (model.llm, model.slm)):
            check_offloaded(part)
        if model.llm is not None and llm_name_or_path is not None:
            raise ValueError(
                f"{place!r} contains its LLM, so none is loaded from `llm_name_or_path={str(llm_name_or_path)!r}`: "
                "leave that out."
            )
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
                Name, folder or `.gguf` file, the only place that is tried. Defaults to `config.llm_name_or_path` at
                `config.llm_revision` and, if the LLM cannot be loaded from there, `config.llm_alternatives` in order.
            check (`bool`, *optional*, defaults to `True`):
                Whether the LLM's weights must match `config.llm_fingerprint`. Switch it off only for other versions
                of the same weights, such as a quantized one.
            llm_kwargs:
                Arguments of the LLM's `from_pretrained`.

        Raises:
            OSError: if there is no LLM at that place, or the right one at none of several.
            ImportError: if it is a GGUF file, and the package that reads these is missing.
            ValueError: if it is another LLM than the one the model was trained with.
        """
        places = self.config.llm_places
        if llm_name_or_path is not None:
            install = self.config.llm_install if llm_name_or_path == self.config.llm_name_or_path else None
            places = [{"llm_name_or_path": llm_name_or_path, "llm_install": install}]
        if not places:
            raise ValueError("The configuration names no LLM: pass `llm_name_or_path`.")
        errors: list[Exception] = []
        for place in places:
            try:
                llm = self._load_llm_from(place, check, llm_kwargs)
                break
            except (OSError, ImportError, ValueError) as error:
                errors.append(error)
        else:
            if len(errors) == 1:
                raise errors[0]
            tried = "\n".join(f"- {error}" for error in errors)
            raise OSError(
                f"This checkpoint's frozen LLM could be loaded from none of its {len(errors)} places:\n{tried}"
            ) from errors[0]
        self.llm = llm
        if "device_map" not in llm_kwargs and self.llm.device != (device := compute_device(self.projector)):
            self.llm.to(device)
        self._skip_llm_when_saving()
        return self

    def _load_llm_from(self, place, check, llm_kwargs) -> PreTrainedModel:
        """What reads the prompt, of the LLM at one of its places."""
        source, install = place["llm_name_or_path"], place["llm_install"]
        llm_kwargs = dict(llm_kwargs)
        for name in ("revision", "gguf_file"):
            if f"llm_{name}" in place:
                llm_kwargs.setdefault(name, place[f"llm_{name}"])
        attention = getattr(self.config.llm_config, "_attn_implementation", None)
        if attention is not None:
            llm_kwargs.setdefault("attn_implementation", attention)
        llm_kwargs.setdefault("dtype", self.dtype)
        try:
            name, gguf_file = split_gguf(source, llm_kwargs.pop("gguf_file", None), install)
            check_gguf(gguf_file, install)
            if gguf_file is not None:  # reading the configuration out of a GGUF file takes seconds, and it is known
                llm_kwargs["config"] = copy.deepcopy(self.config.llm_config)
            llm, llm_config = load_llm(name, gguf_file, **llm_kwargs)
        except OSError as error:
            raise OSError(
                f"This checkpoint's frozen LLM could not be loaded from {str(source)!r}: {error}\n"
                "Or say where it is on this machine with `from_pretrained(..., llm_name_or_path=...)`."
            ) from error
        check_same_architecture(llm_config, self.config.llm_config, source)
        reader = self._reader(llm)
        if check and self.config.llm_fingerprint:
            check_fingerprint(reader, self.config.llm_fingerprint, source)
        return reader

    def save_pretrained(self, save_directory, *args, include_llm: bool | None = None, **kwargs):
        r"""
        Saves projector and SLM (slim), or everything. Takes what every `save_pretrained` takes, and:

        Args:
            include_llm (`bool`, *optional*):
                Whether the LLM's weights go into the checkpoint. Defaults to `False` for an LLM that can be loaded
                again from its own place, and to `True` for one that has none (it was passed as an object).

        The files are written aside and put in their places at the end, the weights last. Weights that an earlier save
        left in the folder, whole, in shards or of an adapter, go: they could be loaded in place of these.

        Raises:
            ValueError: for `include_llm=True` on a model without its LLM, for `include_llm=False` on one whose LLM has
                no place of its own, for `safe_serialization=False`, for a model that PEFT has put its layers in, for
                one whose parts were quantized each for itself, and for an LLM whose vocabulary was resized.
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
        self._check_names_llm(include_llm)
        if os.path.isfile(save_directory):
            raise ValueError(f"`save_directory` must be a folder, but {str(save_directory)!r} is a file.")
        included_before = self.config.include_llm
        self.config.include_llm = include_llm
        self._skip_llm_when_saving()
        try:
            self._check_stored_parts()
            if kwargs.get("distributed_checkpoint"):  # each process adds its part to one folder
                super().save_pretrained(save_directory, *args, **kwargs)
            else:
                self._save_aside(save_directory, *args, **kwargs)
        finally:
            self.config.include_llm = included_before
            self._skip_llm_when_saving()

    def _check_names_llm(self, include_llm: bool):
        if not include_llm and self.config.llm_name_or_path is None:
            raise ValueError(
                "A slim checkpoint names its LLM, but `config.llm_name_or_path` is None. Set it to where the LLM can "
                "be loaded from, or save with `include_llm=True`."
            )

    def _check_stored_parts(self):
        if self.llm is not None:
            found, expected = self.llm.get_input_embeddings().num_embeddings, self.config.llm_text_config.vocab_size
            if found != expected:
                raise ValueError(
                    f"The LLM's vocabulary was resized from {expected} to {found} tokens, but it is frozen, and what "
                    "the checkpoint names is the LLM as it was. Resize it first, then compose the pair with it."
                )
        if self.config.maps_prompt_tokens != (self.prompt_token_map is not None):
            raise ValueError(
                f"The SLM's vocabulary was resized to {self.config.vocab_size} tokens, which does not go with a "
                "tokenizer shared with the LLM. Resize it with the pair's own `resize_token_embeddings`, which checks."
            )
        if getattr(self, "hf_quantizer", None) is not None:
            return
        for name, part in self._stored_parts().items():
            if any(is_packed(parameter) for parameter in part.parameters()):
                raise ValueError(
                    f"The {name} was quantized for itself, and its weights could not be loaded as a part of this "
                    "model. Save the model unquantized; `from_pretrained(..., quantization_config=...)` quantizes it."
                )

    def _save_aside(self, save_directory, is_main_process=True, state_dict=None, *args, **kwargs):
        os.makedirs(save_directory, exist_ok=True)
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", os.path.basename(os.path.abspath(save_directory)))
        if state_dict is None and any(is_offloaded(part) for part in self._stored_parts().values()):
            state_dict = self._onloaded_state_dict()
        if not is_main_process:  # it takes part, and what it writes is the main process's
            with tempfile.TemporaryDirectory(dir=save_directory, prefix=INCOMPLETE) as aside:
                super().save_pretrained(aside, False, state_dict, *args, **kwargs)
            return
        aside = os.path.join(save_directory, INCOMPLETE)
        shutil.rmtree(aside, ignore_errors=True)  # of a save that was killed
        try:
            super().save_pretrained(aside, True, state_dict, *args, **kwargs)
        except BaseException:
            # A push writes its card when all else is written: with it, what failed was the upload of a whole model.
            if os.path.exists(os.path.join(aside, "README.md")):
                self._finish_saving(save_directory, aside, kwargs.get("variant"))
            shutil.rmtree(aside, ignore_errors=True)
            raise
        self._finish_saving(save_directory, aside, kwargs.get("variant"))

    def _finish_saving(self, save_directory, aside, variant):
        _replace_checkpoint(save_directory, aside, variant)
        card = os.path.join(save_directory, "README.md")
        if not os.path.exists(card):
            _write_default_card(card, self.config)

    def _stored_parts(self):
        parts = {"llm": self.llm, "projector": self.projector, "slm": self.slm}
        return {name: part for name, part in parts.items() if name != "llm" or self.config.include_llm}

    def _onloaded_state_dict(self):
        """The weights to be saved, in this computer's memory, wherever they are kept."""
        state_dict: dict = {}
        self._save_to_state_dict(state_dict, "", keep_vars=False)
        for part, stored in self._stored_parts().items():
            for name, module in stored.named_modules(prefix=part):
                with onloaded(module):
                    module._save_to_state_dict(state_dict, f"{name}.", keep_vars=False)
        return {name: tensor.cpu() for name, tensor in state_dict.items()}

    def push_to_hub(self, repo_id, *args, include_llm: bool | None = None, **kwargs):
        """As every `push_to_hub`, with `include_llm` as in `save_pretrained`."""
        self._check_names_llm(include_llm is not False)
        included_before = self.config.include_llm
        self.config.include_llm = included_before if include_llm is None else include_llm
        try:
            return super().push_to_hub(repo_id, *args, **kwargs)
        finally:
            self.config.include_llm = included_before

    def _upload_modified_files(
        self,
        working_dir,
        repo_id,
        files_timestamps,
        commit_message=None,
        token=None,
        create_pr=False,
        revision=None,
        commit_description=None,
    ):
        """As Transformers' own, but the same commit deletes the weights that an earlier one left behind."""
        # Transformers pushes a card of its own, which says nothing, into a repository that has none.
        card = os.path.join(working_dir, "README.md")
        if os.path.exists(card):
            with open(card, encoding="utf-8") as file:
                generic = "This model card has been automatically generated" in file.read()
            if generic:
                _write_default_card(card, self.config)
        hub = sys.modules["huggingface_hub"]  # Transformers' own; this file may name no third package
        if revision is not None and not revision.startswith("refs/pr"):
            hub.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        modified = [
            name
            for name in os.listdir(working_dir)
            if os.path.getmtime(os.path.join(working_dir, name)) > files_timestamps.get(name, 0.0)
        ]
        return hub.upload_folder(
            repo_id=repo_id,
            folder_path=working_dir,
            allow_patterns=modified,
            delete_patterns=weight_files(modified)[1],
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
            token=token,
            create_pr=create_pr,
            revision=revision,
        )

    def _skip_llm_when_saving(self):
        """The Trainer asks for exactly these keys too, when it loads one of its checkpoints back."""
        slim = self.llm is not None and not self.config.include_llm and self.config.llm_name_or_path is not None
        keys = {f"llm.{key}" for key in self.llm.state_dict()} if slim else set()
        self._keys_to_ignore_on_save = keys


# ----------------------------------------------------------------------------------------------- files of a checkpoint
def weight_files(names, variant: str | None = None) -> tuple[list[str], list[str]]:
    """
    Patterns of the files that say where the weights are, and of all that hold weights, in a folder or repository to
    which the files `names` are saved: those of the whole model, and of adapters, which would be put on top of it.
    """
    if "adapter_config.json" in names:  # an adapter alone: the model that it is for may lie beside it
        return ["adapter_config.json"], ["adapter_model*"]
    of_variant = f".{variant}" if variant else ""
    heads = [f"model{of_variant}.safetensors", f"model.safetensors.index{of_variant}.json"]
    return heads, [*heads, f"model{of_variant}-?????-of-?????.safetensors", "adapter_config.json", "adapter_model*"]


def matches(name: str, patterns: list[str]) -> bool:
    """Whether a file's name is one of the patterns'."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _replace_checkpoint(folder, new, variant):
    """
    Moves a complete checkpoint from the folder `new` into `folder`, where the old weights are deleted. What says where
    the weights are goes first and comes last: who is interrupted leaves no mixture that would load.
    """
    names = os.listdir(new)
    heads, weights = weight_files(names, variant)
    old = [name for name in os.listdir(folder) if matches(name, weights)]
    for name in sorted(old, key=lambda name: not matches(name, heads)):
        os.remove(os.path.join(folder, name))
    for name in sorted(names, key=lambda name: matches(name, heads)):
        target = os.path.join(folder, name)
        if name != "README.md" or not os.path.exists(target):  # a card in the folder is the user's
            os.replace(os.path.join(new, name), target)
    shutil.rmtree(new)


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
