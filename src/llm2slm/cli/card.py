"""A model card of what a training and its evaluation recorded.

```bash
llm2slm card --run runs/simplify --report simplify.json slm-alone.json few-shot.json
llm2slm card --run runs/simplify --report simplify.json --benchmark speed.json --model-id user/simplify
llm2slm card --run runs/local --llm-name HuggingFaceTB/SmolLM2-135M-Instruct
```

It says what the records say and, by `--meant-for`, what text the model is for; nothing else. The card is `README.md`
in the training's folder, where `llm2slm push` takes it from.
"""

from dataclasses import asdict, dataclass

from .options import option


@dataclass
class Options:
    """The options of `llm2slm card`."""

    run: str = option("folder of a training, with its run.json", metavar="FOLDER")
    report: list[str] = option(
        "reports of llm2slm evaluate: of this model, and of others on the same data to stand beside it",
        [],
        metavar="FILE",
    )
    outside: list[str] = option(
        "reports of llm2slm evaluate on other text than it was trained for; the worst response of the first is shown",
        [],
        metavar="FILE",
    )
    benchmark: str | None = option("report of llm2slm benchmark", None, metavar="FILE")
    meant_for: str | None = option('what text it is for, in a line that goes on from "For"', None)
    model_id: str | None = option(
        "name on the Hub, or folder, that the card uses; --run if omitted", None, metavar="NAME"
    )
    llm_name: str | None = option("the LLM's name on the Hub, if the training had it elsewhere", None, metavar="NAME")
    slm_name: str | None = option("likewise that of a pretrained SLM", None, metavar="NAME")
    license: str | None = option(
        "the checkpoint's licence, such as apache-2.0; that of its base models if omitted", None, metavar="ID"
    )
    llm_license: str | None = option("the LLM's licence; as its own card or file says if omitted", None, metavar="ID")
    language: list[str] | None = option("languages of prompts and responses, such as en", None, metavar="CODE")
    output: str | None = option("where to write it; README.md in --run if omitted", None, metavar="FILE")


def run(options: Options) -> None:
    """Writes the card; errors are those of [`~llm2slm.sharing.card.write_card`]."""
    from ..sharing.card import write_card

    print(f"Written: {write_card(**asdict(options))}")
