"""The fallback: a decoder that is transformers' own class, for architectures without a definition of ours.

It offers what losses, evaluation and export use of :class:`~posttrain_lib.models.decoder.Decoder`: packed tokens in,
whatever the output makes of the last hidden states out. Packed equals alone by construction, for attention and
recurrences alike: every document is run by itself, from its first token, those of one length together.

The class is listened to at its output projection. What it does to the product behind that (a scale, a soft cap) is
measured by handing it products of our own, so no field of any configuration has to be known by name; what cannot be
said as an :class:`~posttrain_lib.ops.output_head.OutputHead` is refused. What all this lacks is :data:`LACKS`.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from posttrain_lib.adapters.hf_reference_class import native_class, native_config
from posttrain_lib.errors import ModelError
from posttrain_lib.models.heads import Output, full_logits
from posttrain_lib.models.hf_spec import HFSpec
from posttrain_lib.ops.output_head import OutputHead

if TYPE_CHECKING:
    from posttrain_lib.models.decoder import Decoder
    from posttrain_lib.ops.cache import KeyValueCache
    from posttrain_lib.schema.shared_prefix import SharedPrefixes

# Tokens of the forward that the head is measured in: a handful, so that their entries hold all probed values.
_PROBE_TOKENS = 4
# Powers of two: a product with one is exact, so a scale comes out as it is. 2^16 is above any logit that occurs.
_PROBE_EXPONENTS = range(-8, 17)
# Far above any cap: a bounded head gives the bound itself.
_SATURATED = 2.0**40
# A scale behind a cap is read off tanh's inverse in float64, of values that carry float32's rounding of 2^-24 each.
_READ_OFF = 1e-5
# Product by the scale, division by the cap, tanh (2 units in the last place), product with the cap.
_HEAD_ROUNDING = 6 * 2.0**-24


class _ListeningHead(nn.Linear):
    """An output projection that keeps what comes in and computes nothing; ``given`` is what it pretends to give."""

    hidden: Tensor | None = None
    given: Tensor | None = None

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        """Keep the hidden states. New zeros stand in for logits, for a class may change those in place."""
        self.hidden = hidden_BSD
        return hidden_BSD.new_zeros(*hidden_BSD.shape[:-1], 1) if self.given is None else self.given


class HFDecoder(nn.Module):
    """A causal language model of transformers behind the interface of our decoder.

    ``inner`` is transformers' model; parameters are named as it names them, with ``inner.`` in front. ``layers`` are
    its blocks.

    Raises:
        ModelError: the class has no plain output projection, does not run on plain token ids, or does more to its
            logits than a scale and a soft cap.
    """

    def __init__(self, spec: HFSpec, inner: nn.Module) -> None:
        super().__init__()
        self.spec, self.config = spec, spec.config
        self.inner = inner
        self._listen()
        self.logit_scale, self.logit_softcap = self._measure_head()
        self.train(False)

    def train(self, mode: bool = True) -> HFDecoder:
        """Always evaluation mode: a step must not depend on dropout, which our own definitions do not have either."""
        super().train(False)
        return self

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks, which recomputation wraps.

        Raises:
            ModelError: no list of as many modules as the model has layers.
        """
        for module in self.inner.modules():
            if isinstance(module, nn.ModuleList) and len(module) == self.config.num_hidden_layers:
                return module
        raise ModelError(
            "the blocks of the model are not found in transformers' class",
            where=self.spec.architecture,
            expected=f"a list of {self.config.num_hidden_layers} modules",
            fix="set train.activation_checkpointing: none",
        )

    @property
    def head_weight(self) -> Tensor:
        """[V, D] weight of the output projection; the embedding's where they are tied."""
        return self._head.weight

    @property
    def output_head(self) -> OutputHead:
        """The head as losses and samplers use it. A bias is one more column, which :meth:`forward` multiplies by 1."""
        head = self._head
        weight = head.weight if head.bias is None else torch.cat([head.weight, head.bias[:, None]], dim=1)
        return OutputHead(weight, scale=self.logit_scale, softcap=self.logit_softcap)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        output: Output = full_logits,
        *,
        prefixes: SharedPrefixes | None = None,
        cache: KeyValueCache | None = None,
    ) -> Any:
        """Run each document by itself and hand the hidden states of all to ``output``; arguments as of
        :meth:`posttrain_lib.models.decoder.Decoder.forward`. ``positions`` are what they must be, and not read; a
        ``cache`` keeps the tokens alone."""
        bounds = cu_seqlens.tolist()
        own = [end - begin for begin, end in pairwise(bounds)]
        documents = list(token_ids.split(own))
        if cache is not None:
            documents = _with_past(documents, cache)
        elif prefixes is not None:
            documents = list(token_ids[prefixes.key_index].split(prefixes.key_lengths))
        hidden = self._run(documents, own)
        if self._head.bias is not None:
            hidden = torch.cat([hidden, torch.ones_like(hidden[:, :1])], dim=1)
        return output(hidden, self.output_head)

    def _run(self, documents: list[Tensor], own: list[int]) -> Tensor:
        """[T, D]: of each document the hidden states of its last ``own`` tokens, one after the other."""
        by_length: dict[int, list[int]] = {}
        for number, document in enumerate(documents):
            if own[number]:
                by_length.setdefault(len(document), []).append(number)
        parts: dict[int, Tensor] = {}
        for length, numbers in by_length.items():
            hidden_BSD = self._last_hidden(torch.stack([documents[number] for number in numbers]))
            parts.update({n: hidden_BSD[row, length - own[n] :] for row, n in enumerate(numbers)})
        return torch.cat([parts[number] for number in sorted(parts)])

    def _last_hidden(self, token_ids_BS: Tensor) -> Tensor:
        """[B, S, D]: what the class gives its output projection."""
        self.inner(input_ids=token_ids_BS, use_cache=False)
        hidden, self._head.hidden = self._head.hidden, None
        if hidden is None or hidden.shape[:2] != token_ids_BS.shape:
            raise self._refused("does not put all hidden states through its output projection")
        return hidden

    @property
    def _head(self) -> _ListeningHead:
        head: _ListeningHead = self.inner.get_output_embeddings()  # type: ignore[operator]
        return head

    def _listen(self) -> None:
        head: Any = self.inner.get_output_embeddings()  # type: ignore[operator]
        embedding: Any = self.inner.get_input_embeddings()  # type: ignore[operator]
        if type(head) is not nn.Linear:
            raise self._refused(f"has no plain output projection, but {type(head).__name__}")
        if head.weight.shape[0] != embedding.weight.shape[0]:
            raise self._refused(
                f"has {embedding.weight.shape[0]} rows in its embedding and {head.weight.shape[0]} in its head"
            )
        head.__class__ = _ListeningHead

    @torch.no_grad()
    def _measure_head(self) -> tuple[float, float | None]:
        """(scale, soft cap) of the class, measured on products of all sizes and held against every one of them."""
        rows, head = self.config.vocab_size, self._head
        sizes = 2.0 ** torch.tensor(list(_PROBE_EXPONENTS), dtype=torch.float64)
        probes = torch.cat([sizes, -sizes, torch.tensor([_SATURATED])])
        numbers = torch.arange(_PROBE_TOKENS * rows) % len(probes)
        product = probes[numbers].view(1, _PROBE_TOKENS, rows)
        head.given = product.to(head.weight)
        token_ids = torch.zeros(1, _PROBE_TOKENS, dtype=torch.int64, device=head.weight.device)
        try:
            logits = self.inner(input_ids=token_ids, use_cache=False).logits
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
            raise self._refused("does not run on token ids alone", got=f"{type(error).__name__}: {error}") from error
        finally:
            head.given = head.hidden = None
        if logits.shape != product.shape:
            raise self._refused(
                f"makes logits of shape {tuple(logits.shape)} out of a product of {tuple(product.shape)}"
            )
        found = logits.double().cpu()
        place = {float(value): found.flatten()[number] for number, value in enumerate(probes[: found.numel()].tolist())}
        if len(place) < len(probes):
            raise self._refused(f"has a vocabulary of {rows}, too small to measure its head")
        bound = float(place[_SATURATED])
        cap = bound if abs(bound) < _SATURATED / 2**20 else None
        if cap is None:
            scale = self._stated(float(place[1.0]))
        else:
            small = 2.0 ** _PROBE_EXPONENTS[0]
            scale = self._stated(float(torch.atanh(place[small] / cap)) * cap / small)
        said = OutputHead(torch.ones(1, 1), scale=scale, softcap=cap).logits(product.float().view(-1, 1)).view_as(found)
        apart = (said.double() - found).abs()
        if not bool((apart <= _HEAD_ROUNDING * found.abs()).all()):
            raise self._refused(
                "does more to its logits than a scale and a soft cap",
                got=f"off by {float(apart.max()):.3g} with scale {scale:g} and cap {cap}",
            )
        return scale, cap

    def _stated(self, measured: float) -> float:
        """The number of the configuration, or its inverse, that a measured one is up to rounding; else as measured."""
        numbers = [v for v in self.spec.hf_config.values() if isinstance(v, int | float) and not isinstance(v, bool)]
        stated = [1.0, *map(float, numbers), *(1.0 / value for value in numbers if value)]
        return next((value for value in stated if abs(value - measured) <= _READ_OFF * abs(measured)), measured)

    def _refused(self, why: str, got: object = None) -> ModelError:
        return ModelError(
            f"transformers' class cannot be trained here: it {why}",
            where=self.spec.architecture,
            got=got,
            fix="add a definition of the architecture (flows/convert_flow.py looks for one)",
        )


