"""The house rules of imports, read from the source: acyclic, one direction, torch behind one door.

`import_graph` reads every import statement of a package without running it. The last tests point it
at small trees that break each rule, because a walker that sees nothing would pass everything.
"""

from __future__ import annotations

import ast
import fnmatch
import graphlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

TORCH = {"accelerate", "bitsandbytes", "deepspeed", "peft", "safetensors", "torch", "transformers", "trl"}
"""What starts torch, or is of use only beside it: `runner/train/` alone."""

DATA = {"PIL", "datasets", "numpy", "pandas", "pyarrow"}
"""Rows and images: `runner/train/`, and `runner/demo/`, which renders some."""

NETWORK = {"boto3", "botocore", "huggingface_hub"}
"""Clients that a verb loads when it needs them, inside a function."""

TRACKERS = {"mlflow", "tensorboard", "trackio", "wandb"}
"""What a tracker's own process loads, and no other."""

HEAVY = TORCH | DATA | NETWORK | TRACKERS
"""What no module that the command line loads may import while it is loaded."""

TORCH_PROGRAMS = {"runner.demo.pretrain", "runner.schema.generate"}
"""Developers' programs outside `runner/train/`, run by themselves; nothing imports them."""

SUPERVISOR = {"runner.cli", "runner.launch", "runner.settings"}
"""What `runner.train` never imports: data flows one way."""

ASKS_CLUSTERS = {"runner.cli", "runner.cluster", "runner.status"}
"""Commands of a person. Nothing that runs in a container asks a cluster."""

TARGETS_READ = {
    *("runner", "runner.errors", "runner.exits", "runner.manifest", "runner.places", "runner.section"),
    *("runner.settings", "runner.job.resolved", "runner.job.yaml_source"),
}
"""All that `runner.targets` is made of: a job in, plain data out."""

ABOVE_TARGETS = {"runner.cli", "runner.cluster", "runner.render_verb"}

TOP_LEVEL = {
    *{"docker", "jobs", "runner", "k8s", "tests", "bench", "docs", ".ci"},
    *{"Makefile", "pyproject.toml", "constraints.txt", "README.md", "LICENSE", ".gitignore", ".git"},
}


@dataclass(frozen=True)
class Import:
    """One imported module, as one module's source says it."""

    importer: str
    imported: str
    """Dotted module, of this package or of another."""
    lazy: bool
    """Inside a function: paid for when that is called."""

    @property
    def top(self) -> str:
        return self.imported.partition(".")[0]


def import_graph(package: Path) -> dict[str, list[Import]]:
    """Every module of a package folder by its dotted name, with what it imports.

    `from package import module` counts as an import of the module, `from package.module import name`
    as one of `package.module`. Imports under `if TYPE_CHECKING:` never run and are left out.

    Raises:
        ValueError: a relative import; the house writes absolute ones, and this walker reads no others.
    """
    files = {_dotted(path, package): path for path in sorted(package.rglob("*.py"))}
    graph = {}
    for module, path in files.items():
        imports = []
        for node, lazy in _import_nodes(ast.parse(path.read_text(encoding="utf-8")), lazy=False):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif node.level or node.module is None:
                raise ValueError(f"{path}:{node.lineno}: a relative import; write the whole name")
            else:
                members = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [member if member in files else node.module for member in members]
            imports += [Import(module, name, lazy) for name in dict.fromkeys(names)]
        graph[module] = imports
    return graph


