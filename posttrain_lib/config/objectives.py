"""The sections of recipes beyond SFT: what is optimised, and the frozen model that it is compared with, if any."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from posttrain_lib.config.base import Section
from posttrain_lib.config.origin import ModelOrigin

#: variants that compare with no reference
REFERENCE_FREE = ("simpo", "orpo")


class Objective(Section):
    """A recipe's section: the options of its loss, and ``beside`` them what is there for any loss."""

    beside: ClassVar[frozenset[str]]

    @abstractmethod
    def loss(self) -> tuple[str, dict[str, Any]]:
        """Name and options of the loss."""

    def changed_loss_fields(self) -> list[str]:
        """Options of the loss that are not at their defaults."""
        fields = type(self).model_fields
        return [name for name in fields if name not in self.beside and getattr(self, name) != fields[name].default]


class Reference(Section):
    """The policy that a preference loss measures from."""

    kept: Literal["precomputed", "live", "base"] = Field(
        "precomputed",
        description="precomputed: its log-probs are stored once, before training; live: it runs beside the policy; "
        "base: the policy without its adapters (model.lora)",
    )
    path: str | None = Field(
        None,
        description="another model, named as model.path names one; default: the model that training starts from",
    )
    origin: ModelOrigin | None = Field(None, description="written by the run: what made the model that path named")

    @model_validator(mode="after")
    def _base_is_the_start(self) -> Reference:
        if self.kept == "base" and self.path is not None:
            raise ValueError("kept: base is the model that training starts from: leave path out, or set kept: live")
        return self


