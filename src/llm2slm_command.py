"""The way into the command `llm2slm`.

It stands outside the package because `import llm2slm` registers the model with Transformers' Auto classes, which takes
seconds, and `llm2slm --help` should not: the package sees that this module is loaded, and leaves it to the functions
that load models.
"""


def main() -> int | None:
    """Runs the command line, [`llm2slm.cli.main.main`]."""
    from llm2slm.cli.main import main as run

    return run()
