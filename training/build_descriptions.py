"""
Builds data sets from Debian's package descriptions: long description to synopsis, or English paragraph to Italian,
French or German.

    pip install '.[train]'
    python training/build_descriptions.py --task summarize --output data/summarize
    python training/build_descriptions.py --task translate --language it --output data/translate-en-it

    >>> from datasets import load_from_disk
    >>> load_from_disk("data/summarize")["train"][0]

The descriptions are what `apt-get update` downloads from the sources this machine is configured for (Debian, or a
system made from it), here into a folder of their own: no root rights needed, and nothing of the system is changed.
`--lists` keeps that folder, and reads it again without a network. Only the main section of a release is read, not its
updates, so a stable release's descriptions change with its point releases alone; which one it was, and the SHA-256 of
the files, is kept in each split's `info.description`.

With `--more-prompts FOLDER` it writes prompts that have no right response there too, for `llm2slm label`.

Choices made here:

- *Prose.* A paragraph counts if it has no list, no indented line and no address, and ends as a sentence does.
- *Summaries.* One source makes many packages (library, headers, documentation, bindings), whose descriptions differ in
  one paragraph and whose synopses in their last words. That paragraph and those words are dropped, and so are
  paragraphs that many packages share; of what is then near-identical, one pair is kept. A pair that still speaks of
  such a part, or whose description says too little of what the synopsis says, is dropped.
- *Translations.* Translators keep paragraphs, so paragraphs are aligned by their place, if their number is the same.
  Numbers must agree, and texts that were copied rather than translated are dropped.
- *Splits.* Made by `splits.py`, by text: no run of eight words in two splits.
- *More prompts.* To be translated, paragraphs that nobody has; to be summarized, descriptions whose synopsis was no
  good. None is near-identical to a prompt of the pairs, and none shares eight words in a row with a prompt or a
  completion that is validated or tested on.
"""

import argparse
import hashlib
import re
import shutil
import subprocess
import tempfile
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

from datasets import Dataset, DatasetDict, DatasetInfo
from splits import drop_near_identical, drop_sharing, normalize, print_counts, save, split_rows, texts_of

TEST_SHARE = {"summarize": 0.055, "it": 0.035, "fr": 0.07, "de": 0.095}  # for 1,000 to 1,500 pairs
VALIDATION_SHARE = {"summarize": 0.045, "it": 0.025, "fr": 0.055, "de": 0.08}  # for about 1,000 pairs

PROMPT_WORDS = {"summarize": (12, 160), "translate": (6, 80)}  # a small model reads 160 words as about 230 tokens
MIN_SYNOPSIS_WORDS = 3
COMMON = 10  # packages. A paragraph of so many descriptions tells of a project or of packaging, not of the package.
MIN_SUPPORT = 0.4  # share of the synopsis's words, by their first five letters, that the description has
MIN_RATIO, MAX_RATIO = 0.6, 2.0  # characters of the translation per character of the English
MAX_COPIED = 0.5  # share of the translation's words that the English has too

LISTS = re.compile(r"(?P<release>.+_dists_(?P<suite>[a-z]+))_main_i18n_Translation-(?P<language>\w+)")
LIST_ITEM = re.compile(r"\s|[-*+•·–—]|o |\d+[.)]\s|\(\w\)")  # at the beginning of a line
ADDRESS = re.compile(r"://|\bwww\.|\w@\w+\.|<\w+:")
SENTENCE_END = re.compile(r"[.!?][\"'»“”)\]]*$")
# A word broken at its hyphen. "Pre- and post-", "Vor- und Nach-" are two.
BROKEN_WORD = re.compile(r"(?<=\w)-\n(?!(?:and|or|to|und|oder|bzw|e|o|et|ou)\b)")
PUNCTUATION = str.maketrans({"’": "'", "‘": "'", "⋅": " "})

