"""What a reader of an exported reward model must know: which token's score is the document's."""

from __future__ import annotations

from pathlib import Path

README_FILE = "README.md"
_TEXT = """# Reward model

One label: the score of a conversation that ends with an answer, read at the answer's end-of-turn marker, where it was
trained. transformers reads it at the last token that is not padding, so nothing may stand behind the marker. {tail}

```python
# from this folder
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForSequenceClassification.from_pretrained(".")
messages = [{{"role": "user", "content": "..."}}, {{"role": "assistant", "content": "..."}}]
text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip()
inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
with torch.no_grad():
    score = model(**inputs).logits[0, 0]
```
"""


def write_score_readme(folder: Path, behind: str) -> str | None:
    """Write how to score with the folder; the sentence that a person should hear, if there is one.

    Args:
        behind: white space that the chat template writes behind an answer's end-of-turn marker.
    """
    tail, said = "The chat template writes nothing there.", None
    if behind:
        tail = f"The chat template writes {behind!r} there, which `rstrip` takes off."
        said = (
            f"the chat template writes {behind!r} behind the token that is scored; cut it before scoring with "
            f"transformers, as {README_FILE} in the folder shows"
        )
    (folder / README_FILE).write_text(_TEXT.format(tail=tail), encoding="utf-8")
    return said
