"""What of the train section a run's checkpoints are bound to."""

#: Fields that decide the sequence of weights: a checkpoint made under others is of another run. Layout (micro-batches,
#: workers, recomputation), habits (how often to save or evaluate) and what to do about incidents may change on resume.
TRAJECTORY = (
    "steps",
    "epochs",
    "row_tokens",
    "rows_per_step",
    "packing_buffer",
    "share_prefixes",
    "shuffle_window",
    "mixture",
    "loss",
    "loss_options",
    "optimizer",
    "schedule",
    "clip_norm",
    "precision",
    "seed",
)
