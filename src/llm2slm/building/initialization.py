"""Where projector and SLM start, other than at random.

- `standardize_states`: the projector reads the LLM's states at one scale, whatever that of each of their numbers is.
- `start_at_zero`: the model equals the SLM alone.
- `start_from_states`: the SLM is a slice of the LLM's upper layers, which read the LLM's states as they are, and its
  embeddings of the response become the mean states of the same tokens.
- `fit_head`: and its head reads what these layers give, in place of what the LLM's last layer gives.

A projector fitted to the SLM's own embeddings of the prompt was tried, and no better than a random one
(results/choosing.md).
"""

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm.auto import tqdm

from ..layers_llm2slm import without_head

if TYPE_CHECKING:
    from datasets import Dataset

RARE = 3  # a token seen this often starts halfway between its mean state and what the regression says
RIDGE = 1e-4  # of each input's sum of squares, so that the scale of the LLM's layers makes no difference


@torch.no_grad()
def standardize_states(model, dataset: "Dataset", max_rows: int = 4096) -> None:
    r"""
    Measures mean and standard deviation of each number of the LLM's states, by which a projector with
    `projector_norm="standardize"` brings them to one scale. It comes before any other start.

    Unlike the layer norm it keeps what tells a token's state from another's in the numbers whose scale is small, and
    the steps of an optimizer, as long for each weight, do not change the projections the most by the largest. All of a
    prompt's positions count: in a decoder-only LLM some numbers of the first one's state are so large that they would
    stand out otherwise.

    Args:
        model ([`LLM2SLMForConditionalGeneration`]): Changed in place.
        dataset (`datasets.Dataset`):
            With the columns `input_ids` and `prompt_hidden_states` (from
            [`~llm2slm.data.prompt_features.cache_prompt_features`]).
        max_rows (`int`, *optional*, defaults to 4096): This many rows are measured, evenly spaced.

    Raises:
        ValueError: if the projector does not standardize, or a column is missing.
    """
    projector = model.projector
    if model.config.projector_norm != "standardize":
        raise ValueError(f"The model's `projector_norm` must be 'standardize', got {model.config.projector_norm!r}.")
    _check_columns(dataset)
    count, sums, squares = 0, torch.tensor(0.0), torch.tensor(0.0)
    for index in _evenly_spaced(dataset, max_rows):
        states = torch.as_tensor(dataset[index]["prompt_hidden_states"]).double()
        count, sums, squares = count + len(states), sums + states.sum(dim=0), squares + states.square().sum(dim=0)
    mean = sums / count
    scale = (squares / count - mean.square()).clamp(min=0).sqrt()
    scale = scale.clamp(min=1e-3 * float(scale.median()))  # a number that hardly varies says nothing
    layers = zip(mean.split(projector.llm_hidden_size), scale.split(projector.llm_hidden_size), strict=True)
    for norm, (layer_mean, layer_scale) in zip(projector.norms, layers, strict=False):  # maybe the embeddings behind
        norm.mean.copy_(layer_mean)
        norm.scale.copy_(layer_scale)


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
def start_from_states(model, dataset: "Dataset", max_rows: int = 4096) -> float:
    r"""
    Starts an SLM made of the LLM's layers above the one that is read at the LLM's own states: the SLM's input
    embedding of a token becomes the mean state of that token in the texts, and with `fusion="replace"` the projector
    passes the states on unchanged; with `"add"` its last layer starts at zero, and each prompt token at its mean
    state. Tokens that are rare there get what a ridge regression from their own embeddings predicts. The head stays as
    it is.

    The state of a prompt's first position is left out: decoder-only LLMs use it as an attention sink.

    Args:
        model ([`LLM2SLMForConditionalGeneration`]):
            Changed in place. With one tokenizer (maybe trimmed), states of one layer, an SLM as wide as the LLM, from
            [`~llm2slm.building.slice_lm`], and for `fusion="replace"` a linear projector without a layer norm.
        dataset (`datasets.Dataset`):
            With the columns `input_ids` (texts, LLM's tokenizer: prompts, with their responses if these are in other
            words) and `prompt_hidden_states` (from [`~llm2slm.data.prompt_features.cache_prompt_features`]).
        max_rows (`int`, *optional*, defaults to 4096): This many rows are counted, evenly spaced.

    Returns:
        `float`: The share of the mean states' variance that the regression explains (R²).

    Raises:
        ValueError: if the model is another kind, a column is missing, no token of the texts is the SLM's, or the SLM
            normalises embeddings.
    """
    config = model.config
    given = 1.0 if config.slm_config.is_encoder_decoder else _given_scale(model.slm)
    needed = {
        "shared_tokenizer": (config.shared_tokenizer, True),
        "the number of layers read": (len(config.llm_layers), 1),
        "the SLM's width": (config.slm_hidden_size, config.llm_hidden_size),
    }
    if config.fusion == "replace":
        needed["projector_type"] = (config.projector_type, "linear")
        if config.projector_norm != "standardize":
            needed["projector_norm"] = (config.projector_norm, None)
    for name, (found, required) in needed.items():
        if found != required:
            raise ValueError(f"A start from the LLM's states needs {name} to be {required!r}, got {found!r}.")
    _check_columns(dataset)
    embeddings, head = model.slm.get_input_embeddings(), model.slm.get_output_embeddings()
    sums = torch.zeros(config.vocab_size, config.slm_hidden_size, dtype=torch.float64)
    counts = torch.zeros(config.vocab_size, dtype=torch.float64)
    for index in _evenly_spaced(dataset, max_rows):
        row = dataset[index]
        ids = torch.as_tensor(row["input_ids"])[1:]
        if model.prompt_token_map is not None:
            ids = model.prompt_token_map.cpu()[ids].long()
        known = ids >= 0
        sums.index_add_(0, ids[known], torch.as_tensor(row["prompt_hidden_states"])[1:][known].double())
        counts += torch.bincount(ids[known], minlength=config.vocab_size)
    if counts.sum() == 0:
        raise ValueError("No token of the texts is in the SLM's vocabulary.")
    own, means = embeddings.weight.detach().cpu().double(), sums / counts.clamp(min=1)[:, None]
    regression = _RidgeRegression(own.shape[1], means.shape[1])
    regression.add(own, means, counts)
    weight, bias = regression.solve()
    share = (counts / (counts + RARE))[:, None]
    start = share * means + (1 - share) * (own @ weight + bias)

    if head.weight is embeddings.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.slm.config.tie_word_embeddings = False
        config.slm_config = model.slm.config
    embeddings.weight.copy_(start / (given * _looked_up_scale(model.slm)))
    out = model.projector.out
    nn.init.zeros_(out.weight)
    nn.init.zeros_(out.bias)
    if config.fusion == "replace":
        out.weight.fill_diagonal_(1 / given)
        if config.projector_norm == "standardize":  # which is taken back
            (norm,) = model.projector.norms
            out.weight.mul_(norm.scale)
            out.bias.copy_(norm.mean / given)
    return regression.r_squared(weight, bias)