ABOUT_PACKAGE = re.compile(
    r"(?i)(?:additionally, |in addition, |(?:please )?note that )?(?:this|the|these|it)\b[^.]{0,40}\b\w*packages?\b"
    r"|(?:contains|provides|includes|installs)\b"
)
PART_WORDS = frozenset(
    "3 3.x 32 32-bit 32bit 64 64-bit 64bit and api base binaries binary bindings bit c c++ cli client command "
    "command-line common core daemon data debug debugging default demos dev devel developer developers development "
    "doc docs documentation dummy example examples executable executables file files for go gui header headers html "
    "interface java javadoc javascript js lib libraries library libs line main manual metapackage module modules n32 "
    "node node.js package perl plugin plugins program programs python python3 qt qt5 ruby run-time runtime server "
    "shared source static symbols test tests the tool tools transitional utilities utility utils version x32".split()
)
SEPARATOR = re.compile(r"\s+[-–—]+\s+|[,;:]\s+|\s*\(")
ABOUT_PART = re.compile(
    r"(?i)\b(?:32-?bit|64-?bit|build|common files|cross compiler|data files|debug|debugging|default|dependency"
    r"|devel|developers?|development|docs?|documentation|dummy|empty|examples?|feature|for cli|headers?"
    r"|language packs?|locali[sz]ation|meta-?package|multilib|part of|profiling|python ?[23](?:\.\w+)?|runtime"
    r"|shared librar(?:y|ies)|source code|symbols|test ?suite|transitional|translations?|virtual)\b"
)
LINKING_WORDS = frozenset("a an and as at by for from in into is of on or that the to use using with your".split())


def download_lists(folder: Path, languages: list[str]) -> None:
    """
    Downloads the descriptions in some languages by `apt-get update`, into a folder of their own.

    Args:
        folder (`Path`): where the files go. apt's own state and cache are not touched.
        languages (`list[str]`): codes such as `"en"`.

    Raises:
        OSError: if there is no apt-get, or it brings no descriptions in one of the languages, as without a network.
    """
    apt_get = shutil.which("apt-get")
    if apt_get is None:
        raise OSError(
            "apt-get, which downloads the descriptions, was not found: it is part of Debian and of systems made from "
            "it. Run this there or in a container (image `debian`), or copy the folder that --lists kept there."
        )
    folder = folder.resolve()
    (folder / "partial").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as aside:
        config = Path(aside) / "apt.conf"
        config.write_text(
            "#clear APT::Update::Post-Invoke;\n#clear APT::Update::Post-Invoke-Success;\n#clear Acquire::Languages;\n"
            f'Dir::State::Lists "{folder}";\nDir::Cache "{aside}";\n'
            f'Acquire::Languages "{",".join(languages)}";\nAcquire::GzipIndexes "false";\n'
            'Acquire::IndexTargets::deb::Packages::DefaultEnabled "false";\n'
            'APT::Sandbox::User "root";\n'  # else, run as root, it could not enter a folder of the caller's own
        )
        run = subprocess.run([apt_get, "-q", "-c", str(config), "update"], capture_output=True, text=True)
    if missing := [language for language in languages if not find_lists(folder, language)]:
        raise OSError(
            f"`apt-get update` brought no package descriptions in {', '.join(missing)}: needed is a network, and a "
            f"Debian release among this machine's sources. It said:\n{(run.stderr or run.stdout).strip()}"
        )


def find_lists(folder: Path, language: str) -> list[Path]:
    """Returns the files that hold the main section's descriptions in a language, by name."""
    return sorted(
        path for path in folder.glob("*") if (name := LISTS.fullmatch(path.name)) and name["language"] == language
    )


def describe_sources(paths: list[Path]) -> str:
    """Names the releases that the files belong to, with their dates, and each file's SHA-256."""
    lines = []
    for path in paths:
        release = path.with_name(LISTS.fullmatch(path.name)["release"])
        header = ""
        for suffix in ("_InRelease", "_Release"):
            if (file := Path(f"{release}{suffix}")).exists():
                header = file.read_text(encoding="utf-8")
                break
        fields = dict(re.findall(r"^(Origin|Codename|Version|Date): (.*)$", header, flags=re.MULTILINE))
        named = " ".join(fields.get(key, "") for key in ("Origin", "Version")).strip()
        lines.append(
            f"{path.name}: {named or 'unknown release'} ({fields.get('Codename', '?')}), release file of "
            f"{fields.get('Date', 'unknown date')}, SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}"
        )
    return "\n".join(lines)


