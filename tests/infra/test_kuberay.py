"""The KubeRay manifest: fields that KubeRay documents, read by Ray's own reader of such clusters."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay import autoscaling_config

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [
    sys.executable,
    str(ROOT / "infra/kuberay/render.py"),
    "--image",
    "registry/posttrain:1",
    "--claim",
    "volume",
]

#: kind of object -> the fields that KubeRay's ray.io/v1 definitions of RayJob and RayCluster have for it
FIELDS = {
    "job": {
        *("activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy", "entrypoint"),
        *("entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "jobId", "managedBy", "metadata"),
        *("rayClusterSpec", "runtimeEnvYAML", "shutdownAfterJobFinishes", "submissionMode", "submitterConfig"),
        *("submitterPodTemplate", "suspend", "ttlSecondsAfterFinished"),
    },
    "cluster": {
        *("authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec"),
        *("headServiceAnnotations", "managedBy", "rayVersion", "suspend", "upgradeStrategy", "workerGroupSpecs"),
    },
    "head": {"enableIngress", "headService", "labels", "rayStartParams", "resources", "serviceType", "template"},
    "workers": {
        *("groupName", "idleTimeoutSeconds", "labels", "maxReplicas", "minReplicas", "numOfHosts", "rayStartParams"),
        *("replicas", "resources", "scaleStrategy", "suspend", "template"),
    },
}


def rendered(*overrides: str) -> dict[str, Any]:
    arguments = [argument for override in overrides for argument in ("--set", override)]
    done = subprocess.run([*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "${" not in done.stdout
    return yaml.safe_load(done.stdout)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_ray_reads_the_nodes_and_devices_that_were_asked_for(device: str) -> None:
    sizes = ("compute.nodes=4", "compute.devices_per_node=8", "train.rows_per_step=32")
    job = rendered(*sizes, f"compute.device={device}", "train.micro_batch_rows=1")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert set(job["spec"]) <= FIELDS["job"]
    cluster = job["spec"]["rayClusterSpec"]
    assert set(cluster) <= FIELDS["cluster"]
    assert set(cluster["headGroupSpec"]) <= FIELDS["head"]
    (workers,) = cluster["workerGroupSpecs"]
    assert set(workers) <= FIELDS["workers"]
    kinds = autoscaling_config._generate_available_node_types_from_ray_cr_spec(cluster)
    assert kinds["headgroup"]["resources"]["CPU"] == 0
    devices = kinds["devices"]
    assert (devices["min_workers"], devices["max_workers"]) == (4, 4)
    assert devices["resources"]["CPU"] >= 8, "Ray reserves a core for each rank"
    assert devices["resources"].get("GPU") == (8 if device == "cuda" else None)


def test_the_job_runs_the_step_with_the_same_settings_on_the_cluster_it_is_in() -> None:
    job = rendered("train.steps=40")
    assert job["spec"]["entrypoint"].startswith("python -m steps.train --config ")
    assert job["spec"]["entrypoint"].endswith("--set train.steps=40 --set compute.address=auto")
    assert job["spec"]["backoffLimit"] == 2
    pods = [job["spec"]["rayClusterSpec"]["headGroupSpec"], *job["spec"]["rayClusterSpec"]["workerGroupSpecs"]]
    for pod in pods:
        spec = pod["template"]["spec"]
        mounted = {mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}
        assert spec["containers"][0]["image"] == "registry/posttrain:1"


def test_a_wrong_run_file_is_a_plain_error() -> None:
    done = subprocess.run([*COMMAND, "--set", "compute.nodes=0"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "compute.nodes" in done.stderr and "Traceback" not in done.stderr
