"""The cluster's files: valid for Kubernetes, put together by kustomize, of one version throughout."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

REPOSITORY = Path(__file__).parents[2]
CLUSTER = REPOSITORY / "cluster"
SCHEMAS = REPOSITORY.parent / "shared" / "schemas"
RAY_KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs"}
MANIFESTS = ("raycluster.yaml", "rayjob-label.yaml", "rayjob-train.yaml")


def problems(document):
    """Give what KubeRay's schema has against a document."""
    if not SCHEMAS.is_dir():
        pytest.skip("the schemas of KubeRay's resources are not here")
    schema = json.loads((SCHEMAS / f"ray.io_v1_{RAY_KINDS[document['kind']]}.json").read_text())
    return [
        f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(document)
    ]


def read(name):
    return yaml.safe_load((CLUSTER / name).read_text())


@pytest.fixture(scope="module")
def rendered():
    """Give what `kubectl apply -k cluster` would apply, by kind and name."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not here, which puts the manifests together")
    ran = subprocess.run(["kubectl", "kustomize", CLUSTER], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return {
        (document["kind"], document["metadata"]["name"]): document
        for document in yaml.safe_load_all(ran.stdout)
    }


def groups(spec):
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_keeps_the_schema(name):
    assert problems(read(name)) == []


def test_the_schema_finds_a_field_in_the_wrong_place():
    document = read("raycluster.yaml")
    document["spec"]["workerGroupSpecs"][0]["tolerations"] = []
    assert "tolerations" in problems(document)[0]


def test_what_kustomize_renders_keeps_the_schema(rendered):
    assert {kind for kind, _ in rendered} == {"ConfigMap", "RayCluster", "RayJob", "ServiceAccount"}
    for document in rendered.values():
        if document["kind"] in RAY_KINDS:
            assert problems(document) == []


def test_each_job_gets_the_cluster_that_is_described_once(rendered):
    cluster = rendered["RayCluster", "mmray"]["spec"]
    for name in ("mmray-label", "mmray-train"):
        assert rendered["RayJob", name]["spec"]["rayClusterSpec"] == cluster


def test_the_image_is_set_in_one_place(rendered):
    chosen = read("kustomization.yaml")["images"][0]
    images = {
        container["image"]
        for group in groups(rendered["RayCluster", "mmray"]["spec"])
        for container in group["template"]["spec"]["containers"]
    }
    assert images == {f"{chosen['newName']}:{chosen['newTag']}"}


def test_the_options_that_a_job_reads_are_mounted_where_it_looks(rendered):
    options = rendered["ConfigMap", "mmray-options"]["data"]
    pod = rendered["RayCluster", "mmray"]["spec"]["headGroupSpec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for job in ("label", "train"):
        entrypoint = rendered["RayJob", f"mmray-{job}"]["spec"]["entrypoint"]
        folder, file = re.search(r"--config (\S+)/(\S+)", entrypoint).groups()
        (mount,) = (m for m in pod["containers"][0]["volumeMounts"] if m["mountPath"] == folder)
        assert volumes[mount["name"]]["configMap"]["name"] == "mmray-options"
        assert file in options


@pytest.mark.parametrize("job", ["label", "train"])
def test_the_job_knows_the_options_that_are_set_for_it(job):
    """A recipe's unknown option ends a job with 2 before anything starts; --help comes after it was read."""
    recipe = CLUSTER / f"{job}.yaml"
    command = [sys.executable, REPOSITORY / f"jobs/{job}.py", "--config", recipe, "--help"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("name", MANIFESTS[1:])
def test_a_job_frees_its_cluster_and_is_not_repeated_whatever_its_status(name):
    spec = read(name)["spec"]
    assert spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] > 0
    assert spec["backoffLimit"] == 0
    assert "again.sh" in spec["entrypoint"]
    image_path = "/opt/mmray/"  # where the Dockerfile puts the repository
    for word in spec["entrypoint"].split():
        if word.startswith(image_path):
            assert (REPOSITORY / word.removeprefix(image_path)).is_file()


def test_no_actor_runs_on_the_head_and_no_pod_as_root():
    spec = read("raycluster.yaml")["spec"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in groups(spec):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"]
        for container in [*pod["containers"], spec["autoscalerOptions"]]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
        for container in pod["containers"]:
            assert container["readinessProbe"] and container["livenessProbe"]
            assert "/dev/shm" in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_gpu_workers_come_and_go_on_spot_machines():
    spec = read("raycluster.yaml")["spec"]
    (gpu,) = (group for group in spec["workerGroupSpecs"] if group["groupName"] == "gpu")
    assert 1 == gpu["minReplicas"] < gpu["maxReplicas"]
    assert gpu["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    tolerated = {toleration["key"] for toleration in gpu["template"]["spec"]["tolerations"]}
    assert {"cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"} <= tolerated


def test_the_cluster_on_machines_keeps_rays_schema_and_is_like_the_one_on_kubernetes():
    import ray

    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    described = read("ray-up-aws.yaml")
    validator = Draft202012Validator(schema)
    assert [error.message for error in validator.iter_errors(described)] == []
    assert list(validator.iter_errors(described | {"max_worker": 1})), "the schema finds nothing"
    nodes = described["available_node_types"]
    assert nodes[described["head_node_type"]]["resources"]["CPU"] == 0
    assert 1 <= nodes["gpu"]["min_workers"] < nodes["gpu"]["max_workers"] <= described["max_workers"]
    assert nodes["gpu"]["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    chosen = read("kustomization.yaml")["images"][0]
    assert described["docker"]["image"] == f"{chosen['newName']}:{chosen['newTag']}"


def test_one_version_of_everything():
    lock = dict(
        re.findall(
            r"^([a-z0-9-]+)(?:\[[a-z,]+\])?==([^\s;]+)", (REPOSITORY / "requirements.lock").read_text(), re.M
        )
    )
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    pinned = dict(re.findall(r"'?(ray|torch)(?:\[[a-z,]+\])?==([\d.]+)", " ".join(project["dependencies"])))
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    assert lock["ray"] == pinned["ray"] == read("raycluster.yaml")["spec"]["rayVersion"]
    assert lock["torch"] == pinned["torch"]
    python = re.search(r"^FROM python:(\d+\.\d+)", dockerfile, re.M).group(1)
    assert project["requires-python"] == f">={python}"
    assert read("kustomization.yaml")["images"][0]["newTag"] == project["version"]
    told = re.findall(r"ray\[\w+\]==([\d.]+)", (CLUSTER / "README.md").read_text())
    assert told == [lock["ray"]]
