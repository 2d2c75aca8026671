"""Verify a Hugging Face model, or find the definition of one whose architecture the project does not have.

    python flows/convert_flow.py run --model <folder or hub id>
    python flows/convert_flow.py --config configs/convert/llm.yaml run --model <folder or hub id>

``--help`` after any of them lists what it takes.
"""

# First, because it sets the environment that Metaflow reads when it is imported.
from posttrain_flow import ROOT, parser_of, plain_errors, this_run  # isort: skip

from metaflow import Config, FlowSpec, Parameter, card, current, package_sources, step

from posttrain_lib.config.convert import parse_convert_config
from steps import convert_pipeline
from steps.pipeline import load_manifests
from steps.recorded import lineage_of


@package_sources(["../steps", "../posttrain_lib", "../configs"], suffixes=[".py", ".yaml"])
class ConvertFlow(FlowSpec):
    """Convert a Hugging Face model: verified if its architecture is known, else proposed for review."""

    config = Config(
        "config",
        default=str(ROOT / "configs" / "convert" / "default.yaml"),
        parser=parser_of(parse_convert_config),
        help="the run file",
    )
    model = Parameter("model", default="", help="Hugging Face folder or hub id; default: the run file's")
    overrides = Parameter("set", default="", help="overrides, comma-separated: conversion.max_attempts=20")
    reuse = Parameter("reuse", default=True, type=bool, help="take the results of equal work from the store")

    @step
    def start(self):
        """Resolve the config; pin the model folder by its digest."""
        with plain_errors():
            self.run_config = convert_pipeline.resolve(self.config, self.model, self.overrides, this_run())
            self.manifests = convert_pipeline.advance("inputs", self.run_config, {}, reuse=self.reuse)
        self.next(self.propose_family)

    @step
    def propose_family(self):
        """Of an unknown architecture: let an agent work against the gate."""
        with plain_errors():
            self.manifests = convert_pipeline.advance(
                "propose_family", self.run_config, self.manifests, reuse=self.reuse
            )
        self.next(self.convert_model)

    @step
    def convert_model(self):
        """Of a known one: verify our definition against the reference implementation."""
        with plain_errors():
            self.manifests = convert_pipeline.advance(
                "convert_model", self.run_config, self.manifests, reuse=self.reuse
            )
        self.next(self.report)

    @card(type="blank", id="report")
    @step
    def report(self):
        """Write the report: in a step of its own, for a task that fails leaves no card."""
        from posttrain_lib.adapters.metaflow_conversion_card import fill_conversion

        with plain_errors():
            manifests = load_manifests(self.manifests)
            self.summary = convert_pipeline.summarise(self.run_config, manifests)
            fill_conversion(current.card["report"], self.summary, manifests, lineage_of(manifests))
        self.next(self.end)

    @step
    def end(self):
        """Fail where there is no verified model."""
        with plain_errors():
            convert_pipeline.check(self.summary, load_manifests(self.manifests))


if __name__ == "__main__":
    ConvertFlow()
