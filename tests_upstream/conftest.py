"""Makes the tests of a transformers source distribution importable: it lacks the sub-folders of `tests/`."""

import importlib.util
import sys
import types

# What `tests/test_modeling_common.py` imports from folders that the source distribution leaves out.
LEFT_OUT = {"tests.exporters.test_export": "ExportTesterMixin", "tests.generation.test_utils": "GenerationTesterMixin"}


def stand_in(name, mixin):
    """A module that has `mixin` alone, and no test in it."""
    module = types.ModuleType(name)
    setattr(module, mixin, type(mixin, (), {}))
    package = name.rpartition(".")[0]
    sys.modules.setdefault(package, types.ModuleType(package))
    sys.modules[name] = module


for _name, _mixin in LEFT_OUT.items():
    if importlib.util.find_spec("tests") is None:
        raise ImportError("transformers' own tests are not on the path: run `make test-upstream`.")
    if importlib.util.find_spec(_name.rpartition(".")[0]) is None:
        stand_in(_name, _mixin)
