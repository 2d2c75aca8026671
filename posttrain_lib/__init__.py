"""Open LLM post-training: data, models, training, evaluation and export behind versioned steps."""

__version__ = "0.1.0"
