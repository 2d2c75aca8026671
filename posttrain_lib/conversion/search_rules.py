"""The rules of a generated family file: under the names that the families share where they fit, else one by one."""

from __future__ import annotations

from collections.abc import Iterable

from posttrain_lib.conversion.search_fields import quoted
from posttrain_lib.conversion.source_layout import Call, Node
from posttrain_lib.models.families import shared
from posttrain_lib.models.weights import Rule

_SHARED = ("EMBEDDING_AND_HEAD", "PRE_NORM", "ATTENTION", "ATTENTION_BIAS", "QK_NORM", "MLP", "MLP_BIAS", "EXPERTS")
_LAYER, _STORED_LAYER = "layers.{n}.", "model.layers.{n}."


def rule_nodes(rules: Iterable[Rule], may_have: Iterable[str]) -> tuple[list[Node], dict[str, set[str]]]:
    """(source of each rule or shared group, module -> names to import).

    ``may_have``: shared groups whose parameters other folders of the family can have.
    """
    left = list(dict.fromkeys(rules))
    nodes: list[Node] = []
    imports: dict[str, set[str]] = {"shared": set(), "weights": set()}
    owned = {name: rule for rule in left for name in rule.ours}
    for name in _SHARED:
        group: tuple[Rule, ...] = getattr(shared, name)
        clash = any(owned.get(ours, rule) != rule for rule in group for ours in rule.ours)
        has = [rule for rule in group if rule in left]
        whole = len(has) == len(group) or (name.endswith("BIAS") and has) or name == "EMBEDDING_AND_HEAD"
        if not clash and (whole or name in may_have) and (has or name in may_have):
            nodes.append(f"*{name}")
            imports["shared"].add(name)
            left = [rule for rule in left if rule not in group]
    for rule in left:
        nodes.append(_node(rule, imports))
    return nodes, imports


def _node(rule: Rule, imports: dict[str, set[str]]) -> Node:
    ours, inside = [name.removeprefix(_LAYER) for name in rule.ours], rule.theirs.removeprefix(_STORED_LAYER)
    if not rule.float32 and inside != rule.theirs and ours[0] != rule.ours[0]:
        if rule.how == "same":
            return _named("in_layer", [ours[0], inside], imports, "shared")
        if rule.how == "rows":
            return _named("rows", [inside, *ours], imports, "shared")
        if rule.how == "experts":
            return _named("per_expert", [ours[0].removeprefix("mlp.experts."), inside], imports, "shared")
    if rule.how == "same" and not rule.float32:
        return _named("same", [rule.ours[0], rule.theirs], imports, "weights")
    imports["weights"].add("Rule")
    tail: tuple[Node, ...] = ("float32=True",) if rule.float32 else ()
    return Call("Rule", (Call("", tuple(map(quoted, rule.ours))), quoted(rule.theirs), quoted(rule.how), *tail))


def _named(function: str, words: list[str], imports: dict[str, set[str]], module: str) -> Node:
    imports[module].add(function)
    return Call(function, tuple(map(quoted, words)))
