"""Every task against the plain way: enumeration, a dense computation in transformers, one document at a time."""

from __future__ import annotations

import copy
import itertools
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.data.probes import stop_ids
from posttrain_lib.data.token_store import TokenStore
from posttrain_lib.errors import ConfigError, DataError, ModelError
from posttrain_lib.evaluation.generation import greedy_generate
from posttrain_lib.evaluation.pass_rate import pass_at_k
from posttrain_lib.evaluation.tasks import TASKS, Given, Task, TaskResult, build_task
from posttrain_lib.losses.sft import SFTLoss
from posttrain_lib.models.decoder import Decoder
from tests.oracles.tiny_job import SOURCES, write_model, write_store

QUESTIONS = [
    {"prompt": "Who has the red book?", "choices": ["Tom", "Ann and Lea", "nobody at all"], "answer": 1},
    {"prompt": "Two plus two is", "choices": ["three", "four"], "answer": 1},
    {"prompt": "It says <|im_end|> here:", "choices": ["yes", "a <|im_start|> too", "no", "x"], "answer": 0},
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def given(tokenizer: ChatTokenizer) -> Given:
    asked = ["Who has it?", "Where is the lamp?", "What is red?", "Who?"]
    prompts = []
    for number, text in enumerate(asked):
        rendered = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer.encode(rendered).ids.tolist()
        source = "ab"[number % 2]
        messages = [{"role": "user", "content": text}]
        row = {"prompt_ids": ids, "answer": f"{number}", "source": source, "row_id": f"r:{number}"}
        prompts.append({**row, "messages": messages})
    return Given(prompts=prompts)


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_sets_that_hold_a_right_one(samples: int) -> None:
    for right, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        sets = list(itertools.combinations(range(samples), k))
        expected = sum(any(one < right for one in chosen) for chosen in sets) / len(sets)
        assert pass_at_k(samples, right, k) == pytest.approx(expected, abs=1e-12)
    for wrong in ((samples, samples + 1, 1), (samples, 0, samples + 1), (samples, 0, 0)):
        with pytest.raises(ValueError, match="pass@"):
            pass_at_k(*wrong)


def test_multiple_choice_is_the_dense_computation_of_transformers(
    folder: Path, small: Decoder, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    plain = QUESTIONS[:2]
    result = build_task("multiple_choice", {"file": write(tmp_path / "q.jsonl", plain)}).run(small, tokenizer, Given())
    for asked, told in zip(plain, result.examples, strict=True):
        begin = tokenizer.encode(str(asked["prompt"])).ids.tolist()
        sums = []
        for choice in asked["choices"]:
            ids = begin + tokenizer.encode(f" {choice}").ids.tolist()
            with torch.no_grad():
                table = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(float(table[place - 1, ids[place]]) for place in range(len(begin), len(ids))))
        assert told["logprobs"] == pytest.approx(sums, rel=1e-6)  # float32 parts of the rotary tables
        best = max(range(len(sums)), key=lambda choice: sums[choice])
        by_length = [value / len(choice) for value, choice in zip(sums, asked["choices"], strict=True)]
        best_by_length = max(range(len(sums)), key=lambda choice: by_length[choice])
        assert told["accuracy"] == (best == asked["answer"])
        assert told["accuracy_norm"] == (best_by_length == asked["answer"])
        shares = torch.tensor(sums, dtype=torch.float64).softmax(0)
        assert told["answer_probability"] == pytest.approx(float(shares[asked["answer"]]), rel=1e-5)
    assert result.scores["accuracy"].baseline == ("chance", pytest.approx((1 / 3 + 1 / 2) / 2))
    assert result.metrics(0)["accuracy"].examples == 2


def test_words_of_a_question_never_become_control_tokens(
    small: Decoder, tokenizer: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain_lib.evaluation.tasks import multiple_choice

    seen: list[list[int]] = []
    scored = multiple_choice.token_logprobs

    def spy(model: Decoder, sequences: list[list[int]], begins: list[int]) -> list[list[float]]:
        seen.extend(sequences)
        return scored(model, sequences, begins)

    monkeypatch.setattr(multiple_choice, "token_logprobs", spy)
    path = write(tmp_path / "q.jsonl", QUESTIONS[2:])
    build_task("multiple_choice", {"file": path}).run(small, tokenizer, Given())
    assert len(seen) == 4 and not any(set(ids) & tokenizer.special_ids for ids in seen)
    seen.clear()
    build_task("multiple_choice", {"file": path, "chat": True}).run(small, tokenizer, Given())
    rendered = tokenizer.decode(seen[0], skip_special_tokens=False)
    assert rendered.endswith("assistant\nyes") and rendered.count("<|im_end|>") == 2  # the template's and the words
    assert sum(token in tokenizer.special_ids for token in seen[0]) == 3  # the template's alone


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"choices": ["a"]}, "too_few_choices"),
        ({"choices": "ab"}, "choices_not_texts"),
        ({"answer": 3}, "answer_is_no_index: 3, expected 0 to 2"),
        ({"answer": "Tom"}, "answer_is_no_index"),
        ({"prompt": ["x"]}, "prompt_not_text"),
        ({"answer": None}, "missing_field: no answer"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    task = build_task("multiple_choice", {"file": write(tmp_path / "q.jsonl", [QUESTIONS[0], QUESTIONS[0] | wrong])})
    with pytest.raises(DataError, match="1 rows of an evaluation task cannot be used") as caught:
        task.check()
    assert f"q.jsonl:2: {said}" in str(caught.value)


def test_rows_of_prompts_are_checked_too(tmp_path: Path) -> None:
    rows = [{"question": "Who?", "answer": "#### 1"}, {"question": "Who?"}, {"answer": "#### 1"}]
    path = write(tmp_path / "p.jsonl", rows)
    options = {"prompts": 9, "file": path, "fields": {"prompt": "question"}}
    with pytest.raises(DataError) as caught:
        build_task("exact_match", options).check()
    assert "p.jsonl:2: no_answer" in str(caught.value) and "p.jsonl:3: " in str(caught.value)
    build_task("exact_match", {**options, "prompts": 1}).check()
    (tmp_path / "p.jsonl").write_text("not json\n")
    with pytest.raises(DataError, match="cannot be used"):
        build_task("exact_match", options).check()


def test_exact_match_scores_what_is_generated(small: Decoder, tokenizer: ChatTokenizer, given: Given) -> None:
    ids = [prompt["prompt_ids"] for prompt in given.prompts]
    texts = [tokenizer.decode(made) for made in greedy_generate(small, ids, 6, stop_ids(tokenizer))]
    right = [{**prompt, "answer": text} for prompt, text in zip(given.prompts, texts, strict=True)]
    mixed = [right[0], {**right[1], "answer": "@"}, right[2], right[3]]
    result = build_task("exact_match", {"prompts": 9, "max_new_tokens": 6}).run(small, tokenizer, Given(prompts=mixed))
    assert result.scores["exact_match"].values.tolist() == [1, 0, 1, 1]
    assert result.scores["exact_match"].groups == ("a", "b", "a", "b")
    with pytest.raises(DataError, match="needs held-out prompts"):
        build_task("exact_match", {"prompts": 9}).run(small, tokenizer, Given())


def test_a_file_s_prompts_are_what_serving_would_send(
    small: Decoder, tokenizer: ChatTokenizer, tmp_path: Path, given: Given
) -> None:
    rows = [{"question": prompt["messages"][0]["content"], "answer": "#### 4"} for prompt in given.prompts]
    options = {"prompts": 9, "max_new_tokens": 6, "extract": "gsm8k"}
    path = write(tmp_path / "p.jsonl", rows)
    task = build_task("exact_match", {**options, "file": path, "fields": {"prompt": "question"}})
    assert task.files() == (path,) and not task.needs
    found = [row["completion"] for row in task.run(small, tokenizer, Given()).examples]
    own = build_task("exact_match", options)
    assert own.needs == {"prompts"}
    assert found == [row["completion"] for row in own.run(small, tokenizer, given).examples]


def shortest(documents: list[np.ndarray], *, penalty: float = 1.0) -> list[float]:
    """A scorer that goes by length alone."""
    return [-penalty * len(document) for document in documents]


def test_a_win_is_a_higher_score_and_a_tie_is_half(small: Decoder, tokenizer: ChatTokenizer, given: Given) -> None:
    scorer = f"{__name__}:shortest"
    task = build_task("win_rate", {"scorer": scorer, "scorer_options": {"penalty": 2.0}, "prompts": 4})
    task.check()
    result = task.run(small, tokenizer, given)
    made = greedy_generate(small, [p["prompt_ids"] for p in given.prompts], 48, stop_ids(tokenizer))
    lengths = [len(p["prompt_ids"]) + len(tokens) for p, tokens in zip(given.prompts, made, strict=True)]
    assert result.scores["score"].values.tolist() == [-2.0 * length for length in lengths]
    from posttrain_lib.evaluation.bootstrap import Scores

    values = result.scores["score"].values + np.array([1.0, 0.0, -1.0, 0.5])
    after = TaskResult({"score": Scores(values, groups=result.scores["score"].groups)})
    assert task.compare(result, after)["win_rate"].values.tolist() == [1.0, 0.5, 0.0, 1.0]
    assert task.compare(after, result)["win_rate"].values.tolist() == [0.0, 0.5, 1.0, 0.0]


def test_a_reward_model_judges_by_its_folder(
    small: Decoder, tokenizer: ChatTokenizer, given: Given, folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    judge = write_model(
        tmp_path / "judge",
        3,
        architectures=["Qwen3ForSequenceClassification"],
        id2label={"0": "LABEL_0"},
        tie_word_embeddings=False,
        vocab_size=320,
        max_position_embeddings=512,
        pad_token_id=0,
    )
    task = build_task("win_rate", {"reward_model": str(judge), "prompts": 4, "max_new_tokens": 6})
    task.check()
    assert task.models() == (str(judge),) and task.files() == ()
    result = task.run(small, tokenizer, given)
    made = greedy_generate(small, [p["prompt_ids"] for p in given.prompts], 6, stop_ids(tokenizer))
    reference = AutoModelForSequenceClassification.from_pretrained(judge, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = [
            float(reference(input_ids=torch.tensor([[*p["prompt_ids"], *tokens]])).logits[0, 0])
            for p, tokens in zip(given.prompts, made, strict=True)
        ]
    # scores of order 1 after 2 layers in float32, whose products sum in another order in a packed row
    assert result.scores["score"].values.tolist() == pytest.approx(expected, abs=1e-5)
    assert np.ptp(expected) > 1e-3
    assert task.compare(result, task.run(small, tokenizer, given))["win_rate"].values.tolist() == [0.5] * 4
    with pytest.raises(ModelError, match="without a score head cannot judge"):
        build_task("win_rate", {"reward_model": str(folder), "prompts": 4}).check()
    with pytest.raises(ConfigError, match="no such folder"):
        build_task("win_rate", {"reward_model": str(tmp_path / "none"), "prompts": 4}).check()
    for options in ({}, {"reward_model": str(judge), "scorer": f"{__name__}:shortest"}):
        with pytest.raises(ConfigError, match="one judge"):
            build_task("win_rate", {"prompts": 4, **options})


def test_a_prompt_without_a_token_is_refused_by_name(small: Decoder, folder: Path, tmp_path: Path) -> None:
    """Its first choice's first token would have the probability that another question's last token gives it."""
    shutil.copytree(folder, tmp_path / "stripping")
    path = tmp_path / "stripping" / "tokenizer.json"
    strip = {"type": "Strip", "strip_left": True, "strip_right": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), "normalizer": strip}))
    questions = write(tmp_path / "q.jsonl", [*QUESTIONS[:1], {**QUESTIONS[1], "prompt": "  "}])
    task = build_task("multiple_choice", {"file": questions})
    with pytest.raises(DataError, match=r"(?s)1 rows.*the prompt '  ' has no token"):
        task.run(small, ChatTokenizer(path.parent), Given())


