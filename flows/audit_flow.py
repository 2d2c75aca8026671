"""Audit of a promoted model, behind every retrain: pointer, history, and every byte of the current version's folder.

    python flows/audit_flow.py run

Deployed, it starts when a RetrainFlow of its project and branch has ended well. ``--config`` is that flow's file, which
names the model; it stands before ``run``.
"""

# First, because it sets the environment that Metaflow reads when it is imported.
from posttrain_flow import ROOT, parser_of, plain_errors  # isort: skip

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
    step,
    timeout,
    trigger_on_finish,
)

from posttrain_lib.config.retrain import parse_retrain_config
from posttrain_lib.lineage.store import Store
from steps import audit, retrain


@trigger_on_finish(flow="RetrainFlow")
@project(name="posttrain")
@package_sources(["../steps", "../posttrain_lib", "../configs"], suffixes=[".py", ".yaml", ".jsonl"])
class AuditFlow(FlowSpec):
    """Prove that the model that is served is the one that was promoted; fail where it is not."""

    config = Config(
        "config",
        default=str(ROOT / "configs" / "retrain" / "default.yaml"),
        parser=parser_of(parse_retrain_config),
        help="the retrain's file (YAML)",
    )
    overrides = Parameter("set", default="", help="overrides, comma-separated, as the retrain has them")

    @retry(
        times=config_expr("config.limits.retries"),
        minutes_between_retries=config_expr("config.limits.minutes_between_retries"),
    )
    @timeout(hours=config_expr("config.limits.step_hours"))
    @resources(cpu=1, memory=4096)
    @card(type="blank", id="audit")
    @step
    def start(self):
        """Read everything again, and show it. What does not hold fails the next step: a step that fails has no card."""
        from posttrain_lib.adapters.metaflow_retrain_card import fill_audit

        with plain_errors():
            raw = retrain.resolve(self.config, self.overrides, retrain.test_branch(current))
            self.audit = audit.audit(Store(), raw["name"])
            fill_audit(current.card["audit"], raw["name"], self.audit.checks, self.audit.history)
            for check in self.audit.checks:
                print(f"{check.name}: {'' if check.passed else 'NO: '}{check.value}", flush=True)
        self.next(self.end)

    @step
    def end(self):
        """Fail where something does not hold. What was proved stands in the artifact ``audit``."""
        with plain_errors():
            self.audit.demand()


if __name__ == "__main__":
    AuditFlow()
