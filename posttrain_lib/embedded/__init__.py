"""The embedded default: rows and a tokenizer that the project makes itself, so that a first run needs no download."""
