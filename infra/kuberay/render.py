"""Fill the KubeRay manifest from a run file's compute section; prints it.

    ./infra/env python infra/kuberay/render.py --config configs/sft/default.yaml --image registry/posttrain:1 \
        --claim shared-volume --set compute.nodes=2 | kubectl apply -f -

The image holds this checkout, installed as infra/env installs it, with the same run file at the same path, and is the
same for head and workers: Ray wants equal versions everywhere.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shlex
import sys
from pathlib import Path
from string import Template

from posttrain_lib.config import RunConfig, load_run_config
from steps.pipeline import add_config_arguments, plain_errors

MANIFEST = Path(__file__).with_name("ray_job.yaml")


def render(
    config: RunConfig,
    *,
    config_path: str,
    overrides: list[str],
    image: str,
    claim: str,
    cpus_per_device: int,
    memory_per_device: int,
) -> str:
    """The manifest as YAML. ``memory_per_device``: GiB of the node for each device."""
    compute = config.compute
    devices = compute.devices_per_node
    resources = {"cpu": str(cpus_per_device * devices), "memory": f"{memory_per_device * devices}Gi"}
    if compute.device != "cpu":
        resources["nvidia.com/gpu"] = str(devices)
    command = ["python", "-m", "steps.train", "--config", config_path]
    # auto: Ray tells the jobs that it runs where it is
    for override in [*overrides, "compute.address=auto"]:
        command += ["--set", override]
    return Template(MANIFEST.read_text(encoding="utf-8")).substitute(
        name=config.name.lower().replace("_", "-").replace(".", "-"),
        entrypoint=json.dumps(shlex.join(command)),
        retries=compute.retries,
        ray_version=importlib.metadata.version("ray"),
        image=json.dumps(image),
        claim=json.dumps(claim),
        nodes=compute.nodes,
        resources=json.dumps(resources),
    )


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description="Print a KubeRay RayJob that runs the step train on a run file.")
    add_config_arguments(parser)
    parser.add_argument("--image", required=True, help="container image with this project and its environment")
    parser.add_argument("--claim", required=True, help="PersistentVolumeClaim that all nodes can write to")
    parser.add_argument("--cpus-per-device", type=int, default=8, help="CPU cores for each device (default: 8)")
    parser.add_argument("--memory-per-device", type=int, default=64, help="GiB of memory for each device (default: 64)")
    options = parser.parse_args()
    with plain_errors():
        config = load_run_config(options.config, options.set)
    sys.stdout.write(
        render(
            config,
            config_path=str(options.config),
            overrides=options.set,
            image=options.image,
            claim=options.claim,
            cpus_per_device=options.cpus_per_device,
            memory_per_device=options.memory_per_device,
        )
    )


if __name__ == "__main__":
    main()
