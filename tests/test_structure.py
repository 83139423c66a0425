"""Which part of the library may import which: arrows run down only, and there is no circle."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "llm2slm"
HUB = "the Hub files"
# From the top down: each part may import the parts named behind it. CONTRIBUTING.md says what each part is for.
MAY_IMPORT = {
    "cli": {"training", "evaluation", "benchmark", "sharing", "serving", "data", "language_models", "utils"},
    "serving": {"language_models", "utils", HUB},
    "sharing": {"training", "evaluation", "benchmark", "data", "language_models", "utils", HUB},
    "evaluation": {"benchmark", "training", "data", "language_models", "utils"},
    "benchmark": {"language_models", "utils", HUB},
    "training": {"building", "data", "language_models", "utils", HUB},
    "language_models": {"auto", "utils", HUB},
    "auto": {"data", HUB},
    "building": {HUB},
    "data": {"utils", HUB},
    "utils": set(),
    HUB: set(),
}


def part_of(module: str) -> str:
    first = module.split(".")[0]
    return HUB if first.endswith("_llm2slm") else first


def modules() -> dict[str, Path]:
    """Each module of the package but its `__init__`, by its name in the package."""
    paths = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in paths.items() if name != "__init__"}


def imports_of(name: str, path: Path) -> set[str]:
    """The modules of the package that a module imports, inside of functions too."""
    known, found = modules(), set()
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            absolute = [alias.name for alias in node.names if alias.name.split(".")[0] == "llm2slm"]
            assert not absolute, f"{name} imports {absolute}: say it with dots, so that it is seen here"
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}" if base else alias.name
                found.add(inner if inner in known else base)
    return found


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_part_imports_only_the_parts_below_it(part):
    for name, path in modules().items():
        if part_of(name) == part:
            imported = {part_of(other) for other in imports_of(name, path)} - {part}
            assert imported <= MAY_IMPORT[part], f"{name} imports {sorted(imported - MAY_IMPORT[part])}"


def test_each_module_belongs_to_a_part_and_the_parts_have_an_order():
    assert {part_of(name) for name in modules()} == set(MAY_IMPORT)
    above: set[str] = set()
    for part, below in MAY_IMPORT.items():
        above.add(part)
        assert not below & above, f"{part} would import {sorted(below & above)}, which stands above it"


def test_no_modules_import_each_other_in_a_circle():
    arrows = {name: imports_of(name, path) & set(modules()) - {name} for name, path in modules().items()}
    while free := {name for name, targets in arrows.items() if not targets & set(arrows)}:
        arrows = {name: targets for name, targets in arrows.items() if name not in free}
    assert not arrows, f"in or above a circle: {sorted(arrows)}"


def test_only_the_command_line_parses_options_or_imports_by_name():
    for name, path in modules().items():
        if part_of(name) != "cli":
            text = path.read_text(encoding="utf-8")
            assert "argparse" not in text and "import_module" not in text, name