def _dotted(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _import_nodes(node: ast.AST, lazy: bool) -> list[tuple[ast.Import | ast.ImportFrom, bool]]:
    found: list[tuple[ast.Import | ast.ImportFrom, bool]] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            found.append((child, lazy))
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                found += _import_nodes(other, lazy)
        else:
            inner = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            found += _import_nodes(child, inner)
    return found


def cycle(graph: dict[str, list[Import]]) -> list[str]:
    """One import cycle among a package's own modules, lazy imports included; empty when there is none."""
    own = {
        module: {edge.imported for edge in edges if edge.imported in graph} for module, edges in graph.items()
    }
    try:
        graphlib.TopologicalSorter(own).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def loaded_with(start: str, graph: dict[str, list[Import]]) -> set[str]:
    """The package's own modules that importing `start` loads: parents, and imports that are not lazy."""
    loaded: set[str] = set()
    waiting = [start]
    while waiting:
        module = waiting.pop()
        if module in graph and module not in loaded:
            loaded.add(module)
            waiting.append(module.rpartition(".")[0])
            waiting += [edge.imported for edge in graph[module] if not edge.lazy]
    return loaded


def violations(graph: dict[str, list[Import]]) -> list[str]:
    """Every import that the house forbids, as `importer -> imported: rule`."""
    light = loaded_with("runner.cli", graph)
    return [
        f"{edge.importer} -> {edge.imported}: {rule}"
        for edges in graph.values()
        for edge in edges
        for rule in _broken(edge, edge.importer in light)
    ]


def _broken(edge: Import, light: bool) -> list[str]:
    """The rules that one import breaks; `light` when the command line loads its importer."""
    inside, into = _within("runner.train", edge.importer), _within("runner.train", edge.imported)
    program, demo = edge.importer in TORCH_PROGRAMS, _within("runner.demo", edge.importer)
    rules = {
        "torch and its kin live in runner/train/": edge.top in TORCH and not inside and not program,
        "rows and images live in runner/train/ and runner/demo/": edge.top in DATA
        and not (inside or program or demo),
        "heavy, and the command line loads it: import it where it is used": edge.top in HEAVY
        and edge.top not in TORCH
        and light
        and not edge.lazy,
        "runner.train is a process, not a library": into and not inside,
        "a program of its own; nothing imports it": edge.imported in TORCH_PROGRAMS,
        "a plan is all that crosses into runner.train": inside and edge.imported in SUPERVISOR,
        "runs ask no cluster": _within("runner.cluster", edge.imported)
        and not any(_within(one, edge.importer) for one in ASKS_CLUSTERS),
        "a target is made of the job and the table of exit codes": _within("runner.targets", edge.importer)
        and edge.top == "runner"
        and not _within("runner.targets", edge.imported)
        and edge.imported not in TARGETS_READ,
        "runs know nothing of who started them": _within("runner.targets", edge.imported)
        and not any(_within(name, edge.importer) for name in ("runner.targets", *ABOVE_TARGETS)),
    }
    return [rule for rule, broken in rules.items() if broken]


def _within(package: str, module: str) -> bool:
    return module == package or module.startswith(f"{package}.")


@pytest.fixture(scope="module")
def runner_graph() -> dict[str, list[Import]]:
    return import_graph(ROOT / "runner")


def test_imports_have_no_cycle(runner_graph: dict[str, list[Import]]) -> None:
    assert cycle(runner_graph) == []


def test_imports_keep_the_house_rules(runner_graph: dict[str, list[Import]]) -> None:
    assert "runner.train.__main__" in runner_graph
    assert violations(runner_graph) == []


def test_errors_imports_nothing_of_the_package(runner_graph: dict[str, list[Import]]) -> None:
    assert [edge.imported for edge in runner_graph["runner.errors"] if edge.top == "runner"] == []


def test_the_command_line_loads_nothing_heavy() -> None:
    """What the source says, once more from the running program, third parties' own imports included."""
    script = "import sys, runner.cli; print(*sorted(name for name in sys.modules if '.' not in name))"
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert HEAVY & set(loaded.stdout.split()) == set()


def test_top_level_holds_what_the_house_plan_names() -> None:
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    here = {path.name for path in ROOT.iterdir()}
    kept = {
        name for name in here if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored if pattern)
    }
    assert kept - TOP_LEVEL == set()


def tree(folder: Path, files: dict[str, str]) -> dict[str, list[Import]]:
    """The import graph of a package `runner` with these modules."""
    for name, source in files.items():
        path = folder / "runner" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return import_graph(folder / "runner")


