"""What the receipt's measures cost and how right they are:

    python -m tests.benchmarks.validation --output tests/benchmarks/results/validation.json

Near-duplicates against exact Jaccard over all pairs of the real conversations ($POSTTRAIN_DATA) and on planted edits;
their rate beside tokenising the same texts; a million examples; rates of the character and the preference checks.
Rates are of one thread, in processor seconds (other work on the machine then counts little), medians of the rounds.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
from tokenizers import Tokenizer

from posttrain_lib.data import unicode_table
from posttrain_lib.data.near_duplicates import (
    LANES,
    SHINGLE_TOKENS,
    SIGNATURE_BYTES,
    THRESHOLD,
    NearDuplicates,
    compare,
    estimated_jaccard,
    signatures,
)
from posttrain_lib.data.oddities import Oddities
from posttrain_lib.data.pair_checks import PairChecks
from tests.benchmarks.recording import Recording, argument_parser

ROUNDS = 5
SEED = 0


def cpu_seconds(run: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Median processor seconds of a run."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return statistics.median(times)


def read(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def as_text(row: dict[str, Any]) -> str:
    """ChatML without tools."""
    return "".join(
        f"<|im_start|>{message['role']}\n{message.get('content') or ''}"
        f"{json.dumps(message['tool_calls']) if message.get('tool_calls') else ''}<|im_end|>\n"
        for message in row["messages"]
    )


def shingle_set(ids: np.ndarray) -> set[bytes]:
    raw, width = np.ascontiguousarray(ids, "<i4").tobytes(), 4 * SHINGLE_TOKENS
    return {raw[begin : begin + width] for begin in range(0, max(4, len(raw) - width + 4), 4)}


def jaccard(one: set[bytes], other: set[bytes]) -> float:
    return len(one & other) / len(one | other)


def best_earlier(sets: Sequence[set[bytes]]) -> np.ndarray:
    """Exact: the largest similarity to an earlier example, float64 [n], over all pairs."""
    number: dict[bytes, int] = {}
    rows = [np.fromiter((number.setdefault(item, len(number)) for item in own), np.int64, len(own)) for own in sets]
    flat, sizes = np.concatenate(rows), np.array([len(row) for row in rows])
    order = np.argsort(flat, kind="stable")
    owners = np.repeat(np.arange(len(rows)), sizes)[order]
    begins = np.searchsorted(flat[order], np.arange(len(number) + 1))
    best = np.zeros(len(rows))
    for index, row in enumerate(rows[1:], start=1):
        postings = np.concatenate([owners[begins[item] : begins[item + 1]] for item in row])
        common = np.bincount(postings, minlength=len(rows))[:index]
        best[index] = (common / (sizes[:index] + sizes[index] - common)).max()
    return best


def judged(exact: np.ndarray, matches: np.ndarray) -> dict[str, Any]:
    """Precision and recall of the estimate at the threshold against exact similarity."""
    estimated = np.array([estimated_jaccard(int(number)) for number in matches])
    found, true = estimated >= THRESHOLD, exact >= THRESHOLD
    both, clear = int((found & true).sum()), exact >= THRESHOLD + 0.1
    seen = estimated > 0
    return {
        "examples": len(exact),
        "true": int(true.sum()),
        "found": int(found.sum()),
        "recall": round(both / true.sum(), 4) if true.any() else None,
        "precision": round(both / found.sum(), 4) if found.any() else None,
        "true_at_0.9": int(clear.sum()),
        "recall_at_0.9": round(float(found[clear].mean()), 4) if clear.any() else None,
        "found_below_0.7": int((found & (exact < THRESHOLD - 0.1)).sum()),
        "largest_error_of_found": round(float(np.abs(estimated - exact)[seen & found].max()), 3)
        if found.any()
        else None,
    }


def edited(ids: np.ndarray, share: float, pool: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Tokens replaced, dropped or followed by another, a third each, with probability ``share``."""
    kinds = np.where(generator.random(len(ids)) < share, generator.integers(1, 4, len(ids)), 0)
    others = generator.choice(pool, len(ids))
    made: list[int] = []
    for token, other, kind in zip(ids.tolist(), others.tolist(), kinds.tolist(), strict=True):
        made += ([token], [other], [], [token, other])[kind]
    return np.array(made, np.int32)


