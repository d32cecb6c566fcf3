"""The rules of the house that no linter knows."""

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from collections import Counter, defaultdict
from functools import cache
from importlib import import_module, metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import vllm_kvmarket
from vllm_kvmarket.cli import commands
from vllm_kvmarket.core.config import describe

ROOT = Path(__file__).parents[2]
FOLDERS = ("vllm_kvmarket", "tests", "benchmarks", "examples", "tools")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 70
# Values that every room uses; they may import these only.
VALUES = (
    "core/errors",
    "core/config",
    "core/model_identity",
    "core/pricing",
    "auth/operator_tokens",
)
SMALL_LIBRARIES = {"blake3", "msgspec", "numpy", "xxhash", "vllm_kvmarket"}
# Modules that may have one name in several rooms, and what it means in each of them.
SAME_MEANING = {
    "__init__": "the room's public names",
    "errors": "what can go wrong: core has the exceptions, api what HTTP answers to each",
    "integrity": "a room's check of its own invariants",
    "sqlite": "SQLite: core opens its files, ledger keeps its tables there",
}
INTERFACES = ("api/", "cli/")
USERS_EXTRAS = ("cpu", "gpu", "api", "postgres")
BROUGHT_BY_VLLM = {"torch", "transformers", "huggingface_hub"}
# Escaped, neither pattern matches its own source. A host belongs into the user's pip settings.
REGISTRY_HOST = re.compile(
    r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|registry\.npmjs\.org|deb\.debian\.org"
)
MACHINE_PATH = re.compile(r"(?<![\w.}>])/(?:work|root|opt|home/\w+)/")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def functions(path):
    return [node for node in ast.walk(parse(path)) if isinstance(node, Function)]


def name(path):
    return str(path.relative_to(ROOT))


def tracked_texts():
    """Every text file that git knows or would add, with its content."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for entry in filter(None, listed.split("\0")):
        path = ROOT / entry
        if path.is_file():
            content = path.read_bytes()
            if b"\0" not in content:
                yield entry, content.decode("utf-8")


def imported_packages(path):
    """The top-level packages that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_the_sources_are_found():
    """The folders exist and hold code, so that the tests below look at something."""
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(FOLDERS)


