"""A teacher, and what it expects of each token of the responses that a training learns from.

The teacher is a model of any kind whose tokenizer is the student's, or the one that the student's was trimmed from. It
runs once for each pair, before the training, and its distributions are kept on disk (see
[`~llm2slm.data.teacher_distributions`]).

A trimmed tokenizer may cut a response into other tokens than the teacher's. Choices made here:
- The teacher reads the response in its own tokens, those it knows. A token of the student that begins where one of the
  teacher's begins learns from the distribution there; any other learns from the response alone.
- What the teacher expects of a token that the student lacks counts as the first token in which the student would write
  it; what it expects of an added token that the student lacks, as a chat's marker, goes to the tail.
"""

import gc
import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset

from ..building.tokenizers import find_token_ids, first_pieces
from ..data.collator import DataCollatorForLLM2SLM, encode_pairs
from ..data.pairs import load_pairs, load_rows, make_texts
from ..data.teacher_distributions import cache_distributions, find_distributions
from ..language_models import check_positions, identify, load_model, load_models_tokenizer, response_logits
from ..loading_llm2slm import load_tokenizer
from ..tokenization_llm2slm import LLM2SLMTokenizer
from ..utils import write_folder, write_json
from .options import TrainOptions
from .run_folder import TEACHER, read_run

PROMPT, PLACE, POSITIONS = "teacher_prompt", "teacher_place", "teacher_positions"  # columns
RECORD = "teacher.json"
END = -1  # where the end token begins, which is in no text


class Teacher(NamedTuple):
    """
    A teacher that is there and fits the student.

    Args:
        name (`str`): A folder, or a name on the Hub.
        trained_llm (`str`, *optional*): What the training of an adapter called its base model.
        prompt_format (`str`, *optional*): How the prompts that it reads are made of a row's columns.
    """

    name: str
    trained_llm: str | None
    prompt_format: str | None


class Teaching(NamedTuple):
    """
    What a training has of its teacher.

    Args:
        teacher ([`Teacher`]): Who teaches.
        folder (`Path`): The cache of its distributions.
        token_map (`torch.LongTensor`): The student's id of each of its ids, -1 for none.
        counts (`dict[str, int]`): Responses, those that it cuts otherwise, tokens, and those without a distribution.
    """

    teacher: Teacher
    folder: Path
    token_map: torch.Tensor
    counts: dict[str, int]


# ------------------------------------------------------------------------------------------- before anything is loaded
def find_teacher(options: TrainOptions) -> Teacher | None:
    """
    The teacher, if there is to be one. By the tokenizers alone, checks that it is there and fits the student. It reads
    the form of prompts that is given, else that of its own training, else the student's.

    Raises:
        OSError: if there is no such teacher.
        ValueError: if its tokenizer is not the student's.
    """
    if not options.teacher:
        return None
    run = read_run(options.teacher)
    trained_llm, prompt_format = (run["llm"] or {}).get("name_or_path"), options.teacher_prompt_format
    if prompt_format is None:
        prompt_format = run["data"].get("prompt_format") if run["data"] else options.prompt_format
    tokenizer = load_models_tokenizer(options.teacher, trained_llm=trained_llm).slm_tokenizer
    by_llm = options.arm == "llm" or options.slm_tokenizer != "own"
    source = options.llm if by_llm else (options.slice_of or options.llm) if options.slm == "slice" else options.slm
    students = load_tokenizer(source)
    # One of a trimmed student may be the same: that is seen when it has been trimmed.
    if find_token_ids(tokenizer, students) is None and find_token_ids(students, tokenizer) is None:
        raise _other_tokenizer(options.teacher, len(tokenizer), f"{source!r}", len(students))
    return Teacher(options.teacher, trained_llm, prompt_format)


def _other_tokenizer(teacher: str, tokens: int, student: str, students_tokens: int) -> ValueError:
    return ValueError(
        f"The teacher {teacher!r} has another tokenizer ({tokens:,} tokens) than {student} ({students_tokens:,}): its "
        "distributions are over other tokens. Choose a teacher with the student's tokenizer, or give a fresh or "
        "sliced SLM the teacher's (`llm` with `slm_tokenizer: llm` or `trimmed`). From the responses of any teacher a "
        "student learns without that: `llm2slm label`."
    )


