"""What to send: streams of requests, each with its class, lengths and arrivals."""

import os
from pathlib import Path
from typing import Annotated, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Seconds = Annotated[float, Field(gt=0)]


class ScenarioError(ValueError):
    """A scenario that cannot be used; the message names the field and what it takes."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Phase(_Strict):
    """A stretch of the run with one arrival rate; the phases of a stream follow each other."""

    seconds: Seconds
    per_second: Annotated[float, Field(gt=0)]


class Stream(_Strict):
    """One kind of traffic, either open loop (`phases`) or closed loop (`outstanding`)."""

    name: str
    qos_class: str
    models: Annotated[list[str], Field(min_length=1)]
    lengths: Path
    """CSV with the columns prompt_tokens, output_tokens and, for an open loop, arrival_s."""
    phases: list[Phase] = []
    outstanding: Annotated[int, Field(ge=0)] = 0
    start_s: Annotated[float, Field(ge=0)] = 0.0
    stream: bool = True
    max_output_tokens: Annotated[int, Field(ge=1)] = 256
    max_prompt_tokens: Annotated[int, Field(ge=1)] = 100_000
    token: str = ""
    token_env: str = ""
    """Environment variable that holds the token, so that a scenario can be kept without it."""
    timeout_s: Seconds = 300.0

    @model_validator(mode="after")
    def _one_kind_of_arrivals(self) -> Self:
        if bool(self.phases) == bool(self.outstanding):
            raise ValueError("set exactly one of phases (open loop) and outstanding (closed loop)")
        if self.token and self.token_env:
            raise ValueError("set at most one of token and token_env")
        return self


class Scenario(_Strict):
    """A whole run: `seconds` of load, all of it measured."""

    seconds: Seconds
    seed: int = 0
    streams: Annotated[list[Stream], Field(min_length=1)]

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a scenario from YAML or JSON; relative `lengths` are beside the file.

        Each `token_env` is read here. Raises ScenarioError naming the field.
        """
        try:
            scenario = cls.model_validate(yaml.safe_load(path.read_text()))
        except OSError as error:
            raise ScenarioError(f"{path}: {error.strerror}") from error
        except yaml.YAMLError as error:
            raise ScenarioError(f"{path}: not YAML: {error}") from error
        except ValidationError as error:
            lines = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise ScenarioError(f"{path}: " + "; ".join(lines)) from error
        beside = path.parent
        streams = [
            s.model_copy(update={"lengths": beside / s.lengths, "token": _token(s, path)})
            for s in scenario.streams
        ]
        return scenario.model_copy(update={"streams": streams})


def _token(stream: Stream, path: Path) -> str:
    if not stream.token_env:
        return stream.token
    if token := os.environ.get(stream.token_env, ""):
        return token
    raise ScenarioError(f"{path}: stream {stream.name}: token_env: ${stream.token_env} is not set")