def test_no_file_is_long():
    """A file of more than 600 lines holds more than one idea."""
    lengths = {name(path): len(path.read_text("utf-8").splitlines()) for path in SOURCES}
    assert {file: lines for file, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


def test_no_function_is_long():
    """A function of more than 70 lines, docstring included, is two functions."""
    long = [
        f"{name(path)}:{node.lineno} {node.name}"
        for path in SOURCES
        for node in functions(path)
        if node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert long == []


def test_no_inheritance_splits_a_class():
    """A class with one subclass, which nothing else names, is a part of that subclass."""
    package = [path for path in SOURCES if path.is_relative_to(ROOT / "vllm_kvmarket")]
    nodes = [node for path in package for node in ast.walk(parse(path))]
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    subclasses = defaultdict(list)
    for node in classes.values():
        for base in node.bases:
            subclasses[name_of(base)].append(node.name)
    # As a value, a type or a base; an import does not count.
    named = Counter(name_of(node) for node in nodes if not isinstance(node, ast.Subscript))
    only_base = [
        f"{base} is only the base of {children[0]}"
        for base, children in sorted(subclasses.items())
        if base in classes and len(children) == 1 and named[base] == 1
    ]
    assert only_base == []


def name_of(node):
    """The last name of `a.b.C[int]`; for what is no name, None."""
    if isinstance(node, ast.Subscript):
        node = node.value
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)


def test_no_two_modules_share_a_name():
    """A module's name means one thing, so that a search finds one module."""
    modules = defaultdict(list)
    for path in sorted((ROOT / "vllm_kvmarket").rglob("*.py")):
        modules[path.stem].append(path.relative_to(ROOT / "vllm_kvmarket").as_posix())
    twice = {stem: paths for stem, paths in modules.items() if len(paths) > 1}
    # The interfaces name a module after what it is about: api/documents.py, cli/documents.py.
    twice = {
        stem: paths
        for stem, paths in twice.items()
        if not all(path.startswith(INTERFACES) for path in paths)
    }
    assert twice.keys() - SAME_MEANING.keys() == set(), twice


def test_what_the_package_imports_is_declared():
    """pyproject.toml names every distribution that the package imports, in a part for users."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(line for part in USERS_EXTRAS for line in extras[part])]
    declared = {re.match(r"[\w-]+", line).group().replace("-", "_") for line in wanted}
    imported = set()
    for path in (ROOT / "vllm_kvmarket").rglob("*.py"):
        imported |= imported_packages(path)
    ours = {"vllm_kvmarket", *sys.stdlib_module_names}
    assert imported - ours - declared - BROUGHT_BY_VLLM == set()


def test_every_test_says_what_it_shows():
    """A test states the behaviour in its docstring."""
    silent = [
        f"{name(path)}:{node.lineno} {node.name}"
        for path in SOURCES
        if path.name.startswith("test_")
        for node in functions(path)
        if node.name.startswith("test_") and not ast.get_docstring(node)
    ]
    assert silent == []


@pytest.mark.parametrize("module", VALUES)
def test_values_import_small_libraries_only(module):
    """Errors, config, identity and tariff can be used anywhere: they pull nothing heavy in."""
    allowed = SMALL_LIBRARIES | sys.stdlib_module_names
    assert imported_packages(ROOT / "vllm_kvmarket" / f"{module}.py") - allowed == set()


@pytest.mark.parametrize("pattern", [REGISTRY_HOST, MACHINE_PATH], ids=["hosts", "paths"])
def test_the_repository_names_no_registry_and_no_machine(pattern):
    """The repository holds no package registry's host and no absolute path of a machine."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git work tree")
    found = [
        f"{file}:{number}: {match.group()}"
        for file, text in tracked_texts()
        for number, line in enumerate(text.splitlines(), 1)
        if (match := pattern.search(line))
    ]
    assert found == []


def test_no_symbolic_link_is_tracked():
    """A link would lead to another file, or to nothing, on another machine."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git work tree")
    command = ["git", "ls-files", "--stage"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    assert len(listed.splitlines()) > 100
    assert [line for line in listed.splitlines() if line.startswith("120000")] == []


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_the_readme_names_the_first_commands(command):
    """The README says how to see it work and how to test it."""
    assert command in (ROOT / "README.md").read_text("utf-8")


def test_the_generated_documents_are_up_to_date():
    """docs/COMMANDS.md, docs/CONFIGURATION.md and the README's results follow from the code."""
    command = [sys.executable, "-m", "tools.update_docs", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_every_command_and_key_is_documented():
    """A command or key that no document shows would be found by nobody."""
    text = (ROOT / "docs" / "COMMANDS.md").read_text("utf-8")
    assert [each.name for each in commands() if f"`kvmarket {each.name}`" not in text] == []
    text = (ROOT / "docs" / "CONFIGURATION.md").read_text("utf-8")
    assert [key for key, *_ in describe() if f"| `{key}` |" not in text] == []


def test_the_public_names_are_exactly_all():
    """`__all__` is sorted and equals the names that the package shows."""
    visible = [
        key
        for key, value in vars(vllm_kvmarket).items()
        if not key.startswith("_") and not inspect.ismodule(value)
    ]
    assert list(vllm_kvmarket.__all__) == sorted(visible)


def test_entry_points_name_something_callable():
    """The entry points of pyproject.toml exist, and are installed under the same names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    groups = {"console_scripts": project["scripts"], **project["entry-points"]}
    assert set(groups) == {"console_scripts", "vllm.general_plugins", "vllm.endpoint_plugins"}
    for group, entries in groups.items():
        for entry, target in entries.items():
            module, _, attribute = target.partition(":")
            assert callable(getattr(import_module(module), attribute))
            assert metadata.entry_points(group=group)[entry].value == target


def test_the_type_marker_is_packaged():
    """Type checkers of users believe our annotations only where py.typed is."""
    assert (ROOT / "vllm_kvmarket" / "py.typed").is_file()


def test_versions_are_recorded_for_all_that_users_install():
    """constraints.txt has one that pyproject.toml allows for each of our dependencies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    parts = project["optional-dependencies"]
    wanted = map(Requirement, project["dependencies"] + parts["api"] + parts["postgres"])
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    recorded = dict(line.split("==") for line in lines if not line.startswith("#"))
    wrong = [each.name for each in wanted if recorded.get(each.name, "0") not in each.specifier]
    assert wrong == []


def test_the_threat_model_names_tests_that_exist():
    """Each defence in SECURITY.md is shown by a test, whose name is right."""
    model = (ROOT / "SECURITY.md").read_text("utf-8")
    named = re.findall(r"`(attacks|(?:unit|engine|servers)/\S+?\.py)(?:::(\w+))?`", model)
    assert len(named) > 30
    missing = []
    for where, function in named:
        path = "engine/test_attacks.py" if where == "attacks" else where
        file = ROOT / "tests" / path
        text = file.read_text("utf-8") if file.exists() else ""
        if not text or (function and f"def {function}(" not in text):
            missing.append(f"{where}::{function}")
    assert missing == []


def test_every_thread_is_in_the_architecture():
    """ARCHITECTURE.md lists each thread and long task, so that a newcomer knows who runs when."""
    table = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    names = {
        found
        for path in SOURCES
        if path.is_relative_to(ROOT / "vllm_kvmarket")
        for found in re.findall(
            r"(?:name=|thread_name_prefix=|ThreadPoolExecutor\(\w+, )f?\"(kvmarket-[a-z-]+)",
            path.read_text("utf-8"),
        )
    }
    assert len(names) > 10
    assert [name for name in sorted(names) if f"`{name.rstrip('-')}" not in table] == []
