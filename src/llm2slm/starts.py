"""Where projector and SLM start, other than at random.

- `start_at_zero`: the model equals the SLM alone.
- `start_from_states`: the SLM is a slice of the LLM's upper layers, which read the LLM's states as they are, and its
  embeddings of the response become the mean states of the same tokens.

A projector fitted to the SLM's own embeddings of the prompt was tried, and no better than a random one
(results/choosing.md).
"""

import torch
from datasets import Dataset
from torch import nn

RARE = 3  # a token seen this often starts halfway between its mean state and what the regression says
RIDGE = 1e-4  # of each input's sum of squares, so that the scale of the LLM's layers makes no difference


@torch.no_grad()
def start_at_zero(model):
    r"""
    Sets the projector's last layer to zero: with `fusion="add"` and the LLM's tokenizer, training then begins exactly
    at the SLM alone on its own embeddings of the prompt, and can only learn to use the LLM.

    Args:
        model ([`LLM2SLMForConditionalGeneration`]): Changed in place.

    Raises:
        ValueError: for another fusion or two tokenizers, where nothing would be left of the prompt.
    """
    config = model.config
    if config.fusion != "add" or not config.shared_tokenizer:
        raise ValueError(
            "A start at zero needs `fusion='add'` and `shared_tokenizer=True`, which add the projections to the SLM's "
            f"own embeddings; got {config.fusion!r} and {config.shared_tokenizer}."
        )
    nn.init.zeros_(model.projector.out.weight)
    nn.init.zeros_(model.projector.out.bias)


@torch.no_grad()
def start_from_states(model, dataset: Dataset, max_rows: int = 4096) -> float:
    r"""
    Starts an SLM made of the LLM's layers above the one that is read at the LLM's own states: the SLM's input
    embedding of a token becomes the mean state of that token in the prompts, and with `fusion="replace"` the projector
    passes the states on unchanged; with `"add"` its last layer starts at zero, and each prompt token at its mean
    state. Tokens that are rare there get what a ridge regression from their own embeddings predicts. The head stays as
    it is.

    The state of a prompt's first position is left out: decoder-only LLMs use it as an attention sink.

    Args:
        model ([`LLM2SLMForConditionalGeneration`]):
            Changed in place. With one tokenizer (maybe trimmed), states of one layer, an SLM as wide as the LLM, from
            [`~llm2slm.building.slice_lm`], and for `fusion="replace"` a linear projector without normalisation.
        dataset (`datasets.Dataset`):
            With the columns `input_ids` (prompts, LLM's tokenizer) and `prompt_hidden_states` (from
            [`~llm2slm.features.cache_prompt_features`]).
        max_rows (`int`, *optional*, defaults to 4096): This many rows are counted, evenly spaced.

    Returns:
        `float`: The share of the mean states' variance that the regression explains (R²).

    Raises:
        ValueError: if the model is another kind, a column is missing, or no token of the prompts is the SLM's.
    """
    config = model.config
    needed = {
        "shared_tokenizer": (config.shared_tokenizer, True),
        "the number of layers read": (len(config.llm_layers), 1),
        "the SLM's width": (config.slm_hidden_size, config.llm_hidden_size),
    }
    if config.fusion == "replace":
        needed |= {
            "projector_type": (config.projector_type, "linear"),
            "projector_norm": (config.projector_norm, None),
        }
    for name, (found, required) in needed.items():
        if found != required:
            raise ValueError(f"A start from the LLM's states needs {name} to be {required!r}, got {found!r}.")
    _check_columns(dataset)
    embeddings, head = model.slm.get_input_embeddings(), model.slm.get_output_embeddings()
    sums = torch.zeros(config.vocab_size, config.slm_hidden_size, dtype=torch.float64)
    counts = torch.zeros(config.vocab_size, dtype=torch.float64)
    for index in range(0, len(dataset), -(-len(dataset) // max_rows)):
        row = dataset[index]
        ids = torch.as_tensor(row["input_ids"])[1:]
        if model.prompt_token_map is not None:
            ids = model.prompt_token_map.cpu()[ids].long()
        known = ids >= 0
        sums.index_add_(0, ids[known], torch.as_tensor(row["prompt_hidden_states"])[1:][known].double())
        counts += torch.bincount(ids[known], minlength=config.vocab_size)
    if counts.sum() == 0:
        raise ValueError("No token of the prompts is in the SLM's vocabulary.")
    own = embeddings.weight.detach().cpu().double()
    # A token counts as often as it is seen: rows scaled by the root of that.
    scale, means = counts.sqrt()[:, None], sums / counts.clamp(min=1)[:, None]
    weight, bias, r_squared = _ridge_regression(own, means, scale)
    share = (counts / (counts + RARE))[:, None]
    start = share * means + (1 - share) * (own @ weight.T + bias)

    if head.weight is embeddings.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.slm.config.tie_word_embeddings = False
        config.slm_config = model.slm.config
    embeddings.weight.copy_(start)
    (nn.init.eye_ if config.fusion == "replace" else nn.init.zeros_)(model.projector.out.weight)
    nn.init.zeros_(model.projector.out.bias)
    return r_squared


def _check_columns(dataset: Dataset):
    if missing := {"input_ids", "prompt_hidden_states"} - set(dataset.column_names):
        raise ValueError(
            f"The data set lacks the column(s) {sorted(missing)}, it has {dataset.column_names}: tokenize it, then "
            "`cache_prompt_features`."
        )


def _ridge_regression(inputs: torch.Tensor, targets: torch.Tensor, scale: torch.Tensor):
    """
    With a bias, in float64: the weight of shape `(num_targets, num_inputs)`, the bias, and the R² of all targets
    together. Inputs have shape `(rows, num_inputs)`, targets `(rows, num_targets)`; `scale`, of shape `(rows, 1)`, is
    the root of how often each row counts.
    """
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], dim=1) * scale
    targets = targets * scale
    gram, cross = inputs.T @ inputs, inputs.T @ targets
    diagonal = gram.diagonal()
    penalty = RIDGE * diagonal.clamp(min=1e-12 * float(diagonal.max()))  # some inputs are always zero
    penalty[-1] = 0.0  # none on the bias
    solution = torch.linalg.solve(gram + penalty.diag(), cross)
    explained = (solution * (2 * cross - gram @ solution)).sum(dim=0)
    mean_part = cross[-1].square() / float(scale.square().sum())
    r_squared = (explained - mean_part).sum() / (targets.square().sum(dim=0) - mean_part).sum()
    return solution[:-1].T, solution[-1], float(r_squared)
