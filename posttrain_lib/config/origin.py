"""Where a model came from that the run file names by what made it: a run of a flow, or a promoted model."""

from __future__ import annotations

from pydantic import Field

from posttrain_lib.config.base import Section


class ModelOrigin(Section):
    """What a name such as SFTFlow/latest stood for when the run began.

    The run writes it beside the ``path`` that it found; nobody has to write it by hand. ``path`` must equal that one.
    """

    reference: str = Field(description="what the run file said")
    path: str = Field(description="the folder that it stood for")
    digest: str = Field(description="sha256 of the folder's content, as it was published")
    flow: str | None = None
    run: str | None = None
    step: str | None = None
    key: str | None = Field(None, description="content key of that step's result")
    tags: tuple[str, ...] = Field((), description="tags that the run had then")
    promoted: str | None = Field(None, description="name@version of a promoted model")

    def made_by(self) -> str:
        """In a word: the promoted version, the run, or the folder."""
        run = f"{self.flow}/{self.run}" if self.run is not None else None
        if self.promoted is None:
            return run or self.path
        return f"models/{self.promoted}" + (f" ({run})" if run is not None else "")
