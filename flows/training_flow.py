"""The steps that every recipe's flow has, in their order; a recipe adds its config, and what is particular to it."""

# First, because it sets the environment that Metaflow reads when it is imported.
from posttrain_flow import plain_errors, this_run  # isort: skip

from metaflow import FlowSpec, Parameter, card, config_expr, current, retry, step

from steps import pipeline, report


class TrainingFlow(FlowSpec):
    """start -> prepare_data -> check_serving -> convert_model -> train -> evaluate -> export -> end."""

    overrides = Parameter("set", default="", help="overrides, comma-separated: train.steps=50,train.seed=1")
    reuse = Parameter("reuse", default=True, type=bool, help="take the results of equal work from the store")

    @step
    def start(self):
        """Resolve the config, say what will be done, make or find the inputs."""
        with plain_errors():
            self.run_config = pipeline.resolve(self.config, self.overrides, this_run())
            self.manifests = pipeline.advance("inputs", self.run_config, {}, reuse=self.reuse)
            pipeline.show_plan(self.run_config, self.manifests)
        self.next(self.prepare_data)

    @step
    def prepare_data(self):
        """Tokenise, mask, split and check the rows."""
        with plain_errors():
            self.manifests = pipeline.advance("prepare_data", self.run_config, self.manifests, reuse=self.reuse)
        self.next(self.check_serving)

    @step
    def check_serving(self):
        """Prove on a sample that training and serving make the same tokens of the same messages."""
        with plain_errors():
            self.manifests = pipeline.advance("check_serving", self.run_config, self.manifests, reuse=self.reuse)
        self.next(self.convert_model)

    @step
    def convert_model(self):
        """Verify our definition of the model against the reference implementation."""
        with plain_errors():
            self.manifests = pipeline.advance("convert_model", self.run_config, self.manifests, reuse=self.reuse)
        self.next(self.train)

    @retry(times=config_expr("config.compute.retries"), minutes_between_retries=0)
    @card(type="blank", id="training", refresh_interval=5)
    @step
    def train(self):
        """Train on the devices of the compute section; a retry and a resume go on from the last checkpoint."""
        from posttrain_lib.adapters.metaflow_card import TrainingCard

        again = current.retry_count > 0 or current.origin_run_id is not None
        with plain_errors():
            self.manifests = pipeline.advance(
                "train",
                self.run_config,
                self.manifests,
                reuse=self.reuse or again,
                observe=TrainingCard(current.card["training"]),
            )
        self.next(self.evaluate)

    @step
    def evaluate(self):
        """Held-out loss per source, exact match, samples and tasks, before and after training."""
        with plain_errors():
            self.manifests = pipeline.advance("evaluate", self.run_config, self.manifests, reuse=self.reuse)
        self.next(self.export)

    @step
    def export(self):
        """Write a Hugging Face folder and prove it in transformers and vLLM; ask lm_eval, where the run file does."""
        with plain_errors():
            self.manifests = pipeline.advance("export", self.run_config, self.manifests, reuse=self.reuse)
            if self.run_config["evaluation"]["lm_eval"] is not None:
                self.manifests = pipeline.advance("lm_eval", self.run_config, self.manifests, reuse=self.reuse)
        self.next(self.end)

    @card(type="blank", id="report")
    @step
    def end(self):
        """Write the report, and check that the run did what it was asked to."""
        from posttrain_lib.adapters.metaflow_card import fill_report

        with plain_errors():
            manifests = pipeline.load_manifests(self.manifests)
            self.summary = report.summarise(self.run_config, manifests)
            fill_report(current.card["report"], report.collect(self.run_config, manifests), manifests)
            report.check_gates(self.run_config, self.summary)


class ComparingFlow(TrainingFlow):
    """A recipe that compares with a frozen model, which may have its say once before training: score_data."""

    @step
    def convert_model(self):
        """Verify our definition of the model against the reference implementation."""
        with plain_errors():
            self.manifests = pipeline.advance("convert_model", self.run_config, self.manifests, reuse=self.reuse)
        self.next(self.score_data)

    @step
    def score_data(self):
        """Store what the frozen model says of every example, unless it runs beside the trained one."""
        with plain_errors():
            self.manifests = pipeline.advance("score_data", self.run_config, self.manifests, reuse=self.reuse)
        self.next(self.train)
