"""Serve an LLM-to-SLM checkpoint on this machine, as OpenAI's API does.

```bash
llm2slm serve user/checkpoint
llm2slm serve ./checkpoint --llm ./llm --port 9000 --max-batch-size 32
curl localhost:8000/v1/completions -H "Content-Type: application/json" -d '{"prompt": "Let there be light."}'
```

docs/serving.md says what it answers, and what it refuses.
"""

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from ..utils import check_installed
from .options import DEVICE_HELP, DTYPES, option

KEY_VARIABLE = "LLM2SLM_API_KEY"


@dataclass
class Options:
    """The options of `llm2slm serve`."""

    llm: str | None = option("where the frozen LLM is, if not where the checkpoint says", None, metavar="NAME")
    revision: str | None = option("branch, tag or commit of the checkpoint's repository on the Hub", None)
    dtype: DTYPES = option("number format of the weights; auto: as they are stored", "auto")
    device: str | None = option(DEVICE_HELP, None, metavar="NAME")

    host: str = option("address to listen at; 0.0.0.0 for all, which others can reach", "127.0.0.1", metavar="ADDRESS")
    port: int = option("0 for any that is free", 8000, at_least=0, at_most=65535)
    name: str | None = option("what clients call the model; the checkpoint's name if omitted", None)
    api_key: str | None = option(
        f"what clients must send as their API key; {KEY_VARIABLE} of the environment if omitted", None, metavar="KEY"
    )
    origins: list[str] = option("sites whose pages may use it in a browser, * for all", [], metavar="URL")

    fast: bool = option("compile the SLM's step for few responses at a time, in the background", True)
    max_batch_size: int = option("responses that are written at a time", 16, at_least=1)
    max_queue: int = option("responses that may wait; more requests get status 429", 256, at_least=1)
    max_prompt_tokens: int = option("tokens of a prompt at most", 2048, at_least=1)
    max_tokens: int = option("tokens of a response at most", 1024, at_least=1)
    max_body_bytes: int = option("size of a request at most", 2**20, at_least=1)
    max_seconds: int = option("for an answer at most, waiting included", 300, at_least=1)


def add_more_options(parser: argparse.ArgumentParser, help_only: bool) -> None:
    """Adds the checkpoint, which is no option."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="LLM-to-SLM checkpoint: folder, or name on the Hub")


def run(options: Options, checkpoint: str) -> None:
    """
    Loads the checkpoint, and serves it until SIGTERM or Ctrl-C.

    Raises:
        ImportError: if what it takes to serve is not installed.
        OSError: if there is no such checkpoint, or it cannot listen there.
        ValueError: if it is another kind of model, its generation config is not served, or the API key is empty.
    """
    needed = ("prometheus_client", "pydantic", "starlette", "uvicorn")
    check_installed("`llm2slm serve`", *needed, install="pip install 'llm-to-slm[serve]'")
    from ..language_models import load_checkpoint
    from ..serving.server import Server, listen, own_names, run
    from ..serving.service import Limits, Service

    api_key = os.environ.get(KEY_VARIABLE) if options.api_key is None else options.api_key
    if api_key == "":
        raise ValueError(f"The API key is empty: say one, or leave out --api-key and {KEY_VARIABLE}.")
    listening = listen(options.host, options.port)  # before the model is loaded, which takes longer
    model, tokenizer = load_checkpoint(checkpoint, options.revision, options.llm, options.dtype, options.device)
    if (beams := model.generation_config.num_beams) not in (None, 1):
        print(f"Responses are written greedily; the {beams} beams of this checkpoint are not served.", file=sys.stderr)
    limits = Limits(
        batch_size=options.max_batch_size,
        queue=options.max_queue,
        prompt_tokens=options.max_prompt_tokens,
        tokens=options.max_tokens,
        body_bytes=options.max_body_bytes,
        seconds=options.max_seconds,
    )
    name = options.name or (Path(checkpoint).resolve().name if Path(checkpoint).is_dir() else checkpoint)
    hosts = [] if api_key else own_names(listening, options.host)  # pages of other sites do not know the key
    service, code = Service(model, tokenizer, limits, options.fast), 0
    try:
        run(Server(service, name, api_key, options.origins, hosts), listening)
    except KeyboardInterrupt:
        if not service.batcher.compiling:
            raise
        code = 130
    if service.batcher.compiling:  # all is answered; torch would abort what ends in the midst of it
        sys.stderr.flush()
        os._exit(code)
