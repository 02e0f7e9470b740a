"""The image's Dockerfile, as far as it goes without a container engine: linted, its steps run in a folder."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DOCKERFILE = REPOSITORY / "cluster" / "Dockerfile"


def steps(kind):
    """Give the arguments of the Dockerfile's steps of a kind, in order."""
    code = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.M).replace("\\\n", " ")
    return re.findall(rf"^{kind} +(.+)$", code, re.M)


def run(*command, cwd, **environ):
    ran = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | environ)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """Give a folder with what the image gets of the repository, and nothing else."""
    folder = tmp_path_factory.mktemp("image")
    for step in steps("COPY"):
        *sources, target = step.split()
        (folder / target).mkdir(parents=True, exist_ok=True)
        for source in map(REPOSITORY.joinpath, sources):
            if source.is_dir():  # COPY takes what is in it
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source, folder / target, ignore=ignored, dirs_exist_ok=True)
            else:
                shutil.copy2(source, folder / target)
    return folder


def test_the_linter_has_nothing_to_say():
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent)
    if not hadolint:
        pytest.skip("hadolint is not here")
    run(hadolint, DOCKERFILE, cwd=REPOSITORY)


def test_the_packages_are_the_projects_and_their_versions_the_locks(image):
    (step,) = (step for step in steps("RUN") if "requirements.lock" in step)
    code = re.search(r'^python -c "(.+?)" +> ', step)[1]
    named = run(sys.executable, "-c", code, cwd=image).splitlines()
    assert named == tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    locked = set(re.findall(r"^([\w-]+)(?:\[.+\])?==", (image / "requirements.lock").read_text(), re.M))
    names = {re.match(r"[\w-]+", line)[0].lower() for line in named}
    assert names <= locked


def test_its_packages_can_be_installed_together_into_a_clean_place(image, tmp_path):
    """Asks the package index, as the image's step does; downloads no package."""
    (step,) = (step for step in steps("RUN") if "requirements.lock" in step)
    code, install = re.search(
        r'^python -c "(.+?)" +> /tmp/direct.txt +&& (pip install .+?) +&& rm', step
    ).groups()
    (tmp_path / "direct.txt").write_text(run(sys.executable, "-c", code, cwd=image))
    words = install.replace("/tmp/direct.txt", str(tmp_path / "direct.txt")).split()
    apart = ("--dry-run", "--ignore-installed", "--quiet", "--report", tmp_path / "report.json")
    run(sys.executable, "-m", *words, *apart, cwd=image)
    found = json.loads((tmp_path / "report.json").read_text())["install"]
    versions = {each["metadata"]["name"].lower(): each["metadata"]["version"] for each in found}
    lines = re.findall(r"^([\w-]+)(?:\[.+\])?==([^\s;]+)", (image / "requirements.lock").read_text(), re.M)
    locked = defaultdict(set)  # some packages have a version for each Python
    for name, version in lines:
        locked[name].add(version)
    assert {"ray", "torch", "timm", "boto3"} <= versions.keys()
    assert [name for name in versions.keys() & locked if versions[name] not in locked[name]] == []


def test_it_has_what_others_call_in_it():
    """KubeRay's probes, and Ray's autoscaler, which sets up machines from inside of the head's container."""
    (step,) = (step for step in steps("RUN") if step.startswith("apt-get"))
    assert {"openssh-client", "rsync", "wget"} <= set(step.split())


def test_a_job_runs_of_what_is_copied(image, tmp_path):
    """The package by the image's own step, with the packages of this environment."""
    (step,) = (step for step in steps("RUN") if step.startswith("pip install --no-deps"))
    here = ("--no-build-isolation", "--quiet", "--target", tmp_path)
    run(sys.executable, "-m", *step.split(), *here, cwd=image)
    where = run(
        sys.executable, "-c", "import mmray; print(mmray.__file__)", cwd=tmp_path, PYTHONPATH=str(tmp_path)
    )
    assert Path(where.strip()).parent == tmp_path / "mmray"
    assert (tmp_path / "mmray" / "page.html").exists()
    helped = run(sys.executable, "jobs/label.py", "--help", cwd=image, PYTHONPATH=str(tmp_path))
    assert "--output" in helped


def test_nothing_in_it_runs_as_root():
    assert steps("USER") == ["1000"]
    assert DOCKERFILE.read_text().rstrip().endswith("USER 1000")
