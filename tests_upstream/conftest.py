"""
Makes the tests of transformers' source distribution importable: of its `tests/` it has the files, but no folder. A
mixin that lies in a folder is empty here, unless UPSTREAM names a checkout of transformers' repository.
"""

import importlib.util
import sys
import types

# What `tests/test_modeling_common.py` imports from folders.
MIXINS_IN_FOLDERS = {
    "tests.exporters.test_export": "ExportTesterMixin",
    "tests.generation.test_utils": "GenerationTesterMixin",
}

if importlib.util.find_spec("tests.test_modeling_common") is None:
    raise ImportError("transformers' own tests are not on the path: run `make test-upstream`.")
for name, mixin in MIXINS_IN_FOLDERS.items():
    package = name.rpartition(".")[0]
    if importlib.util.find_spec(package) is None:
        sys.modules[package] = types.ModuleType(package)
        sys.modules[name] = module = types.ModuleType(name)
        setattr(module, mixin, type(mixin, (), {}))