def read_descriptions(paths: list[Path], language: str) -> dict[tuple[str, str], tuple[str, list[list[str]]]]:
    """
    Reads descriptions as apt keeps them.

    Returns:
        The synopsis, and the long description as paragraphs of lines, by the package's name and the MD5 of its English
        description, which its translations carry too. In the order of those keys.
    """
    descriptions = {}
    for path in paths:
        for stanza in path.read_text(encoding="utf-8").split("\n\n"):
            fields = re.findall(r"^([\w-]+): ?(.*(?:\n .*)*)", stanza, flags=re.MULTILINE)
            values = dict(fields)
            synopsis, *lines = values.get(f"Description-{language}", "").split("\n")
            paragraphs = [[]]
            for line in lines:  # " text", or " ." between paragraphs
                if line.strip() in ("", "."):
                    paragraphs.append([])
                else:
                    paragraphs[-1].append(line[1:])
            if synopsis:
                key = values["Package"], values["Description-md5"]
                descriptions[key] = clean(synopsis), [paragraph for paragraph in paragraphs if paragraph]
    return dict(sorted(descriptions.items()))


def clean(text: str) -> str:
    """Joins lines and words broken at their end, and sets one kind of apostrophe, quotation mark and space."""
    text = unicodedata.normalize("NFC", BROKEN_WORD.sub("-", text)).translate(PUNCTUATION)
    return " ".join(text.replace("``", '"').replace("''", '"').split())


def is_prose(paragraph: list[str]) -> bool:
    """Tells whether a paragraph is sentences: no list, no indented line, and an end as a sentence has it."""
    return (
        not any(LIST_ITEM.match(line) for line in paragraph)
        and not re.search(r" [*•] ", " ".join(paragraph))
        and bool(SENTENCE_END.search(paragraph[-1].rstrip()))
    )


def strip_part(synopsis: str) -> str:
    """Drops what names the part of a package family at the end, as in "library for X (development files)"."""
    while separators := list(SEPARATOR.finditer(synopsis)):
        words = re.findall(r"[\w.+-]+", synopsis[separators[-1].end() :].lower())
        if not PART_WORDS.issuperset(words):
            break
        synopsis = synopsis[: separators[-1].start()]
    return synopsis


def support(prompt: str, completion: str) -> float:
    """Returns the share of the completion's words, but for linking words, that the prompt has by their beginning."""
    known = {word[:5] for word in normalize(prompt)}
    words = {word[:5] for word in normalize(completion) if word not in LINKING_WORDS}
    return len(words & known) / max(1, len(words))


def summary_prompts(english: dict) -> tuple[dict[tuple[str, str], str], Counter]:
    """
    Makes the prompts that are to be summarized.

    Returns:
        Those that are prose of the right length, by the description's key, and how many descriptions were dropped for
        each reason.
    """
    # A description's paragraphs in order, `None` for one that is not prose.
    texts = {
        key: [clean("\n".join(p)) if is_prose(p) else None for p in paragraphs]
        for key, (_, paragraphs) in english.items()
    }
    packages_with = Counter(text for paragraphs in texts.values() for text in set(paragraphs) if text)
    least, most = PROMPT_WORDS["summarize"]
    prompts, dropped = {}, Counter()
    for key, paragraphs in texts.items():
        own = [text for text in paragraphs if packages_with[text] < COMMON]
        told = own[:1] + [
            text for text in own[1:] if text and not ABOUT_PACKAGE.match(text) and not ADDRESS.search(text)
        ]
        while len(told) > 1 and sum(len((text or "").split()) for text in told) > most:
            told.pop()
        prompt = " ".join(filter(None, told))
        if not own:
            dropped[f"{COMMON} packages or more share all its paragraphs"] += 1
        elif not told[0] or ADDRESS.search(told[0]):
            dropped["the first paragraph of its own is a list, no sentence, or has an address"] += 1
        elif not least <= len(prompt.split()) <= most:
            dropped[f"fewer than {least} or more than {most} words of prose"] += 1
        else:
            prompts[key] = prompt
    return prompts, dropped


