"""The equality gate: a fast engine is used only if it gives, on every text of a hard set, what Hugging Face gives."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakValueDictionary

import numpy as np

from posttrain_lib.data.engine_texts import gate_texts
from posttrain_lib.data.engines import Encoded, Engine, GigatokenEngine, HfEngine, Unsupported

#: engines in use in this process, and what the gate said, by digest of tokenizer and texts
_ENGINES: WeakValueDictionary[str, GigatokenEngine] = WeakValueDictionary()
_VERDICTS: dict[str, GateReport] = {}


class FastEngine(Engine, Protocol):
    """An engine that has the reference read what it cannot read itself, and counts those texts by why."""

    fallbacks: Counter[str]


@dataclass(frozen=True)
class Difference:
    """A text, and the first place where the two disagree. ``where`` is "ids" or "offsets"."""

    text: str
    where: str
    expected: tuple[int, ...]
    got: tuple[int, ...]


@dataclass(frozen=True)
class GateReport:
    """What the gate found.

    ``tokenizer`` is a digest of tokenizer and conversations, ``characters`` counts the text compared, ``fallbacks`` how
    often the engine had the reference read a text, ``reason`` is empty where it passed. Small and picklable: hand it to
    a worker, which then need not ask again.
    """

    tokenizer: str
    engine: str
    version: str
    passed: bool
    cases: int
    characters: int
    fallbacks: int = 0
    reason: str = ""
    first_difference: Difference | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for lineage and receipts."""
        return dataclasses.asdict(self)


def gate(reference: Engine, engine: FastEngine, texts: Sequence[str]) -> GateReport:
    """Compare ids and character offsets, one by one and as a batch, until the first difference.

    An engine that fails on a text has not passed either, nor has one that had the reference read every text: that
    compares the reference with itself.
    """
    cases, own, difference, reason = 0, 0, None, ""
    try:
        batch = engine.encode_batch(texts)
        for cases, text in enumerate(texts, 1):
            before = engine.fallbacks.total()
            got = engine.encode_with_offsets(text)
            own += len(text) if engine.fallbacks.total() == before else 0
            difference = compare(text, reference.encode_with_offsets(text), got, batch[cases - 1])
            if difference is not None:
                reason = f"{difference.where} differ from Hugging Face's"
                break
        if not reason and not own:
            reason = f"nothing read by it: the reference read all of {cases} texts"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of an engine written in Rust is no Exception
        reason = f"it fails on text {cases}: {error!r}"
    read = sum(map(len, texts[:cases]))
    return GateReport("", engine.name, engine.version, not reason, cases, read, 0, reason, difference)


def compare(text: str, expected: Encoded, got: Encoded, batch_ids: np.ndarray) -> Difference | None:
    """The first difference between the two, None where they are equal."""
    for ids in (got.ids, batch_ids):
        if not np.array_equal(expected.ids, ids):
            return Difference(text, "ids", tuple(expected.ids.tolist()), tuple(ids.tolist()))
    for name in ("begins", "ends"):
        ours, theirs = getattr(got, name), getattr(expected, name)
        if not np.array_equal(theirs, ours):
            return Difference(text, "offsets", tuple(theirs.tolist()), tuple(ours.tolist()))
    return None


def choose_engine(
    tokenizer: Any, rendered: Sequence[str] = (), verdict: GateReport | None = None
) -> tuple[Engine, GateReport]:
    """The fast engine where the gate passes, else the reference; once per tokenizer and process.

    Args:
        tokenizer: a ``transformers`` tokenizer of the fast kind.
        rendered: conversations in the template that will be used.
        verdict: what the gate said in another process; believed if it is of this tokenizer, these texts and this
            version of the engine.
    """
    content = tokenizer.backend_tokenizer.to_str()
    facts = [type(tokenizer).__name__, str(getattr(tokenizer, "split_special_tokens", False)), content, *rendered]
    digest = hashlib.sha256("\x00".join(facts).encode("utf-8", "surrogatepass")).hexdigest()
    name, version = GigatokenEngine.name, GigatokenEngine.installed_version()
    asked = (_VERDICTS.get(digest), verdict)
    known = next((said for said in asked if said and (said.tokenizer, said.version) == (digest, version)), None)
    reference, engine = HfEngine(tokenizer), None
    if known is None or known.passed:
        try:
            engine = _ENGINES.get(digest) or GigatokenEngine(tokenizer, content)
        except Unsupported as error:
            known = GateReport(digest, name, version, False, 0, 0, reason=str(error))
    if known is None and engine is not None:
        markers = sorted(token.content for token in tokenizer.added_tokens_decoder.values())
        found = gate(reference, engine, gate_texts(markers, rendered))
        known = dataclasses.replace(found, tokenizer=digest, fallbacks=engine.fallbacks.total())
        engine.fallbacks.clear()
    assert known is not None
    _VERDICTS[digest] = known
    if engine is None or not known.passed:
        return reference, known
    _ENGINES[digest] = engine
    return engine, known


@dataclass(frozen=True)
class AutoDifferences:
    """``AutoTokenizer`` against the tokenizer.json it came with: texts compared, texts that differ, the first one.

    In ``first`` what is expected is the file's, what is got is ``AutoTokenizer``'s.
    """

    tokenizer_class: str
    cases: int
    differing: int
    first: Difference | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for lineage and receipts."""
        return dataclasses.asdict(self)


def autotokenizer_differences(folder: Path | str) -> AutoDifferences:
    """Ids by ``AutoTokenizer``, which rebuilds some classes' steps by its own rules, against the file read as it is."""
    import tokenizers
    from transformers import AutoTokenizer

    rebuilt = AutoTokenizer.from_pretrained(folder)
    rebuilt.model_max_length = 2**31
    plain = tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    plain.no_padding()
    plain.no_truncation()
    texts = gate_texts(sorted(token.content for token in plain.get_added_tokens_decoder().values()))
    expected = [found.ids for found in plain.encode_batch_fast(texts, add_special_tokens=False)]
    got = rebuilt(texts, add_special_tokens=False)["input_ids"]
    differing = [place for place in range(len(texts)) if expected[place] != got[place]]
    first = None
    if differing:
        place = min(differing, key=lambda place: len(texts[place]))
        first = Difference(texts[place], "ids", tuple(expected[place]), tuple(got[place]))
    return AutoDifferences(type(rebuilt).__name__, len(texts), len(differing), first)
