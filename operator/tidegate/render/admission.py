"""Who may carry a class: admission policies, decided by the API server itself.

The parameters of a policy are the QoSClasses: a binding whose selector takes all of them makes the
API server evaluate it once per class, so that no expression loops over classes (CEL's cost limit).
A class that is not there is no parameter, and so denies nothing.

Three policies rather than one, so that each is typed by one kind, and so that no trouble with the
parameters (their CRD gone, say) can ever stand in the way of pods that have nothing to do with
classes: `matchConstraints` with an object selector is looked at first.

Only a claim that is new is judged. An object that carries a class already may still be changed,
finalised and deleted after its namespace lost the label.
"""

from typing import Any, Final

from tidegate.api.names import (
    ANNOTATION_DEFAULT_CLASS,
    API_VERSION,
    GROUP,
    LABEL_CLASS,
    VERSION,
    priority_class_name,
)

_API: Final = "admissionregistration.k8s.io/v1"
_PREFIX: Final = priority_class_name("")

_LABELS: Final = "has(namespaceObject.metadata.labels) ? namespaceObject.metadata.labels : {}"

_ALLOWED: Final = """\
has(params.spec.allowedNamespaces) &&
(!has(params.spec.allowedNamespaces.matchLabels) ||
  params.spec.allowedNamespaces.matchLabels.all(k,
    k in variables.labels && variables.labels[k] == params.spec.allowedNamespaces.matchLabels[k])) &&
(!has(params.spec.allowedNamespaces.matchExpressions) ||
  params.spec.allowedNamespaces.matchExpressions.all(e,
    e.operator == 'In' ? e.key in variables.labels && variables.labels[e.key] in e.values :
    e.operator == 'NotIn' ? !(e.key in variables.labels && variables.labels[e.key] in e.values) :
    e.operator == 'Exists' ? e.key in variables.labels :
    !(e.key in variables.labels)))"""
"""The selector of a class against the namespace's labels. An absent selector allows none."""

_MESSAGE: Final = (
    "'namespace ' + request.namespace + ' may not use QoSClass ' + params.metadata.name + ': '"
    " + (has(params.spec.allowedNamespaces)"
    " ? 'its labels do not match spec.allowedNamespaces of that class'"
    " : 'that class has no spec.allowedNamespaces, so no namespace may')"
)


def _names_class(model: str) -> str:
    """Whether a ModelDeployment claims the class: by name, or as the default when it names none."""
    return (
        f"(has({model}.spec.classes) && size({model}.spec.classes) > 0)"
        f" ? {model}.spec.classes.exists(c, c.qosClass == params.metadata.name)"
        f" : has(params.metadata.annotations)"
        f" && '{ANNOTATION_DEFAULT_CLASS}' in params.metadata.annotations"
        f" && params.metadata.annotations['{ANNOTATION_DEFAULT_CLASS}'] == 'true'"
    )


def _has_label(pod: str) -> str:
    """Whether a pod carries the class's label."""
    return (
        f"has({pod}.metadata.labels) && '{LABEL_CLASS}' in {pod}.metadata.labels"
        f" && {pod}.metadata.labels['{LABEL_CLASS}'] == params.metadata.name"
    )


def _policy(name: str, constraints: dict[str, Any], **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": _API,
        "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/part-of": "tidegate"}},
        "spec": {"failurePolicy": "Fail", "matchConstraints": constraints, **spec},
    }


def _binding(name: str, *, per_class: bool) -> dict[str, Any]:
    spec: dict[str, Any] = {"policyName": name, "validationActions": ["Deny"]}
    if per_class:
        spec["paramRef"] = {"selector": {}, "parameterNotFoundAction": "Allow"}
    return {
        "apiVersion": _API,
        "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/part-of": "tidegate"}},
        "spec": spec,
    }


def _resource(group: str, version: str, plural: str) -> dict[str, Any]:
    return {
        "apiGroups": [group],
        "apiVersions": [version],
        "operations": ["CREATE", "UPDATE"],
        "resources": [plural],
    }


def _class_policy(name: str, constraints: dict[str, Any], claims: str, claimed: str) -> dict[str, Any]:
    """Deny a new claim of a class in a namespace that the class does not allow."""
    return _policy(
        name,
        constraints,
        paramKind={"apiVersion": API_VERSION, "kind": "QoSClass"},
        variables=[
            {"name": "claims", "expression": claims},
            {"name": "claimed", "expression": f"oldObject != null && ({claimed})"},
            {"name": "labels", "expression": _LABELS},
            {"name": "allowed", "expression": _ALLOWED},
        ],
        validations=[
            {
                "expression": "!variables.claims || variables.claimed || variables.allowed",
                "messageExpression": _MESSAGE,
                "message": "this namespace may not use that QoSClass (see its spec.allowedNamespaces)",
                "reason": "Forbidden",
            }
        ],
    )


def _priority_policy(name: str) -> dict[str, Any]:
    """A pod with a class's PriorityClass must carry the class's label, by which the class is judged."""
    label = (
        "has({0}.metadata.labels) && '" + LABEL_CLASS + "' in {0}.metadata.labels"
        " && '" + _PREFIX + "' + {0}.metadata.labels['" + LABEL_CLASS + "'] == {0}.spec.priorityClassName"
    )
    return _policy(
        name,
        {"resourceRules": [_resource("", "v1", "pods")]},
        matchConditions=[
            {
                "name": "has-priority-of-a-class",
                "expression": "has(object.spec.priorityClassName)"
                f" && object.spec.priorityClassName.startsWith('{_PREFIX}')",
            }
        ],
        validations=[
            {
                "expression": f"({label.format('object')})"
                f" || (oldObject != null && !({label.format('oldObject')}))",
                "messageExpression": "'a pod with priorityClassName ' + object.spec.priorityClassName"
                f" + ' must carry the label {LABEL_CLASS}: '"
                f" + object.spec.priorityClassName.substring({len(_PREFIX)})",
                "message": f"a pod with a QoSClass's priorityClassName must carry its label {LABEL_CLASS}",
                "reason": "Forbidden",
            }
        ],
    )


def admission() -> list[dict[str, Any]]:
    """The policies and their bindings."""
    labelled = {"matchExpressions": [{"key": LABEL_CLASS, "operator": "Exists"}]}
    models = _class_policy(
        "tidegate-model-classes",
        {"resourceRules": [_resource(GROUP, VERSION, "modeldeployments")]},
        _names_class("object"),
        _names_class("oldObject"),
    )
    pods = _class_policy(
        "tidegate-pod-classes",
        {"resourceRules": [_resource("", "v1", "pods")], "objectSelector": labelled},
        _has_label("object"),
        _has_label("oldObject"),
    )
    priority = _priority_policy("tidegate-pod-priority")
    return [
        *(models, _binding("tidegate-model-classes", per_class=True)),
        *(pods, _binding("tidegate-pod-classes", per_class=True)),
        *(priority, _binding("tidegate-pod-priority", per_class=False)),
    ]
