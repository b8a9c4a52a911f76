"""The rules of the house: imports point down, there is no circle, and the map of the repository is the repository."""

import ast
import functools
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BOTTOM = {"config", "options", "utils"}


@functools.cache
def tracked():
    """The files of the repository; all files where there is no git."""
    done = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]
    return [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if path.is_file()]


@functools.cache
def modules():
    """name -> path of everything that is imported or run, without tests and benchmarks."""
    python = [Path(name) for name in tracked() if name.endswith(".py")]
    python = [path for path in python if len(path.parts) <= 2 and path.parts[0] not in ("tests", "benchmarks")]
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): ROOT / path for path in python}


@functools.cache
def imports():
    """name -> the modules of the repository that it imports, those for annotations alone included."""
    known = modules()
    graph = {}
    for name, path in known.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= inner & known.keys() or {node.module}
        graph[name] = {target for target in found if target in known and target != name}
    return graph


def is_script(name):
    return "." not in name and 'if __name__ == "__main__":' in modules()[name].read_text()


def test_there_is_no_circle():
    try:
        list(graphlib.TopologicalSorter(imports()).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_imports_point_down():
    scripts = {name for name in modules() if is_script(name)}
    assert {"train", "extract", "lfw_eval", "megaface_eval"} <= scripts
    for name, targets in imports().items():
        assert not targets & scripts, f"{name} imports a script: {targets & scripts}"
        if name in BOTTOM:
            assert targets <= BOTTOM, f"{name} imports {targets - BOTTOM}"
    for name in modules():
        if name.startswith("formats."):
            upper = {target.split(".")[0] for target in imports()[name]} - BOTTOM - {"formats"}
            assert not upper & {"training", "verification", "megaface", "ijb", "embedding", "models"}, (name, upper)


def test_nothing_imports_torchvision_before_it_is_needed():
    """It takes as long as all the rest together, in every process."""
    for name, path in modules().items():
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [word for word in names if word.split(".")[0] == "torchvision"], name


def test_no_module_takes_the_private_names_of_another():
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "") in modules():
                private = [alias.name for alias in node.names if re.match(r"_[a-z]|_[A-Z]", alias.name)]
                assert not private, f"{name} imports {private} of {node.module}"


def test_every_room_says_what_it_is_for():
    rooms = {name.split(".")[0] for name in modules() if "." in name}
    for room in rooms:
        text = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text())) or ""
        assert len(text.splitlines()) >= 3, f"{room}/__init__.py does not say what the room is for"


def test_every_script_opens_with_what_it_does_and_how_to_run_it():
    for name in modules():
        if is_script(name):
            text = ast.get_docstring(ast.parse(modules()[name].read_text())) or ""
            assert f"{name}.py" in text, f"{name}.py: no command in its docstring"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(name for name in modules() if is_script(name)))
def test_help_shows_every_option(name):
    done = subprocess.run([sys.executable, f"{name}.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--config FILE" in done.stdout
    assert "default: " in done.stdout


def test_the_tour_names_what_there_is():
    text = (ROOT / "docs" / "architecture.md").read_text()
    for file, name in re.findall(r"`([\w/]+\.py)`\s`(\w+)`", text):
        assert re.search(rf"^(?:def|class) {name}\b|^{name}\b.*=", (ROOT / file).read_text(), re.MULTILINE), (
            file,
            name,
        )
    for file in re.findall(r"`([\w/]+\.py)`", text):
        assert (ROOT / file).is_file(), file


def test_the_map_of_the_repository_is_the_repository():
    text = (ROOT / "README.md").read_text()
    section = text.split("## A map of the repository")[1].split("## ")[0]
    named = set(re.findall(r"^([\w/., ]+?)  ", section, re.MULTILINE))
    places = {place.strip() for names in named for place in names.split(",")}
    files = {name for name in tracked() if "/" not in name and name.endswith(".py")}
    folders = {name.split("/")[0] + "/" for name in tracked() if "/" in name and not name.startswith(".")}
    assert places == files | folders
    assert len(text.splitlines()) <= 200


def test_every_page_of_the_manual_is_in_its_navigation():
    navigation = set(re.findall(r": ([\w-]+\.md)", (ROOT / "mkdocs.yml").read_text()))
    pages = {name.removeprefix("docs/") for name in tracked() if re.fullmatch(r"docs/[\w-]+\.md", name)}
    assert navigation == pages
