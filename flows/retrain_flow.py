"""Scheduled retrains: what is new -> prepare -> train from the current version -> evaluate both -> export -> decide.

    python flows/retrain_flow.py run
    python flows/retrain_flow.py --config configs/retrain/default.yaml run --set keep_sources=false
    python flows/retrain_flow.py resume

``--help`` after any of them lists what it takes. README.md, "Scheduled retrains", says how to deploy it.
"""

# First, because it sets the environment that Metaflow reads when it is imported.
from posttrain_flow import ROOT, parser_of, plain_errors, this_run  # isort: skip

from metaflow import (
    Config,
    FlowSpec,
    Parameter,
    card,
    config_expr,
    current,
    package_sources,
    project,
    resources,
    retry,
    schedule,
    step,
    timeout,
)

from posttrain_lib.config.retrain import parse_retrain_config
from steps import pipeline, retrain

_AGAIN = retry(
    times=config_expr("config.limits.retries"),
    minutes_between_retries=config_expr("config.limits.minutes_between_retries"),
)
_IN_TIME = timeout(hours=config_expr("config.limits.step_hours"))
_HOST = resources(cpu=config_expr("config.resources.cpu"), memory=config_expr("config.resources.memory_mb"))
_DEVICES = resources(
    cpu=config_expr("config.resources.cpu"),
    memory=config_expr("config.resources.memory_mb"),
    gpu=config_expr("config.resources.gpu"),
)


@schedule(cron=config_expr("config.schedule.cron"), timezone=config_expr("config.schedule.timezone"))
@project(name="posttrain")
@package_sources(["../steps", "../posttrain_lib", "../configs"], suffixes=[".py", ".yaml", ".jsonl"])
class RetrainFlow(FlowSpec):
    """Keep a promoted model up to date: a candidate of what is new takes its place where it proves itself."""

    config = Config(
        "config",
        default=str(ROOT / "configs" / "retrain" / "default.yaml"),
        parser=parser_of(parse_retrain_config),
        help="the retrain's file (YAML)",
    )
    overrides = Parameter("set", default="", help="overrides, comma-separated: run.train.steps=50,keep_sources=false")
    reuse = Parameter("reuse", default=True, type=bool, help="take the results of equal work from the store")

    @_AGAIN
    @_IN_TIME
    @_HOST
    @step
    def start(self):
        """Look for new rows, copy them, and look the current version up."""
        self.refused, self.manifests, self.run_config = None, {}, None
        with plain_errors():
            self.retrain_config = retrain.resolve(self.config, self.overrides, retrain.test_branch(current))
            self.due = retrain.look(self.retrain_config)
            if self.due.is_due:
                self.run_config = retrain.training_config(self.retrain_config, self.due, this_run())
                self.manifests = pipeline.advance("inputs", self.run_config, {}, reuse=self.reuse)
        self.next(self.prepare)

    @_AGAIN
    @_IN_TIME
    @_HOST
    @step
    def prepare(self):
        """Everything before training: tokens, the comparison with serving, the model's verification."""
        with plain_errors():
            if self.due.is_due:
                self._advance(*retrain.before_training(self.run_config)[1:])
        self.next(self.train)

    @_AGAIN
    @_IN_TIME
    @_DEVICES
    @card(type="blank", id="training", refresh_interval=5)
    @step
    def train(self):
        """Train from the current version; a retry and a resume go on from the last checkpoint."""
        from posttrain_lib.adapters.metaflow_card import TrainingCard

        with plain_errors():
            self._advance("train", observe=TrainingCard(current.card["training"]))
        self.next(self.evaluate)

    @_AGAIN
    @_IN_TIME
    @_HOST
    @step
    def evaluate(self):
        """The current version and the candidate on the same held-out rows and suites."""
        with plain_errors():
            self._advance("evaluate")
        self.next(self.export)

    @_AGAIN
    @_IN_TIME
    @_HOST
    @step
    def export(self):
        """Write the candidate's folder and prove it in transformers and vLLM."""
        with plain_errors():
            self._advance("export")
            if self.run_config is not None and self.run_config["evaluation"]["lm_eval"] is not None:
                self._advance("lm_eval")
        self.next(self.promote)

    @_AGAIN
    @_IN_TIME
    @_HOST
    @card(type="blank", id="retrain")
    @step
    def promote(self):
        """Make the candidate the current version where every gate holds; else keep the one there is, and say why."""
        from posttrain_lib.adapters.metaflow_retrain_card import fill_retrain

        with plain_errors():
            self.decision = None
            if self.due.is_due:
                name = f"{current.flow_name}/{current.run_id}"
                self.decision = retrain.decide(
                    self.retrain_config, self.due.rows, self.run_config, self.manifests, self.refused, name
                )
            self.said = retrain.told(self.retrain_config, self.decision)
            print(self.said, flush=True)
            history = retrain.history(self.retrain_config)
            fill_retrain(
                current.card["retrain"],
                self.said,
                self.due.rows,
                self.due.remarks,
                self.decision,
                history,
                self.manifests,
                retrain.lineage(self.manifests),
            )
        self.next(self.end)

    @_AGAIN
    @_IN_TIME
    @_HOST
    @step
    def end(self):
        """The decision stands in the artifacts ``decision`` and ``said``."""

    def _advance(self, *names, **options):
        """These steps, unless there is nothing to do or the candidate was refused before."""
        if self.run_config is None or self.refused is not None:
            return
        again = current.retry_count > 0 or current.origin_run_id is not None
        self.manifests, self.refused = retrain.attempt(
            names, self.run_config, self.manifests, reuse=self.reuse or again, **options
        )


if __name__ == "__main__":
    RetrainFlow()