def _with_past(new: list[Tensor], cache: KeyValueCache) -> list[Tensor]:
    """Each sequence's kept tokens and its new ones behind them, which the cache keeps from now on."""
    kept = cache.state(0)
    tokens = new[0].new_zeros(cache.sequences, cache.capacity) if kept is None else kept[0].clone()
    sequences = []
    for row, before, added in zip(tokens, cache.lengths.tolist(), new, strict=True):
        row[before : before + len(added)] = added
        sequences.append(row[: before + len(added)])
    cache.set_state(0, (tokens,))
    return sequences


def load_hf_decoder(spec: HFSpec, folder: str | Path, device: str | torch.device = "cpu") -> HFDecoder:
    """transformers' model of a local folder, float32 weights, on a device.

    Raises:
        ModelError: a shard is missing or damaged, transformers refuses the folder, does not find all weights or finds
            some that have no place, or the class does not do here (see :class:`HFDecoder`).
    """
    from posttrain_lib.adapters.hf_reference_parts import quiet
    from posttrain_lib.checkpoint.hf_files import read_headers
    from posttrain_lib.checkpoint.weight_files import need_local

    need_local(folder, "model.backend: hf lets transformers read it")
    read_headers(folder)  # it names the shard that is missing or cut
    where = str(Path(folder) / "config.json")
    kind = native_class(spec.hf_config, where)
    try:
        with quiet():
            inner, info = kind.from_pretrained(
                folder,
                config=native_config(spec.hf_config, where),
                dtype=torch.float32,
                output_loading_info=True,
                use_safetensors=True,
                attn_implementation="eager",  # the definition: fused ones leave soft caps out without a word
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError("transformers cannot load the model folder", where=folder, got=error) from error
    lost = sorted(str(name) for key in ("missing_keys", "mismatched_keys") for name in info[key])
    if lost:
        raise ModelError(
            "transformers does not find all weights in the folder",
            where=folder,
            got=", ".join(lost[:4]),
            fix="check that config.json belongs to these weights",
        )
    if unplaced := sorted(map(str, info["unexpected_keys"])):
        raise ModelError(
            "the weights hold tensors that transformers' class has no place for",
            where=folder,
            got=", ".join(unplaced[:4]),
            fix="check that config.json belongs to these weights",
        )
    return HFDecoder(spec, inner.requires_grad_(True)).to(device)


def as_decoder(model: HFDecoder) -> Decoder:
    """The same object, for annotations: it offers what the loop, losses and evaluation use of a Decoder."""
    return cast("Decoder", model)
