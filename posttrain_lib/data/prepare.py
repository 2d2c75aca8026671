"""Rows into token stores: parse, render, mask, split, count; refuse into a quarantine; stop where it must not go on."""

from __future__ import annotations

import bisect
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.data.formats import get_format
from posttrain_lib.data.probes import check_maskable
from posttrain_lib.data.receipt import Receipt
from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.data.rendering import Document, render_conversation
from posttrain_lib.data.sources import BadRow, iter_rows
from posttrain_lib.data.split import is_held_out
from posttrain_lib.data.token_store import TokenStoreWriter
from posttrain_lib.data.tokenize import Tokens, tokenize
from posttrain_lib.errors import DataError
from posttrain_lib.schema.examples import Conversation, TokenizedExample

if TYPE_CHECKING:
    from posttrain_lib.config.data import DataConfig

#: what a finished preparation leaves in its folder
TRAIN, HELD_OUT = "train", "held_out"
PROMPTS, RECEIPT, SAMPLES, QUARANTINE = "prompts.jsonl", "receipt.json", "samples.json", "quarantine.jsonl"

#: held-out prompts kept for evaluation, of every source and length alike
_MOST_PROMPTS = 2000
_SAMPLES_PER_SOURCE = 3
_SAMPLE_TOKENS = 600
_PROGRESS_SECONDS = 5.0


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

    Args:
        inputs: source name -> path of its rows. ``config.chat_template`` is a path of this machine or None.
        rejects_dir: where receipt and quarantine are also put when the preparation stops; made then.

    Raises:
        DataError: more rows refused than the config allows, a template that cannot be masked, nothing to train on or
            nothing held out. The stores are then not finished.
    """
    tokenizer = ChatTokenizer(
        tokenizer_folder,
        chat_template=config.chat_template,
        template_date=config.template_date,
        template_kwargs=config.template_kwargs,
    )
    check_maskable(tokenizer, config.chat_template or tokenizer_folder)
    with ExitStack() as stack:
        preparation = _Preparation(config, tokenizer, out_dir, rejects_dir, stack)
        for source in config.sources:
            parse = get_format(source.format)
            for row_id, row in _reported(iter_rows(inputs[source.name]), source.name, preparation, progress):
                preparation.add(source.name, row_id, row, parse)
        preparation.finish()
    return preparation.receipt


class _Preparation:
    """The open files of a preparation and what is counted on the way."""

    def __init__(
        self, config: DataConfig, tokenizer: ChatTokenizer, out: Path, rejects: Path, stack: ExitStack
    ) -> None:
        self.config, self.tokenizer, self.out, self.rejects = config, tokenizer, out, rejects
        self.receipt = Receipt(config.max_refused_fraction)
        self._stores = {name: stack.enter_context(TokenStoreWriter(out / name)) for name in (TRAIN, HELD_OUT)}
        self._quarantine: IO[str] = stack.enter_context(
            (out / QUARANTINE).open("w", encoding="utf-8", errors="backslashreplace")
        )
        self._samples: dict[str, list[dict[str, Any]]] = {}
        # The prompts with the smallest hashes of their row ids, largest first: a sample that no order decides.
        self._prompts: list[tuple[int, dict[str, Any]]] = []

    def add(self, source: str, row_id: str, row: dict[str, Any] | BadRow, parse: Callable[..., Conversation]) -> None:
        """Take in one row, whatever it is."""
        self.receipt.row(source)
        try:
            if isinstance(row, BadRow):
                raise RefusedRow(row.reason, row.detail)
            conversation = parse(row, source, row_id, self.config.held_out.group_field)
            rendered = render_conversation(self.tokenizer, conversation, self.config.trained_turns)
            made, left_out = self._tokenize_each(rendered.documents)
        except RefusedRow as refusal:
            # A row that its author keeps out of the loss is no bad row.
            self._refuse(source, row_id, row, refusal, whole_row=refusal.reason != "nothing_to_train")
            return
        for document, problem in left_out:
            self._refuse(source, row_id + document.suffix, row, problem, whole_row=False)
        self.receipt.notes.update(rendered.notes)
        held_out = is_held_out(conversation.group or row_id, self.config.held_out)
        for document, tokens, truncated in made:
            self._write(conversation, document, tokens, held_out=held_out, truncated=truncated)
        self._keep_prompts(conversation, made, held_out=held_out)

    def finish(self) -> None:
        """Write the small files, and stop where training would be in vain."""
        self._quarantine.flush()
        ordered = [prompt for _, prompt in sorted(self._prompts, key=lambda item: -item[0])]
        self._write_lines(PROMPTS, [prompt for prompt in ordered if not self._is_leaked(prompt)])
        samples = [sample for found in self._samples.values() for sample in found]
        (self.out / SAMPLES).write_text(json.dumps(samples, ensure_ascii=False), encoding="utf-8")
        (self.out / RECEIPT).write_text(json.dumps(self.receipt.to_dict(), indent=1), encoding="utf-8")
        try:
            self._stop_if_in_vain()
        except DataError:
            self.rejects.mkdir(parents=True, exist_ok=True)
            for name in (QUARANTINE, RECEIPT):
                shutil.copyfile(self.out / name, self.rejects / name)
            raise

    def _tokenize_each(
        self, documents: Sequence[Document]
    ) -> tuple[list[tuple[Document, Tokens, bool]], list[tuple[Document, RefusedRow]]]:
        """The documents that can be used and those that cannot; RefusedRow where none can."""
        made, left_out = [], []
        for document in documents:
            try:
                made.append((document, *self._tokenize(document)))
            except RefusedRow as refusal:
                left_out.append((document, refusal))
        if not made:
            raise left_out[0][1]
        return made, left_out

    def _tokenize(self, document: Document) -> tuple[Tokens, bool]:
        tokens = tokenize(self.tokenizer, document)
        limit = self.config.max_example_tokens
        if len(tokens.ids) <= limit:
            return tokens, False
        if self.config.over_length == "refuse":
            raise RefusedRow("too_long", f"{len(tokens.ids)} tokens, data.max_example_tokens is {limit}")
        tokens = tokens.truncated(limit)
        if not np.count_nonzero(tokens.weights[1:]):
            raise RefusedRow("nothing_left", f"no trained token within the first {limit} tokens")
        return tokens, True

    def _write(
        self, conversation: Conversation, document: Document, tokens: Tokens, *, held_out: bool, truncated: bool
    ) -> None:
        name, row_id = conversation.source, conversation.row_id + document.suffix
        store = self._stores[HELD_OUT if held_out else TRAIN]
        store.add(TokenizedExample(tokens.ids, tokens.weights, name, row_id))
        self.receipt.example(name, tokens, held_out=held_out, truncated=truncated)
        notes, bos = self.receipt.notes, self.tokenizer.bos_id
        notes["double_bos"] += bos is not None and list(tokens.ids[:2]) == [bos, bos]
        notes["missing_end"] += not all(span.closed for span in document.spans)
        notes["resplit_examples"] += tokens.resplit
        kept = self._samples.setdefault(name, [])
        if len(kept) < _SAMPLES_PER_SOURCE and not held_out:
            kept.append(self._sample(name, row_id, tokens))

    def _sample(self, source: str, row_id: str, tokens: Tokens) -> dict[str, Any]:
        ids = tokens.ids[:_SAMPLE_TOKENS].tolist()
        weights = [round(float(weight), 4) for weight in tokens.weights[:_SAMPLE_TOKENS]]
        return {"source": source, "row_id": row_id, "tokens": self.tokenizer.pieces(ids), "weights": weights}

    def _keep_prompts(
        self, conversation: Conversation, made: Sequence[tuple[Document, Tokens, bool]], *, held_out: bool
    ) -> None:
        """Remember what training answers; of a held-out row, keep what serving would send before its last turn."""
        if not held_out:
            for _, tokens, _ in made:
                for first, _ in tokens.answers:
                    self.receipt.trained_prompt(tokens.ids[:first])
            return
        document, tokens, truncated = made[-1]
        if truncated:
            return  # the cut to data.max_example_tokens went through the last answer
        first, end = tokens.answers[-1]
        self.receipt.notes["held_out_prompts"] += 1
        messages = [
            {"role": said.role, "content": said.content} for said in conversation.messages[: document.last_turn]
        ]
        prompt = {
            "source": conversation.source,
            "row_id": conversation.row_id,
            "prompt_ids": tokens.ids[:first].tolist(),
            "messages": messages,
            # As a generation would be read: what the model writes, markers left out.
            "answer": self.tokenizer.decode(tokens.ids[first:end].tolist()).strip(),
        }
        self.receipt.notes["held_out_prompts_kept"] += 1
        key = int.from_bytes(
            hashlib.sha256(f"{conversation.source} {conversation.row_id}".encode()).digest()[:8], "big"
        )
        bisect.insort(self._prompts, (-key, prompt), key=lambda item: item[0])
        if len(self._prompts) > _MOST_PROMPTS:
            self.receipt.notes["held_out_prompts_kept"] -= 1
            del self._prompts[0]

    def _is_leaked(self, prompt: dict[str, Any]) -> bool:
        leaked = self.receipt.leaked(np.asarray(prompt["prompt_ids"]))
        self.receipt.notes["held_out_prompts_also_in_training"] += leaked
        return leaked

    def _refuse(
        self, source: str, row_id: str, row: dict[str, Any] | BadRow, refusal: RefusedRow, *, whole_row: bool = True
    ) -> None:
        """Count and keep. Not ``whole_row``: noted, without counting against ``max_refused_fraction``."""
        if whole_row:
            self.receipt.refuse(source, row_id, refusal.reason, refusal.detail)
        else:
            self.receipt.notes[f"left_out_{refusal.reason}"] += 1
        raw = row.raw if isinstance(row, BadRow) else row
        record = {
            "source": source, "row_id": row_id, "reason": refusal.reason, "detail": refusal.detail, "row": raw,
        }  # fmt: skip
        self._quarantine.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")

    def _write_lines(self, name: str, rows: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (self.out / name).write_text(text, encoding="utf-8")

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
                fix="mend or remove these rows in the source (the quarantine file has them all), or raise that limit",
            )
        if receipt.total("trained_tokens") == 0 or receipt.total("examples") == receipt.total("held_out"):
            raise DataError(
                "there is nothing to train on",
                where=", ".join(receipt.sources),
                got=receipt.summary(),
                fix="add rows with assistant turns, or lower data.held_out.fraction",
            )
        if receipt.total("held_out") == 0:
            raise DataError(
                "no row is held out, so the model could not be judged",
                where="data.held_out",
                got=f"fraction {self.config.held_out.fraction} of {rows:,} rows, by {self.config.held_out.group_field}",
                fix="raise data.held_out.fraction, change its seed, or give more groups of rows",
            )


def _named(refused: dict[str, str]) -> str:
    return f"{refused['source']} {refused['row_id']}: {refused['reason']}: {refused['detail']}"


def _reported(
    rows: Iterator[tuple[str, Any]], source: str, preparation: _Preparation, progress: Callable[[str], None]
) -> Iterator[tuple[str, Any]]:
    """The rows, with a line on how far it is every few seconds."""
    last = time.monotonic()
    for number, row in enumerate(rows, start=1):
        yield row
        if time.monotonic() - last >= _PROGRESS_SECONDS:
            last = time.monotonic()
            receipt = preparation.receipt
            progress(
                f"prepare_data: {source}: {number:,} rows, {receipt.total('refused'):,} refused, "
                f"{receipt.total('tokens'):,} tokens"
            )
