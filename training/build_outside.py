"""
Builds test sets of other text than the recipes' own: is a checkpoint right one step beside what it learned from?

    pip install '.[train]'
    python training/build_outside.py --task sentences --apart-from data/simplify --output data/outside-sentences
    python training/build_outside.py --task summarize --apart-from data/summarize --output data/outside-summarize
    python training/build_outside.py --task translate --language it --apart-from data/translate-en-it \
        --output data/outside-translate-en-it

    >>> from datasets import load_from_disk
    >>> load_from_disk("data/outside-sentences")["test"][0]

- `sentences`: example sentences of WordNet, everyday, news and questions, for any task whose prompt is a sentence.
  They have no right answer, so no column `completion`: `llm2slm label` lets an LLM write it.
- `summarize`: a page of help, and the line that its authors say of it in the list of pages.
- `translate`: paragraphs of the same pages and their translations.

The texts are those of three Debian packages, which `apt-get download` brings into a folder of its own: no root rights
needed, and nothing is installed. `--packages` keeps them, and reads them again without a network.

Choices made here:

- *Apart.* A text that shares a run of eight words with a text of a data set named by `--apart-from` is dropped, prompt
  or completion, whatever its split.
- *Sentences.* Many of WordNet's examples are phrases ("milk in a heavy mug"): those are kept that begin as sentences
  do. They get the capital and the full stop that most of them lack. A third of those tested are questions.
- *Which.* By the hash of the text, as in `splits.py`. Sentences and paragraphs that are not tested are the split
  `train`, prompts for `llm2slm label`. None shares eight words in a row with a tested text. Who trains on them tests
  on others of their kind, no longer outside.
- *Pages.* Translations keep a page's elements, so texts are aligned by their place. Text that is still English is
  dropped, as is what is short or no sentence.
"""

import argparse
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from datasets import Dataset, DatasetDict, load_from_disk
from splits import RUN, drop_near_identical, drop_sharing, normalize, save, texts_of

from llm2slm.data.hash_split import prompt_position

SENTENCES = ("wordnet-base",)
PAGES = ("gnome-user-docs", "evolution-common")
NUM_QUESTIONS, NUM_STATEMENTS = 100, 200  # of the sentences that are tested
NUM_PAIRS = 300  # of the pages, summarized or translated, at most

SENTENCE_WORDS = (6, 40)
# How an example begins that is a sentence, not a phrase such as "a budget deficit that caused spending cuts".
BEGINNING = re.compile(
    r"(?:I|you|he|she|we|they|it|there|that|this|these|those|who|what|where|when|why|how|do|did|does|is|are|was|were"
    r"|can|could|will|would|have|has|had|don't|please|if|(?:the|his|her|my|our|their|your) \w+ (?:is|are|was|were|has"
    r"|had|have|will|can|could|would|did|does|\w+ed)|[A-Z][a-z]+ \w+) "
)

MALLARD = "{http://projectmallard.org/1.0/}"
ITS = "{http://www.w3.org/2005/11/its}"
SEPARATORS = {f"{MALLARD}keyseq": "+", f"{MALLARD}guiseq": " > "}
TEXTS = {MALLARD + name for name in ("title", "p", "desc")}
PARAGRAPH_WORDS = (5, 60)
PAGE_WORDS = (25, 160)  # as in build_descriptions.py at most; shorter, a page says no more than its line
LINE_WORDS = (4, 25)
SENTENCE_END = re.compile(r"[.!?][\"')\]]*$")
PUNCTUATION = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "\u00a0": " "})


# ------------------------------------------------------------------------------------------------------------ packages
def download(folder: Path, packages: tuple[str, ...]) -> None:
    """
    Downloads packages that `folder` lacks.

    Raises:
        OSError: if there is no apt-get, or it brings none, as without a network.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in packages if not list(folder.glob(f"{name}_*.deb"))]
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise OSError(
            "apt-get, which downloads the texts, was not found: it is part of Debian and of systems made from it. Run "
            "this there or in a container (image `debian`), or copy the folder that --packages kept there."
        )
    command = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *missing]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if run.returncode:
        raise OSError(
            f"apt-get could not download {', '.join(missing)}: needed is a network and, once, `apt-get update`. "
            f"It said:\n{(run.stderr or run.stdout).strip()}"
        )


def unpack(folder: Path, packages: tuple[str, ...], output: Path) -> list[str]:
    """Unpacks the packages in `folder` and returns their names with their versions."""
    files = [max(folder.glob(f"{name}_*.deb")) for name in packages]
    for file in files:
        subprocess.run(["dpkg-deb", "-x", str(file), str(output)], check=True)
    return [" ".join(file.stem.split("_")[:2]).replace("%3a", ":") for file in files]


# ----------------------------------------------------------------------------------------------------------- sentences
def read_sentences(folder: Path) -> list[dict[str, str]]:
    """The sentences among the examples in WordNet's files, each once, with the capital and the end of a sentence."""
    least, most = SENTENCE_WORDS
    found = {}
    for path in sorted(folder.glob("usr/share/wordnet/data.*")):
        for line in path.read_text(encoding="utf-8").splitlines():
            _, _, gloss = line.partition(" | ")
            for text in re.findall(r'"([^"]+)"', gloss):
                text = clean(text)
                if least <= len(text.split()) <= most and BEGINNING.match(text) and not re.search(r"[;`*]|--", text):
                    text = text[0].upper() + text[1:]
                    found.setdefault(text if SENTENCE_END.search(text) else f"{text.rstrip(',:')}.")
    return [{"prompt": text} for text in found]


