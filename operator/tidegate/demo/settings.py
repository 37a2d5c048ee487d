"""The demo's figures: reckoned to need about one core at the rush, so that two are enough."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import tidegate
from tidegate.load.scenario import Phase, Scenario, Stream

CLASSES = ("interactive", "standard", "batch")
MODELS = ("chat-8b", "code-8b")
LAG_LIMIT_MS = 20.0
"""A load generator that was later than this measured itself, so the run claims nothing."""

_CALM_PER_S, _RUSH_PER_S, _STANDARD_PER_S = 4.0, 12.0, 1.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What one run of the demo does. Times in seconds, unscaled."""

    directory: Path = Path(".tidegate/demo")
    out: Path = Path("out/demo")
    nodes: int = 4
    gpus_per_node: int = 4
    cold_start_s: float = 4.0
    calm_s: float = 15.0
    rush_s: float = 35.0
    after_s: float = 35.0
    outstanding: int = 256
    seed: int = 1
    keep: bool = False

    @property
    def seconds(self) -> float:
        """Length of the measured window of one arm."""
        return self.calm_s + self.rush_s + self.after_s


def examples() -> Path:
    """The folder of the example manifests: in a checkout at its top, else beside this package."""
    checkout = Path(tidegate.__file__).parents[2] / "examples"
    return checkout if checkout.is_dir() else Path(str(files("tidegate.demo") / "examples"))


def scenario(settings: Settings, tokens: dict[str, str]) -> Scenario:
    """The load of one arm: chat people, code completion, and a pipeline that never runs dry.

    `tokens` has each class's bearer token. Both arms are given the same.
    """
    data = Path(str(files("tidegate.demo") / "data"))
    models = list(MODELS)
    chat = [
        Phase(seconds=settings.calm_s, per_second=_CALM_PER_S),
        Phase(seconds=settings.rush_s, per_second=_RUSH_PER_S),
        Phase(seconds=settings.after_s, per_second=_CALM_PER_S),
    ]
    code = [Phase(seconds=settings.seconds, per_second=_STANDARD_PER_S)]
    return Scenario(
        seconds=settings.seconds,
        seed=settings.seed,
        streams=[
            Stream(
                name="chat",
                qos_class="interactive",
                models=models,
                lengths=data / "chat.csv",
                phases=chat,
                token=tokens["interactive"],
            ),
            Stream(
                name="code",
                qos_class="standard",
                models=models,
                lengths=data / "code.csv",
                phases=code,
                token=tokens["standard"],
            ),
            Stream(
                name="summaries",
                qos_class="batch",
                models=models,
                lengths=data / "summaries.csv",
                outstanding=settings.outstanding,
                stream=False,
                token=tokens["batch"],
            ),
        ],
    )
