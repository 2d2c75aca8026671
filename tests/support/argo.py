"""Argo without a cluster: the manifest that Metaflow renders, and its pods as local processes in empty folders."""

from __future__ import annotations

import base64
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain_lib.lineage.digests import digest_file

ROOT = Path(__file__).resolve().parents[2]


def deploy_packages() -> Path:
    """The folder with the packages of infra/locks/deploy.txt, beside the environment; made when first asked for.

    Raises:
        CalledProcessError: pip could not install them; its words are in ``stderr``.
    """
    lock = ROOT / "infra" / "locks" / "deploy.txt"
    folder = Path(sys.prefix) / f"deploy-{digest_file(lock)[:12]}"
    if not folder.is_dir():
        coming = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(coming)]
        subprocess.run([*command, "-r", str(lock)], check=True, capture_output=True, text=True)
        coming.rename(folder)
    return folder


def deployment(home: Path, url: str, packages: Path) -> dict[str, str]:
    """The environment of who deploys: an S3 server at ``url`` with a bucket, the names of a cluster."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("METAFLOW_", "POSTTRAIN_"))},
        **s3_settings(url),
        **datastore(url),
        "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(home),
        "METAFLOW_KUBERNETES_NAMESPACE": "jobs",
        "METAFLOW_KUBERNETES_CONTAINER_IMAGE": "registry.example/posttrain:1",
        "METAFLOW_ARGO_EVENTS_EVENT": "metaflow-event",
        "METAFLOW_ARGO_EVENTS_EVENT_BUS": "default",
        "METAFLOW_ARGO_EVENTS_EVENT_SOURCE": "argo-events-webhook",
        "METAFLOW_ARGO_EVENTS_SERVICE_ACCOUNT": "operate-workflow-sa",
        "METAFLOW_USER": "tester",
        "PYTHONPATH": str(packages),
    }


def datastore(url: str) -> dict[str, str]:
    """Metaflow's own, in a bucket of the S3 server."""
    return {
        "METAFLOW_DEFAULT_DATASTORE": "s3",
        "METAFLOW_DATASTORE_SYSROOT_S3": "s3://posttrain/metaflow",
        "METAFLOW_DATATOOLS_S3ROOT": "s3://posttrain/data",
        "METAFLOW_S3_ENDPOINT_URL": url,
    }


def s3_settings(url: str) -> dict[str, str]:
    """What a client of the S3 server reads."""
    return {
        "AWS_ENDPOINT_URL_S3": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def rendered(flow: Path, config: Path | None, environment: dict[str, str], *options: str) -> dict[str, Any]:
    """The WorkflowTemplate of ``argo-workflows create --only-json``."""
    named = [] if config is None else ["--config", str(config)]
    command = [sys.executable, str(flow), "--no-pylint", *named, *options, "argo-workflows", "create", "--only-json"]
    home = environment["METAFLOW_DATASTORE_SYSROOT_LOCAL"]
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def has_namespaces() -> bool:
    """Whether a process may have mounts of its own."""
    return subprocess.run([*_with_a_mnt(Path("/usr")), "true"], capture_output=True).returncode == 0


def _with_a_mnt(folder: Path) -> list[str]:
    """What runs a command with ``folder`` as its /mnt, where Metaflow writes what Argo reads."""
    return ["unshare", "-rm", "bash", "-c", 'mount --bind "$0" /mnt && exec "$@"', str(folder)]


@dataclass
class Pods:
    """Runs the containers of one workflow, each in an empty folder, with Argo's placeholders filled in."""

    manifest: dict[str, Any]
    home: Path
    url: str
    name: str
    settings: dict[str, str] = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    tasks: dict[str, str] = field(default_factory=dict)

    def run(self, step: str, retries: int = 0) -> subprocess.CompletedProcess[str]:
        """The container of a step; the task's id is noted for the steps behind it, as Argo's output parameter is."""
        container = next(each for each in self.manifest["spec"]["templates"] if each["name"] == step)["container"]
        folder = self.home / f"{self.name}-{step}-{retries}"
        out, pod, paths = folder / "mnt" / "out", folder / "pod", folder / "input-paths"
        for each in (out, pod):
            each.mkdir(parents=True)
        filled = [self._filled(part, step, retries) for part in container["command"]]
        # One file for every pod of the machine, which here are several.
        command = [*_with_a_mnt(folder / "mnt"), *(re.sub(r"/\w+/mf-input-paths", str(paths), part) for part in filled)]
        environment = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(folder),
            "METAFLOW_SKIP_INSTALL_DEPENDENCIES": "1",  # as an image that has them says
            # what a kubelet fills in, as the pod's name
            **{each["name"]: "local" for each in container["env"] if (each.get("valueFrom") or {}).get("fieldRef")},
            "OMP_NUM_THREADS": "1",
            **s3_settings(self.url),
            **{
                each["name"]: self._filled(each["value"], step, retries)
                for each in container["env"]
                if each.get("value") is not None
            },
            **self.settings,
        }
        done = subprocess.run(command, env=environment, cwd=pod, capture_output=True, text=True, timeout=500)
        if (out / "task_id").is_file():
            self.tasks[step] = (out / "task_id").read_text().strip()
        return done

    def _filled(self, text: str, step: str, retries: int) -> str:
        dag = next(each for each in self.manifest["spec"]["templates"] if "dag" in each)["dag"]["tasks"]
        inputs = {
            each["name"]: each["value"]
            for task in dag
            if task["name"] == step
            for each in task["arguments"]["parameters"]
        }
        values = {f"inputs.parameters.{name}": value for name, value in inputs.items()}
        values |= {f"tasks.{name}.outputs.parameters.task-id": value for name, value in self.tasks.items()}
        values |= {
            "workflow.name": self.name,
            "workflow.namespace": "jobs",
            "workflow.creationTimestamp": self.created,
            "retries": str(retries),
        }
        for given in self.manifest["spec"]["arguments"]["parameters"]:
            encoded = base64.b64encode(given["value"].encode()).decode()
            values[f"=toBase64(workflow.parameters['{given['name']}'])"] = encoded
        for _ in range(2):  # an input's value has placeholders of its own
            for name, value in values.items():
                text = text.replace("{{" + name + "}}", value)
        return text