def split_sentences(rows: list[dict[str, str]]) -> DatasetDict:
    """The sentences that are tested, `NUM_QUESTIONS` of them questions, and those that share no run with them."""
    questions, statements = ([row for row in rows if (row["prompt"][-1] == "?") == asks] for asks in (True, False))
    test = choose(questions, NUM_QUESTIONS) + choose(statements, NUM_STATEMENTS)
    train = drop_sharing(rows, [row["prompt"] for row in test])
    return DatasetDict({"train": Dataset.from_list(train), "test": Dataset.from_list(test)})


# --------------------------------------------------------------------------------------------------------------- pages
def read_pages(folder: Path, language: str) -> dict[str, ElementTree.Element]:
    """The pages of help in a language (`"C"` is English) by their place."""
    pages = {}
    for path in sorted((folder / "usr/share/help" / language).rglob("*.page")):
        pages[str(path.relative_to(folder / "usr/share/help" / language))] = ElementTree.parse(path).getroot()
    return pages


def places_of_text(element: ElementTree.Element, place: str = "") -> Iterator[tuple[str, ElementTree.Element]]:
    """The titles, paragraphs and descriptions of a page, each with its place in the tree; credits are left out."""
    seen = Counter()
    for child in element:
        seen[child.tag] += 1
        below = f"{place}/{child.tag}{seen[child.tag]}"
        if child.get(f"{ITS}translate") == "no" or child.tag.endswith("credit"):
            continue
        if child.tag in TEXTS:
            yield below, child
        else:
            yield from places_of_text(child, below)


def text_of(element: ElementTree.Element) -> str | None:
    """The text of a paragraph; `None` if a part of it is not in the file, such as the title that a link names."""
    text = join_text(element)
    return None if text is None else clean(text)


def join_text(element: ElementTree.Element) -> str | None:
    """The text of an element and those in it, with a sign between keys, and between menus, that stand in a row."""
    parts = []
    for child in element:
        text = join_text(child)
        if text is None:
            return None
        parts.append((text, "" if element.tag in SEPARATORS else child.tail or ""))
    if not parts:
        return element.text if (element.text or "").strip() else None
    if element.tag in SEPARATORS:
        return SEPARATORS[element.tag].join(text for text, _ in parts)
    return (element.text or "") + "".join(text + tail for text, tail in parts)


def clean(text: str) -> str:
    """Sets one kind of apostrophe, quotation mark and space."""
    return " ".join(text.translate(PUNCTUATION).split())


def is_sentence(text: str | None, bounds: tuple[int, int]) -> bool:
    """Whether a text ends as a sentence does, and has as many words as asked for."""
    return text is not None and bounds[0] <= len(text.split()) <= bounds[1] and bool(SENTENCE_END.search(text))


def translation_pairs(folder: Path, language: str) -> list[dict[str, str]]:
    """The texts of all pages, with their translations."""
    foreign, rows = read_pages(folder, language), {}
    for page, root in read_pages(folder, "C").items():
        if page not in foreign:
            continue
        translated = dict(places_of_text(foreign[page]))
        for place, element in places_of_text(root):
            if place not in translated:
                continue
            prompt, completion = text_of(element), text_of(translated[place])
            if not (is_sentence(prompt, PARAGRAPH_WORDS) and is_sentence(completion, PARAGRAPH_WORDS)):
                continue
            copied = (Counter(normalize(prompt)) & Counter(normalize(completion))).total()
            same_numbers = sorted(re.findall(r"\d+", prompt)) == sorted(re.findall(r"\d+", completion))
            if copied <= len(normalize(completion)) / 2 and same_numbers:
                rows.setdefault(prompt, {"prompt": prompt, "completion": completion, "page": page})
    return list(rows.values())