def accuracy(examples: list[np.ndarray]) -> dict[str, Any]:
    """On the real conversations as they are, and on edited copies of those that have no relative."""
    sets = [shingle_set(ids) for ids in examples]
    exact = best_earlier(sets)
    found = compare(signatures(examples), np.zeros(len(examples), bool))
    result: dict[str, Any] = {"real": judged(exact, found.same_split[0])}
    result["real"] |= {"exact_duplicates": int(found.exact.sum()), "crowded": int(found.crowded.sum())}
    alone = [index for index in range(len(examples)) if exact[index] < 0.3 and len(examples[index]) >= 50]
    pool, generator = np.concatenate(examples), np.random.default_rng(SEED)
    for share in (0.01, 0.05, 0.2):
        copies = [edited(examples[index], share, pool, generator) for index in alone]
        truth = np.array([jaccard(sets[i], shingle_set(copy)) for i, copy in zip(alone, copies, strict=True)])
        made = signatures([*(examples[index] for index in alone), *copies])
        matches = compare(made, np.arange(len(made)) >= len(alone)).training[0][len(alone) :]
        result[f"edited {share:.0%} of tokens"] = {"median_jaccard": round(float(np.median(truth)), 3)} | judged(
            truth, matches
        )
    return result


def signing_rates() -> dict[str, Any]:
    """Examples per second by length, random tokens: batched, and signed one by one."""
    generator, rates = np.random.default_rng(SEED), {}
    for length in (50, 200, 350, 500, 2000):
        examples = [generator.integers(0, 150_000, length).astype(np.int32) for _ in range(4000)]

        rates[f"{length} tokens"] = {
            "signatures": round(len(examples) / cpu_seconds(lambda: signatures(examples))),  # noqa: B023
            "one by one": round(500 / cpu_seconds(lambda: [signatures([ids]) for ids in examples[:500]])),  # noqa: B023
        }
    return rates


def beside_tokenising(tokenizer: Tokenizer, texts: list[str], examples: list[np.ndarray]) -> dict[str, Any]:
    """Processor seconds for the real conversations."""
    tokenise = cpu_seconds(lambda: [tokenizer.encode(text) for text in texts], rounds=3)
    sign = cpu_seconds(lambda: signatures(examples))
    return {
        "examples": len(texts),
        "tokens": sum(map(len, examples)),
        "tokenise_seconds": round(tokenise, 3),
        "sign_seconds": round(sign, 4),
        "share": round(sign / tokenise, 5),
    }


def at_scale(number: int) -> dict[str, Any]:
    """A set of ``number`` examples, a tenth of which are near-duplicates of another: time and memory of the report."""
    generator = np.random.default_rng(SEED)
    lanes = generator.integers(0, 256, (number, SIGNATURE_BYTES), dtype=np.uint8)
    copies = generator.choice(number // 2, number // 10, replace=False)
    lanes[-len(copies) :] = lanes[copies]
    changed = generator.random((len(copies), LANES)) < 0.08
    lanes[-len(copies) :, -LANES:][changed] ^= 1
    lanes[-len(copies) :, :8] ^= 1  # another content
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = NearDuplicates()
    start = time.process_time()
    for index in range(number):
        found.add_signature(f"source/row-{index:08d}", lanes[index].tobytes(), held_out=index % 10 == 0)
    added = time.process_time()
    report = found.report()
    return {
        "examples": number,
        "planted": len(copies),
        "found": report["near_duplicates"] + report["held_out_near_training"],
        "add_signature_seconds": round(added - start, 2),
        "report_seconds": round(time.process_time() - added, 2),
        "state_bytes_per_example": round(
            (len(found._signatures) + len(found._held_out) + len(found._keys._text) + 8 * len(found._keys)) / number
        ),
        "peak_resident_growth_mib": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024),
    }