def load_taught_pairs(
    options: TrainOptions, teacher: Teacher | None, source: str, split: str, max_pairs: int | None = None
) -> Dataset:
    """A source's pairs and, with a teacher, the prompts that it reads as another column."""
    formats = options.prompt_format, options.completion_format
    pairs = load_pairs(source, split, *formats, max_pairs, options.skip_empty)
    if teacher is None:
        return pairs
    if teacher.prompt_format == options.prompt_format:
        return pairs.add_column(PROMPT, pairs["prompt"][:])
    rows = load_rows(source, split, max_pairs, options.prompt_format)
    try:
        texts = make_texts(rows, {"prompt": teacher.prompt_format}, f"{source!r}", options.skip_empty)
    except ValueError as error:
        text = re.sub("(?<=[`-])prompt([_-])format", r"teacher\1prompt\1format", str(error))
        raise ValueError(f"For the teacher: {text}") from error
    return pairs.add_column(PROMPT, texts["prompt"][:])


# ------------------------------------------------------------------------------------------------------- distributions
def teach(
    options: TrainOptions, teacher: Teacher, examples: Dataset, tokenizer, device: torch.device, folder: Path
) -> tuple[Dataset, Teaching]:
    r"""
    Runs the teacher for the pairs whose distributions are not kept yet; it is not loaded if there are none and this
    training has loaded it before.

    Args:
        options ([`TrainOptions`]): What is kept of its distributions, and where.
        teacher ([`Teacher`]): Who teaches.
        examples (`datasets.Dataset`):
            The pairs that are learned from, with `labels`, the student's, and the prompts of [`load_taught_pairs`].
        tokenizer: The student's.
        device (`torch.device`): Where the teacher runs.
        folder (`Path`): The training's.

    Returns:
        The examples with two more columns: where the distributions of a response are, and which of them each of the
        student's tokens learns from, -1 for none. And what goes for all of them.

    Raises:
        ValueError: if the tokenizers do not go together, or a pair does not fit the teacher's positions.
        OSError: if there is no teacher, or the disk cannot hold the distributions.
    """
    student = tokenizer.slm_tokenizer if isinstance(tokenizer, LLM2SLMTokenizer) else tokenizer
    record, cache_dir, places = folder / TEACHER, Path(options.cache_dir).absolute(), None
    if record.exists():
        teachers = LLM2SLMTokenizer.from_pretrained(record)
        cache = cache_dir / json.loads((record / RECORD).read_text(encoding="utf-8"))["distributions"]
        pairs = _encode(options, teacher, examples, teachers)
        places = find_distributions(cache, pairs)
    if places is None:
        teachers, cache, pairs, places = _run(options, teacher, examples, student, device, cache_dir)
        gc.collect()
        if not record.exists():
            write_folder(record, lambda path: _write_record(path, teachers, cache))
    token_map = _token_map(teachers, student, teacher.name)
    positions, counts = _positions(examples, pairs, student, teachers.slm_tokenizer, token_map)
    examples = examples.remove_columns(PROMPT).add_column(PLACE, places).add_column(POSITIONS, positions)
    return examples, Teaching(teacher, cache, token_map, counts)