def paragraphs(folder: Path) -> list[dict[str, str]]:
    """The English texts of all pages, each once."""
    texts = [text_of(element) for root in read_pages(folder, "C").values() for _, element in places_of_text(root)]
    return [{"prompt": text} for text in dict.fromkeys(texts) if is_sentence(text, PARAGRAPH_WORDS)]


def summary_pairs(folder: Path) -> list[dict[str, str]]:
    """The prose of each page, from its beginning, with the line that is said of it."""
    rows = []
    for page, root in read_pages(folder, "C").items():
        found = list(places_of_text(root))
        line = next((text_of(element) for _, element in found if element.tag == f"{MALLARD}desc"), None)
        told, length = [], 0
        for _, element in found:
            text = text_of(element)
            if element.tag != f"{MALLARD}p" or text is None or not SENTENCE_END.search(text):
                continue
            if length + len(text.split()) > PAGE_WORDS[1]:
                break
            told.append(text)
            length += len(text.split())
        prompt = " ".join(told)
        if is_sentence(prompt, PAGE_WORDS) and line and LINE_WORDS[0] <= len(line.split()) <= LINE_WORDS[1]:
            rows.append({"prompt": prompt, "completion": line.rstrip("."), "page": page})
    return rows


# --------------------------------------------------------------------------------------------------------------- build
def choose(rows: list[dict[str, str]], number: int) -> list[dict[str, str]]:
    """As many rows as asked for, by the hash of their prompt, in their order."""
    chosen = sorted(range(len(rows)), key=lambda i: prompt_position(rows[i]["prompt"]))[:number]
    return [rows[i] for i in sorted(chosen)]


def build(packages: Path, task: str, language: str | None = None, apart_from: list[Path] | None = None) -> DatasetDict:
    """
    Builds a test set in memory.

    Args:
        packages (`Path`):
            Folder with the packages that `download` downloads.
        task (`str`):
            `"sentences"`, `"summarize"` or `"translate"`.
        language (`str`, *optional*):
            `"it"` or `"fr"`, for `"translate"`.
        apart_from (`list[Path]`, *optional*):
            Data sets with whose texts no text of the result shares a run of eight words.

    Returns:
        `DatasetDict` with the split `test`, and with `train`, prompts alone, for `"sentences"` and `"translate"`; the
        column `prompt`, and in `test` `completion` and `page` for the other tasks, all strings.
    """
    learned = [text for path in apart_from or [] for text in texts_of(load_from_disk(str(path)).values())]
    names = SENTENCES if task == "sentences" else PAGES
    with tempfile.TemporaryDirectory() as aside:
        sources = unpack(packages, names, Path(aside))
        if task == "sentences":
            found = read_sentences(Path(aside))
        elif task == "summarize":
            found = summary_pairs(Path(aside))
        else:
            found, more = translation_pairs(Path(aside), language), paragraphs(Path(aside))
    rows = drop_sharing(found, learned)
    kept = drop_near_identical(rows)
    print(f"{len(found):,} found, {len(found) - len(rows):,} share {RUN} words in a row with the data sets named")
    print(f"{len(rows) - len(kept):,} are near-identical to one before")
    if task == "sentences":
        data = split_sentences(kept)
    else:
        test = choose(kept, NUM_PAIRS)
        data = DatasetDict({"test": Dataset.from_list(test)})
        if task == "translate":
            more = drop_sharing(more, [*learned, *texts_of([data["test"]])])
            more = drop_near_identical(more, beside=data["test"]["prompt"])
            data["train"] = Dataset.from_list(more)
    for split, dataset in data.items():
        dataset.info.description = f"Made by build_outside.py --task {task} from {', '.join(sources)}"
        print(f"{split}: {len(dataset):,}")
    return data


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Build a test set of other text than the recipes' own.")
    parser.add_argument("--task", choices=("sentences", "summarize", "translate"), required=True, help="which texts")
    parser.add_argument("--language", choices=("it", "fr"), help="what to translate to")
    parser.add_argument(
        "--apart-from",
        type=Path,
        nargs="+",
        required=True,
        metavar="FOLDER",
        help="data sets that are learned from: no text shares eight words in a row with theirs",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where to write the data set")
    parser.add_argument(
        "--packages",
        type=Path,
        metavar="FOLDER",
        help="keep the downloaded packages here, and read those that are here already without a network",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if (arguments.task == "translate") != (arguments.language is not None):
        parser.error("--language is required for --task translate, and for no other task.")
    try:
        with tempfile.TemporaryDirectory() as aside:
            packages = arguments.packages or Path(aside)
            download(packages, SENTENCES if arguments.task == "sentences" else PAGES)
            save(build(packages, arguments.task, arguments.language, arguments.apart_from), arguments.output)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
