"""Upload a trained model to the Hub: weights, tokenizer, code, card and pictures, in one commit; and a Space for it.

```bash
llm2slm card --run runs/simplify --report simplify.json --model-id user/simplify
llm2slm push --run runs/simplify --repo-id user/simplify --private
llm2slm push --run runs/local --repo-id user/simplify --llm-name HuggingFaceTB/SmolLM2-135M-Instruct
llm2slm push --repo-id user/simplify --space user/race --adapter user/llm-lora
```

With --space a Space runs `llm2slm race` for the model; without --run it is for one that is on the Hub already.
The token is that of `hf auth login`, or `HF_TOKEN`.
"""

import argparse
from dataclasses import asdict, dataclass
from typing import Any

from .options import add_options, option
from .race import RaceOptions


@dataclass
class Options:
    """The options of `llm2slm push`."""

    repo_id: str = option("where to: user/name; made if it is not there", metavar="NAME")
    run: str | None = option(
        "folder of the model, with its card; with --space it may be left out, if the model is on the Hub",
        None,
        metavar="FOLDER",
    )
    space: str | None = option("push a Space of this name, too, that runs the race of the model", None, metavar="NAME")
    private: bool = option("make what is new private", False)
    revision: str | None = option("branch to commit to; the main one if omitted", None, metavar="BRANCH")
    message: str = option("of the model's commit", "Upload model")
    llm_name: str | None = option(
        "the LLM's name on the Hub, if the model names it by a place on this machine", None, metavar="NAME"
    )
    llm_revision: str | None = option("with --llm-name: the commit of the LLM's repository", None, metavar="COMMIT")


def add_more_options(parser: argparse.ArgumentParser, help_only: bool) -> None:
    """Adds what the race in a Space is."""
    add_options(parser.add_argument_group("with --space, as in `llm2slm race`"), RaceOptions)


def run(options: Options, **race_options: Any) -> None:
    """
    Uploads the model, a Space, or both; errors are those of [`~llm2slm.sharing.upload.push`] and
    [`~llm2slm.sharing.space.push_space`].

    Raises:
        ValueError: if options name nothing to push, or are about a Space that is not asked for.
    """
    race = RaceOptions(**race_options)
    if options.space is None and race != RaceOptions():
        about = "--adapter, --instruction, --dtype, --systems and --max-new-tokens"
        raise ValueError(f"{about} are about --space: add it.")
    if options.space is None and options.run is None:
        raise ValueError("Say what to push: --run for a model, --space for the race of one that is on the Hub.")
    from ..sharing.card import hub_name
    from ..sharing.space import push_space
    from ..sharing.upload import push

    if race.adapter is not None:  # before anything is sent
        hub_name(race.adapter, "--adapter")
    if options.run is not None:
        push(**{name: value for name, value in asdict(options).items() if name != "space"})
    if options.space is not None:
        llm = options.llm_name if options.run is None else None  # else the model itself says so by now
        push_space(
            options.space,
            options.repo_id,
            private=options.private,
            llm=llm,
            adapter=race.adapter,
            revision=options.revision,
            options=words_of(race, llm, options.revision),
        )


def words_of(race: RaceOptions, llm: str | None, revision: str | None) -> list[str]:
    """The words of the command line in a Space, behind the checkpoint."""
    words = ["--systems", *race.systems, "--dtype", race.dtype, "--host", "0.0.0.0", "--port", "7860"]
    more = {"adapter": race.adapter, "instruction": race.instruction, "max-new-tokens": race.max_new_tokens}
    for name, value in (more | {"llm": llm, "revision": revision}).items():
        if value is not None:
            words += [f"--{name}", str(value)]
    return words
