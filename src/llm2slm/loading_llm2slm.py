"""Loading the two models of a pair, recognising the LLM, cutting it at the highest layer that is read, reading layers.

One of the files copied into every checkpoint: it imports nothing but torch and transformers, and works on Transformers
4.x and 5.x.
"""

import copy
import os
from contextlib import contextmanager
from importlib.util import find_spec

import torch
import transformers
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import extract_commit_hash

PACKAGE = "package:"  # before the name of a Python package that holds a model


def slm_auto_class(config):
    """What loads an SLM of this configuration, with its head."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def llm_auto_class(config):
    """What loads an LLM of this configuration, if possible without its head and its decoder."""
    if config.model_type in ("t5", "mt5", "umt5"):
        return AutoModelForTextEncoding
    # Transformers 4 does not find Gemma 3's weights for its class without the head.
    return AutoModelForCausalLM if config.model_type == "gemma3_text" else AutoModel


def load_slm(name, **kwargs) -> PreTrainedModel:
    """Loads a language model with its head by name, folder or GGUF file; `kwargs` are its `from_pretrained`'s."""
    name, gguf_file = split_gguf(name, kwargs.pop("gguf_file", None))
    kwargs |= _gguf_kwargs(gguf_file)
    config = transformers.AutoConfig.from_pretrained(name, **_config_kwargs(kwargs))
    return slm_auto_class(config).from_pretrained(name, **kwargs)


def load_llm(name, gguf_file, config=None, **kwargs) -> tuple[PreTrainedModel, transformers.PretrainedConfig]:
    """
    Loads an LLM without its head; returns it with its configuration, since an encoder's own says less than that.

    Raises:
        ValueError: if weights are missing or of other shapes.
    """
    kwargs |= _gguf_kwargs(gguf_file)
    if config is None:
        config = transformers.AutoConfig.from_pretrained(name, **_config_kwargs(kwargs))
    with _quiet():  # the head's weights are unexpected, and not wanted
        llm, info = llm_auto_class(config).from_pretrained(
            name, config=copy.deepcopy(config), output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    check_loading_info({**info, "unexpected_keys": []}, f"The LLM's weights in {str(name)!r}")
    return llm, config


def _config_kwargs(kwargs):
    names = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "trust_remote_code", "gguf_file")
    return {name: kwargs[name] for name in names if kwargs.get(name) is not None}


