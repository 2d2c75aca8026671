# Short names for the commands in README; nothing is done here that they do not do.
.PHONY: run test lint slow

run:
	./infra/env python flows/sft_flow.py run

test:
	./infra/env pytest

lint:
	./infra/env ruff check .
	./infra/env mypy

slow:
	./infra/env pytest -m slow
