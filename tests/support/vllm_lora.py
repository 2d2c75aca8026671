"""vLLM serving adapters: ``python -m tests.support.vllm_lora QUESTION ANSWER``, see ``adapters.vllm_process``.

Question: folder, adapters (name -> folder), prompts, new_tokens. Answer: name -> {"tokens", "logprobs"} of what is
generated, with "" for the base alone. Prompts are not scored: with adapters allowed, the CPU code of vLLM 0.31 has room
for the sampled rows of the logits alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def serve(question: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens and their log-probs, from one engine for all adapters."""
    import vllm
    from vllm.lora.request import LoRARequest

    engine = vllm.LLM(
        model=question["folder"],
        dtype="float32",
        max_model_len=64,
        enforce_eager=True,
        disable_log_stats=True,
        seed=0,
        skip_tokenizer_init=True,
        enable_lora=True,
        max_lora_rank=16,
    )
    prompts = [{"prompt_token_ids": ids} for ids in question["prompts"]]
    answer = {}
    for number, (name, folder) in enumerate({"": None, **question["adapters"]}.items()):
        sampling = vllm.SamplingParams(
            temperature=0.0,
            max_tokens=question["new_tokens"],
            logprobs=1,
            detokenize=False,
            ignore_eos=True,
        )
        request = None if folder is None else LoRARequest(name, number, folder)
        outputs = engine.generate(prompts, sampling, use_tqdm=False, lora_request=request)
        done = [output.outputs[0] for output in outputs]
        answer[name] = {
            "tokens": [list(each.token_ids) for each in done],
            "logprobs": [
                [table[token].logprob for token, table in zip(each.token_ids, each.logprobs, strict=True)]
                for each in done
            ],
        }
    return answer


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(serve(json.loads(Path(sys.argv[1]).read_text()))))