def test_a_model_whose_scores_are_no_numbers_answers_nothing(
    small: Decoder, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    questions = [{**question, "answer": 0} for question in QUESTIONS]
    broken = copy.deepcopy(small)
    with torch.no_grad():
        broken.head_weight.fill_(math.nan)
    result = build_task("multiple_choice", {"file": write(tmp_path / "q.jsonl", questions)}).run(
        broken, tokenizer, Given()
    )
    assert {name: scores.values.tolist() for name, scores in result.scores.items()} == {
        name: [0.0] * 3 for name in ("accuracy", "accuracy_norm", "answer_probability")
    }


def beside(documents: list[np.ndarray]) -> list[float]:
    """As a reward model's in a packed row: what else is scored moves a score's last bits."""
    return [1.0 + 1e-7 * sum(len(other) for other in documents) for _ in documents]


def test_an_answer_that_stayed_is_a_tie_whatever_it_is_scored_beside(
    small: Decoder, tokenizer: ChatTokenizer, given: Given
) -> None:
    task = build_task("win_rate", {"scorer": f"{__name__}:beside", "prompts": 4, "max_new_tokens": 4})
    before = task.run(small, tokenizer, given)
    after = task.run(small, tokenizer, Given(prompts=given.prompts[1:3]))
    assert after.scores["score"].values.tolist() == before.scores["score"].values.tolist()[1:3]


def nothing(documents: list[np.ndarray]) -> list[float]:
    return [math.nan for _ in documents]


def test_a_scorer_that_gives_no_numbers_stops(small: Decoder, tokenizer: ChatTokenizer, given: Given) -> None:
    task = build_task("win_rate", {"scorer": f"{__name__}:nothing", "prompts": 2, "max_new_tokens": 1})
    with pytest.raises(DataError, match="no finite score"):
        task.run(small, tokenizer, given)
    with pytest.raises(ConfigError, match="scorer cannot be imported"):
        build_task("win_rate", {"scorer": "nowhere:at_all", "prompts": 2}).check()


def starts_low(completion: str, row: Mapping[str, Any]) -> bool:
    """A verifier: right where the text's first character is an early one."""
    return completion[:1] < "a" and row["answer"].isdigit()


def says_maybe(completion: str, row: Any) -> str:
    """A verifier that does not say."""
    return "maybe"


def test_a_verifier_that_does_not_say_is_named(small: Decoder, tokenizer: ChatTokenizer, given: Given) -> None:
    options = {"prompts": 2, "samples": 2, "max_new_tokens": 2, "verifier": f"{__name__}:says_maybe"}
    with pytest.raises(DataError, match="'maybe'"):
        build_task("pass_at_k", options).run(small, tokenizer, given)


def test_pass_at_k_counts_what_the_verifier_says(small: Decoder, tokenizer: ChatTokenizer, given: Given) -> None:
    options = {"prompts": 4, "k": [1, 3], "samples": 6, "max_new_tokens": 3, "verifier": f"{__name__}:starts_low"}
    task = build_task("pass_at_k", options)
    assert task.metrics == ("pass@1", "pass@3")
    result = task.run(small, tokenizer, given)
    counts = [row["right"] for row in result.examples]
    assert 0 < sum(counts) < 24  # the samples differ
    for k in (1, 3):
        assert result.scores[f"pass@{k}"].values.tolist() == [pass_at_k(6, count, k) for count in counts]
    alone = task.run(small, tokenizer, Given(prompts=given.prompts[2:3]))
    assert alone.examples[0] == result.examples[2], "a prompt's samples do not depend on the others"
    other = task.run(small, tokenizer, Given(prompts=given.prompts, seed=1))
    assert [row["right"] for row in other.examples] != counts


def test_perplexity_is_that_of_each_document_alone(small: Decoder, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    store = TokenStore(write_store(tmp_path / "held_out", 12, seed=2))
    given = Given(held_out=store, row_tokens=64)
    result = build_task("perplexity", {}).run(small, tokenizer, given)
    scores = result.scores["perplexity"]
    for number in range(len(store)):
        ids, weights = (np.asarray(part) for part in store.get(number))
        with torch.no_grad():
            length = len(ids)
            table = small(
                torch.tensor(ids).long(), torch.arange(length), torch.tensor([0, length], dtype=torch.int32), length
            ).log_softmax(-1)
        losses = [-float(table[place - 1, ids[place]]) for place in range(1, length)]
        own = weights[1:].astype(float)
        assert scores.values[number] == pytest.approx(np.average(losses, weights=own), rel=1e-5)  # float32 weights
        assert scores.groups is not None and scores.groups[number] == SOURCES[number % 2]
    mean = np.average(scores.values, weights=scores.weights)
    assert result.metrics(0)["perplexity"].mean == pytest.approx(math.exp(mean), rel=1e-9)
    assert SFTLoss().kind == "document"


class OwnTask(Task):
    """A user's task: it inherits what it does not need."""

    name, needs, metrics = "own", frozenset(), ("size",)

    def __init__(self, *, size: float) -> None:
        self._size = size

    def run(self, model: Decoder, tokenizer: ChatTokenizer, given: Given) -> TaskResult:
        from posttrain_lib.evaluation.bootstrap import Scores

        return TaskResult({"size": Scores(np.full(3, self._size))})


def test_a_task_of_the_user_s_own(small: Decoder, tokenizer: ChatTokenizer) -> None:
    task = build_task(f"{__name__}:OwnTask", {"size": 2.0})
    task.check()
    assert task.files() == () and task.run(small, tokenizer, Given()).metrics(0)["size"].mean == 2.0
    with pytest.raises(ConfigError, match="did you mean 'size'"):
        build_task(f"{__name__}:OwnTask", {"sise": 2.0})
    with pytest.raises(ConfigError, match="did you mean 'perplexity'"):
        build_task("perplexty", {})
    with pytest.raises(ConfigError, match="pass@k needs at least k samples"):
        build_task("pass_at_k", {"prompts": 1, "k": [3], "samples": 2})


def test_the_table_names_what_there_is() -> None:
    options = {"file": "f", "prompts": 1, "scorer": "a:b"}
    wanted = {
        "multiple_choice": ("file",), "exact_match": ("prompts",), "pass_at_k": ("prompts",),
        "win_rate": ("prompts", "scorer"), "perplexity": (),
    }  # fmt: skip
    assert set(wanted) == set(TASKS)
    for name, needed in wanted.items():
        assert build_task(name, {key: options[key] for key in needed}).name == name


def test_documents_losses_have_the_held_out_means(small: Decoder, tmp_path: Path) -> None:
    from posttrain_lib.evaluation.bootstrap import estimate
    from posttrain_lib.evaluation.documents import DocumentLosses
    from posttrain_lib.evaluation.perplexity import held_out_loss

    store = TokenStore(write_store(tmp_path / "held_out", 30, seed=3))
    documents = DocumentLosses(store)
    means = held_out_loss(small, SFTLoss(), store, row_tokens=64, batch_rows=2, observe=documents)
    scores = documents.scores()
    for name, expected in means.losses.items():
        found = estimate(scores if name == "all" else scores.of_group(name), seed=0)
        assert found is not None and found.mean == pytest.approx(expected, rel=1e-12)  # float64 sums in another order