def character_rates(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """MB of UTF-8 per second: the real turns, those of ASCII alone and the others."""
    turns = [
        (row["source"], row["id"], message["role"], message["content"])
        for row in rows
        for message in row["messages"]
        if message.get("content")
    ]
    start = time.process_time()
    unicode_table.script_of("a")
    rates: dict[str, Any] = {"tables_seconds": round(time.process_time() - start, 3)}
    chinese = [
        (
            "s",
            "r",
            "user",
            "\u8fd9\u662f\u4e00\u4e2a\u4e2d\u6587\u53e5\u5b50\uff0c\u7528\u6765\u6d4b\u8bd5\u901f\u5ea6\u3002" * 60,
        )
    ] * 200
    kinds = {
        "all": turns,
        "ascii": [turn for turn in turns if turn[3].isascii()],
        "not ascii": [turn for turn in turns if not turn[3].isascii()],
        "chinese, made up": chinese,
    }
    for name, chosen in kinds.items():

        def observe(chosen: list[tuple[str, str, str, str]] = chosen) -> None:
            found = Oddities()
            for turn in chosen:
                found.observe(*turn)

        size = sum(len(turn[3].encode("utf-8", "surrogatepass")) for turn in chosen)
        rates[name] = {
            "texts": len(chosen),
            "bytes": size,
            "mb_per_second": round(size / cpu_seconds(observe) / 1e6, 1),
        }
    return rates


def preference(tokenizer: Tokenizer, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rate, and what the real pairs hold; every tenth row is held out, whatever its prompt."""

    def ids(text: str) -> np.ndarray:
        return np.array(tokenizer.encode(text).ids, np.int32)

    def answer(row: dict[str, Any], name: str) -> np.ndarray:
        return ids("\n".join(message["content"] for message in row[name]))

    pairs = [
        (row["id"], ids(as_text({"messages": row["prompt"]})), answer(row, "chosen"), answer(row, "rejected"))
        for row in rows
    ]

    def check() -> PairChecks:
        found = PairChecks()
        for number, pair in enumerate(pairs):
            found.add(*pair, held_out=number % 10 == 0)
        return found

    report = check().report()
    return {
        "pairs_per_second": round(len(pairs) / cpu_seconds(check)),
        "rows": {name: finding["rows"] for name, finding in report["findings"].items()},
        "lengths": report["lengths"],
    }


def main() -> None:
    """All cases, a few minutes."""
    parser = argument_parser(__doc__)
    options = parser.parse_args()
    recording = Recording()
    root = Path(__file__).resolve().parents[2]
    data = Path(os.environ.get("POSTTRAIN_DATA") or root.parent / "shared" / "data")
    tokenizer = Tokenizer.from_file(str(data / "tokenizers" / "qwen3" / "tokenizer.json"))
    rows = [row for name in ("chat", "tool_chat") for row in read(data / "chat" / f"{name}.jsonl")]
    texts = [as_text(row) for row in rows]
    examples = [np.array(tokenizer.encode(text).ids, np.int32) for text in texts]
    cases = {
        "near_duplicates": {
            "threshold": THRESHOLD,
            "signature_bytes": SIGNATURE_BYTES,
            "accuracy": accuracy(examples),
            "examples_per_second": signing_rates(),
            "beside_tokenising": beside_tokenising(tokenizer, texts, examples),
            "at_scale": at_scale(1_000_000),
        },
        "oddities": character_rates(rows),
        "pair_checks": preference(tokenizer, read(data / "preference" / "pairs.jsonl")),
    }
    print(json.dumps(cases, indent=1))
    recording.write(options.output, {"threads": 1, "cases": cases})


if __name__ == "__main__":
    main()