class DPO(Objective):
    """Learning from pairs of a better and a worse answer."""

    # A loss of one's own takes from the variant whether there is a reference.
    beside: ClassVar[frozenset[str]] = frozenset({"variant", "reference"})

    variant: Literal["sigmoid", "ipo", "hinge", "robust", "apo_zero", "apo_down", "simpo", "orpo", "kto"] = "sigmoid"
    beta: float | None = Field(
        None,
        gt=0,
        description="how strongly the policy is held to the reference; simpo: the factor on the margin; orpo: the "
        "weight of the odds ratio. Default: 0.1; simpo: 2.0",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of the pairs taken to be the wrong way round")
    sft_weight: float = Field(0.0, ge=0, description="weight of the chosen answer's negative log-likelihood a token")
    length_normalise: bool | None = Field(
        None, description="compare log-probs a token in place of an answer's sums; default: as the variant has it"
    )
    target_margin: float | None = Field(
        None, ge=0, description="simpo: the margin wanted, in units of reward; default: 1.0"
    )
    desirable_weight: float | None = Field(None, gt=0, description="kto: of chosen answers; default: 1")
    undesirable_weight: float | None = Field(None, gt=0, description="kto: of rejected answers; default: 1")
    reference: Reference = Reference()

    def loss(self) -> tuple[str, dict[str, Any]]:
        """Name and options of the loss."""
        if self.variant == "simpo":
            margin = 1.0 if self.target_margin is None else self.target_margin
            beta = 2.0 if self.beta is None else self.beta
            return "simpo", {"beta": beta, "target_margin": margin, "sft_weight": self.sft_weight}
        beta = 0.1 if self.beta is None else self.beta
        if self.variant == "orpo":
            return "orpo", {"beta": beta}
        if self.variant == "kto":
            weights = {"desirable_weight": self.desirable_weight, "undesirable_weight": self.undesirable_weight}
            return "kto", {"beta": beta, **{name: 1.0 if value is None else value for name, value in weights.items()}}
        names = ("variant", "label_smoothing", "sft_weight", "length_normalise")
        return "dpo", {"beta": beta, **{name: getattr(self, name) for name in names}}

    @property
    def needs_reference(self) -> bool:
        """Whether the variant compares with one."""
        return self.variant not in REFERENCE_FREE

    @model_validator(mode="after")
    def _options_of_the_variant(self) -> DPO:
        if self.reference != Reference() and not self.needs_reference:
            raise ValueError(f"reference is not for variant {self.variant}, which compares with none: leave it out")
        if self.variant != "kto" and (self.desirable_weight, self.undesirable_weight) != (None, None):
            raise ValueError(f"desirable_weight and undesirable_weight are for variant kto, not {self.variant}")
        if self.target_margin is not None and self.variant != "simpo":
            raise ValueError(f"target_margin is for variant simpo, not {self.variant}")
        if self.sft_weight and self.variant in ("orpo", "kto"):
            raise ValueError(f"sft_weight is not for variant {self.variant}")
        if self.length_normalise is not None and self.variant in ("simpo", "orpo", "kto"):
            raise ValueError(f"length_normalise is not for variant {self.variant}, which has its own rule")
        if self.label_smoothing and self.variant not in ("sigmoid", "robust"):
            raise ValueError(f"label_smoothing is for the variants sigmoid and robust, not {self.variant}")
        if self.variant == "robust" and not self.label_smoothing:
            raise ValueError("variant robust needs label_smoothing above 0; without it, it is sigmoid")
        return self


class Reward(Objective):
    """A scalar score from pairs of a better and a worse answer (Bradley-Terry)."""

    beside: ClassVar[frozenset[str]] = frozenset({"pad_token"})

    centre: float = Field(0.0, ge=0, description="weight of (chosen + rejected)^2, which keeps scores around 0")
    margin_weight: float = Field(
        0.0,
        ge=0,
        description="units of score by which the chosen answer is to lead for one unit of the row's margin; 0: rows' "
        "margins are not looked at",
    )
    pad_token: str | None = Field(
        None,
        description="of the exported model; no document may end with it. Default: the tokenizer's padding token",
    )

    def loss(self) -> tuple[str, dict[str, Any]]:
        """Name and options of the loss."""
        return "reward", {"centre": self.centre, "margin_weight": self.margin_weight}


class Teacher(Section):
    """The model that is learned from."""

    path: str = Field(description="named as model.path names a model; of the student's tokenizer")
    origin: ModelOrigin | None = Field(None, description="written by the run: what made the model that path named")
    kept: Literal["live", "stored"] = Field(
        "live", description="live: it runs beside the student; stored: its top log-probs are stored once"
    )
    top_k: int | None = Field(
        None, ge=1, description="stored: log-probs kept of each trained token's distribution; default: 64"
    )

    @property
    def stored_entries(self) -> int:
        """Log-probs kept of each token."""
        return 64 if self.top_k is None else self.top_k

    @model_validator(mode="after")
    def _entries_are_stored(self) -> Teacher:
        if self.top_k is not None and self.kept != "stored":
            raise ValueError("top_k is of kept: stored: leave it out, or set kept: stored")
        return self


class Distill(Objective):
    """Learning a teacher's distributions over the next token."""

    beside: ClassVar[frozenset[str]] = frozenset({"teacher"})

    teacher: Teacher
    divergence: Literal["forward", "reverse", "symmetric", "jensen_shannon"] = Field(
        "forward", description="forward: KL(teacher || student); reverse: KL(student || teacher); symmetric: their mean"
    )
    mix: float = Field(0.5, gt=0, lt=1, description="of jensen_shannon: the teacher's share in the mixture")
    temperature: float = Field(1.0, gt=0, description="divides the logits of both")
    hard_weight: float = Field(0.0, ge=0, lt=1, description="share of the tokens' own cross-entropy in the loss")

    def loss(self) -> tuple[str, dict[str, Any]]:
        """Name and options of the loss."""
        names = ("divergence", "mix", "temperature", "hard_weight")
        return "distill", {name: getattr(self, name) for name in names}

    @model_validator(mode="after")
    def _stored_is_forward(self) -> Distill:
        if self.mix != type(self).model_fields["mix"].default and self.divergence != "jensen_shannon":
            raise ValueError(f"mix is for divergence jensen_shannon, not {self.divergence}")
        if self.teacher.kept == "stored" and self.divergence != "forward":
            raise ValueError(
                f"divergence {self.divergence} needs the teacher's whole distribution: set teacher.kept: live, or "
                "divergence: forward"
            )
        return self