@torch.no_grad()
def fit_head(model, lm, dataset: "Dataset", max_rows: int = 512) -> float:
    r"""
    Fits the head of an SLM that is a slice of the LLM to the slice: a linear map from the slice's final states to
    those of the whole LLM, found by ridge regression on the texts, becomes part of the head. The layers between,
    which the slice lacks, are made up for as far as a linear map can: a tuned lens (Belrose et al.,
    [arXiv 2303.08112](https://arxiv.org/abs/2303.08112)) for a stack with gaps.

    Args:
        model ([`LLM2SLMForConditionalGeneration`]):
            Changed in place. Its SLM is from [`~llm2slm.building.slice_lm`], reads the LLM's states, and has a head of
            its own: [`start_from_states`] comes before.
        lm (`PreTrainedModel`): The whole LLM with its head, decoder-only, of which the SLM is a slice.
        dataset (`datasets.Dataset`):
            With the columns `input_ids` (texts, LLM's tokenizer) and `prompt_hidden_states` (from
            [`~llm2slm.data.prompt_features.cache_prompt_features`]).
        max_rows (`int`, *optional*, defaults to 512): This many texts are read, evenly spaced.

    Returns:
        `float`: The share of the LLM's final states' variance that the map explains (R²).

    Raises:
        ValueError: if a column is missing, or the head is tied to the embeddings.
    """
    _check_columns(dataset)
    slm, head = model.slm, model.slm.get_output_embeddings()
    if head.weight is slm.get_input_embeddings().weight:
        raise ValueError("The SLM's head is its embeddings: `start_from_states` comes first and gives it its own.")
    regression = _RidgeRegression(slm.config.hidden_size, slm.config.hidden_size, bias=False)
    given = _given_scale(slm)
    with _in_eval_mode(slm):
        for index in tqdm(_evenly_spaced(dataset, max_rows), desc="Fitting the head", unit=" texts"):
            row = dataset[index]
            ids, states = torch.as_tensor(row["input_ids"])[None], torch.as_tensor(row["prompt_hidden_states"])[None]
            own = without_head(slm)(inputs_embeds=states.to(slm.device, slm.dtype) / given).last_hidden_state
            final = without_head(lm)(ids.to(lm.device)).last_hidden_state
            regression.add(own[0, 1:], final[0, 1:])  # the first position is an attention sink
    weight, bias = regression.solve()
    head.weight.copy_(head.weight.double() @ weight.T.to(head.weight.device))
    return regression.r_squared(weight, bias)


