"""Which fields are accepted and nothing acts on yet: nobody shall believe in a promise not kept.

The controller names them in the condition `NotEnforced`. When a field begins to be acted on, take
its line out of the table of its kind.
"""

from collections.abc import Iterator
from typing import Any, Final

from pydantic import BaseModel

from tidegate.api.common import KubeObject
from tidegate.api.gpupool import GPUPool
from tidegate.api.modeldeployment import ModelDeployment
from tidegate.api.qosclass import QoSClass

NOT_YET: Final[dict[type[KubeObject], tuple[str, ...]]] = {
    QoSClass: (),
    GPUPool: ("spec.devices.deviceClassName",),
    ModelDeployment: (
        "spec.engine.qosScheduler",
        "spec.profileRef",
        "spec.classes[].objectives.timePerOutputToken",
    ),
}


def not_enforced(obj: KubeObject) -> list[str]:
    """Paths of the fields that are set to something other than their default and not acted on yet."""
    return [found for path in NOT_YET[type(obj)] for found in _set_at(obj, path.split("."), "")]


def _set_at(model: BaseModel, steps: list[str], before: str) -> Iterator[str]:
    """Walk one path; `name[]` stands for every item of a list."""
    alias = steps[0].removesuffix("[]")
    name, field = next((n, f) for n, f in type(model).model_fields.items() if f.alias == alias)
    value: Any = getattr(model, name)
    here = f"{before}.{alias}" if before else alias
    if len(steps) == 1:
        if value != field.get_default(call_default_factory=True):
            yield here
    elif isinstance(value, BaseModel):
        yield from _set_at(value, steps[1:], here)
    elif value is not None:
        for index, item in enumerate(value):
            yield from _set_at(item, steps[1:], f"{here}[{index}]")
