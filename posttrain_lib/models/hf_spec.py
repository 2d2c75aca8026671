"""What a model is that has no definition here: transformers' class of it, and the few facts that a plan needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain_lib.adapters.hf_reference_class import native_class, native_config
from posttrain_lib.errors import ConfigError, ModelError
from posttrain_lib.models.families import read_hf_config
from posttrain_lib.models.families.foreign import refuse_quantised

#: what a run with ``model.backend: hf`` does without, in the words of plan, report and export
LACKS: tuple[str, ...] = (
    "the gate: no second implementation is there to compare logits, modules and gradients with",
    "fused attention: it is the class's eager one, which holds a document's square of scores",
    "packed rows: each document is a forward of its own, those of one length together",
    "shared beginnings: they are computed again for every document that has them",
    "cached generation: each new token runs its whole sequence again",
    "more than one worker (FSDP2, tensor parallelism)",
    "low-rank adapters",
    "new tokens, and a vocabulary padded in memory",
    "loading by regions: transformers reads the whole model from a local folder",
    "compiled blocks",
    "dropout and other habits of the class's training mode: it runs in evaluation mode, as our own definitions do",
    "a gradient for the embedding of the padding token, which transformers leaves out",
    "exact FLOP counts: FLOPs and MFU are estimates",
)

# How configurations spell the number of experts, and how many of them a token goes through.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "top_k_experts")
#: positions of a class without a bound of its own: what int32, their type in a batch, can say
UNBOUNDED = 2**31 - 1


@dataclass(frozen=True)
class HFFacts:
    """What is asked of a decoder's configuration.

    Every document is run whole from its first token, so beginnings that documents share, recurrences and rotary
    embeddings that go by the length need no care: ``is_recurrent`` and ``changes_rope`` say so.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    is_recurrent: bool = False
    score_head: bool = False

    def changes_rope(self, before: int, after: int) -> bool:
        """Never: nothing of a document's earlier tokens is kept."""
        return False


@dataclass(frozen=True)
class HFSpec:
    """A model of transformers.

    ``family`` is its ``model_type``, ``architecture`` the class. ``body_parameters`` and ``head_parameters`` take part
    in a matrix product per token, ``flops_per_pair`` are those of one query-key pair over all layers, forward and
    backward: estimates, since what a class computes is not known here.
    """

    family: str
    architecture: str
    config: HFFacts
    parameters: int
    body_parameters: int
    head_parameters: int
    flops_per_pair: float
    hf_config: Mapping[str, Any] = field(default_factory=dict)


def hf_spec_from_folder(folder: str | Path) -> HFSpec:
    """The HFSpec of a Hugging Face folder. ModelError where config.json is missing, broken or unsupported."""
    return hf_spec_from_config(read_hf_config(folder), where=str(Path(folder) / "config.json"))


def hf_spec_from_config(hf_config: Mapping[str, Any], where: str = "config.json") -> HFSpec:
    """The HFSpec of a config.json's content; the class is built without memory.

    Raises:
        ModelError: a quantised model, code in the folder, a type that transformers has no causal language model for,
            another architecture than that one, a configuration that transformers refuses.
    """
    import torch

    refuse_quantised(hf_config, where)
    kind, config = native_class(hf_config, where), native_config(hf_config, where)
    given = hf_config.get("architectures")
    if given is not None and list(given) != [kind.__name__]:
        raise ModelError(
            "the model is not a plain causal language model of its type",
            where=f"{where}: architectures",
            got=given,
            expected=[kind.__name__],
            fix="export the causal language model part of it as a folder of its own",
        )
    text = config.get_text_config()
    try:
        with torch.device("meta"):
            model = kind(config)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        raise ModelError("transformers refuses this configuration", where=where, got=error) from error
    body, head = _matmul_parameters(model, text)
    return HFSpec(
        family=str(hf_config["model_type"]),
        architecture=kind.__name__,
        config=HFFacts(
            vocab_size=model.get_input_embeddings().weight.shape[0],
            hidden_size=text.hidden_size,
            num_hidden_layers=text.num_hidden_layers,
            max_position_embeddings=getattr(text, "max_position_embeddings", None) or UNBOUNDED,
            tie_word_embeddings=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        ),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        body_parameters=body,
        head_parameters=head,
        flops_per_pair=_flops_per_pair(text),
        hf_config=dict(hf_config),
    )


def marks(backend: str) -> dict[str, Any]:
    """What a step's record and an exported folder say of the backend; of our own definitions nothing."""
    return {"backend": backend, "lacks": list(LACKS)} if backend == "hf" else {}


def check_workers(workers: int) -> None:
    """One process: documents differ in number from rank to rank, and sharded blocks would wait for each other.

    Raises:
        ConfigError: more than one worker.
    """
    if workers > 1:
        raise ConfigError(
            "model.backend hf runs in one worker",
            where="compute.devices_per_node",
            got=workers,
            expected=1,
            fix="set compute.devices_per_node: 1, or use an architecture that has a definition here",
        )


def _matmul_parameters(model: Any, text: Any) -> tuple[int, int]:
    """(body, head): entries of matrices besides embeddings, experts by the share that a token goes through."""
    from torch import nn

    head = model.get_output_embeddings().weight
    every, chosen = _first(text, _EXPERTS), _first(text, _CHOSEN)
    share = chosen / every if every and chosen else 1.0
    body = 0.0
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter is head or parameter.dim() < 2:
                continue
            joined = parameter.dim() == 3 and parameter.shape[0] == every
            if joined or "experts" in path.split("."):
                body += parameter.numel() * share
            elif parameter.dim() == 2:  # convolutions over few tokens have three
                body += parameter.numel()
    return round(body), head.numel()


def _flops_per_pair(text: Any) -> float:
    """As of plain attention in every layer; 0 for a class without heads."""
    heads = _first(text, ("num_attention_heads",))
    if not heads:
        return 0.0
    width = _first(text, ("head_dim",)) or text.hidden_size / heads
    return 12.0 * heads * width * text.num_hidden_layers


def _first(text: Any, names: tuple[str, ...]) -> float | None:
    """The first of these fields that holds a number."""
    values = (getattr(text, name, None) for name in names)
    return next((value for value in values if isinstance(value, int | float) and not isinstance(value, bool)), None)
