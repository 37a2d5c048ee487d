"""The PriorityClass that kube-scheduler knows a QoSClass by."""

from typing import Any

from tidegate.api import names
from tidegate.api.qosclass import QoSClass
from tidegate.render.lane import owner_reference


def priority_class(qos: QoSClass) -> dict[str, Any]:
    """`tidegate-<name>` with the class's priority; it may preempt what is below it."""
    return {
        "metadata": {
            "name": names.priority_class_name(qos.metadata.name),
            "labels": {
                names.LABEL_CLASS: qos.metadata.name,
                names.LABEL_MANAGED_BY: names.FIELD_MANAGER,
            },
            "ownerReferences": [owner_reference(qos)],
        },
        "value": qos.spec.priority,
        "preemptionPolicy": "PreemptLowerPriority",
        "description": f"Pods of the QoSClass {qos.metadata.name}; made by Tidegate.",
    }
