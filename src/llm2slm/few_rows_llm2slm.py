"""Linear layers and attention of a few rows on a CPU, where the matrix library is slow.

One of the files copied into every checkpoint: it imports nothing but torch, and works on Transformers 4.x and 5.x.
"""

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class EagerFewRows(TorchFunctionMode):
    """
    Without compiling: in float32 the product from the left, `W @ x.T`, takes hardly longer for a few rows than for
    one, unlike `linear`.
    """

    ROWS = range(2, 9)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is nn.functional.linear and not kwargs and args[0].device.type == "cpu":
            inputs, weight, *bias = args
            dense = type(weight) in (torch.Tensor, nn.Parameter)  # not one of a quantization library
            if dense and inputs.dtype == torch.float32 and inputs.numel() // inputs.shape[-1] in self.ROWS:
                output = torch.mm(weight, inputs.reshape(-1, inputs.shape[-1]).t()).t().contiguous()
                output = output.view(*inputs.shape[:-1], -1)
                return output if not bias or bias[0] is None else output + bias[0]
        return function(*args, **(kwargs or {}))


class CompiledFewRows(TorchFunctionMode):
    """
    Within `torch.compile`: linear layers and attention as products and sums. The compiler makes one run of vector
    loops of them that reads the weights about as fast as memory gives them; the matrix library takes three to four
    times as long (experiments/fast_decode.py).
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = {nn.functional.linear: _linear, nn.functional.scaled_dot_product_attention: _attention}.get(func, func)
        return func(*args, **(kwargs or {}))


def _linear(x, weight, bias=None):
    if x.device.type != "cpu" or x.dtype != weight.dtype:
        return nn.functional.linear(x, weight, bias)
    exact = _exact(x.dtype)
    rows = _in_memory(x.reshape(-1, x.shape[-1])).to(exact)  # (rows, in_features)
    weight = weight.to(exact)
    # One loop for all of these sums: each weight is read, and converted, once. (rows, out_features)
    y = torch.stack([(weight * row).sum(dim=-1) for row in rows])
    y = y if bias is None else y + bias
    return y.to(x.dtype).reshape(*x.shape[:-1], -1)


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    _, heads, length, width = query.shape
    if length > 1 or query.device.type != "cpu" or dropout_p or is_causal:
        options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask, **options)
    exact = _exact(query.dtype)
    if enable_gqa:
        key, value = (states.repeat_interleave(heads // states.shape[1], dim=1) for states in (key, value))
    scores = (_in_memory(query).to(exact) * key.to(exact)).sum(dim=-1)  # (batch_size, heads, key_length)
    scores = scores * (width**-0.5 if scale is None else scale)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask[:, :, 0], -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask[:, :, 0]
    weights = _in_memory(scores.softmax(dim=-1))
    return (weights[..., None] * value.to(exact)).sum(dim=2, keepdim=True).to(query.dtype)


def _exact(dtype):
    return torch.promote_types(dtype, torch.float32)


def _in_memory(x):
    """The compiler would otherwise compute `x` anew for each output that it goes into."""
    return torch.as_strided(x.contiguous(), x.shape, x.contiguous().stride())
