"""Rows into token stores: encode, split, count; refuse into a quarantine; stop where it must not go on."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from posttrain_lib.data.encoding import (
    EncodedRow,
    Example,
    RawRow,
    RowEncoder,
    encode_rows,
    make_encoder,
    name_rows,
)
from posttrain_lib.data.fingerprint import fingerprint
from posttrain_lib.data.formats import check_fields
from posttrain_lib.data.misfit import Misfits
from posttrain_lib.data.oddities import Oddities
from posttrain_lib.data.probes import check_maskable
from posttrain_lib.data.receipt import Receipt
from posttrain_lib.data.sources import files_of, names_of, read_from
from posttrain_lib.data.split import fraction_up_to
from posttrain_lib.data.token_store import TokenStoreWriter
from posttrain_lib.data.workers import OrderedPool
from posttrain_lib.errors import DataError
from posttrain_lib.schema.examples import TokenizedExample

if TYPE_CHECKING:
    from posttrain_lib.config.data import DataConfig

#: what a finished preparation leaves in its folder
TRAIN, HELD_OUT = "train", "held_out"
PROMPTS, RECEIPT, SAMPLES, QUARANTINE = "prompts.jsonl", "receipt.json", "samples.json", "quarantine.jsonl"
#: rows of the ``prompts`` format that training asks, in the order of their examples in the store
TRAIN_PROMPTS = "train_prompts.jsonl"

#: held-out prompts kept for evaluation, of every source and length alike
_MOST_PROMPTS = 2000
_SAMPLES_PER_SOURCE = 3
_SAMPLE_TOKENS = 600
_PROGRESS_SECONDS = 5.0
#: rows of one work item of a process
_CHUNK_ROWS = 64
#: starting processes takes seconds: as many work items are done without
_CHUNKS_ALONE = 16

Encoded = tuple[list[EncodedRow], Oddities]


def prepare_dataset(
    config: DataConfig,
    *,
    tokenizer_folder: str | Path,
    inputs: Mapping[str, str],
    out_dir: Path,
    rejects_dir: Path,
    progress: Callable[[str], None],
) -> Receipt:
    """Write token stores ``train`` and ``held_out``, prompts, samples, quarantine and receipt below ``out_dir``.

    Of a few groups of rows, chance may hold out none. Then one is held out, the first by its hash, and the rows are
    read again. Not with ``config.on_the_fly``, where training must tell held-out rows by the config alone.

    Args:
        inputs: source name -> path of its rows. ``config.chat_template`` is a path of this machine or None.
        rejects_dir: where receipt and quarantine are also put when the preparation stops; made then.

    Raises:
        DataError: more rows refused than the config allows, or all of the first ones of a source for one reason; a
            template that cannot be masked, rows of several kinds, nothing to train on or nothing held out. The stores
            are then not finished.
        ConfigError: an unknown format, or a field that it does not have.
    """
    preparation = _prepare(config, tokenizer_folder, inputs, out_dir, rejects_dir, progress)
    fraction = preparation.fraction_for_one_group()
    if fraction is None:
        return preparation.receipt
    progress(
        f"prepare_data: data.held_out.fraction {config.held_out.fraction:g} holds out none of the groups of rows; "
        f"reading again to hold out one"
    )
    for name in (TRAIN, HELD_OUT):
        shutil.rmtree(out_dir / name)
    wider = config.model_copy(update={"held_out": config.held_out.model_copy(update={"fraction": fraction})})
    preparation = _prepare(wider, tokenizer_folder, inputs, out_dir, rejects_dir, progress, one_group=True)
    return preparation.receipt


def _prepare(
    config: DataConfig,
    tokenizer_folder: str | Path,
    inputs: Mapping[str, str],
    out_dir: Path,
    rejects_dir: Path,
    progress: Callable[[str], None],
    *,
    one_group: bool = False,
) -> _Preparation:
    """One reading of all rows. Not finished where the next one shall hold out a group; ``one_group``: this is it."""
    for source in config.sources:
        check_fields(source.format, source.fields)
    encoder = RowEncoder(config, tokenizer_folder)
    check_maskable(encoder.tokenizer, config.chat_template or tokenizer_folder)
    files = {source.name: files_of(inputs[source.name]) for source in config.sources}
    with ExitStack() as stack:
        preparation = _Preparation(config, encoder, files, out_dir, rejects_dir, stack)
        preparation.receipt.notes["groups_held_out_against_chance"] += one_group
        for rows, oddities in _encoded(
            config, encoder, tokenizer_folder, preparation.chunks(), preparation.receipt, stack
        ):
            preparation.receipt.oddities.merge(oddities)
            for row in rows:
                preparation.add(row)
            preparation.report(progress)
        if preparation.fraction_for_one_group() is None:
            preparation.finish()
    return preparation


def _encoded(
    config: DataConfig,
    encoder: RowEncoder,
    tokenizer_folder: str | Path,
    chunks: Iterator[list[RawRow]],
    receipt: Receipt,
    stack: ExitStack,
) -> Iterator[Encoded]:
    """Every chunk encoded, in order: the first ones here, the rest by processes where the config allows."""
    workers = len(os.sched_getaffinity(0)) if config.workers is None else config.workers
    alone = chunks if workers < 2 and config.workers is None else itertools.islice(chunks, _CHUNKS_ALONE)
    yield from map(encoder.encode, alone)
    rest = next(chunks, None)
    if rest is None:
        return
    verdict = encoder.tokenizer.gate_verdict()
    arguments = (config, str(tokenizer_folder), verdict, True)
    pool: OrderedPool[list[RawRow], Encoded] = OrderedPool(workers, make_encoder, arguments, encode_rows, name_rows)
    stack.callback(pool.close)
    yield from pool.map(itertools.chain([rest], chunks))
    receipt.notes["worker_deaths"] += pool.deaths


class _Preparation:
    """The open files of a preparation and what is counted on the way."""

    def __init__(
        self,
        config: DataConfig,
        encoder: RowEncoder,
        files: Mapping[str, Sequence[str]],
        out: Path,
        rejects: Path,
        stack: ExitStack,
    ) -> None:
        self.config, self.tokenizer, self.out, self.rejects = config, encoder.tokenizer, out, rejects
        self.receipt = Receipt(config.max_refused_fraction)
        self._misfits = Misfits(config.sources)
        self._first_groups: set[int] = set()  # where the first two groups stand that gave examples
        self._names = [source.name for source in config.sources]
        self._files = files
        self._called = {name: names_of(files[name]) for name in self._names}
        self._rows_read = {name: [0] * len(files[name]) for name in self._names}
        made_by = fingerprint(encoder.tokenizer)
        self._stores = {
            name: stack.enter_context(TokenStoreWriter(out / name, fingerprint=made_by)) for name in (TRAIN, HELD_OUT)
        }
        self._quarantine = _open(stack, out / QUARANTINE)
        self._train_prompts = _open(stack, out / TRAIN_PROMPTS)
        self._samples: dict[str, list[dict[str, Any]]] = {}
        # The prompts with the smallest hashes of their row ids, largest first: a sample that no order decides.
        self._prompts: list[tuple[int, dict[str, Any]]] = []
        self._reported = time.monotonic()

    def chunks(self) -> Iterator[list[RawRow]]:
        """All rows in the order of reading, some at a time; at most the configured sample of each source."""
        most = self.config.on_the_fly_sample if self.config.on_the_fly else None
        for number, name in enumerate(self._names):
            rows = itertools.islice(self._rows_of(number, name), most)
            while chunk := list(itertools.islice(rows, _CHUNK_ROWS)):
                yield chunk

    def _rows_of(self, source: int, name: str) -> Iterator[RawRow]:
        for file, (path, called) in enumerate(zip(self._files[name], self._called[name], strict=True)):
            for place, row_id, content in read_from(path, name=called):
                self._rows_read[name][file] += 1
                yield RawRow(source, file, place.row, row_id, content)
            if not self._rows_read[name][file]:
                raise DataError("the data file has no rows", where=path, fix="remove it from the source, or fill it")

    def add(self, row: EncodedRow) -> None:
        """Take in what became of one row."""
        name, receipt = self._names[row.source], self.receipt
        receipt.row(name)
        receipt.notes["read_tokens"] += row.read_tokens
        receipt.notes["left_out_tokens"] += row.left_out_tokens
        self._misfits.see(name, row)
        if row.refused is not None:
            # A row that its author keeps out of the loss is no bad row.
            self._refuse(name, row.row_id, row.raw, *row.refused, whole_row=row.refused[0] != "nothing_to_train")
            with self._kept_rejects():
                self._misfits.stop_if_hopeless(name, self.rejects / QUARANTINE)
            return
        receipt.notes.update(row.notes)
        for row_id, reason, detail in row.left_out:
            self._refuse(name, row_id, row.raw, reason, detail, whole_row=False)
        row = self._without_repeated(name, row)
        if not row.examples:
            return
        self._first_groups = set(sorted({*self._first_groups, row.split_place})[:2])
        receipt.trained_prompts(row.answered)
        if row.kind == "pair":
            receipt.pair(row, self.tokenizer.special_ids)
        for example in row.examples:
            self._write(name, row, example)
        self._keep_prompt(row)

    def report(self, progress: Callable[[str], None]) -> None:
        """A line on how far it is, every few seconds."""
        if time.monotonic() - self._reported < _PROGRESS_SECONDS:
            return
        self._reported, receipt = time.monotonic(), self.receipt
        progress(
            f"prepare_data: {receipt.total('rows'):,} rows, {receipt.total('refused'):,} refused, "
            f"{receipt.total('tokens'):,} tokens"
        )

    def fraction_for_one_group(self) -> float | None:
        """What ``held_out.fraction`` would hold out one group of rows; None where some are, or that is not to be."""
        receipt = self.receipt
        none_of_several = receipt.total("held_out") == 0 and len(self._first_groups) > 1
        if self.config.on_the_fly or not none_of_several or receipt.refused_fraction > self.config.max_refused_fraction:
            return None
        return fraction_up_to(min(self._first_groups))

    def finish(self) -> None:
        """Write the small files, and stop where training would be in vain."""
        for name in self._names:
            for store in self._stores.values():
                store.state_files(name, list(zip(self._called[name], self._rows_read[name], strict=True)))
        engine = {name: value for name, value in self.tokenizer.engine_report.items() if name != "fallbacks"}
        self.receipt.made_by = {**fingerprint(self.tokenizer), "engine": engine}
        ordered = [prompt for _, prompt in sorted(self._prompts, key=lambda item: -item[0])]
        _write_lines(self.out / PROMPTS, [prompt for prompt in ordered if not self._is_leaked(prompt)])
        samples = [sample for found in self._samples.values() for sample in found]
        (self.out / SAMPLES).write_text(json.dumps(samples, ensure_ascii=False), encoding="utf-8")
        with self._kept_rejects():
            self._stop_if_in_vain()
        self._write_receipt(self.out)

    @contextmanager
    def _kept_rejects(self) -> Iterator[None]:
        """Where the preparation stops here, quarantine and receipt as they are then are put where they outlast it."""
        try:
            yield
        except DataError:
            self._quarantine.flush()
            self.rejects.mkdir(parents=True, exist_ok=True)
            self._write_receipt(self.rejects)
            unfinished = self.rejects / f"{QUARANTINE}.tmp"
            shutil.copyfile(self.out / QUARANTINE, unfinished)
            os.replace(unfinished, self.rejects / QUARANTINE)  # a part of it would be taken for all that was refused
            raise

    def _write_receipt(self, folder: Path) -> None:
        (folder / RECEIPT).write_text(json.dumps(self.receipt.to_dict(), indent=1), encoding="utf-8")

    def _without_repeated(self, source: str, row: EncodedRow) -> EncodedRow:
        """Count examples that came before; with ``deduplicate``, leave them out. A pair goes or stays as a whole."""
        if row.kind == "pair":  # each answer may have been compared with others before: of A > B > C come three pairs
            known = [self.receipt.is_duplicate(*row.examples)] * len(row.examples)
        else:
            known = [self.receipt.is_duplicate(example) for example in row.examples]
        if not self.config.deduplicate:
            self.receipt.notes["duplicate_examples"] += sum(known)
            return row
        kept: list[Example] = []
        shared = 0
        for example, repeated in zip(row.examples, known, strict=True):
            # What a document shares with one that is left out, it shares with the one before that at most.
            shared = min(shared, example.shared) if kept else 0
            if repeated:
                self.receipt.notes["left_out_tokens"] += len(example.ids)
                why = "an earlier row gave the same tokens"
                self._refuse(source, example.row_id, row.raw, "duplicate", why, whole_row=False)
                continue
            kept.append(replace(example, shared=shared))
            shared = len(example.ids)
        return replace(row, examples=tuple(kept))

    def _write(self, source: str, row: EncodedRow, example: Example) -> None:
        store = self._stores[HELD_OUT if row.held_out else TRAIN]
        tokenized = TokenizedExample(example.ids, example.weights, source, example.row_id)
        place = (row.file, row.row)
        store.add(tokenized, kind=row.kind, shared=example.shared, row=place, margin=example.margin)
        self.receipt.example(source, example, kind=row.kind, held_out=row.held_out, bos_id=self.tokenizer.bos_id)
        kept = self._samples.setdefault(source, [])
        if len(kept) < _SAMPLES_PER_SOURCE and not row.held_out:
            ids = example.ids[:_SAMPLE_TOKENS].tolist()
            weights = [round(float(weight), 4) for weight in example.weights[:_SAMPLE_TOKENS]]
            pieces = self.tokenizer.pieces(ids)
            kept.append({"source": source, "row_id": example.row_id, "tokens": pieces, "weights": weights})

    def _keep_prompt(self, row: EncodedRow) -> None:
        """Keep what serving would send: all prompts of training, a bounded sample of the held-out ones."""
        if row.prompt is None:
            return
        if not row.held_out:
            self._train_prompts.write(json.dumps(row.prompt, ensure_ascii=False) + "\n")
            return
        notes, prompt = self.receipt.notes, row.prompt
        notes["held_out_prompts"] += 1
        notes["held_out_prompts_kept"] += 1
        key = int.from_bytes(hashlib.sha256(f"{prompt['source']} {row.row_id}".encode()).digest()[:8], "big")
        bisect.insort(self._prompts, (-key, prompt), key=lambda item: item[0])
        if len(self._prompts) > _MOST_PROMPTS:
            notes["held_out_prompts_kept"] -= 1
            del self._prompts[0]

    def _is_leaked(self, prompt: dict[str, Any]) -> bool:
        leaked = self.receipt.leaked(np.asarray(prompt["prompt_ids"]))
        self.receipt.notes["held_out_prompts_also_in_training"] += leaked
        return leaked

    def _refuse(self, source: str, row_id: str, raw: Any, reason: str, detail: str, *, whole_row: bool) -> None:
        """Count and keep. Not ``whole_row``: noted, without counting against ``max_refused_fraction``."""
        if whole_row:
            self.receipt.refuse(source, row_id, reason, detail)
        else:
            self.receipt.notes[f"left_out_{reason}"] += 1
        record = {"source": source, "row_id": row_id, "reason": reason, "detail": detail, "row": raw}
        self._quarantine.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")

    def _stop_if_in_vain(self) -> None:
        receipt, limit = self.receipt, self.config.max_refused_fraction
        rows, refused = receipt.total("rows"), receipt.total("refused")
        if receipt.refused_fraction > limit:
            raise DataError(
                f"{refused:,} of {rows:,} rows were refused",
                where=self.rejects / QUARANTINE,
                got="; ".join(f"{reason} {count:,}" for reason, count in receipt.refused.most_common())
                + "".join(f"\n            {_named(first)}" for first in receipt.first_refused),
                expected=f"at most {limit:.2%} (data.max_refused_fraction)",
                fix=self._misfits.hints()
                or "mend or remove these rows in the source (the quarantine file has them all), or raise that limit",
            )
        self._check_group_field()
        if len(receipt.kinds) > 1:
            raise DataError(
                "the sources give rows of several kinds, and no training takes them together",
                where="data.sources.format",
                got=", ".join(f"{count:,} of kind {kind}" for kind, count in receipt.kinds.items()),
                expected="conversations and text, or pairs, or prompts",
                fix="make a run file of each",
            )
        in_training = receipt.total("examples") - receipt.total("held_out")
        if in_training == 0 or (receipt.total("trained_tokens") == 0 and set(receipt.kinds) != {"prompt"}):
            raise DataError(
                "there is nothing to train on",
                where=", ".join(receipt.sources),
                got=receipt.summary(),
                fix=self._fix_for_nothing_to_train(),
            )
        if receipt.total("held_out") == 0:
            raise DataError(
                "no row is held out, so the model could not be judged",
                where="data.held_out",
                got=f"fraction {self.config.held_out.fraction} of {rows:,} rows, by {self.config.held_out.group_field}",
                fix="raise data.held_out.fraction, change its seed, or give more groups of rows"
                + (", or raise data.on_the_fly_sample" if self.config.on_the_fly else ""),
            )

    def _fix_for_nothing_to_train(self) -> str:
        if self.receipt.total("held_out"):
            return "lower data.held_out.fraction, change its seed, or give more groups of rows"
        if self.config.train_on == "flagged" and self.receipt.notes["left_out_nothing_to_train"]:
            return "give the assistant turns to be learned train: true (or a weight), or set data.train_on: all"
        return "add rows with assistant turns that are learned (the quarantine says why these are not)"

    def _check_group_field(self) -> None:
        """A misspelt field would leave related rows on both sides of the split."""
        field, notes = self.config.held_out.group_field, self.receipt.notes
        # The default names a field that most data does not have.
        if field in (None, "group") or notes["grouped_by_field"] or not self.receipt.total("examples"):
            return
        raise DataError(
            "no row has the field by which rows are grouped",
            where="data.held_out.group_field",
            got=f"{field!r}; {notes['grouped_by_first_question']:,} rows were grouped by their first question, "
            f"{notes['grouped_by_row']:,} each by itself",
            expected="a field of the rows",
            fix="name it as the rows do, or give null to group by the first question",
        )


def _open(stack: ExitStack, path: Path) -> IO[str]:
    return stack.enter_context(path.open("w", encoding="utf-8", errors="backslashreplace"))


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _named(refused: dict[str, str]) -> str:
    return f"{refused['source']} {refused['row_id']}: {refused['reason']}: {refused['detail']}"