def _given_scale(slm) -> float:
    """What a decoder-only SLM multiplies the embeddings by that it is given: Granite and older Gemmas do so."""
    once = torch.ones(1, 1, slm.config.hidden_size, device=slm.device, dtype=slm.dtype)
    with _in_eval_mode(slm):
        first, second = (
            without_head(slm)(inputs_embeds=embeds, output_hidden_states=True).hidden_states[0]
            for embeds in (once, 2 * once)
        )
    if torch.allclose(first, second):
        raise ValueError(
            f"A start from the LLM's states needs an SLM that takes embeddings as they are, or scaled; "
            f"{type(slm).__name__} normalises them."
        )
    return float((second - first).mean())


def _looked_up_scale(slm) -> float:
    """What an SLM's embedding layer multiplies the embeddings by that it looks up: Gemma 3's does so."""
    embeddings = slm.get_input_embeddings()
    norms = embeddings.weight.float().norm(dim=1)
    return float(embeddings(norms.argmax()).float().norm() / norms.max())


@contextmanager
def _in_eval_mode(model):
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _evenly_spaced(dataset: "Dataset", max_rows: int) -> list[int]:
    """Numbers of at most this many rows, each as far from the next."""
    number = min(max_rows, len(dataset))
    return [i * len(dataset) // number for i in range(number)]


def _check_columns(dataset: "Dataset"):
    if missing := {"input_ids", "prompt_hidden_states"} - set(dataset.column_names):
        raise ValueError(
            f"The data set lacks the column(s) {sorted(missing)}, it has {dataset.column_names}: tokenize it, then "
            "`cache_prompt_features`."
        )


class _RidgeRegression:
    """
    Fits `targets = inputs @ weight + bias` to rows that come in parts, of which only sums are kept.

    Args:
        num_inputs (`int`): Width of a row of inputs.
        num_targets (`int`): Width of a row of targets.
        bias (`bool`, *optional*, defaults to `True`): Whether there is one; it is zero otherwise.
    """

    def __init__(self, num_inputs: int, num_targets: int, bias: bool = True):
        self.bias = bias
        # With a column of ones behind the inputs, whose products are their sums.
        self.gram = torch.zeros(num_inputs + 1, num_inputs + 1, dtype=torch.float64)
        self.cross = torch.zeros(num_inputs + 1, num_targets, dtype=torch.float64)
        self.squares = 0.0

    def add(self, inputs: torch.Tensor, targets: torch.Tensor, counts: torch.Tensor | None = None) -> None:
        """Takes up rows, `(rows, num_inputs)` and `(rows, num_targets)`, each `counts` times, `(rows,)`, or once."""
        inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1).cpu().double()
        targets = targets.cpu().double()
        counted = inputs if counts is None else inputs * counts[:, None]
        self.gram += counted.T @ inputs
        self.cross += counted.T @ targets
        self.squares += float((targets.square().sum(dim=1) * counted[:, -1]).sum())

    def solve(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight, `(num_inputs, num_targets)`, and the bias, `(num_targets,)`."""
        used = len(self.gram) if self.bias else len(self.gram) - 1
        gram, cross = self.gram[:used, :used], self.cross[:used]
        diagonal = gram.diagonal()
        penalty = RIDGE * diagonal.clamp(min=1e-12 * float(diagonal.max()))  # some inputs are always zero
        solution = torch.linalg.solve(gram + penalty.diag(), cross)
        return (solution[:-1], solution[-1]) if self.bias else (solution, cross.new_zeros(cross.shape[1]))

    def r_squared(self, weight: torch.Tensor, bias: torch.Tensor) -> float:
        """The share of the variance of all targets together that the fit explains."""
        solution = torch.cat([weight, bias[None]])
        residual = self.squares - float((solution * (2 * self.cross - self.gram @ solution)).sum())
        variance = self.squares - float(self.cross[-1].square().sum() / self.gram[-1, -1])
        return 1 - residual / variance
