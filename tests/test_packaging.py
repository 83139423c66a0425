"""What pyproject.toml, constraints, the README and the Hub files promise about versions, imports and installing."""

import ast
import re
import subprocess
import sys
import sysconfig
from importlib import metadata
from importlib.resources import files
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from transformers.dynamic_module_utils import get_relative_imports

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
HUB_MODULES = sorted(path.stem for path in (ROOT / "src" / "llm2slm").glob("*_llm2slm.py"))
CONSTRAINTS = {  # and the extras whose packages each pins
    "constraints.txt": ["gguf", "onnx", "peft", "train", "test", "quality", "docs"],
    "constraints-v4.txt": ["gguf", "peft", "train", "test"],
}


def read_requirements(name: str) -> list[Requirement]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def lower_bound(requirement: Requirement) -> str | None:
    return next((spec.version for spec in requirement.specifier if spec.operator == ">="), None)


def test_readme_states_the_version_floors_of_pyproject():
    floors = {r.name: lower_bound(r) for r in map(Requirement, PROJECT["dependencies"])}
    floors["python"] = PROJECT["requires-python"].removeprefix(">=")
    readme = (ROOT / "README.md").read_text(encoding="utf-8").lower()
    for name, version in re.findall(r"\b(" + "|".join(floors) + r")`?\s*(?:>=|≥)\s*(\d+(?:\.\d+)*)", readme):
        assert Version(version) == Version(floors[name]), f"README asks for {name}>={version}"


def test_command_is_installed_and_answers_help():
    scripts = metadata.distribution("llm-to-slm").entry_points.select(group="console_scripts", name="llm2slm")
    assert [script.value for script in scripts] == ["llm2slm_command:main"]
    command = Path(sysconfig.get_path("scripts")) / "llm2slm"
    result = subprocess.run([command, "--help"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "usage: llm2slm" in result.stdout


def test_type_hints_are_shipped():
    assert files("llm2slm").joinpath("py.typed").is_file()


def test_hub_files_are_all_there():
    kinds = ["configuration", "modeling", "pipeline", "tokenization"]
    assert {f"{kind}_llm2slm" for kind in kinds} <= set(HUB_MODULES)


@pytest.mark.parametrize("module", HUB_MODULES)
def test_hub_file_imports_only_what_every_user_has(module):
    path = ROOT / "src" / "llm2slm" / f"{module}.py"
    allowed = {"torch", "transformers", *sys.stdlib_module_names}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            foreign = {alias.name for alias in node.names if alias.name.split(".")[0] not in allowed}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            foreign = {node.module} if node.module.split(".")[0] not in allowed else set()
        elif isinstance(node, ast.ImportFrom):
            foreign = {node.module} if node.level > 1 or node.module not in HUB_MODULES else set()
        else:
            continue
        assert not foreign, f"{path.name}:{node.lineno} imports {foreign}"
    # transformers looks for relative imports by a regular expression, in docstrings too.
    imported = set(get_relative_imports(path))
    assert imported <= set(HUB_MODULES) - {module}
    if module == "modeling_llm2slm":  # Transformers 4 copies what this one imports, and no more
        assert imported == set(HUB_MODULES) - {module}


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_constraints_are_exact_and_name_no_build(name):
    for pin in read_requirements(name) + read_requirements("requirements-real.txt"):
        assert re.fullmatch(r"==[^+*,]+", str(pin.specifier)), f"{pin} is no exact, public version"
        assert pin.url is None and pin.marker in (None, Requirement('x; python_version >= "3.11"').marker), pin


@pytest.mark.parametrize(("name", "extras"), CONSTRAINTS.items())
def test_constraints_pin_all_dependencies_within_their_bounds(name, extras):
    pins = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in read_requirements(name)}
    assert "torch" in pins
    asked = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    for requirement in map(Requirement, asked):
        if requirement.name != PROJECT["name"]:
            pin = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(pin), f"{requirement} against {pin} in {name}"


def test_oldest_supported_transformers_is_the_one_tested():
    pins = {pin.name: pin.specifier for pin in read_requirements("constraints-v4.txt")}
    bounds = {r.name: lower_bound(r) for r in map(Requirement, PROJECT["dependencies"])}
    assert str(pins["transformers"]) == f"=={bounds['transformers']}"


def test_no_tracked_file_names_a_path_of_someones_machine():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    path_of_a_machine = re.compile(rb"(?<![\w.~-])/(?:home|root|Users|work)/\w")
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            found = path_of_a_machine.search((ROOT / name).read_bytes())
            assert not found, f"{name} at byte {found.start()}"
