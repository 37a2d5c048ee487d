"""What pydantic found wrong, in the words of somebody who writes YAML."""

import difflib
from collections.abc import Callable
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails


def describe(model: type[BaseModel], error: ValidationError) -> list[str]:
    """One sentence for each wrong field: its path, and what is allowed there."""
    return [f"{_path(e['loc'])} {_problem(model, e)}" for e in error.errors()]


def _path(loc: tuple[int | str, ...]) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "the object"


def _problem(model: type[BaseModel], error: ErrorDetails) -> str:
    context: dict[str, Any] = error.get("ctx", {})
    given = error["input"]
    texts: dict[str, Callable[[], str]] = {
        "missing": lambda: "is required",
        "extra_forbidden": lambda: "is not a known field" + _did_you_mean(model, error["loc"]),
        "literal_error": lambda: f"must be one of {context['expected']}, not {given!r}",
        "greater_than_equal": lambda: f"must be at least {context['ge']}, not {given}",
        "less_than_equal": lambda: f"must be at most {context['le']}, not {given}",
        "string_pattern_mismatch": lambda: f"must match {context['pattern']}, not {given!r}",
        "too_long": lambda: f"may hold at most {context['max_length']} items",
        "string_too_long": lambda: f"may hold at most {context['max_length']} characters",
        "string_too_short": lambda: f"must hold at least {context['min_length']} characters",
        "value_error": lambda: str(context["error"]),
    }
    fallback = f"{error['msg'][:1].lower()}{error['msg'][1:]}, not {given!r}"
    return texts.get(error["type"], lambda: fallback)()


def _did_you_mean(model: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    """Suggest the field nearest to a misspelt one."""
    current: type[BaseModel] | None = model
    key_next = False
    for part in loc[:-1]:
        if isinstance(part, int) or current is None:
            continue
        if key_next:  # of a mapping of models: any name may stand there
            key_next = False
            continue
        found = next((f for f in current.model_fields.values() if f.alias == part), None)
        current = model_in(found.annotation) if found else None
        key_next = found is not None and get_origin(found.annotation) is dict
    names = [f.alias or n for n, f in current.model_fields.items()] if current else []
    near = difflib.get_close_matches(str(loc[-1]), names, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known here: {', '.join(names)}" if names else ""


def model_in(annotation: Any) -> type[BaseModel] | None:
    """The model inside `X`, `X | None`, `list[X]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for arg in get_args(annotation) if (m := model_in(arg))), None)