def load_tokenizer(name, **kwargs):
    """
    Loads the tokenizer of one model by name, folder, GGUF file or `package:NAME`; `kwargs` are those of its
    `from_pretrained`. One without a padding token pads with its end token.

    Raises:
        OSError: if there is none.
        ValueError: if a folder has several GGUF files.
    """
    folder, gguf_file = split_gguf(name, kwargs.pop("gguf_file", None))
    if gguf_file is not None:
        kwargs["gguf_file"] = gguf_file
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **kwargs)
    except (OSError, ValueError) as error:
        raise OSError(f"There is no tokenizer in {str(name)!r}: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def split_gguf(name, gguf_file) -> tuple[str, str | None]:
    """
    Folder, or name on the Hub, and GGUF file's name of a model: `name` may be the file, a folder with one and no
    config.json, or `package:NAME` for an installed Python package that holds the model.

    Raises:
        OSError: if there is no such package, or no model in it.
        ValueError: if a folder has several GGUF files.
    """
    name = os.fspath(name)
    if is_package(name):
        name = _package_folder(name.removeprefix(PACKAGE))
    if gguf_file is not None:
        return name, gguf_file
    if os.path.isfile(name) and name.endswith(".gguf"):
        folder, gguf_file = os.path.split(name)
        return folder or ".", gguf_file
    if os.path.isdir(name) and not os.path.exists(os.path.join(name, "config.json")):
        files = sorted(file for file in os.listdir(name) if file.endswith(".gguf"))
        if len(files) > 1:
            raise ValueError(f"{name!r} has several GGUF files, {files}: say which with `gguf_file`.")
        if files:
            return name, files[0]
    return name, None


def is_package(name) -> bool:
    """Whether a model's name is that of a Python package which holds it: the same name on every machine."""
    return str(name).startswith(PACKAGE)


def _package_folder(package: str) -> str:
    spec = find_spec(package) if package.isidentifier() else None  # found, never imported
    if spec is None or not spec.submodule_search_locations:
        raise OSError(f"No Python package {package!r} is installed here, and the model is in it.")
    folder = spec.submodule_search_locations[0]
    files = (file for *_, names in os.walk(folder) for file in names)  # a caller may name one in a subfolder
    if not any(file == "config.json" or file.endswith(".gguf") for file in files):
        raise OSError(
            f"There is no model in {folder}: neither config.json nor a GGUF file. If the Python package {package!r} "
            "brings it in parts, join them there, as its own description says."
        )
    return folder


def _gguf_kwargs(gguf_file) -> dict:
    if gguf_file is None:
        return {}
    # Transformers 5 keeps GGUF weights packed unless told otherwise: dense, every dtype, device and save works.
    if hasattr(transformers, "GgufConfig"):
        return {"gguf_file": gguf_file, "quantization_config": transformers.GgufConfig(dequantize=True)}
    return {"gguf_file": gguf_file}


def resolve_revision(name, gguf_file, kwargs) -> str | None:
    """The commit that a name on the Hub stands for now; `None` for a folder."""
    if os.path.isdir(name):
        return None
    file = cached_file(
        name,
        gguf_file or "config.json",
        **{key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs},
    )
    return extract_commit_hash(file, None)


def sub_device_map(device_map: dict, module: str):
    """The part of a composite's device map that is about `module`; `None` if it says nothing about it."""
    prefix = f"{module}."
    part = {key[len(prefix) :]: device for key, device in device_map.items() if key.startswith(prefix)}
    if module in device_map:
        part[""] = device_map[module]
    return part or ({"": device_map[""]} if "" in device_map else None)


@contextmanager
def _quiet():
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


# RoBERTa and its kin count positions from behind the padding token's id.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "longformer")


def max_positions(config) -> int | None:
    """How many tokens a model of this configuration can tell apart by position; `None` for any number."""
    limit = getattr(config, "max_position_embeddings", None)
    return limit - config.pad_token_id - 1 if config.model_type in _OFFSET_POSITIONS else limit


# ------------------------------------------------------------------------------------------------- is it the right LLM
def check_loading_info(info, what):
    """Raises a `ValueError` if a `from_pretrained` left weights out or had to make some up."""
    for name, problem in (
        ("missing_keys", "lack"),
        ("mismatched_keys", "have other shapes for"),
        ("unexpected_keys", "have, besides this model's,"),
    ):
        if keys := sorted(key if isinstance(key, str) else key[0] for key in info.get(name) or []):
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(f"{what} are not this model's: they {problem} {', '.join(keys[:3])}{more}.")


def check_same_architecture(found, expected, source):
    """Raises a `ValueError` if the LLM at `source` is of another kind or size than the one trained with."""
    for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        if getattr(found, name, None) != getattr(expected, name, None):
            raise ValueError(
                f"The LLM at {str(source)!r} is not the one this checkpoint was trained with: its {name} is "
                f"{getattr(found, name, None)!r}, not {getattr(expected, name, None)!r}."
            )


def shared_parameter(llm: nn.Module, slm: nn.Module) -> str | None:
    """The name of a parameter of `slm` that is `llm`'s too, if there is one."""
    frozen = {parameter.data_ptr() for parameter in llm.parameters() if parameter.device.type != "meta"}
    return next((name for name, parameter in slm.named_parameters() if parameter.data_ptr() in frozen), None)


def fingerprint(llm: nn.Module, num_tensors: int = 16, num_values: int = 8) -> dict[str, str]:
    """
    Some weights of the LLM, evenly spaced over its floating-point parameters, as hexadecimal bfloat16. Sampled values
    rather than a hash, so that the same weights in another dtype are recognised.
    """
    parameters = {name: p for name, p in sorted(llm.named_parameters()) if p.is_floating_point() and p.numel()}
    names = list(parameters)
    chosen = [names[i * len(names) // num_tensors] for i in range(num_tensors)] if len(names) > num_tensors else names
    return {
        name: bytes(_sample(parameters[name], num_values).to(torch.bfloat16).view(torch.uint8).tolist()).hex()
        for name in chosen
    }


def check_fingerprint(llm: nn.Module, fingerprint: dict[str, str], source):
    """Raises a `ValueError` if weights of `llm` are not those of the fingerprint; quantized ones are passed over."""
    parameters = dict(llm.named_parameters())
    for name, expected_hex in fingerprint.items():
        expected = torch.tensor(list(bytes.fromhex(expected_hex)), dtype=torch.uint8).view(torch.bfloat16).float()
        if name in parameters and not parameters[name].is_floating_point():
            continue  # quantized
        found = _sample(parameters[name], len(expected)) if name in parameters else None
        # Two roundings to bfloat16 (8 bits) apart at most; float16 has nothing below 6e-8.
        if found is None or not torch.allclose(found, expected, rtol=2**-7, atol=1e-7):
            raise ValueError(
                f"The LLM at {str(source)!r} is not the one this checkpoint was trained with: its parameter {name!r} "
                "differs from the fingerprint in config.json. Say where the right one is with `llm_name_or_path`."
            )


@torch.no_grad()
def _sample(parameter: torch.Tensor, num_values: int) -> torch.Tensor:
    index = torch.linspace(0, parameter.numel() - 1, min(num_values, parameter.numel()), dtype=torch.float64).long()
    return parameter.detach().flatten()[index.to(parameter.device)].float().cpu()


# --------------------------------------------------------------------------------------------------- the LLM's layers
def find_layers(llm: nn.Module, num_layers: int) -> nn.ModuleList:
    """The list of the model's layers; raises a `ValueError` if it keeps them in no such list."""
    for module in llm.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise ValueError(f"{type(llm).__name__} has no list of {num_layers} layers: only `llm_layer=-1` can be read.")


def without_head(lm: PreTrainedModel) -> PreTrainedModel:
    """What of a model gives hidden states; itself if it has no head."""
    if lm.base_model is not lm:
        return lm.base_model
    return lm.model if lm.can_generate() else lm  # Gemma 3 in Transformers 4 names no base model


def truncate(llm: PreTrainedModel, num_layers: int, depth: int) -> PreTrainedModel:
    """A shallow copy of `llm` that shares its parameters and has only its first `depth` layers (at least one)."""
    layers = find_layers(llm, num_layers)

    def copied(module):
        if module is layers:
            return layers[: max(depth, 1)]
        if not any(child is layers for child in module.modules()):
            return module
        clone = copy.copy(module)
        clone._modules = {name: child and copied(child) for name, child in module._modules.items()}
        return clone

    return copied(llm)


@contextmanager
def record_layer_states(llm: PreTrainedModel, wanted: list[int], num_layers: int):
    """
    Yields a dictionary that holds, after the LLM's forward, the states of the layers in `wanted`: 0 is the input of
    the first layer, k the output of layer k, but the last what the LLM returns, after its final norm.
    """
    states: dict[int, torch.Tensor] = {}

    def keep_input(module, args, kwargs):
        states[0] = args[0] if args else kwargs["hidden_states"]

    def keep_output(layer):
        def hook(module, args, output):
            states[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    def keep_last(module, args, output):
        states[num_layers] = output[0]

    handles, inner = [], sorted(set(wanted) - {num_layers})
    if num_layers in wanted:
        handles.append(llm.register_forward_hook(keep_last))
    if inner:
        layers = find_layers(llm, max(max(wanted), 1))
        for layer in inner:
            if layer == 0:
                handles.append(layers[0].register_forward_pre_hook(keep_input, with_kwargs=True))
            else:
                handles.append(layers[layer - 1].register_forward_hook(keep_output(layer)))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
