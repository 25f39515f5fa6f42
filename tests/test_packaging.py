"""The package as it ships: every folder in the wheel, lazy imports, one direction of imports."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"topology": 0, "solver": 1, "tamoe": 2, "adapters": 3, "experiments": 4}
HEAVY = ("torch", "scipy", "cvxpy", "matplotlib", "pyroute2", "networkx")


def loaded_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*[m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.splitlines()[-1].split()) if result.stdout.strip() else set()


def test_package_list_equals_the_tree() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.name for path in ROOT.glob("*/*.py")} - {"tests", "build"}
    folders.add("cuda")  # sources only
    named = {"tamoe" if f == "tamoe" else f"tamoe.{f}" for f in folders}
    assert set(config["packages"]) == named == set(config["package-dir"])
    nested = [p for f in folders for p in (ROOT / f).glob("*/*.py") if not p.parent.is_symlink()]
    assert not nested, "folders stay flat: a nested one would be missing from the wheel"


def test_cuda_is_not_a_package() -> None:
    assert not (ROOT / "cuda" / "__init__.py").exists()


def test_every_kernel_source_is_shipped() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = config["package-data"]["tamoe.cuda"]
    listing = subprocess.run(["git", "ls-files", "cuda"], cwd=ROOT, capture_output=True, text=True)
    names = {Path(name).name for name in listing.stdout.split()} or {"port.h", "combine.cu"}
    missed = {n for n in names if not any(fnmatch(n, pattern) for pattern in patterns)}
    assert missed <= {"README.md"}
    assert "*.so" in patterns, "a release carries its library"


def test_a_wheel_holds_what_compiles_the_kernels(tmp_path: Path) -> None:
    """Built from a copy, so that nothing is left in the tree; installed nowhere."""
    copy = tmp_path / "source"
    shutil.copytree(
        ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.so")
    )
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(tmp_path)]
    result = subprocess.run([*command, str(copy)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {
        f"tamoe/cuda/{p.name}" for p in (ROOT / "cuda").iterdir() if p.suffix in (".cu", ".h")
    }
    assert len(sources) >= 9 and sources <= names


def test_importing_tamoe_loads_nothing_heavy() -> None:
    assert loaded_after("import tamoe, tamoe.topology, tamoe.solver") == set()


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["solve", "--help"], ["kernels", "build", "--help"], ["--version"]],
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"from tamoe.cli import main\ntry:\n    main({arguments!r})\nexcept SystemExit:\n    pass"
    )
    assert loaded_after(code) == set()


def test_solve_and_show_load_no_torch(tmp_path: Path) -> None:
    file, plan, figure = (str(tmp_path / name) for name in ("t.json", "p.json", "f.png"))
    make = (
        "from tamoe.topology import Topology\n"
        f"Topology.from_tree('2x2', bandwidth_bytes_per_s=(1e9, 1e8)).save({file!r})\n"
        "from tamoe.cli import main\n"
    )
    for command in (["solve", file, "-o", plan], ["show", file, "-o", figure]):
        code = (
            f"{make}try:\n    main({command!r})\nexcept SystemExit as end:\n    assert not end.code"
        )
        assert "torch" not in loaded_after(code)


def imports_of(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return found


def layer_of(module: str) -> int:
    part = module.split(".")[1] if "." in module else ""
    return FOLDERS.get(part, 2)


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_go_only_backwards(folder: str) -> None:
    for path in (ROOT / folder).glob("*.py"):
        for module in imports_of(path):
            if module.split(".")[0] != "tamoe":
                continue
            allowed = 4 if path.name == "cli.py" else FOLDERS[folder]
            assert layer_of(module) <= allowed, f"{path.name} imports {module}"


def test_every_module_says_what_it_is_in_its_first_line() -> None:
    for folder in FOLDERS:
        for path in (ROOT / folder).glob("*.py"):
            assert ast.get_docstring(ast.parse(path.read_text())) or path.name == "__main__.py", (
                path
            )