def speaks_of_part(prompt: str) -> bool:
    """Whether a description speaks first of a part of what its source makes."""
    return bool(ABOUT_PACKAGE.match(prompt) and ABOUT_PART.search(re.split(r"(?<=\w\w[.!?]) ", prompt)[0]))


def summary_pairs(english: dict) -> tuple[list[dict[str, str]], Counter]:
    """
    Makes the pairs of long description and synopsis.

    Returns:
        The rows, by package, and how many descriptions were dropped for each reason.
    """
    prompts, dropped = summary_prompts(english)
    rows = []
    for key, prompt in prompts.items():
        completion = strip_part(english[key][0])
        if ABOUT_PART.search(completion) or len(completion.split()) < MIN_SYNOPSIS_WORDS:
            dropped["the synopsis names a part (development files, ...) or is a name alone"] += 1
        elif speaks_of_part(prompt):
            dropped["the description speaks first of a part"] += 1
        elif support(prompt, completion) < MIN_SUPPORT:
            dropped["the description has too few of the synopsis's words"] += 1
        else:
            rows.append({"prompt": prompt, "completion": completion, "package": key[0]})
    return rows, dropped


def translation_pairs(english: dict, foreign: dict) -> tuple[list[dict[str, str]], Counter]:
    """
    Aligns the paragraphs of descriptions with those of their translations.

    Returns:
        The rows, by package and paragraph, each English paragraph once with its most frequent translation, and how
        many paragraphs were dropped for each reason.
    """
    least, most = PROMPT_WORDS["translate"]
    translations, first_package, dropped = defaultdict(Counter), {}, Counter()
    for key, (_, foreign_paragraphs) in foreign.items():
        _, english_paragraphs = english.get(key, (None, []))
        if len(english_paragraphs) != len(foreign_paragraphs):
            dropped["the description has another number of paragraphs"] += len(foreign_paragraphs)
            continue
        for pair in zip(english_paragraphs, foreign_paragraphs, strict=True):
            prompt, completion = (clean("\n".join(paragraph)) for paragraph in pair)
            english_words, foreign_words = Counter(normalize(prompt)), Counter(normalize(completion))
            if not all(map(is_prose, pair)) or ADDRESS.search(f"{prompt} {completion}"):
                dropped["one side is a list, no sentence, or has an address"] += 1
            elif not least <= len(prompt.split()) <= most:
                dropped[f"fewer than {least} or more than {most} English words"] += 1
            elif not MIN_RATIO <= len(completion) / len(prompt) <= MAX_RATIO:
                dropped["one side is much longer"] += 1
            elif (english_words & foreign_words).total() > MAX_COPIED * foreign_words.total():
                dropped["more than half of it is copied"] += 1
            elif sorted(re.findall(r"\d+", prompt)) != sorted(re.findall(r"\d+", completion)):
                dropped["the numbers differ"] += 1
            else:
                translations[prompt][completion] += 1
                first_package.setdefault(prompt, key[0])
    rows = [
        {"prompt": prompt, "completion": found.most_common(1)[0][0], "package": first_package[prompt]}
        for prompt, found in translations.items()
    ]
    dropped["the same English came before"] = sum(found.total() for found in translations.values()) - len(rows)
    return rows, dropped


def paragraphs_to_translate(english: dict) -> list[dict[str, str]]:
    """The English paragraphs that could be translated, each once, by package."""
    least, most = PROMPT_WORDS["translate"]
    first_package = {}
    for key, (_, paragraphs) in english.items():
        for paragraph in paragraphs:
            text = clean("\n".join(paragraph))
            if is_prose(paragraph) and not ADDRESS.search(text) and least <= len(text.split()) <= most:
                first_package.setdefault(text, key[0])
    return [{"prompt": text, "package": package} for text, package in first_package.items()]


