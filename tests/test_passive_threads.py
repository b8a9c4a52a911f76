"""Every program that loads torch first says how its threads are to wait."""

import ast
import os
import subprocess
import sys

import pytest
from test_architecture import ROOT, imports, is_script, modules


def loads(name, what, seen=None):
    """Whether a module imports a package at its top, itself or by a module of the repository that it imports."""
    seen = set() if seen is None else seen
    if name in seen:
        return False
    seen.add(name)
    for node in ast.parse(modules()[name].read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if any(found.split(".")[0] == what for found in names):
            return True
    return any(loads(other, what, seen) for other in imports()[name])


SCRIPTS = sorted(name for name in modules() if is_script(name) and loads(name, "torch"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_is_the_first_thing_that_a_program_imports(name):
    body = ast.parse(modules()[name].read_text()).body
    first = next(node for node in body if isinstance(node, ast.Import | ast.ImportFrom))
    assert isinstance(first, ast.Import) and first.names[0].name == "passive_threads", name


def test_most_programs_are_meant():
    assert {"train", "lfw_eval", "megaface_eval", "pre_process", "doctor", "export"} <= set(SCRIPTS)


@pytest.mark.parametrize(("before", "after"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_whoever_sets_it_is_left_alone(before, after):
    code = "import sys, os, passive_threads; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": before} if before else {}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [after, "False"]
