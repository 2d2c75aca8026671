"""Writing what the search chose as a family file that a reviewer would want: it reads fields, it repeats no numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from posttrain_lib.conversion.family_file import ARCHITECTURE, MODEL_TYPE
from posttrain_lib.conversion.search_fields import LAYER_TYPES, SIZES, Value, period_of, quoted
from posttrain_lib.conversion.search_rules import rule_nodes
from posttrain_lib.conversion.search_space import Space
from posttrain_lib.conversion.source_layout import WIDTH, Call, Keyword, Node, flat, imported, lay_out
from posttrain_lib.models.spec import ALL_NORMS, POST_NORMS, PRE_NORMS
from posttrain_lib.models.weights import Rule

_PACKAGE = "posttrain_lib.models"
_NORM_SETS = {frozenset(PRE_NORMS): "", frozenset(POST_NORMS): "POST_NORMS", frozenset(ALL_NORMS): "ALL_NORMS"}


class FamilyWriter:
    """Source of one family file.

    Args:
        space: of the brief. picks: choice -> which of its readings.
    """

    def __init__(self, space: Space, picks: Mapping[str, int]) -> None:
        self.space, self.fields, self.roles = space, space.fields, space.roles
        self.chosen = space.chosen(picks)
        self.config, self.defaults = space.fields.config, space.fields.defaults
        self.lines: list[str] = []
        self.constants: list[str] = []
        self.read: set[str] = set(SIZES)
        self.spec_names = {"DecoderConfig", "LayerConfig"}
        self.family_imports = {"ConfigReader"}
        self.loops: dict[str, str] = {}
        self.errors = False
        self.activation = "activation"

    def text(self) -> str:
        """The file."""
        self._sizes()
        attention = self._attention()
        mlp = self._feed_forward()
        layer = self._layer(attention, mlp)
        final = self._final(layer)
        unread = [f"    {code}  # {why}" for code, why in self.fields.unread(self.read)]
        rules, imports = self._rules()
        head = [
            f'"""New family (``model_type: {MODEL_TYPE}``).',
            "",
            f"{self._described().capitalize()}.",
            '"""',
            "",
            "from __future__ import annotations",
            "",
            *(["import math", ""] if "ropes" in self.loops else []),
            *(imported("posttrain_lib.errors", ["ModelError"]) if self.errors else []),
            *imported(f"{_PACKAGE}.families", ["Family"]),
            *imported(f"{_PACKAGE}.families.fields", sorted(self.family_imports)),
            *imported(f"{_PACKAGE}.families.shared", [*imports["shared"], "read_sizes"]),
            *imported(f"{_PACKAGE}.spec", sorted(self.spec_names)),
            *(imported(f"{_PACKAGE}.weights", sorted(imports["weights"])) if imports["weights"] else []),
            "",
            *([*self.constants, ""] if self.constants else []),
            "",
        ]
        body = [
            "def read_config(fields: ConfigReader) -> DecoderConfig:",
            '    """Defaults are those of transformers\' configuration class of this ``model_type``."""',
            *self.lines,
            *unread,
            *final,
            "",
            "",
            *rules,
            f'FAMILY = Family("{MODEL_TYPE}", "{ARCHITECTURE}", read_config, RULES)',
        ]
        return "\n".join([*head, *body]) + "\n"

    def _described(self) -> str:
        """What is peculiar about it, in a few words."""
        said, facts = [], self.roles.facts
        norms = frozenset(self._places().values())
        if norms == frozenset(ALL_NORMS):
            said.append("norms before and after")
        elif norms == frozenset(POST_NORMS):
            said.append("norms after only")
        if "qk_norm" in facts:
            said.append(f"query and key norms over each {'head' if facts['qk_norm'] == 'head' else 'projection'}")
        if "sinks" in facts:
            said.append("attention sinks")
        if self._picked("windows") not in (None, "none"):
            said.append("sliding windows")
        if self._picked("positions") not in (None, "rope"):
            said.append("layers without positions")
        if "mixture" in facts:
            said.append("a mixture of experts")
        return ", ".join(said) or "the plain block"

    # --- parts of read_config -----------------------------------------------------------------------------------

    def _put(self, node: Node, name: str) -> None:
        """``name = node``."""
        self.lines += lay_out(node, 4, before=f"{name} = ")

    def _use(self, value: Value) -> str:
        self.read.update(value.fields)
        return value.code

    def _picked(self, choice: str) -> str | None:
        return self.chosen[choice].code if choice in self.chosen else None

    def _places(self) -> Mapping[str, Any]:
        return self.space.places[int(self.chosen["places"].code)]

    def _sizes(self) -> None:
        given, known = self.config, self.defaults
        arguments: list[Node] = ["fields"]
        positions = known.get("max_position_embeddings")
        stated = 'fields.integer("max_position_embeddings")'
        arguments.append(Keyword("positions", stated if positions is None else str(positions)))
        heads = known.get("num_attention_heads")
        if isinstance(size := known.get("head_dim"), int) and size * (heads or 0) != known.get("hidden_size"):
            arguments.append(Keyword("head_dim", str(size)))
        elif not self.space.head_dim_stated:
            arguments.append(Keyword("head_dim", str(self.space.sizes.head_dim)))
        if isinstance(groups := known.get("num_key_value_heads"), int) and groups != heads:
            arguments.append(Keyword("key_value_heads", str(groups)))
        if isinstance(eps := known.get("rms_norm_eps"), float) and eps != 1e-6:
            arguments.append(Keyword("eps", repr(eps)))
        headless = "tie_word_embeddings" not in given and "head" not in self.roles.facts
        if known.get("tie_word_embeddings") is True or headless:
            arguments.append(Keyword("tied", "True"))
        self._put(Call("read_sizes", tuple(arguments)), "sizes")

    def _bias(self, words: tuple[str, ...], present: bool) -> str | None:
        """Source of a bias flag: of the field that decides it, where one does; None where there never is one."""
        field = next((found for word in words if (found := self.fields.governed(word))), None)
        if field is None:
            return "True" if present else None
        if field not in self.loops:
            self.loops[field] = field
            self._put(self._use(self.fields.boolean(field)), field)
        return field

    def _attention(self) -> Node:
        facts, options = self.roles.facts, list[Node]()
        options.append(Keyword("rope", self._rope()))
        if (window := self._window()) is not None:
            options.append(Keyword("window", window))
        for name, usual in (("scale", ""), ("softcap", "None")):
            if (picked := self.chosen[name]).code != usual:
                self._put(self._use(picked), name)
                options.append(Keyword(name, name))
        if "sinks" in facts:
            options.append(Keyword("sinks", "True"))
        for option, words in (("qkv_bias", ("q_proj", "qkv")), ("o_bias", ("o_proj", "dense", "out_proj"))):
            part = option.partition("_")[0]
            if (bias := self._bias(words, f"{part}_bias" in facts)) is not None:
                options.append(Keyword(option, bias))
        if "qk_norm" in facts:
            options.append(Keyword("qk_norm", quoted(facts["qk_norm"])))
        if self._picked("qk_norm_after_rope") == "True":
            options.append(Keyword("qk_norm_after_rope", "True"))
        if (clip := self.fields.clip) is not None:
            self._put(self._use(Value(self.fields.optional(clip), (clip,))), "clip")
            options.append(Keyword("clip", "clip"))
        if "gated" in facts:
            options.append(Keyword("gated", "True"))
        return Call("sizes.attention", tuple(options))

    def _rope(self) -> str:
        rope = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        if any(isinstance(value, dict) for value in rope.values()):
            self._kinds()
            self.constants += [
                "# Every kind of layer states its own; there is no default to fall back to.",
                *lay_out(
                    f"{{{', '.join(f'{quoted(k)}: (' + quoted('rope_theta') + ', math.nan)' for k in rope)}}}",
                    0,
                    "_THETAS = ",
                ),
            ]
            self.loops["ropes"] = ""
            self._put("fields.ropes_by_kind(sizes.head_dim, sizes.positions, _THETAS)", "ropes")
            return "ropes[kind]"
        arguments: list[Node] = ["sizes.head_dim", "sizes.positions"]
        known = {**(self.defaults.get("rope_parameters") or {}), **self.defaults}
        if isinstance(theta := known.get("rope_theta"), int | float) and theta != 10_000:
            arguments.append(Keyword("theta", repr(float(theta))))
        # Nothing was picked where config.json states it: then the family reads it.
        picked = self._picked("partial")
        partial = picked or str(known.get("partial_rotary_factor") or 1.0)
        if picked is None or float(partial) != 1.0:
            arguments.append(Keyword("partial", partial))
        if self._picked("interleaved") == "True":
            arguments.append(Keyword("interleaved", "True"))
        self._put(Call("fields.rope", tuple(arguments)), "rope")
        if (turn := self._picked("positions")) in (None, "rope"):
            return "rope"
        flags = self.fields.position_flags
        assert flags is not None and turn is not None
        self.read.add(flags)
        self._put(f"fields.integers({quoted(flags)}, sizes.layers)", "turns")
        self.errors = True
        self.lines += [
            "    if turns is None:",
            f"        {_missing(flags)}",
        ]
        self.loops["turn"] = "turns"
        return turn

    def _kinds(self) -> None:
        """``kinds``: the kind of every layer, by the field that states it."""
        if "kind" in self.loops:
            return
        self.loops["kind"] = "kinds"
        self.read.add(LAYER_TYPES)
        default = period_of(list(self.defaults.get(LAYER_TYPES) or ()))
        if default is None:
            self.errors = True
            self.lines += [
                f"    if fields.peek({quoted(LAYER_TYPES)}) is None:",
                f"        {_missing(LAYER_TYPES)}",
            ]
            default = quoted("full_attention")
        arguments: list[Node] = ["sizes.layers", '("full_attention", "sliding_attention")', f"lambda layer: {default}"]
        self._put(Call("fields.layer_types", tuple(arguments)), "kinds")

    def _window(self) -> str | None:
        """Source of a layer's window."""
        field, way = self.fields.window, self._picked("windows")
        if field is None or way == "none":
            return None
        named = "" if field == "sliding_window" else quoted(field)
        usual = self.defaults.get(field)
        default = "" if usual is None else f"default={usual!r}"
        width = f"fields.window({', '.join(part for part in (named, default) if part)})"
        self.read.add(field)
        if (flag := self.fields.window_flag) is not None:
            width = f"{width} if {self._use(self.fields.boolean(flag))} else None"
            self._put(width, "window")
            self.lines.append(f"    fields.skip({quoted(field)})  # read only where it is switched on")
        else:
            self._put(width, "window")
        if way == "kind":
            self._kinds()
            return 'window if kind == "sliding_attention" else None'
        if way == "all":
            return "window"
        self.loops["layer"] = "range(sizes.layers)"
        return f"window if layer % 2 == {0 if way == 'even' else 1} else None"

    def _feed_forward(self) -> Node:
        facts = self.roles.facts
        self.activation = activation = self._use(self.chosen["activation"])
        if not activation.startswith('"'):
            self._put(activation, "activation")
            self.activation = "activation"
        elif self.fields.activation:
            stated = ", ".join(map(quoted, self.fields.activation))
            self.read.update(self.fields.activation)
            self.lines.append(f"    fields.activation({stated})  # stated, and not what is computed")
        bias = self._bias(("gate_proj", "up_proj", "gate_up", "fc1", "w1"), "mlp_bias" in facts)
        plain = Call("MLPConfig", ("sizes.intermediate", self.activation, *([] if bias is None else [bias])))
        if "dense" in facts or "mixture" not in facts:
            self.spec_names.add("MLPConfig")
            self._put(plain, "mlp")
        if "mixture" not in facts:
            return "mlp"
        self.spec_names.add("ExpertsConfig")
        self._put(self._experts(), "experts")
        sparse = self.chosen["sparse"].code
        if sparse == "True":
            return "experts"
        if "dense" in sparse:
            self.read.update(("decoder_sparse_step", "mlp_only_layers"))
            self._put('fields.integer("decoder_sparse_step", 1)', "every")
            self._put('set(fields.integers("mlp_only_layers") or ())', "dense")
        else:
            self.read.add("first_k_dense_replace")
            self._put('fields.integer("first_k_dense_replace", minimum=0)', "first")
        self.loops["layer"] = "range(sizes.layers)"
        return f"experts if {sparse} else mlp" if "dense" in facts else "experts"

    def _experts(self) -> Node:
        facts, counts = self.roles.facts, self.fields.experts
        usual = next((self.defaults[name] for name in counts if isinstance(self.defaults.get(name), int)), None)
        # Files from before and after transformers 5 call the number by two names.
        names = dict.fromkeys((*counts, "num_experts", "num_local_experts"))
        self.read.update(names)
        count = Call(
            "fields.same_integer", (Call("", tuple(map(quoted, names))), *([] if usual is None else [str(usual)]))
        )
        chosen = self.fields.chosen
        assert chosen is not None
        self.read.add(chosen)
        size = "sizes.intermediate"
        if "moe_intermediate_size" in self.config:
            size = 'fields.integer("moe_intermediate_size")'
            self.read.add("moe_intermediate_size")
        top = f"fields.integer({quoted(chosen)}{self.fields.literal(chosen)})"
        options: list[Node] = [count, top, size, self.activation]
        if (router := self.chosen["router"].code) != '"softmax"':
            options.append(Keyword("router", router))
        for name in ("renormalise", "float_weights"):
            if name in self.chosen and (picked := self._use(self.chosen[name])) != "False":
                options.append(Keyword(name, picked))
        if "experts_bias" in facts:
            options.append(Keyword("bias", "True"))
        return Call("ExpertsConfig", tuple(options))

    # --- the whole ------------------------------------------------------------------------------------------------

    def _layer(self, attention: Node, mlp: Node) -> Node:
        options: list[Node] = [attention, mlp]
        places = [place for place in ALL_NORMS if place in set(self._places().values())]
        if name := _NORM_SETS.get(frozenset(places), "?"):
            if name == "?":
                options.append(Keyword("norms", Call("", tuple(map(quoted, places)))))
            else:
                self.spec_names.add(name)
                options.append(Keyword("norms", name))
        residual = self.chosen["residual_scale"]
        if residual.code != "1.0":
            self._put(self._use(residual), "residual_scale")
            options.append(Keyword("residual_scale", "residual_scale"))
        return Call("LayerConfig", tuple(options))

    def _final(self, layer: Node) -> list[str]:
        options: list[Node] = []
        plus_one, other = self._picked("plus_one") == "True", self._picked("other_cast") == "True"
        # A norm about one multiplies before it rounds, as a rule; any other rounds first.
        flags = ["plus_one"] * plus_one + ["late_cast"] * (plus_one != other)
        if flags:
            self.spec_names.add("NormConfig")
            options.append(Call("NormConfig", ("sizes.eps", *(Keyword(name, "True") for name in flags))))
        for name, usual in (("embedding_scale", "1.0"), ("logit_scale", "1.0"), ("logit_softcap", "None")):
            if (picked := self.chosen[name]).code != usual:
                options.append(Keyword(name, self._use(picked)))
        loops = {name: over for name, over in self.loops.items() if name in ("kind", "turn", "layer")}
        loops = {name: over for name, over in loops.items() if _mentions(layer, name)}
        if not loops:
            self._put(layer, "layer")
            return lay_out(Call("sizes.decoder", ("[layer] * sizes.layers", *options)), 4, "return ")
        over = next(iter(loops.values()))
        if len(loops) > 1:
            over = f"zip({', '.join(loops.values())}, strict=True)"
        each = f"for {', '.join(loops)} in {over}"
        whole = f"    layers = [{flat(layer)} {each}]"
        lines = [whole] if len(whole) <= WIDTH else ["    layers = [", *lay_out(layer, 8), f"        {each}", "    ]"]
        return [*lines, *lay_out(Call("sizes.decoder", ("layers", *options)), 4, "return ")]

    def _rules(self) -> tuple[list[str], dict[str, set[str]]]:
        exchanged = self._picked("exchanged") == "True"
        pairs = self.roles.swapped if exchanged else self.roles.pairs
        rules = [*self.roles.rules, *(rule for pair in pairs for rule in pair)]
        rules += [Rule((f"layers.{{n}}.{place}_norm.weight",), name) for name, place in self._places().items()]
        may_have = [
            group
            for group, word in (("ATTENTION_BIAS", "q_proj"), ("MLP_BIAS", "gate_proj"))
            if self.fields.governed(word) is not None
        ]
        nodes, imports = rule_nodes(rules, may_have)
        return lay_out(Call("", tuple(nodes)), 0, "RULES = "), imports


def _mentions(node: Node, name: str) -> bool:
    if isinstance(node, str):
        return re.search(rf"\b{name}\b", node) is not None
    if isinstance(node, Keyword):
        return _mentions(node.value, name)
    return any(_mentions(item, name) for item in node.arguments)


def _missing(field: str) -> str:
    return f'raise ModelError("config.json lacks a field", where={quoted(field)}, fix="state it for every layer")'
