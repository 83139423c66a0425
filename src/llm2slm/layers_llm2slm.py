"""The LLM's layers: cutting it at the highest one that is read, and reading their states.

No hook is set and no module is changed, so that many threads can call one model. What has to differ for a call is in a
shallow copy: new module objects on the way from the model to what differs, everything else shared.

One of the files copied into every checkpoint: it imports nothing but torch and transformers, and works on Transformers
4.x and 5.x.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def find_layers(llm: nn.Module, num_layers: int, depth: int | None = None) -> nn.ModuleList:
    """The list of the model's layers, or of the first `depth`; raises a `ValueError` if it keeps them in no list."""
    for module in llm.modules():  # the outermost first: T5's layers are lists, too
        if isinstance(module, nn.ModuleList) and len(module) in (num_layers, depth):
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
    return with_modules(llm, {layers: layers[: max(depth, 1)]})


def with_modules(root: Any, replacements: dict[nn.Module, nn.Module]) -> Any:
    """A shallow copy of `root` with other modules in the place of some; everything else is shared."""
    if root in replacements:
        return replacements[root]
    children = {name: child and with_modules(child, replacements) for name, child in root._modules.items()}
    if all(children[name] is child for name, child in root._modules.items()):
        return root
    clone = _shallow_copy(root)
    clone._modules = children
    return clone


def with_forward(module: nn.Module, wrap: Callable[[Callable], Callable]) -> nn.Module:
    """A shallow copy of `module` whose forward is `wrap(forward)`; the module itself is not changed."""
    clone = _shallow_copy(module)
    clone.forward = wrap(clone.forward)
    return clone


def _shallow_copy(module: nn.Module) -> nn.Module:
    # `copy.copy` calls `__new__`, which makes a new module of one that FSDP2 shards.
    clone = object.__new__(type(module))
    vars(clone).update(vars(module))
    clone._compiled_call_impl = None  # what `module.compile()` made runs the module itself
    # Accelerate gives a module that it places on a device a forward of its own, which is bound to the module.
    for name in ("forward", "_old_forward"):
        function = vars(module).get(name)
        if isinstance(function, types.MethodType) and function.__self__ is module:
            setattr(clone, name, types.MethodType(function.__func__, clone))
        elif isinstance(function, functools.partial) and function.args[:1] == (module,):
            bound = functools.partial(function.func, clone, *function.args[1:], **function.keywords)
            setattr(clone, name, functools.update_wrapper(bound, function))
    return clone


class LayerStates:
    """
    Keeps the states of some of an LLM's layers while `model`, a copy of it for one call, runs: 0 is the input of the
    first layer, k the output of layer k, but the last is what the LLM returns, after its final norm.

    Args:
        llm (`PreTrainedModel`):
            What returns hidden states: an encoder, or a decoder-only model without its head. It may be cut at the
            highest of `layers`.
        layers (`list[int]`):
            Those to keep, in the order in which they are concatenated.
        num_layers (`int`):
            How many layers the LLM has, uncut.
        whole (`PreTrainedModel`, *optional*):
            The model that `llm` is part of, if that is what will run.

    Raises:
        ValueError: if the LLM keeps its layers in no list, and another one than the last is asked for.
    """

    def __init__(self, llm: PreTrainedModel, layers: list[int], num_layers: int, whole: PreTrainedModel | None = None):
        self._order = layers
        self._states: dict[int, torch.Tensor] = {}
        copies: dict[nn.Module, nn.Module] = {}
        inner = sorted(set(layers) - {num_layers})
        modules = find_layers(llm, num_layers, depth=max(max(layers), 1)) if inner else nn.ModuleList()
        for layer in inner:  # the first module may be read before it and behind it
            module = modules[max(layer - 1, 0)]
            copies[module] = with_forward(copies.get(module, module), self._keep(layer))
        reader = with_modules(llm, copies)
        if num_layers in layers:
            reader = with_forward(reader, self._keep(num_layers))
        self.model = reader if whole is None else with_modules(whole, {llm: reader})

    def states(self) -> torch.Tensor:
        """Those of the last run, concatenated: of shape `(batch_size, length, len(layers) * hidden_size)`."""
        device = self._states[self._order[0]].device  # layers may be spread over several
        return torch.cat([self._states[layer].to(device) for layer in self._order], dim=-1)

    def _keep(self, layer: int):
        def wrap(forward):
            def keep_input(*args, **kwargs):
                self._states[layer] = args[0] if args else kwargs["hidden_states"]
                return forward(*args, **kwargs)

            def keep_output(*args, **kwargs):
                output = forward(*args, **kwargs)
                self._states[layer] = output if isinstance(output, torch.Tensor) else output[0]
                return output

            return functools.wraps(forward)(keep_input if layer == 0 else keep_output)

        return wrap
