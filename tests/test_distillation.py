"""Distillation: what is kept of a teacher, how a student's tokens find it, the loss, and trainings from end to end."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from conftest import (
    LLM_KINDS,
    QUICK_TRAINING,
    build_llm_tokenizer,
    build_slm,
    build_slm_tokenizer,
    jitter,
    read_report,
    train,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, Seq2SeqTrainer

from llm2slm import LLM2SLMTokenizer
from llm2slm.building import trim_tokenizer
from llm2slm.building.tokenizers import find_token_ids, first_pieces
from llm2slm.cli import main as cli
from llm2slm.data.teacher_distributions import cache_distributions, in_students_tokens, likeliest, read_distributions
from llm2slm.training import teacher as teachers
from llm2slm.training.distillation import divergence
from llm2slm.training.options import TrainOptions
from llm2slm.training.teacher import find_teacher, line_up, load_taught_pairs, token_starts

VOCAB = 11


# ----------------------------------------------------------------------------------------------------------- the loss
def reference(logits: list[float], ids: list[int], log_probs: list[float], temperature: float) -> float:
    """The divergence of one token, by the book: the kept tokens and all others as one, softened, compared."""
    total = sum(math.exp(x) for x in logits)
    student = [math.exp(logits[i]) / total for i in ids]
    student.append(sum(math.exp(x) for i, x in enumerate(logits) if i not in ids) / total)
    taught = [math.exp(x) for x in log_probs]
    student, taught = ([p ** (1 / temperature) for p in row] for row in (student, taught))
    student, taught = ([p / sum(row) for p in row] for row in (student, taught))
    return temperature**2 * sum(p * math.log(p / q) for p, q in zip(taught, student, strict=True) if p > 0)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_the_divergence_is_that_of_the_likeliest_tokens_and_the_rest_as_one(temperature):
    torch.manual_seed(0)
    logits = torch.randn(4, VOCAB, dtype=torch.double, requires_grad=True)
    ids, log_probs = likeliest(3 * torch.randn(4, VOCAB), 3)
    found = divergence(logits, logits.logsumexp(dim=1), ids.long(), log_probs.double(), temperature)
    for row in range(4):
        expected = reference(logits[row].tolist(), ids[row].tolist(), log_probs[row].tolist(), temperature)
        assert found[row].item() == pytest.approx(expected, rel=1e-6)
    # The gradient, against small steps.
    torch.autograd.gradcheck(
        lambda x: divergence(x, x.logsumexp(dim=1), ids.long(), log_probs.double(), temperature), (logits,)
    )


def test_the_divergence_from_itself_is_nothing_and_stays_finite_where_a_side_is_sure():
    logits = torch.tensor([[50.0, 0.0, 0.0, 0.0], [0.0, 1.0, 2.0, 3.0]], requires_grad=True)
    ids, log_probs = likeliest(logits.detach().clone(), 2)
    own = divergence(logits, logits.logsumexp(dim=1), ids.long(), log_probs.float(), 1.0)
    torch.testing.assert_close(own, torch.zeros(2), atol=1e-3, rtol=0)
    other = torch.tensor([[3, -1], [-1, -1]])  # tokens that the student lacks
    found = divergence(logits, logits.logsumexp(dim=1), other, torch.tensor([[-0.1, -1e4, -2.35], [-1e4, -1e4, 0]]), 2)
    found.sum().backward()
    assert torch.isfinite(found).all() and torch.isfinite(logits.grad).all() and found[0] > 10


# ------------------------------------------------------------------------------------------------------- what is kept
def test_the_likeliest_tokens_and_the_mass_of_all_others_are_kept():
    logits = 4 * torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(0))
    probs = logits.softmax(dim=1)
    ids, log_probs = likeliest(logits.clone(), 4)
    assert (ids.dtype, log_probs.dtype, ids.shape, log_probs.shape) == (torch.int32, torch.float16, (5, 4), (5, 5))
    torch.testing.assert_close(log_probs[:, :4].float().exp(), probs.gather(1, ids.long()), atol=0, rtol=5e-3)
    torch.testing.assert_close(log_probs.float().exp().sum(dim=1), torch.ones(5), atol=2e-3, rtol=0)
    _, everything = likeliest(logits.clone(), VOCAB)
    assert (everything[:, -1].exp() == 0).all() and torch.isfinite(everything).all()
    with pytest.raises(ValueError, match="logits are not finite"):
        likeliest(torch.full((1, VOCAB), float("nan")), 2)


def test_tokens_that_are_one_for_the_student_are_added_up_and_lost_ones_are_in_the_tail():
    ids = torch.tensor([[5, 2, 9, 7]])
    log_probs = torch.tensor([[0.4, 0.3, 0.15, 0.1, 0.05]]).log()
    token_map = torch.full((9,), -1)  # 9 is beyond the tokenizer's tokens
    token_map[torch.tensor([5, 2, 7])] = torch.tensor([1, 3, 1])
    mapped, found = in_students_tokens(ids, log_probs, token_map)
    masses = dict(zip(mapped[0].tolist(), found[0].exp().tolist(), strict=False))
    assert masses.pop(-1) == 0 and masses == pytest.approx({1: 0.5, 3: 0.3})
    assert found[0, -1].exp().item() == pytest.approx(0.2)


PAIRS = [([1] * (3 + i), [2, 3, 4][: 1 + i % 3]) for i in range(6)] + [([1, 1, 1], [2])]  # the last one is the first


def logits_of(pairs) -> torch.Tensor:
    """Logits that depend on prompt, response and place."""
    return torch.stack([
        torch.randn(VOCAB, generator=torch.Generator().manual_seed(1000 * len(prompt) + 10 * len(response) + i))
        for prompt, response in pairs
        for i in range(len(response))
    ])  # fmt: skip


def test_an_interrupted_caching_goes_on_and_each_distinct_pair_is_run_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("llm2slm.data.teacher_distributions.SHARD_BYTES", 3 * 30)  # 3 tokens
    read = []

    def compute(pairs):
        read.append(len(pairs))
        if len(read) == 3:
            raise KeyboardInterrupt
        return logits_of(pairs)

    with pytest.raises(KeyboardInterrupt):
        cache_distributions(tmp_path, PAIRS, compute, VOCAB, 4)
    assert "Caching teacher's distributions: 6 responses, 0.00 GiB" in capsys.readouterr().err
    places = cache_distributions(tmp_path, PAIRS, compute, VOCAB, 4)
    assert sum(read) - read[2] == 6 and places[-1] == places[0]
    for (prompt, response), place in zip(PAIRS, places, strict=True):
        ids, log_probs = read_distributions(tmp_path, place)
        expected = likeliest(logits_of([(prompt, response)]), 4)
        assert torch.equal(ids, expected[0]) and torch.equal(log_probs, expected[1])
    with pytest.raises(FileNotFoundError, match="teacher's distributions .* are gone: start the training again"):
        read_distributions(tmp_path / "elsewhere", places[0])


def test_a_disk_that_is_too_small_is_told_before_the_teacher_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(OSError, match="The teacher's distributions need .* GiB, but .* has 0.00 GiB free"):
        cache_distributions(tmp_path, PAIRS, lambda pairs: pytest.fail("it ran"), VOCAB, 4)


# ------------------------------------------------------------------------------------------------ two ways of cutting
def test_a_trimmed_tokenizer_is_known_and_a_token_that_it_lacks_counts_as_its_first_piece():
    whole = build_slm_tokenizer()
    trimmed, token_ids = trim_tokenizer(whole, ["a b", "ab"])
    assert find_token_ids(whole, trimmed) == token_ids and find_token_ids(trimmed, whole) is None
    assert find_token_ids(whole, build_slm_tokenizer()) == list(range(len(whole)))
    pieces, vocab, kept = first_pieces(whole, trimmed), whole.get_vocab(), trimmed.get_vocab()
    assert pieces[vocab["▁a"]] == kept["▁a"] and "▁c" not in kept
    assert pieces[vocab["▁c"]] == kept["▁"]  # and then "c"
    assert pieces[vocab["</s>"]] == kept["</s>"]


def test_tokens_that_begin_at_the_same_place_find_each_other():
    whole = build_slm_tokenizer()
    trimmed, _ = trim_tokenizer(whole, ["b c", "bc"])
    text = "ab c"  # ▁a b ▁c end, and ▁ a b ▁c end
    both = [token_starts(each, text, [*each(text)["input_ids"], each.eos_token_id]) for each in (trimmed, whole)]
    assert both == [[0, 0, 1, 2, -1], [0, 1, 2, -1]] or both == [[0, 0, 1, 3, -1], [0, 1, 3, -1]]
    assert line_up(*both) == [-1, -1, 1, 2, 3]
    assert line_up([0, 1, 1, 2], [0, 1, 2]) == [0, -1, -1, 2]
    assert token_starts(whole, text, [5, 6]) == [None, None]  # not the ids of this text


# ---------------------------------------------------------------------------------------------------- from end to end
STEPS = 8


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An LLM that spells, an encoder-decoder and an SLM with its tokenizer, and pairs."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    vocab = len(build_slm_tokenizer())
    jitter(AutoModelForCausalLM.from_config(LLM_KINDS["llama"](24, vocab))).save_pretrained(folder / "llm")
    jitter(AutoModelForSeq2SeqLM.from_config(LLM_KINDS["t5"](24, vocab))).save_pretrained(folder / "t5")
    build_slm("llama").save_pretrained(folder / "slm")
    for name in ("llm", "t5", "slm"):
        build_slm_tokenizer().save_pretrained(folder / name)
    generator = random.Random(0)
    pairs = []
    for _ in range(24):
        prompt = " ".join("".join(generator.choices("abcd", k=3)) for _ in range(3))
        pairs.append({"prompt": prompt, "completion": prompt[::-1][: 4 + generator.randrange(4)], "extra": prompt[:3]})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


@pytest.fixture
def recipe(files, tmp_path):
    return {
        "data": str(files / "pairs.jsonl"),
        "train_split": "train[:20]",
        "validation_split": "train[20:]",
        "llm": str(files / "llm"),
        "slm_tokenizer": "trimmed",
        "max_steps": STEPS,
        "eval_steps": 4,
        "per_device_train_batch_size": 4,
        **QUICK_TRAINING,
        "teacher": str(files / "llm"),
        "teacher_top_k": 5,
        "cache_dir": str(tmp_path / "features"),
        "output_dir": str(tmp_path / "run"),
    }


def weights(folder) -> dict[str, torch.Tensor]:
    path = Path(folder) / "model.safetensors"
    return load_file(path if path.exists() else path.with_name("adapter_model.safetensors"))


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


ARMS = [
    {"arm": "llm2slm"},
    {"arm": "llm2slm", "slm": "slm", "lora_r": 2},
    {"arm": "slm"},
    {"arm": "slm", "slm": "t5"},
    {"arm": "llm"},
]


@pytest.mark.parametrize("changes", ARMS, ids=lambda changes: "-".join(map(str, changes.values())))
def test_every_arm_learns_from_a_teacher_and_the_folder_says_so(recipe, files, tmp_path, changes):
    if "slm" in changes:
        changes = {**changes, "slm": str(files / changes["slm"]), "slm_tokenizer": None}
        changes |= {"hidden_size": None, "num_hidden_layers": None}
    if changes["arm"] == "llm":  # itself, with another prompt: context distillation
        changes = {**changes, "teacher_prompt_format": "{extra} {prompt}"}
    assert train(recipe, **changes) is None
    run = read_report(tmp_path / "run")
    assert run["teacher"]["name_or_path"] == recipe["teacher"] and run["teacher"]["revision"] is None
    assert (run["teacher"]["weight"], run["teacher"]["temperature"], run["teacher"]["top_k"]) == (0.5, 1.0, 5)
    assert run["teacher"]["prompt_format"] == changes.get("teacher_prompt_format")
    assert run["teacher"]["responses"] == 20 and run["teacher"]["cut_otherwise"] == 0
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert not {"teacher", "start"} & names and "run.json" in names
    alone = {**recipe, "teacher": None, "teacher_top_k": None, "output_dir": str(tmp_path / "alone")}
    assert train(alone, **{**changes, "teacher_prompt_format": None}) is None
    assert not same(weights(tmp_path / "run"), weights(tmp_path / "alone"))


@pytest.mark.parametrize("own_form", [False, True])
def test_a_teacher_reads_prompts_cut_as_the_student_does_but_for_a_form_of_its_own(recipe, files, own_form):
    form = "{prompt} {extra}" if own_form else None
    options = TrainOptions(
        data=recipe["data"], llm=recipe["llm"], slm="fresh", slm_tokenizer="llm", truncate=True, prompt_max_length=2,
        teacher=recipe["teacher"], teacher_prompt_format=form,
    )  # fmt: skip
    who = find_teacher(options)
    rows = load_taught_pairs(options, who, recipe["data"], "all")
    tokenizer = LLM2SLMTokenizer.from_tokenizers(build_llm_tokenizer(), build_llm_tokenizer())
    prompts = [prompt for prompt, _ in teachers._encode(options, who, rows, tokenizer)]
    cut = {} if own_form else {"truncation": True, "max_length": 2}
    assert prompts == tokenizer(rows["teacher_prompt"][:], apply_prompt_format=False, **cut)["input_ids"]
    assert (max(map(len, prompts)) > 2) == own_form


def test_with_a_weight_of_zero_it_is_the_training_without_a_teacher(recipe, tmp_path):
    changes = {"gradient_accumulation_steps": 2, "max_steps": 3, "eval_steps": 3}
    assert train(recipe, teacher_weight=0.0, **changes) is None
    assert train(recipe, teacher=None, teacher_top_k=None, output_dir=str(tmp_path / "alone"), **changes) is None
    ours, expected = weights(tmp_path / "run"), weights(tmp_path / "alone")
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], atol=1e-4, rtol=1e-3)
    losses = [read_report(tmp_path / name)["train"] for name in ("run", "alone")]
    assert losses[0]["final_loss"] == pytest.approx(losses[1]["final_loss"], rel=1e-4)
    assert losses[0]["eval_loss"] == pytest.approx(losses[1]["eval_loss"], rel=1e-3)


@pytest.mark.parametrize("changes", [{}, {"arm": "slm", "slm": "t5"}], ids=["llm2slm", "t5"])
def test_accumulated_batches_are_one_large_batch(recipe, files, tmp_path, changes):
    if changes:
        changes = {**changes, "slm": str(files / "t5"), "slm_tokenizer": None}
        changes |= {"hidden_size": None, "num_hidden_layers": None}
    # All pairs in one step: the order of them changes nothing.
    changes |= {"max_steps": 1, "validation_split": "none", "logging_steps": 1, "teacher_weight": 0.8}
    losses = {}
    for size, parts in ((20, 1), (4, 5)):
        folder, sizes = (
            tmp_path / str(parts),
            {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts},
        )
        assert train(recipe, **changes, **sizes, output_dir=str(folder)) is None
        (losses[parts],) = (
            row for row in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in row
        )
    for name in ("loss", "grad_norm"):
        assert losses[1][name] == pytest.approx(losses[5][name], rel=1e-4)


def test_a_student_learns_what_the_teacher_would_say(recipe, tmp_path):
    """With the divergence alone, the student's loss is that of the teacher's distributions, not of the responses."""
    assert train(recipe, teacher_weight=1.0, max_steps=60, eval_steps=60, teacher_top_k=VOCAB) is None
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0] / 2


def test_a_killed_training_goes_on_bit_by_bit_without_loading_the_teacher_again(recipe, tmp_path, monkeypatch):
    recipe = {**recipe, "lr_scheduler_type": "constant", "teacher_temperature": 2.0}
    assert train(recipe, output_dir=str(tmp_path / "whole")) is None
    original, calls = Seq2SeqTrainer._save_rng_state, []

    class Killed(BaseException):
        """Nobody catches it."""

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:  # in the second checkpoint
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(Seq2SeqTrainer, "_save_rng_state", killed)
    with pytest.raises(Killed):
        train(recipe)
    monkeypatch.setattr(teachers, "load_model", lambda *args, **kwargs: pytest.fail("the teacher was loaded"))
    assert train(recipe) is None
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_teachers_of_every_kind_and_one_cache_for_students_of_several_vocabularies(recipe, files, tmp_path, capsys):
    def caches() -> set[str]:
        return {path.name for path in (tmp_path / "features").glob("teacher-*")}

    changes = {"max_steps": 1, "validation_split": "none"}
    assert train(recipe, **changes) is None
    first = caches()
    # A student that has too few tokens for some responses, with the same teacher.
    few = {"output_dir": str(tmp_path / "few"), "vocab_size": 42, "arm": "slm"}
    capsys.readouterr()
    assert train(recipe, **changes, **few) is None
    run, said = read_report(tmp_path / "few")["teacher"], capsys.readouterr()
    assert caches() == first == {run["distributions"]}
    assert 0 < run["cut_otherwise"] and 0 < run["tokens_without_distribution"] < run["tokens"]
    assert f"The student cuts {run['cut_otherwise']} of 20 responses into other tokens" in said.out
    # An encoder-decoder, an adapter, a pair; each has a cache of its own, as have another `teacher_top_k` and dtype.
    assert (
        train(recipe, **changes, teacher=None, teacher_top_k=None, arm="llm", output_dir=str(tmp_path / "lora"))
        is None
    )
    for number, teacher in enumerate((files / "t5", tmp_path / "lora", tmp_path / "run"), start=2):
        output = {"output_dir": str(tmp_path / f"taught-{number}"), "teacher": str(teacher)}
        assert train(recipe, **changes, **output) is None, teacher
        assert len(caches()) == number
    assert train(recipe, **changes, teacher_top_k=6, output_dir=str(tmp_path / "more")) is None
    assert len(caches()) == 5
    assert train(recipe, **changes, teacher_dtype="bfloat16", output_dir=str(tmp_path / "bfloat16")) is None
    assert len(caches()) == 6 and read_report(tmp_path / "bfloat16")["teacher"]["dtype"] == "bfloat16"


def test_the_card_says_who_taught(recipe, tmp_path):
    assert train(recipe, teacher_prompt_format="{extra}: {prompt}", max_steps=2, eval_steps=2) is None
    options = ["--license", "mit", "--llm-name", "tester/llm", "--llm-license", "mit"]
    assert cli.main(["card", "--run", str(tmp_path / "run"), *options]) is None
    card = (tmp_path / "run" / "README.md").read_text()
    assert 'Taught by `llm`, which reads prompts in the form `"{extra}: {prompt}"`' in card
    assert "(training, at the end, with the divergence from the teacher)" in card


# ---------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_weight": 1.5}, "`teacher_weight` must be from 0 to 1, got 1.5"),
        ({"teacher_temperature": 0.0}, "`teacher_temperature` must be positive, got 0.0"),
        ({"teacher_top_k": 0}, "`teacher_top_k` must be at least 1, got 0"),
        ({"teacher": ""}, "`teacher_top_k` is about a teacher: say which, `teacher`"),
        ({"slm_tokenizer": "own"}, "a fresh SLM's own is no other model's"),
    ],
)
def test_options_that_do_not_go_together(recipe, changes, message):
    given = {"data": "pairs", "llm": "llm", "slm": "fresh", "slm_tokenizer": "llm", "teacher": "t", "teacher_top_k": 3}
    with pytest.raises(ValueError, match=message):
        TrainOptions(**{**given, **changes})


def test_what_is_wrong_with_a_teacher_is_said_before_anything_is_loaded(recipe, files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("llm2slm.training.setup.write_start", lambda *_: pytest.fail("it began"))
    other = tmp_path / "other"
    build_slm("llama").save_pretrained(other)
    build_llm_tokenizer().save_pretrained(other)
    (tmp_path / "empty").mkdir()
    for teacher, message in [
        (str(tmp_path / "nowhere"), "There is no folder"),
        (str(tmp_path / "empty"), "There is no "),
        (str(other), "has another tokenizer (60 tokens) than"),
    ]:
        assert train(recipe, teacher=teacher)
        assert message in capsys.readouterr().err
    assert train(recipe, label_smoothing_factor=0.1)
    assert "leave out `label_smoothing_factor`" in capsys.readouterr().err
    assert train(recipe, teacher_prompt_format="{nothing}")
    error = capsys.readouterr().err
    assert "For the teacher: " in error and "has no column 'nothing' for the prompt" in error
    assert "--teacher-prompt-format '{" in error and "`teacher_prompt_format` in Python" in error