def _run(options: TrainOptions, teacher: Teacher, examples: Dataset, student, device: torch.device, cache_dir: Path):
    """The teacher's tokenizer, the cache, the pairs in the teacher's tokens and the places of their distributions."""
    model, teachers = load_model(
        teacher.name, dtype=options.teacher_dtype, device=str(device), trained_llm=teacher.trained_llm
    )
    _token_map(teachers, student, teacher.name)
    pairs = _encode(options, teacher, examples, teachers)
    check_positions(
        model.config,
        [(len(prompt), len(response)) for prompt, response in pairs],
        "A pair that the teacher reads",
        "shorten `teacher_prompt_format`, or leave longer pairs out with a smaller `prompt_max_length` or "
        "`response_max_length`",
    )
    identity = json.dumps([identify(model), options.teacher_top_k])
    cache = cache_dir / f"teacher-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    collate = DataCollatorForLLM2SLM(teachers)

    def compute_logits(batch: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        tensors = collate([{"input_ids": prompt, "labels": response} for prompt, response in batch])
        tensors = {name: tensor.to(model.device) for name, tensor in tensors.items()}
        return response_logits(model, tensors)[tensors["labels"] != -100]

    vocab_size = compute_logits(pairs[:1]).shape[1]
    places = cache_distributions(cache, pairs, compute_logits, vocab_size, options.teacher_top_k, model.device.type)
    return teachers, cache, pairs, places


def _write_record(path: Path, tokenizer: LLM2SLMTokenizer, cache: Path) -> None:
    tokenizer.save_pretrained(path)
    write_json(path / RECORD, {"distributions": cache.name})


def _token_map(teachers: LLM2SLMTokenizer, student, name: str) -> torch.Tensor:
    token_map = first_pieces(teachers.slm_tokenizer, student)
    if token_map is None:
        raise _other_tokenizer(name, len(teachers), "the student", len(student))
    token_map[teachers.eos_token_id] = student.eos_token_id  # either's end of a response
    return token_map


def _encode(
    options: TrainOptions, teacher: Teacher, examples: Dataset, teachers: LLM2SLMTokenizer
) -> list[tuple[list[int], list[int]]]:
    """
    Prompt and response of each example in the teacher's tokens. They are cut as the student's are, but for prompts in
    a form of their own, which may end in an instruction.
    """
    prompts, completions = examples[PROMPT][:], examples["completion"][:]
    if not isinstance(prompts[0], str) and teachers.chat_template is None:
        raise ValueError(
            f"The prompts are chats, but the teacher {options.teacher!r} has no chat template: say what it reads with "
            "`teacher_prompt_format`."
        )
    cuts_prompts = options.truncate and teacher.prompt_format == options.prompt_format
    columns = encode_pairs(
        prompts,
        completions,
        teachers,
        range(len(prompts)),
        apply_prompt_format=False,
        prompt_max_length=options.prompt_max_length if cuts_prompts else None,
    )
    longest = options.response_max_length if options.truncate else None
    return [
        (prompt, response[:longest]) for prompt, response in zip(columns["input_ids"], columns["labels"], strict=True)
    ]


# ----------------------------------------------------------------------------------------------- token behind token
def _positions(examples, pairs, student, teachers, token_map) -> tuple[list[list[int]], dict[str, int]]:
    """For each token of the student the place of the distribution that it learns from, and how many have none."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in examples["completion"][:]]
    labels = [[i for i in row if i != -100] for row in examples["labels"][:]]
    positions: list[list[int]] = []
    cut_otherwise = 0
    for text, ids, (_, teachers_ids) in zip(texts, labels, pairs, strict=True):
        if token_map[teachers_ids[: len(ids)]].tolist() == ids:
            positions.append(list(range(len(ids))))
        else:
            cut_otherwise += 1
            positions.append(line_up(token_starts(student, text, ids), token_starts(teachers, text, teachers_ids)))
    counts = {
        "responses": len(labels),
        "cut_otherwise": cut_otherwise,
        "tokens": sum(map(len, labels)),
        "tokens_without_distribution": sum(row.count(-1) for row in positions),
    }
    return positions, counts


def describe_counts(counts: dict[str, int]) -> str | None:
    """One sentence on the responses that the student's tokenizer cuts otherwise; nothing if it does not."""
    if not counts["cut_otherwise"]:
        return None
    return (
        f"The student cuts {counts['cut_otherwise']:,} of {counts['responses']:,} responses into other tokens than "
        f"the teacher: {counts['tokens_without_distribution']:,} of {counts['tokens']:,} tokens learn from the "
        "response alone."
    )


def token_starts(tokenizer, text: str, ids: list[int]) -> list[int | None]:
    """Where in its text each token of a response begins; `None` for what is not seen of it."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    whole = [*encoding["input_ids"], tokenizer.eos_token_id]
    if ids != whole[: len(ids)]:  # special tokens in the text
        return [None] * len(ids)
    return [*(start for start, _ in encoding["offset_mapping"]), END][: len(ids)]


def line_up(starts: list[int | None], teachers_starts: list[int | None]) -> list[int]:
    """
    For each token of the student the place of the teacher's that begins where it does, -1 if none does. Where several
    of either begin, as the bytes of one letter do, it is not known which is which.
    """

    def alone(values: list[int | None]) -> dict[int, int]:
        return {value: i for i, value in enumerate(values) if value is not None and values.count(value) == 1}

    places, own = alone(teachers_starts), alone(starts)
    return [places.get(start, -1) if start in own else -1 for start in starts]
