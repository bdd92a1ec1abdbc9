"""Forms that nobody needs and somebody sends.

Knows:        what has taken other compilers long, or down: depth, repetition, references, numbers.
Ignorant of:  what becomes of them.
"""

import random
from collections.abc import Callable
from typing import Any

from lowmoe.engine.constraint import Constraint, Grammar, JsonSchema, Regex


def _chain(n_rules: int, body: str) -> str:
    rules = [f"{body.format(f'r{i + 1}')}" for i in range(n_rules)]
    return "\n".join(["start: r0", *(f"r{i}: {rule}" for i, rule in enumerate(rules))]) + (
        f'\nr{n_rules}: "a"'
    )


def _doubling(n_levels: int, rule: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Each level refers twice to the next."""
    levels = {f"d{i}": rule({"$ref": f"#/$defs/d{i + 1}"}) for i in range(n_levels)}
    last = {"type": "object", "properties": {"x": {"type": "string"}}}
    return {"$ref": "#/$defs/d0", "$defs": {**levels, f"d{n_levels}": last}}


def _nested(n_levels: int) -> dict[str, Any]:
    return {"items": _nested(n_levels - 1)} if n_levels else {}


_EACH_OTHER = {
    "$ref": "#/$defs/a",
    "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
}
_HUGE = {"type": "integer", "minimum": -(10**300), "maximum": 10**300}
_TERMINALS = _chain(40, "{0} {0}").replace("r", "R").replace("staRt", "start")

# llguidance 1.9.1 does not come back from these for a minute and more.
ENDLESS: dict[str, Constraint] = {
    "a number that four primes divide": JsonSchema(
        {"type": "integer", "allOf": [{"multipleOf": p} for p in (9973, 9967, 9949, 9941)]}
    ),
    "a thousand patterns of names": JsonSchema(
        {"patternProperties": {f"^a{i}.*b{i}$": {"type": "string"} for i in range(1000)}}
    ),
}
# ... and ends the process with this.
CRASHING: dict[str, Constraint] = {"a chain of rules": Grammar(_chain(4000, "{0}"))}

REFUSED: dict[str, tuple[Constraint, str]] = {
    "too long": (Regex("a" * 65_537), "has 65537 bytes, but at most 65536"),
    "half a character": (Regex("\ud800"), "not Unicode"),
    "too deep": (JsonSchema({"items": _nested(32)}), "nested deeper than 32"),
    "not JSON": (JsonSchema({"const": float("nan")}), "not JSON .*Out of range"),
    "not JSON at all": (JsonSchema({"const": b"a"}), "not JSON .*bytes"),
    "no object": (JsonSchema(True), "is of type bool"),  # type: ignore[arg-type]
    "no pattern": (Regex("(a"), "unclosed group"),
    "look-around": (Regex("(?=a)b"), "look-around"),
    "a back reference": (Regex(r"(a)\1"), "backreferences"),
    "a number too large": (Regex("a{99999999999}"), "decimal literal"),
    "parentheses": (Regex("(" * 20_000 + "a" + ")" * 20_000), "regular expression: "),
    "repetition": (Regex("((a{1000}){1000}){1000}"), "too many expressions"),
    "a web address": (JsonSchema({"$ref": "http://127.0.0.1:9/x.json"}), "nothing is fetched"),
    "a file": (JsonSchema({"$ref": "file:///etc/passwd"}), "nothing is fetched"),
    "a web address in a grammar": (
        Grammar('start: %json {"$ref": "https://example.com/x"}'),
        "nothing is fetched",
    ),
    "itself": (JsonSchema({"$ref": "#"}), "no text has this form"),
    "each other": (JsonSchema(_EACH_OTHER), "no text has this form"),
    "itself and more": (JsonSchema({"allOf": [{"$ref": "#"}], "type": "object"}), "circular"),
    "nothing": (JsonSchema({"type": "integer", "minimum": 2, "maximum": 1}), "JSON schema: "),
    "a keyword": (JsonSchema({"type": "array", "uniqueItems": True}), "uniqueItems"),
    "a keyword made light of": (
        JsonSchema({"not": {}, "x-guidance": {"lenient": True}}),
        'Unimplemented keys: ."not"',
    ),
    "an unknown type": (JsonSchema({"type": 17}), "type must be"),
    "an unknown format": (JsonSchema({"type": "string", "format": "soup"}), "Unknown format"),
    "choices of choices": (
        JsonSchema(
            {
                "allOf": [
                    {"anyOf": [{"properties": {f"p{i}{j}": {"type": "null"}}} for j in range(8)]}
                    for i in range(8)
                ]
            }
        ),
        "too large|too complex|too big",
    ),
    "numbers": (JsonSchema(_HUGE), "range"),
    "a fraction": (JsonSchema({"type": "number", "multipleOf": 1e-300}), "multipleOf"),
    "a prime": (JsonSchema({"type": "integer", "multipleOf": 982451653}), "fuel|too"),
    "no rules": (Grammar(""), "Empty grammar"),
    "a rule of itself": (Grammar("start: start"), "no text has this form"),
    "doubling terminals": (Grammar(_TERMINALS), "too"),
    "an unknown rule": (Grammar("start: nobody"), "nobody"),
    "a package": (Grammar("%import os (X)\nstart: X"), "os.X"),
    "another grammar": (Grammar("start: @other"), "other"),
    "tokens by number": (Grammar('start: <[0-4000000000]> "a"'), "4000000000"),
}  # fmt: skip

# Large, odd, and to be answered all the same.
ACCEPTED: dict[str, Constraint] = {
    "a long text": Regex(".{1,60000}"),
    "nested repetition": Regex("(((a|b){1,1000}c){1,1000}d){1,1000}"),
    "what needs 2**60 states": Regex("(a|b)*a(a|b){60}"),
    "catastrophic elsewhere": Regex("(x+x+)+y"),
    "words": Regex(r"(\w{1,200}\s){1,200}\d{1,200}"),
    "alternatives": Regex("|".join(f"w{i}.*x{i}" for i in range(3000))),
    "a long string": JsonSchema({"type": "string", "minLength": 10**6, "maxLength": 4 * 10**9}),
    "many items": JsonSchema({"type": "array", "minItems": 10**6, "items": {"type": "null"}}),
    "many names": JsonSchema(
        {
            "type": "object",
            "properties": {f"k{i}": {"type": "string"} for i in range(1000)},
            "required": [f"k{i}" for i in range(1000)],
        }
    ),
    "many values": JsonSchema({"enum": [f"value number {i}" for i in range(2500)]}),
    "doubling references": JsonSchema(
        _doubling(30, lambda ref: {"type": "object", "properties": {"a": ref, "b": ref}})
    ),
    "doubling conjunctions": JsonSchema(_doubling(25, lambda ref: {"allOf": [ref, ref]})),
    "a tree": JsonSchema({"anyOf": [{"type": "array", "items": {"$ref": "#"}}, {"type": "null"}]}),
    "anything": JsonSchema({}),
    "an empty text": Grammar('start: ""'),
    "an ambiguous text": Grammar('start: a*\na: b*\nb: c*\nc: "x"*'),
}


def random_form(seed: int) -> Constraint:
    """One of countless more."""
    chance = random.Random(seed)
    if seed % 3 == 0:
        return Regex(_pattern(chance, chance.randrange(1, 7)))
    if seed % 3 == 1:
        names = [f"d{i}" for i in range(chance.randrange(1, 5))]
        defs = {name: _schema(chance, names, 3) for name in names}
        return JsonSchema({**_schema(chance, names, 5), "$defs": defs})
    n_rules = chance.randrange(1, 12)
    rules = [f"r{i}: {_rule(chance, n_rules, 4)}" for i in range(n_rules)]
    return Grammar("\n".join([f"start: {_rule(chance, n_rules, 3)}", *rules]))


_NUMBERS = (0, 1, 2, 3, 17, 1000, 65_536, 2**31, -(2**63), 10**30)
_ATOMS = (
    "a",
    ".",
    r"\w",
    r"\s",
    r"\p{L}",
    "[^a-f]",
    "[äöü]",
    r"\x00",
    "(?i:straße)",
    "🦙",
    "$",
    "^",
)


def _pattern(chance: random.Random, depth: int) -> str:
    if depth == 0:
        return chance.choice(_ATOMS)
    inner = [_pattern(chance, depth - 1) for _ in range(chance.randrange(1, 4))]
    low = abs(chance.choice(_NUMBERS))
    end = chance.choice(
        ["*", "+", "?", f"{{{low}}}", f"{{{low},}}", f"{{{low},{2 * low + 1}}}", ""]
    )
    return f"({chance.choice(['|', '', '&'])}{chance.choice(['|', '']).join(inner)}){end}"


def _schema(chance: random.Random, names: list[str], depth: int) -> dict[str, Any]:
    if depth == 0 or chance.random() < 0.2:
        return chance.choice(
            [
                {"$ref": f"#/$defs/{chance.choice(names)}"},
                {"type": "string", "pattern": _pattern(chance, 3)},
                {"type": "number", "minimum": chance.choice(_NUMBERS), "multipleOf": 0.01},
                {"type": "integer", "multipleOf": 1 + abs(chance.choice(_NUMBERS))},
                {"type": "string", "minLength": abs(chance.choice(_NUMBERS))},
                {"const": chance.choice(_NUMBERS)},
                {"type": chance.choice(["string", "null", "object", "array"])},
            ]
        )
    inner = [_schema(chance, names, depth - 1) for _ in range(chance.randrange(1, 5))]
    kind = chance.choice(["anyOf", "allOf", "oneOf", "object", "array", "patterns"])
    if kind == "object":
        keys = [f"k{i}" for i in range(len(inner))]
        of_keys = dict(zip(keys, inner, strict=True))
        return {"type": "object", "properties": of_keys, "required": keys[:2]}
    if kind == "array":
        size = abs(chance.choice(_NUMBERS))
        return {"type": "array", "items": inner[0], "minItems": size, "prefixItems": inner[1:]}
    if kind == "patterns":
        return {"patternProperties": {_pattern(chance, 2): one for one in inner}}
    return {kind: inner}


def _rule(chance: random.Random, n_rules: int, depth: int) -> str:
    if depth == 0:
        return chance.choice(
            [f"r{chance.randrange(n_rules)}", '"a"', '""', f"/{_pattern(chance, 2)}/", '"b"i']
        )
    inner = [_rule(chance, n_rules, depth - 1) for _ in range(chance.randrange(1, 4))]
    end = chance.choice(["", "*", "+", "?", "{3}", "{1,1000}"])
    return f"({chance.choice([' | ', ' ']).join(inner)}){end}"
