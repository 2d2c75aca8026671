"""Retrains as schedulers would run them: the rendered manifest against Argo's schema, its containers run for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml

from posttrain_lib.lineage import promoted
from posttrain_lib.lineage.store import Store
from tests.support.argo import Pods, deploy_packages, deployment, has_namespaces, rendered
from tests.support.retrains import FLOW, TINY, Retrains
from tests.support.s3 import s3_environment, s3_server

pytestmark = pytest.mark.slow
STEPS = ("start", "prepare", "train", "evaluate", "export", "promote", "end")
STORE = '{"POSTTRAIN_STORE": "%s"}'


@pytest.fixture(scope="module")
def packages() -> Path:
    try:
        return deploy_packages()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"infra/locks/deploy.txt cannot be installed: {error.stderr[-500:]}")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as url, s3_environment(url):
        fsspec.filesystem("s3").mkdir("posttrain")
        yield url


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Retrains:
    return Retrains(tmp_path_factory.mktemp("deployed"))


@pytest.fixture(scope="module")
def config(deployed: Retrains) -> Path:
    """The tiny retrain with a suite that the code package brings."""
    raw = yaml.safe_load(TINY.read_text().replace("${LANDING}", str(deployed.landing)))
    raw["suites"] = [
        {
            "task": "multiple_choice",
            "name": "suite",
            "file": "posttrain_lib/embedded/suite.jsonl",
            "chat": True,
            "limit": 20,
        }
    ]
    raw["gates"] = {"held_out.loss": {"max_change": 0.1}, "suite.answer_probability": {"min_change": -0.5}}
    raw["limits"] = {"retries": 2, "minutes_between_retries": 3, "step_hours": 5}
    raw["resources"] = {"cpu": 8, "memory_mb": 64000, "gpu": 4}
    path = deployed.home / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.fixture(scope="module")
def manifest(deployed: Retrains, config: Path, server: str, packages: Path) -> dict[str, Any]:
    environment = deployment(deployed.home, server, packages)
    store = STORE % (deployed.home / "store")
    return rendered(FLOW, config, environment, "--production", "--with", f"environment:vars={store}")


def template(manifest: dict[str, Any], step: str) -> dict[str, Any]:
    return next(each for each in manifest["spec"]["templates"] if each["name"] == step)


def test_the_manifest_has_what_the_config_says(manifest: dict[str, Any]) -> None:
    assert manifest["metadata"]["name"] == "posttrain.prod.retrainflow"
    cron = json.loads(manifest["metadata"]["annotations"]["metaflow/cron"])
    assert cron["schedule"] == "0 3 * * ?" and not cron["tz"]
    for step in STEPS:
        assert template(manifest, step)["activeDeadlineSeconds"] == 5 * 3600, step
        assert template(manifest, step)["retryStrategy"]["limit"] == 2, step
        assert template(manifest, step)["retryStrategy"]["backoff"] == {"duration": "3m"}, step
    asked = template(manifest, "train")["container"]["resources"]
    assert asked["requests"]["cpu"] == "8.0" and asked["requests"]["memory"] == "64000.0M"
    assert asked["limits"]["nvidia.com/gpu"] == "4"
    assert "nvidia.com/gpu" not in template(manifest, "evaluate")["container"]["resources"]["limits"]


def test_an_audit_is_triggered_by_the_retrain_of_its_project_and_branch(
    deployed: Retrains, config: Path, server: str, packages: Path
) -> None:
    environment = deployment(deployed.home, server, packages)
    for options, branch in (("--production",), "prod"), (("--branch", "x"), "test.x"):
        audit = rendered(FLOW.with_name("audit_flow.py"), config, environment, *options)
        (trigger,) = json.loads(audit["metadata"]["annotations"]["metaflow/triggers"])
        assert trigger == {"name": f"metaflow.posttrain.{branch}.RetrainFlow.end", "type": "run"}


VALIDATE = """
import json, sys
from hera.workflows.models import WorkflowTemplate
WorkflowTemplate.model_validate(json.load(sys.stdin))
"""


@pytest.mark.parametrize("broken", [False, True])
def test_the_manifest_is_one_by_argo_s_schema(manifest: dict[str, Any], packages: Path, broken: bool) -> None:
    text = json.dumps(manifest)
    if broken:
        text = text.replace('"activeDeadlineSeconds": 18000', '"activeDeadlineSeconds": {"hours": 5}')
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    done = subprocess.run([sys.executable, "-c", VALIDATE], input=text, env=environment, capture_output=True, text=True)
    assert (done.returncode != 0) == broken, done.stderr


@pytest.mark.skipif(not has_namespaces(), reason="no process may have mounts of its own here")
@pytest.mark.timeout(1200)
def test_the_containers_run_in_empty_folders(manifest: dict[str, Any], deployed: Retrains, server: str) -> None:
    """A first version; then a container that is run a second time, as Argo does where the first's node went away."""
    deployed.land("2026-03-01.jsonl", 1)
    pods = Pods(manifest, deployed.home, server, "retrain-a")
    for step in STEPS:
        done = pods.run(step)
        assert done.returncode == 0, f"{step}\n{done.stdout}\n{done.stderr}"
    assert current_of(deployed) == 1
    history = promoted.pointer_of(Store(deployed.home / "store"), "tiny").history
    assert [entry.run for entry in history] == ["RetrainFlow/argo-retrain-a"]
    again = pods.run("promote", retries=1)
    assert again.returncode == 0, again.stdout + again.stderr
    assert promoted.pointer_of(Store(deployed.home / "store"), "tiny").history == history


