"""The house, kept by reading its imports: each module stands on those before it, and few know Ray."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mmray

HOUSE = Path(__file__).parents[2] / "mmray"

FLOORS = [
    # 0: the contract
    ["errors", "faults", "schema", "columns", "uris", "options", "config", "fingerprints", "recipes"],
    # 1: everything that works without Ray
    [
        *(
            "damage",
            "disk",
            "stores",
            "remote",
            "storage",
            "files",
            "fetch",
            "rowgroups",
            "parquet",
            "plan",
            "shards",
            "retry",
            "parcels",
            "lease",
            "progress",
        ),
        *(
            "randaugment",
            "images",
            "jpeg",
            "captions",
            "decoding",
            "decoded",
            "towers",
            "fusions",
            "ngrams",
            "model",
            "words",
            "losses",
            "metrics",
            "decisions",
        ),
        *("bundle", "planning"),
        *(
            "selection",
            "predictor",
            "gpu_decoding",
            "labeler",
            "isolation",
            "tables",
            "learner",
            "warm_start",
            "validation",
            "card",
            "cli",
        ),
        *("charts", "page", "picking", "survey", "label_studio", "onnx_export", "events", "layouts"),
    ],
    # 2: on Ray Data and Ray Train
    [
        "joining",
        "resources",
        "datasets",
        "start",
        "news",
        "worker",
        "fitting",
        "training",
        "watching",
        "pool",
        "decoders",
        "scoring",
        "committing",
        "labeling",
        "verify",
        "pseudo",
    ],
    # 3: one module for each further job
    [
        *("prepare", "pairing", "evaluate", "deciding", "self_train", "variants", "ablate"),
        *("looks", "gallery", "labeling_report", "training_report", "report", "answers", "export"),
        *("demo", "bench"),
    ],
]
ORDER = [module for floor in FLOORS for module in floor]
MODULES = sorted(path.stem for path in HOUSE.glob("*.py") if path.stem != "__init__")


def imports(module, *, everywhere=True):
    """Give the dotted names that a module imports; functions and TYPE_CHECKING included, or not."""
    tree = ast.parse((HOUSE / f"{module}.py").read_text())
    nodes = list(ast.walk(tree)) if everywhere else at_import(tree.body)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: write imports in full, so that this test can read them"
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def at_import(body):
    """Give the statements that run when a module is imported."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from at_import(node for node in ast.iter_child_nodes(node) if isinstance(node, ast.stmt))


def packages(names):
    return {name.split(".")[0] for name in names}


def siblings(module, **how):
    """Give the modules of this package that a module imports."""
    return {name.split(".")[1] for name in imports(module, **how) if name.startswith("mmray.")}


def test_every_module_has_its_place():
    assert sorted(set(MODULES) - set(ORDER)) == []
    assert len(set(ORDER)) == len(ORDER)


def test_there_are_no_subpackages():
    assert [path.name for path in HOUSE.iterdir() if path.is_dir() and path.name != "__pycache__"] == []


@pytest.mark.parametrize("module", MODULES)
def test_a_module_stands_on_what_comes_before_it(module):
    below = set(ORDER[: ORDER.index(module)])
    # What the command line starts may be anything; what it needs to start may not.
    found = siblings(module, everywhere=module != "cli")
    assert sorted(found - below) == []


@pytest.mark.parametrize("module", [module for module in MODULES if module in FLOORS[0] + FLOORS[1]])
def test_the_lower_floors_do_not_know_ray(module):
    assert "ray" not in packages(imports(module, everywhere=module != "cli"))


def test_one_module_alone_knows_the_file_systems():
    knowing = [module for module in MODULES if packages(imports(module)) & {"fsspec", "s3fs", "aiobotocore"}]
    assert knowing == ["stores"]


@pytest.mark.parametrize("name", ["utils", "helpers", "common", "misc"])
def test_no_module_is_named_after_nothing(name):
    assert name not in MODULES


def loaded_by(module):
    """Give the top-level modules that importing one loads, in a process of its own."""
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HOUSE.parent
    )
    return set(ran.stdout.split())


def test_importing_the_package_loads_neither_torch_nor_ray():
    assert not loaded_by("mmray") & {"torch", "ray", "timm", "transformers", "pyarrow"}


def test_the_package_gives_what_it_promises_when_it_is_asked():
    for name in mmray.__all__:
        assert getattr(mmray, name).__module__.startswith("mmray.")
    assert set(mmray.__all__) <= set(dir(mmray))
    with pytest.raises(AttributeError, match="no attribute 'label_datasets'"):
        _ = mmray.label_datasets


def test_the_labeler_comes_without_ray():
    loaded = loaded_by("mmray; mmray.Labeler")
    assert "torch" in loaded and "ray" not in loaded


def test_the_model_and_the_labeler_do_not_load_ray():
    loaded = loaded_by("mmray.labeler, mmray.learner")
    assert "torch" in loaded and "mmray" in loaded
    assert "ray" not in loaded


def test_the_model_alone_does_not_load_ray():
    assert "ray" not in loaded_by("mmray.model")