def build_more_prompts(lists: Path, task: str, data: DatasetDict) -> DatasetDict:
    """
    The prompts without a right response that can be learned from beside a data set.

    Args:
        lists (`Path`), task (`str`):
            As for [`build`].
        data (`DatasetDict`):
            What it gives.

    Returns:
        `DatasetDict` with the split `train` and the columns `prompt` and `package`, by package.
    """
    paths = find_lists(lists, "en")
    english = read_descriptions(paths, "en")
    if task == "summarize":
        prompts, _ = summary_prompts(english)
        found = [{"prompt": text, "package": key[0]} for key, text in prompts.items() if not speaks_of_part(text)]
    else:
        found = paragraphs_to_translate(english)
    found = drop_sharing(found, texts_of([data["validation"], data["test"]]))
    rows = drop_near_identical(found, beside=[prompt for split in data.values() for prompt in split["prompt"]])
    info = DatasetInfo(description=f"Made by build_descriptions.py --more-prompts from\n{describe_sources(paths)}")
    return DatasetDict({"train": Dataset.from_list(rows, info=info)})


def build(lists: Path, task: str, language: str | None = None, verbose: bool = False) -> DatasetDict:
    """
    Builds a data set in memory, in about half a minute.

    Args:
        lists (`Path`):
            Folder with the files that `download_lists` downloads.
        task (`str`):
            `"summarize"` or `"translate"`.
        language (`str`, *optional*):
            `"it"`, `"fr"` or `"de"`, for `"translate"`.
        verbose (`bool`, *optional*, defaults to `False`):
            Whether to print what was dropped and kept, as a Markdown table.

    Returns:
        `DatasetDict` with the splits `train`, `validation` and `test`, and the columns `prompt`, `completion` and
        `package`, all strings. Each split is in the order of the packages' names.

    Raises:
        ValueError: if fewer pairs are found than fill all three splits.
    """
    paths = find_lists(lists, "en")
    english = read_descriptions(paths, "en")
    if task == "summarize":
        pairs, dropped = summary_pairs(english)
    else:
        foreign_paths = find_lists(lists, language)
        pairs, dropped = translation_pairs(english, read_descriptions(foreign_paths, language))
        paths += foreign_paths
    rows = drop_near_identical(pairs)
    dropped["the English is near-identical to one that came before"] = len(pairs) - len(rows)
    sources = describe_sources(paths)
    info = DatasetInfo(
        description=f"Made by build_descriptions.py --task {task}{f' --language {language}' if language else ''} "
        f"from\n{sources}",
        homepage="https://www.debian.org/distrib/packages",
        license="That of the package each description belongs to: all are free software by Debian's guidelines.",
    )
    share = language or task
    data, groups = split_rows(rows, TEST_SHARE[share], VALIDATION_SHARE[share], info)
    if empty := [split for split, dataset in data.items() if not len(dataset)]:
        raise ValueError(f"{len(rows)} pairs found in {lists}, too few: no pair falls to {', '.join(empty)}.")
    if verbose:
        print(f"{sources}\n")
        unit = "descriptions" if task == "summarize" else "translated paragraphs"
        print_counts(unit, "in all", rows, dropped, groups, data)
    return data


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Build a data set from Debian's package descriptions.")
    parser.add_argument("--task", choices=("summarize", "translate"), required=True, help="which pairs to make")
    parser.add_argument("--language", choices=("it", "fr", "de"), help="what to translate to")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where to write the data set")
    parser.add_argument(
        "--more-prompts",
        type=Path,
        metavar="FOLDER",
        help="where to write prompts that have no right response, for llm2slm label",
    )
    parser.add_argument(
        "--lists",
        type=Path,
        metavar="FOLDER",
        help="keep the downloaded descriptions here, and read those that are here already without a network",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if (arguments.task == "translate") != (arguments.language is not None):
        parser.error("--language is required for --task translate, and for no other task.")
    languages = ["en"] if arguments.language is None else ["en", arguments.language]
    try:
        with tempfile.TemporaryDirectory() as aside:
            lists = arguments.lists or Path(aside)
            if not all(find_lists(lists, language) for language in languages):
                download_lists(lists, languages)
            data = build(lists, arguments.task, arguments.language, verbose=True)
            save(data, arguments.output)
            if arguments.more_prompts:
                more = build_more_prompts(lists, arguments.task, data)
                print(f"Prompts without a right response: {len(more['train']):,}")
                save(more, arguments.more_prompts)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