def current_of(deployed: Retrains) -> int | None:
    return promoted.pointer_of(Store(deployed.home / "store"), "tiny").current


def test_step_functions_take_the_flow_and_its_schedule(deployed: Retrains, config: Path, server: str) -> None:
    """A real deployment, to a server of the same interface: a state machine, and the rule that starts it."""
    clients = batch_queue(server)
    environment = {
        **deployment(deployed.home, server, Path("/nowhere")),
        "AWS_ENDPOINT_URL": server,
        "METAFLOW_SFN_IAM_ROLE": "arn:aws:iam::123456789012:role/states",
        "METAFLOW_EVENTS_SFN_ACCESS_IAM_ROLE": "arn:aws:iam::123456789012:role/events",
        "METAFLOW_ECS_S3_ACCESS_IAM_ROLE": "arn:aws:iam::123456789012:role/tasks",
        "METAFLOW_BATCH_JOB_QUEUE": "queue",
        "METAFLOW_BATCH_CONTAINER_IMAGE": "registry.example/posttrain:1",
    }
    command = [sys.executable, str(FLOW), "--no-pylint", "--config", str(config), "--production"]
    done = subprocess.run(
        [*command, "step-functions", "create"], env=environment, cwd=deployed.home, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (rule,) = clients["events"].list_rules()["Rules"]
    assert (rule["State"], rule["ScheduleExpression"]) == ("ENABLED", "cron(0 3 * * ? *)")
    (machine,) = clients["stepfunctions"].list_state_machines()["stateMachines"]
    found = clients["stepfunctions"].describe_state_machine(stateMachineArn=machine["stateMachineArn"])
    states = json.loads(found["definition"])["States"]
    assert set(states) == set(STEPS)
    train = states["train"]
    assert train["Parameters"]["RetryStrategy"] == {"Attempts": 3}  # with the first
    assert train["Parameters"]["Timeout"] == {"AttemptDurationSeconds": 5 * 3600}
    assert states["start"]["Next"] == "prepare" and states["end"]["End"]


def batch_queue(url: str) -> dict[str, Any]:
    """A queue of AWS Batch with the least that it needs; clients of the services that a deployment writes to."""
    boto3 = pytest.importorskip("boto3")
    services = ("ec2", "iam", "batch", "events", "stepfunctions")
    clients = {name: boto3.client(name, endpoint_url=url, region_name="us-east-1") for name in services}
    network = clients["ec2"].create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    subnet = clients["ec2"].create_subnet(VpcId=network, CidrBlock="10.0.0.0/24")["Subnet"]["SubnetId"]
    group = clients["ec2"].create_security_group(GroupName="batch", Description="batch", VpcId=network)["GroupId"]
    role = clients["iam"].create_role(RoleName="batch", AssumeRolePolicyDocument="{}")["Role"]["Arn"]
    profile = clients["iam"].create_instance_profile(InstanceProfileName="batch")["InstanceProfile"]["Arn"]
    computers = clients["batch"].create_compute_environment(
        computeEnvironmentName="computers",
        type="MANAGED",
        state="ENABLED",
        serviceRole=role,
        computeResources={
            "type": "EC2", "minvCpus": 0, "maxvCpus": 4, "instanceTypes": ["optimal"], "instanceRole": profile,
            "subnets": [subnet], "securityGroupIds": [group],
        },
    )["computeEnvironmentArn"]  # fmt: skip
    order = [{"order": 1, "computeEnvironment": computers}]
    clients["batch"].create_job_queue(jobQueueName="queue", state="ENABLED", priority=1, computeEnvironmentOrder=order)
    return clients
