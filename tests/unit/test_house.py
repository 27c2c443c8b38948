"""The house rules that the import linter cannot see (ARCHITECTURE.md names them)."""

import ast
import re
import subprocess

from conftest import ROOT

ROOMS = ("core", "networks", "plugins", "runtime", "export", "engines", "tools")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
# Parts of layer names, which only `networks/` writes down.
LAYERS = re.compile(r"\b(conv_in|conv_out|conv_shortcut|conv1|conv2|to_out|to_qkv)\b")
LONGEST = 400


def trees():
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in FILES}


def documentation(tree):
    """The docstrings of a module, as nodes."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, kinds) and node.body]
    return {id(body[0].value) for body in bodies if isinstance(body[0], ast.Expr)}


def test_denoisers_are_made_in_the_registry_alone():
    made = [
        f"{name}:{node.lineno}"
        for name, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("Denoiser")
    ]
    assert made
    assert [place for place in made if not place.startswith("runtime/backends/registry/")] == []


def test_layers_are_named_in_networks_alone():
    named = []
    for name, tree in trees().items():
        documented = documentation(tree)
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if LAYERS.search(text) and id(node) not in documented:
                named.append(f"{name}:{node.lineno}")
    assert any(place.startswith("networks/") for place in named)
    assert [place for place in named if not place.startswith("networks/")] == []


def test_no_module_has_state_that_others_write():
    """`global` and `nonlocal` state of a module, and settings of torch that last beyond a call."""
    for name, tree in trees().items():
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.Global)], name


def test_files_have_one_subject():
    assert [str(path) for path in FILES if len(path.read_text().splitlines()) >= LONGEST] == []


def test_what_is_kept_in_the_repository_names_no_folder_of_a_machine():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    for name in tracked:
        if name.endswith((".py", ".md", ".toml", ".yml", "Makefile")) and name != "tests/unit/test_house.py":
            text = (ROOT / name).read_text()
            assert "/root/" not in text and "/home/" not in text, name
