"""The package's metadata, and the commands that README and CI share."""

import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

import metaopt

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

SET_UP = 'python3 -m venv .venv && .venv/bin/pip install -q -e ".[all]"'


def test_the_wheel_holds_every_package_of_metaopt_and_nothing_else():
    folders = {p.parent for p in (ROOT / "metaopt").rglob("__init__.py")}
    names = {".".join(f.relative_to(ROOT).parts) for f in folders}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == names


def test_every_data_file_is_package_data():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    for path in (ROOT / "metaopt").rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            package = ".".join(path.parent.relative_to(ROOT).parts)
            assert any(path.match(p) for p in patterns.get(package, ())), path


def test_the_version_is_a_literal_that_needs_no_import():
    text = (ROOT / "metaopt" / "__init__.py").read_text()
    assert f'\n__version__ = "{metaopt.__version__}"\n' in text


def test_every_public_name_exists():
    assert sorted(set(metaopt.__all__)) == sorted(metaopt.__all__)
    assert all(hasattr(metaopt, name) for name in metaopt.__all__)


def test_importing_the_library_imports_no_extra():
    code = """
import sys
import haiku, optax  # haiku imports flax where it is installed
before = set(sys.modules)
import metaopt
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = "tensorflow_datasets orbax sklearn matplotlib flax equinox tyro rich PIL"
    assert "metaopt" in done.stdout.split()
    assert not set(heavy.split()) & set(done.stdout.split())


def test_the_readme_has_both_commands_with_their_whole_set_up():
    lines = (ROOT / "README.md").read_text().splitlines()
    (tests,) = [line for line in lines if line.endswith("-m pytest")]
    assert tests == f"{SET_UP} && .venv/bin/python -m pytest"
    run = ".venv/bin/python -m experiments meta-train digits-pes --out runs/first"
    assert [line for line in lines if line.endswith(f"{SET_UP} && {run}")]


def test_ci_takes_its_commands_from_the_readme():
    script = (ROOT / ".ci" / "run").read_text()
    (pattern,) = re.findall(r"grep -m1 -- '(.*)' README\.md", script)
    lines = (ROOT / "README.md").read_text().splitlines()
    assert [line for line in lines if re.search(pattern, line)]
    assert "pip install" not in script


@pytest.mark.parametrize("extra", ["checkpoint", "data", "experiments", "dev"])
def test_all_is_everything(extra):
    (everything,) = PROJECT["project"]["optional-dependencies"]["all"]
    assert extra in re.split(r"[\[\],]", everything)
