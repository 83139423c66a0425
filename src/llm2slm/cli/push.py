"""Upload a trained model to the Hub: weights, tokenizer, code, card and pictures, in one commit.

```bash
llm2slm card --run runs/simplify --report simplify.json --model-id user/simplify
llm2slm push --run runs/simplify --repo-id user/simplify --private
llm2slm push --run runs/local --repo-id user/simplify --llm-name HuggingFaceTB/SmolLM2-135M-Instruct
```

The token is that of `hf auth login`, or `HF_TOKEN`.
"""

from dataclasses import asdict, dataclass

from .options import option


@dataclass
class Options:
    """The options of `llm2slm push`."""

    run: str = option("folder of the model, with its card", metavar="FOLDER")
    repo_id: str = option("where to: user/name; made if it is not there", metavar="NAME")
    private: bool = option("make a new repository private", False)
    revision: str | None = option("branch to commit to; the main one if omitted", None, metavar="BRANCH")
    message: str = option("of the commit", "Upload model")
    llm_name: str | None = option(
        "the LLM's name on the Hub, if the model names it by a place on this machine", None, metavar="NAME"
    )
    llm_revision: str | None = option("with --llm-name: the commit of the LLM's repository", None, metavar="COMMIT")


def run(options: Options) -> None:
    """Uploads the model; errors are those of [`~llm2slm.sharing.upload.push`]."""
    from ..sharing.upload import push

    push(**asdict(options))
