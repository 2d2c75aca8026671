"""Do a run again from its lineage alone, and compare every step with the recorded one.

    python flows/reproduce_flow.py run --origin SFTFlow/1795696944952819
    python flows/reproduce_flow.py run --origin DPOFlow/latest --input model=/elsewhere/model
    python flows/reproduce_flow.py run --origin GRPOFlow/tag:paper --code here

``--help`` after any of them lists what it takes.
"""

# First, because it sets the environment that Metaflow reads when it is imported.
from posttrain_flow import plain_errors  # isort: skip

from metaflow import FlowSpec, Parameter, card, current, package_sources, step

from steps import reproduce


@package_sources(["../steps", "../posttrain_lib", "../configs"], suffixes=[".py", ".yaml"])
class ReproduceFlow(FlowSpec):
    """start -> rebuild -> compare -> end, which fails where the run does not reproduce."""

    origin = Parameter("origin", required=True, help="the run: <flow>/<run id>, <flow>/latest, <flow>/tag:<tag>")
    moved = Parameter("input", default="", help="inputs that lie elsewhere by now: source:a=PATH,model=PATH")
    code = Parameter("code", default="recorded", help="recorded, or here: this checkout's, whatever was recorded")
    environment = Parameter("environment", default="recorded", help="recorded, or here: the one that runs this")
    keep = Parameter("keep", default=False, type=bool, help="keep what was made where it is as recorded, too")

    @step
    def start(self):
        """Look at every input; have the code and the environment ready."""
        with plain_errors():
            self.plan = reproduce.begin(
                self.origin, current.run_id, moved=self.moved, code=self.code, environment=self.environment
            )
        self.next(self.rebuild)

    @step
    def rebuild(self):
        """Run the recorded flow again, with a store and records of its own."""
        with plain_errors():
            self.made = reproduce.carry_out(self.plan)
        self.next(self.compare)

    @card(type="blank", id="report")
    @step
    def compare(self):
        """Hold each step beside the recorded one: in a step of its own, for a task that fails leaves no card."""
        from posttrain_lib.adapters.metaflow_reproduction import fill_reproduction

        with plain_errors():
            self.report = reproduce.report(self.plan, self.made)
            fill_reproduction(current.card["report"], self.report)
            reproduce.clear_away(self.plan, self.report, keep=self.keep)
        self.next(self.end)

    @step
    def end(self):
        """Say what came of it; fail where it is not what was recorded."""
        with plain_errors():
            reproduce.check(self.report)


if __name__ == "__main__":
    ReproduceFlow()
