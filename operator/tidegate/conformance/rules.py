"""Rules: what each is called, how binding it is, and the function that checks it."""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tidegate.conformance.probe import Probe


class Level(StrEnum):
    """How binding a rule is."""

    MUST = "MUST"
    SHOULD = "SHOULD"


class BrokenError(Exception):
    """The picker breaks the rule; the message says what was sent and what came."""


class NotRunError(Exception):
    """The rule could not be checked; the message says what is missing."""


class UnknownRuleError(ValueError):
    """A rule was asked for that does not exist."""


Check = Callable[["Probe"], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. `source` says where it comes from: the protocol (004), or Envoy's ext_proc."""

    id: str
    level: Level
    text: str
    source: str
    check: Check


_RULES: dict[str, Rule] = {}


def rule(name: str, level: Level, source: str = "004") -> Callable[[Check], Check]:
    """Register the function below it as the check of a rule; its docstring is the rule's text."""

    def register(check: Check) -> Check:
        if name in _RULES:
            raise ValueError(f"rule {name} is there twice")
        text = " ".join((check.__doc__ or "").split())
        _RULES[name] = Rule(name, level, text, source, check)
        return check

    return register


def all_rules() -> list[Rule]:
    """Every rule, in the order in which they are checked."""
    from tidegate.conformance import checks

    checks.load()
    return list(_RULES.values())


def select(wanted: Sequence[str], left_out: Iterable[str] = ()) -> list[Rule]:
    """The rules of these names, or all, less some. `subset` stands for all that begin with `subset.`.

    Raises:
        UnknownRuleError: A name that no rule has.
    """
    rules = all_rules()
    drop = list(left_out)
    for name in (*wanted, *drop):
        if not any(_is(name, r) for r in rules):
            groups = ", ".join(sorted({r.id.partition(".")[0] for r in rules}))
            raise UnknownRuleError(f"there is no rule {name!r}; groups are {groups}, and --list shows all")
    chosen = [r for r in rules if not wanted or any(_is(name, r) for name in wanted)]
    return [r for r in chosen if not any(_is(name, r) for name in drop)]


def _is(name: str, one: Rule) -> bool:
    return one.id == name or one.id.startswith(f"{name}.")
