"""docs/upstream_tests.md says of each of transformers' tests that is not run as it is, and why."""

import inspect
from pathlib import Path

from . import test_llm2slm
from .test_llm2slm import DecoderOnlySLMTests, LLM2SLMTests

PAGE = Path(__file__).parents[1] / "docs" / "upstream_tests.md"
PAIRS = {LLM2SLMTests.__name__: "all", DecoderOnlySLMTests.__name__: "decoder-only SLM"}


def rows():
    """The page's table, from the test classes: what is not run as it is, for which pairs, and why."""
    for cls in vars(test_llm2slm).values():
        if not inspect.isclass(cls) or not issubclass(cls, LLM2SLMTests):
            continue
        pairs = PAIRS.get(cls.__name__) or " → ".join(cls.pair)
        for name, function in inspect.getmembers(cls, inspect.isfunction):
            # Upstream wraps what a class inherits, and so makes it the class's own.
            own = (function.__module__, function.__qualname__) == (cls.__module__, f"{cls.__name__}.{name}")
            if own and name != "setUp":
                skipped = getattr(function, "__unittest_skip_why__", None)
                how, reason = ("skipped", skipped) if skipped else ("replaced", function.__doc__)
                yield f"| `{name}` | {pairs} | {how} | {reason} |"
        for name in vars(cls).get("switched_off", {}):
            assert getattr(cls, name) is False
            yield f"| `{name}` | {pairs} | switched off | {cls.switched_off[name]} |"


def test_page_lists_each_override_and_skip_with_its_reason():
    written = {line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")}
    assert written == set(rows())


def test_each_flag_that_is_switched_off_has_a_reason():
    for cls in LLM2SLMTests.__mro__:
        if cls.__module__ == LLM2SLMTests.__module__:
            flags = {name for name, value in vars(cls).items() if name.startswith("test_") and value is False}
            assert flags == set(vars(cls).get("switched_off", {}))
