"""Own decoder definitions: blocks, heads, families, and the specification that ties them to a Hugging Face folder."""
