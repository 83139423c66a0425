"""What a model gives for each token of a text, kept on disk: a folder of shards that is filled once and read often.

Shards are safetensors files, written aside and then renamed: whatever is there is complete, and an interrupted run
goes on with the texts that no shard has. A text is known by a hash of its ids; its *place* is `shard:start:length`.
"""

import hashlib
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

KEYS, LENGTHS = "keys", "lengths"  # besides what is kept
# Shards mapped into memory at a time, least recently used out first: no data set takes more than this of them.
MAPPED_SHARDS = 32
# Tokens, padding included, of one forward. On a CPU more is slower: what lies between an MLP's layers is then too
# large for the allocator to keep (SmolLM2-135M, one core: 1,024 tokens a batch are 8% slower than 512).
TOKENS_PER_BATCH = {"cpu": 512, "other": 16384}


def hash_ids(*texts: list[int]) -> bytes:
    """A key of 16 bytes, of the ids of one text or of several."""
    digest = hashlib.sha256()
    for ids in texts:
        digest.update(np.asarray(ids, dtype=np.int64).tobytes())
        if len(texts) > 1:
            digest.update(b"|" + len(ids).to_bytes(8, "little"))
    return digest.digest()[:16]


def find_places(folder: Path) -> dict[bytes, str]:
    """The place of each text that is kept, by its key."""
    places = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as shard:
            keys, lengths = shard.get_tensor(KEYS), shard.get_tensor(LENGTHS)
        starts = np.cumsum(lengths) - lengths
        for key, start, length in zip(keys, starts.tolist(), lengths.tolist(), strict=True):
            places[key.tobytes()] = f"{path.name}:{start}:{length}"
    return places


def read_place(folder: str | Path, place: str, what: str, again: str) -> dict[str, torch.Tensor]:
    """
    What is kept at a place, memory-mapped: a slice of each tensor of its shard.

    Raises:
        FileNotFoundError: if the shard is gone; the message says `what` it held, and what makes it `again`.
    """
    shard, start, length = place.split(":")
    path = os.path.join(folder, shard)
    try:
        tensors = _map_shard(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"The cached {what} {path} are gone: {again}.") from error
    return {name: tensor[int(start) : int(start) + int(length)] for name, tensor in tensors.items()}


@lru_cache(maxsize=MAPPED_SHARDS)
def _map_shard(path: str) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as shard:  # the disk is read where a row is touched
        return {name: shard.get_tensor(name) for name in shard.keys() if name not in (KEYS, LENGTHS)}  # noqa: SIM118


def fill_cache(
    folder: Path,
    texts: list[tuple[bytes, int]],
    compute: Callable[[list[tuple[int, int, bytes]], tqdm], dict[str, torch.Tensor]],
    token_bytes: int,
    shard_bytes: int,
    what: tuple[str, str],
) -> dict[bytes, str]:
    r"""
    Computes what a folder lacks of some texts, each distinct one once, and says where everything is.

    Args:
        folder (`Path`): It is made if something is missing.
        texts (`list[tuple[bytes, int]]`): Key and length of each row; the length is the number of tokens kept.
        compute (`Callable`):
            Gets `(length, row, key)` of the texts of a shard, the longest first, and the progress bar, which it moves
            on by the tokens. Returns the tensors kept, their first dimension the tokens in the order of the texts.
        token_bytes (`int`): What is kept for a token.
        shard_bytes (`int`): Size of a shard; a kill loses the work on one at most.
        what (`tuple[str, str]`): What messages call it, and its texts.

    Returns:
        `dict[bytes, str]`: the place of each text, and of others that were there.

    Raises:
        OSError: if the disk cannot hold it, before anything is computed where that is known, or it cannot be written.
    """
    places = find_places(folder)
    if all(key in places for key, _ in texts):
        return places
    folder.mkdir(parents=True, exist_ok=True)
    # Of the processes of one training, the first to come writes, the others wait and read.
    lock = FileLock(folder / "lock")
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        logger.warning(f"Another process writes {what[0]} to {folder}: waiting until it is done.")
        held = lock.acquire()
    with held:
        _write_missing(folder, texts, find_places(folder), compute, token_bytes, shard_bytes, what)
    return find_places(folder)


def _write_missing(folder, texts, places, compute, token_bytes: int, shard_bytes: int, what: tuple[str, str]):
    """The longest first: they need most memory."""
    distinct = {key: (length, row) for row, (key, length) in enumerate(texts)}
    missing = sorted(((*distinct[key], key) for key in distinct if key not in places), reverse=True)
    if not missing:
        return
    tokens, all_tokens = sum(length for length, *_ in missing), sum(length for length, _ in distinct.values())
    free = shutil.disk_usage(folder).free
    size = f"{tokens * token_bytes / 2**30:.2f} GiB"
    if tokens * token_bytes > free:
        raise OSError(f"The {what[0]} need {size}, but {folder} has {free / 2**30:.2f} GiB free.")
    tqdm.write(f"Caching {what[0]}: {len(missing):,} {what[1]}, {size} in {folder}", file=sys.stderr)
    for part in folder.glob("*.part"):  # of a run that was killed
        part.unlink()
    with tqdm(total=all_tokens, initial=all_tokens - tokens, unit="tok", unit_scale=True) as progress:
        for shard in in_groups(missing, max(1, shard_bytes // token_bytes)):
            _save_shard(folder, compute(shard, progress), shard, what[0])


def in_groups(texts: list[tuple], max_tokens: int) -> Iterator[list[tuple]]:
    """Consecutive texts, the longest first, as many as have `max_tokens` padded to the longest; at least one."""
    start = 0
    for end in range(1, len(texts) + 1):
        if end == len(texts) or (end + 1 - start) * texts[start][0] > max_tokens:
            yield texts[start:end]
            start = end


def _save_shard(folder: Path, tensors: dict[str, torch.Tensor], texts: list[tuple[int, int, bytes]], what: str):
    keys = b"".join(key for *_, key in texts)
    path = folder / f"{hashlib.sha256(keys).hexdigest()[:16]}.safetensors"
    content = {
        **tensors,
        KEYS: torch.frombuffer(bytearray(keys), dtype=torch.uint8).view(len(texts), -1),
        LENGTHS: torch.tensor([length for length, *_ in texts]),
    }
    try:
        save_file(content, path.with_suffix(".part"))
    except SafetensorError as error:
        path.with_suffix(".part").unlink(missing_ok=True)
        raise OSError(f"The {what} cannot be written to {folder}: {error}") from error
    path.with_suffix(".part").rename(path)
