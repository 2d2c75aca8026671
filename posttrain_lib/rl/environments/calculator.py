"""Environment ``calculator``: a tool that works expressions out, for word problems such as GSM8K's.

    <tool_call>{"name": "calculator", "arguments": {"expression": "48 / 2 + 48"}}</tool_call>   ->   72

An expression is numbers, ``+ - * / // % **`` and brackets. It is read by Python's parser and worked out here, node by
node, within bounds: nothing of it is run.
"""

from __future__ import annotations

import ast
import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from posttrain_lib.rl.environments.base import Said, Turn

if TYPE_CHECKING:
    from posttrain_lib.rl.prompts import RolloutPrompt

_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_NAME = "calculator"
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "Works out an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string", "description": "numbers, + - * / // % ** and brackets"}},
            "required": ["expression"],
        },
    },
}
#: characters of an expression, which bound what the parser does; the size of a power's exponent and of any value
_LONGEST, _LARGEST_EXPONENT, _LARGEST = 200, 64, 10**30

_Number = int | float
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class Calculator:
    """Answers every call of a turn; a turn without a call is the policy's last.

    For graders: ``calls`` and ``failed_calls`` of the episode so far, counts.
    """

    roles: ClassVar[frozenset[str]] = frozenset({"tool"})

    def __init__(self) -> None:
        self._calls = self._failed = 0

    def tools(self) -> Sequence[Mapping[str, Any]]:
        """The one tool."""
        return (_TOOL,)

    def reset(self, prompt: RolloutPrompt, seed: int) -> None:
        """Nothing depends on the prompt, and nothing is random."""
        self._calls = self._failed = 0

    def step(self, text: str) -> Turn:
        """A result, or what is wrong, for each call."""
        calls = _CALL.findall(text)
        messages = [Said("tool", self._answer(call)) for call in calls]
        return Turn(messages, done=not calls, info={"calls": self._calls, "failed_calls": self._failed})

    def _answer(self, call: str) -> str:
        self._calls += 1
        try:
            return shown(evaluated(_expression(call)))
        except ValueError as error:
            self._failed += 1
            return f"error: {error}"


def evaluated(expression: str) -> int | float:
    """The expression's value; whole numbers stay exact, also where they are the result of a division.

    Raises:
        ValueError: it is no such expression, has no value, or goes beyond the bounds. The text does not quote it: what
            the policy made up is not to come back in the environment's words.
    """
    if len(expression) > _LONGEST:
        raise ValueError(f"the expression is longer than {_LONGEST} characters")
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError("not an arithmetic expression") from error
    except ZeroDivisionError as error:
        raise ValueError("division by zero") from error
    except OverflowError as error:
        raise ValueError("the value is too large") from error


def shown(value: int | float) -> str:
    """The value as text: at most 12 digits of what is no whole number."""
    return str(value) if isinstance(value, int) else format(value, ".12g")


def _expression(call: str) -> str:
    try:
        said = json.loads(call)
    except (ValueError, RecursionError) as error:
        raise ValueError("the call is no JSON") from error
    if not isinstance(said, dict) or said.get("name") != _NAME:
        raise ValueError(f"the only tool is {_NAME}")
    arguments = said.get("arguments")
    expression = arguments.get("expression") if isinstance(arguments, dict) else None
    if not isinstance(expression, str):
        raise ValueError("the call has no argument 'expression' of text")
    return expression


def _value(node: ast.expr) -> _Number:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if type(node.op) in _BINARY:
            return _bounded(_BINARY[type(node.op)](left, right))
        if isinstance(node.op, ast.Div):
            exact = isinstance(left, int) and isinstance(right, int) and right and left % right == 0
            return _bounded(left // right if exact else left / right)
        if isinstance(node.op, ast.Pow):
            if abs(right) > _LARGEST_EXPONENT:
                raise ValueError(f"an exponent is above {_LARGEST_EXPONENT}")
            return _bounded(left**right)
    raise ValueError("not an arithmetic expression")


def _bounded(value: Any) -> _Number:
    if isinstance(value, complex) or not abs(value) <= _LARGEST:
        raise ValueError("the value is too large, or no real number")
    number: _Number = value
    return number
