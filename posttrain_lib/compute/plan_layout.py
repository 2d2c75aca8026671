"""What a plan is made from: how a config lays a model over its devices, what the mesh asks of the model, and what
devices and nodes have."""

from __future__ import annotations

from posttrain_lib.compute.plan_memory import Layout
from posttrain_lib.config import RunConfig
from posttrain_lib.models.spec import ModelSpec

GIB = 2**30
#: name -> GiB of memory, by the makers' data sheets (decimal gigabytes there are taken as what CUDA reports, about 2 %
#: less than that many GiB)
DEVICE_GIB = {
    "GB200": 186, "B200": 180, "H200": 141, "H100": 80, "A100": 80, "A100-40": 40, "L40S": 48, "A10": 24,
    "RTX 4090": 24, "MI300X": 192,
}  # fmt: skip
_REPORTED = 0.98


def layout_of(config: RunConfig) -> Layout:
    """How a config lays a model over its devices."""
    train, compute, lora = config.train, config.compute, config.model.lora
    return Layout(
        mesh=compute.mesh_spec(),
        row_tokens=train.row_tokens,
        rows_per_step=train.rows_per_step,
        micro_batch_rows=train.micro_batch_rows,
        recomputation=train.activation_checkpointing,
        precision=train.precision,
        moments=_moments(config),
        lora=lora,
        base_bytes=2 if lora is not None and lora.base_dtype == "bfloat16" else 4,
        offload=compute.offload == "parameters",
        cuda=_on_cuda(config),
        emulated=not _on_cuda(config) and _emulates(),
    )


def _moments(config: RunConfig) -> int:
    """Float32 tensors of a parameter's size; of optimisers that are not ours, as many as AdamW's are assumed."""
    optimizer = config.train.optimizer
    if optimizer.name == "sgd":
        return 1 if optimizer.options.get("momentum") else 0
    return 3 if optimizer.options.get("amsgrad") else 2


def _on_cuda(config: RunConfig) -> bool:
    if config.compute.device != "auto" or config.compute.gpu is not None:
        return config.compute.device != "cpu"
    import torch

    return torch.cuda.is_available()


def _emulates() -> bool:
    import torch

    from posttrain_lib.ops.attention import has_arithmetic

    return not has_arithmetic(torch.device("cpu"), torch.bfloat16)


def device_of(config: RunConfig) -> tuple[str, int | None]:
    """(what the device is, its bytes or None): as configured, by its name, or this machine's own."""
    compute = config.compute
    if compute.device_memory_gib is not None:
        return compute.gpu or "compute.device_memory_gib", int(compute.device_memory_gib * GIB)
    if compute.gpu is not None:
        return compute.gpu, int(DEVICE_GIB[compute.gpu] * GIB * _REPORTED)
    if compute.address is not None or compute.nodes > 1:
        return "not known: compute.gpu or compute.device_memory_gib names it", None
    if _on_cuda(config):
        import torch

        if not torch.cuda.is_available():
            return "a GPU that is not here", None
        return torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory
    return f"this machine's free memory / {compute.devices_per_node}", _free_here() // compute.devices_per_node


def check_mesh(spec: ModelSpec, config: RunConfig) -> None:
    """The mesh's degrees against the model: what each axis would refuse when the ranks build the model.

    Raises:
        ConfigError: naming the degree, and what it does not fit.
    """
    from posttrain_lib.parallel.context import check_context
    from posttrain_lib.parallel.experts import check_experts, even_dimension
    from posttrain_lib.parallel.tensor import check_tensor

    mesh = config.compute.mesh_spec()
    check_tensor(spec.config, mesh.tensor)
    check_experts(spec.config, mesh.expert)
    if mesh.expert > 1:
        shapes = {shape for name, shape in spec.parameter_shapes().items() if spec.sharding_of(name) == "expert"}
        for experts, *features in sorted(shapes):
            even_dimension((experts // mesh.expert, *features), mesh.shard * mesh.context // mesh.expert)
    check_context(spec.config, mesh.context, row_tokens=config.train.row_tokens, longest=config.data.max_example_tokens)


def host_of(config: RunConfig) -> int | None:
    """Bytes of a node's memory: as configured, or free here where the run is on this machine; None: not known."""
    compute = config.compute
    if compute.host_memory_gib is not None:
        return int(compute.host_memory_gib * GIB)
    return _free_here() if _is_here(config) else None


def _is_here(config: RunConfig) -> bool:
    """Whether the run's GPUs are this machine's; a GPU of another name is planned for elsewhere."""
    compute = config.compute
    if compute.address is not None or compute.nodes > 1:
        return False
    import torch

    return torch.cuda.is_available() and (compute.gpu or "").removesuffix("-40") in torch.cuda.get_device_name(0)


def _free_here() -> int:
    from posttrain_lib.checkpoint.verify import free_memory_bytes

    return free_memory_bytes()


def size(count: int) -> str:
    """Bytes in the unit in which their first digits stand."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"