REST = {
    "cli.py": "from runner import launch, plan, settings\nimport runner.demo",
    **dict.fromkeys(["launch.py", "plan.py", "settings.py", "demo/__init__.py", "demo/pretrain.py"], ""),
    **dict.fromkeys(["cluster/__init__.py", "cluster/jobs.py"], ""),
    **dict.fromkeys(["train/__init__.py", "train/data.py", "targets/__init__.py", "targets/pods.py"], ""),
}
"""The modules around the one that a test looks at."""


@pytest.mark.parametrize(
    ("module", "source", "seen"),
    [
        ("plan.py", "import torch", ["runner.plan -> torch"]),
        ("plan.py", "import torch.nn as nn", ["runner.plan -> torch.nn"]),
        ("plan.py", "def f():\n    from transformers import Trainer", ["runner.plan -> transformers"]),
        ("plan.py", "try:\n    import peft\nexcept ImportError:\n    pass", ["runner.plan -> peft"]),
        ("plan.py", "class A:\n    import trl", ["runner.plan -> trl"]),
        ("plan.py", "def f():\n    import numpy", ["runner.plan -> numpy"]),
        ("demo/__init__.py", "import datasets", ["runner.demo -> datasets"]),
        ("settings.py", "from boto3 import client", ["runner.settings -> boto3"]),
        ("launch.py", "from runner.train import data", ["runner.launch -> runner.train.data"]),
        ("launch.py", "def f():\n    import runner.train.data", ["runner.launch -> runner.train.data"]),
        ("demo/pretrain.py", "import runner.train.data", ["runner.demo.pretrain -> runner.train.data"]),
        ("demo/__init__.py", "from runner.demo import pretrain", ["runner.demo -> runner.demo.pretrain"]),
        ("train/model.py", "from runner.launch import Launch", ["runner.train.model -> runner.launch"]),
        ("launch.py", "from runner.cluster import jobs", ["runner.launch -> runner.cluster.jobs"]),
        (
            "targets/pods.py",
            "def f():\n    from runner import launch",
            ["runner.targets.pods -> runner.launch"],
        ),
        ("plan.py", "from runner.targets import pods", ["runner.plan -> runner.targets.pods"]),
    ],
)
def test_walker_sees_a_forbidden_import(tmp_path: Path, module: str, source: str, seen: list[str]) -> None:
    found = violations(tree(tmp_path, REST | {module: source}))
    assert [line.partition(": ")[0] for line in found] == seen


def test_walker_follows_what_the_command_line_loads(tmp_path: Path) -> None:
    charts = {"demo/charts.py": "from PIL import Image"}
    lazy = tree(tmp_path / "lazy", REST | charts | {"plan.py": "def f():\n    import runner.demo.charts"})
    assert violations(lazy) == []
    loaded = tree(tmp_path / "loaded", REST | charts | {"plan.py": "import runner.demo.charts"})
    assert [line.partition(": ")[0] for line in violations(loaded)] == ["runner.demo.charts -> PIL"]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("train/model.py", "import torch\nfrom runner.train import data\nfrom runner.plan import Plan"),
        ("demo/pretrain.py", "import torch\nimport datasets"),
        ("demo/__init__.py", "def build():\n    import datasets\n    from PIL import Image"),
        ("settings.py", "def fetch():\n    import boto3"),
        ("plan.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("plan.py", "import torchlike\nfrom runner.training import x"),
    ],
)
def test_walker_lets_an_allowed_import_pass(tmp_path: Path, module: str, source: str) -> None:
    assert violations(tree(tmp_path, REST | {module: source})) == []


def test_walker_sees_a_cycle_through_a_lazy_import(tmp_path: Path) -> None:
    a, b, c = "from runner import b", "import runner.c", "def f():\n    from runner.a import x"
    found = cycle(tree(tmp_path, {"__init__.py": "", "a.py": a, "b.py": b, "c.py": c}))
    assert set(found) == {"runner.a", "runner.b", "runner.c"}


def test_walker_refuses_a_relative_import(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"plan.py:1: a relative import"):
        tree(tmp_path, {"plan.py": "from . import manifest"})
