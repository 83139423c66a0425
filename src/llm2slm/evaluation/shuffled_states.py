"""Whether LLM-to-SLM uses its LLM: the loss with the LLM states of other examples.

The held-out loss is taken again with each example's LLM states replaced by those of another example, of the same
prompt length if there is one. With `fusion="add"` the SLM's own embeddings of the prompt (or, with two tokenizers,
the LLM's input embeddings) stay: only what the LLM computed is another's. A model that uses its LLM loses by it.
"""

import torch


def shuffle_among_like(lengths: list[int]) -> list[int]:
    """
    For each example another one, each taken once: the next of the same length, in turn. One that is alone with its
    length joins the next longer ones.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    groups: list[list[int]] = []
    for i in order:
        if groups and (len(groups[-1]) == 1 or lengths[groups[-1][-1]] == lengths[i]):
            groups[-1].append(i)
        else:
            groups.append([i])
    if len(groups) > 1 and len(groups[-1]) == 1:  # the longest of all
        alone = groups.pop()
        groups[-1] += alone
    donors = [0] * len(lengths)
    for group in groups:
        for i, donor in zip(group, [*group[1:], group[0]], strict=True):
            donors[i] = donor
    return donors


def states_of_others(model, batch: dict, others: dict):
    r"""
    The LLM's states of other prompts at the places of a batch's own, cut, or repeated from their start, to their
    lengths.

    Args:
        model ([`LLM2SLMForConditionalGeneration`]): With its LLM.
        batch (`dict[str, torch.Tensor]`): The batch, with `input_ids` and `attention_mask`.
        others (`dict[str, torch.Tensor]`): The other prompts likewise, one for each row.

    Returns:
        `torch.Tensor` of shape `(batch_size, prompt_length, prompt_hidden_size)`.
    """
    mask = batch["attention_mask"].bool()
    given = model.encode_hidden_states(others["input_ids"], others["attention_mask"])
    states = given.new_zeros(*mask.shape, given.shape[-1])
    for row in range(len(mask)):
        other = given[row, others["attention_mask"][row].bool().to(given.device)]  # (its length, prompt_hidden_size)
        states[row, mask[row]] = other[torch.arange(int(mask[row].sum())) % len(other)]
    if model.config.adds_llm_embeddings:  # they say which tokens the prompt has: they stay its own
        start = model.config.prompt_layers.index(0) * model.config.llm_hidden_size
        own = slice(start, start + model.config.llm_hidden_size)
        states[..., own] = model.encode_hidden_states(batch["input_ids"], batch["attention_mask"])[..., own]
    return states
