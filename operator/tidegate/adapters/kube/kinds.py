"""The kinds that Tidegate reads or writes."""

from typing import Final

from tidegate.adapters.kube.client import Kind

_OWN: Final = "tidegate.dev/v1alpha1"

QOS_CLASS: Final = Kind(_OWN, "qosclasses", "QoSClass", namespaced=False)
GPU_POOL: Final = Kind(_OWN, "gpupools", "GPUPool", namespaced=False)
MODEL_DEPLOYMENT: Final = Kind(_OWN, "modeldeployments", "ModelDeployment")

POD: Final = Kind("v1", "pods", "Pod")
NODE: Final = Kind("v1", "nodes", "Node", namespaced=False)
NAMESPACE: Final = Kind("v1", "namespaces", "Namespace", namespaced=False)
SERVICE: Final = Kind("v1", "services", "Service")
SERVICE_ACCOUNT: Final = Kind("v1", "serviceaccounts", "ServiceAccount")
CONFIG_MAP: Final = Kind("v1", "configmaps", "ConfigMap")
SECRET: Final = Kind("v1", "secrets", "Secret")
EVENT: Final = Kind("events.k8s.io/v1", "events", "Event")
DEPLOYMENT: Final = Kind("apps/v1", "deployments", "Deployment")
REPLICA_SET: Final = Kind("apps/v1", "replicasets", "ReplicaSet")
PRIORITY_CLASS: Final = Kind("scheduling.k8s.io/v1", "priorityclasses", "PriorityClass", namespaced=False)
CRD: Final = Kind(
    "apiextensions.k8s.io/v1", "customresourcedefinitions", "CustomResourceDefinition", namespaced=False
)
ADMISSION_POLICY: Final = Kind(
    "admissionregistration.k8s.io/v1",
    "validatingadmissionpolicies",
    "ValidatingAdmissionPolicy",
    namespaced=False,
)
ADMISSION_BINDING: Final = Kind(
    "admissionregistration.k8s.io/v1",
    "validatingadmissionpolicybindings",
    "ValidatingAdmissionPolicyBinding",
    namespaced=False,
)
CLUSTER_ROLE: Final = Kind("rbac.authorization.k8s.io/v1", "clusterroles", "ClusterRole", namespaced=False)
CLUSTER_ROLE_BINDING: Final = Kind(
    "rbac.authorization.k8s.io/v1", "clusterrolebindings", "ClusterRoleBinding", namespaced=False
)
ROLE: Final = Kind("rbac.authorization.k8s.io/v1", "roles", "Role")
ROLE_BINDING: Final = Kind("rbac.authorization.k8s.io/v1", "rolebindings", "RoleBinding")
TOKEN_REVIEW: Final = Kind("authentication.k8s.io/v1", "tokenreviews", "TokenReview", namespaced=False)
ACCESS_REVIEW: Final = Kind(
    "authorization.k8s.io/v1", "subjectaccessreviews", "SubjectAccessReview", namespaced=False
)
INFERENCE_POOL: Final = Kind("inference.networking.k8s.io/v1", "inferencepools", "InferencePool")
HTTP_ROUTE: Final = Kind("gateway.networking.k8s.io/v1", "httproutes", "HTTPRoute")
LEASE: Final = Kind("coordination.k8s.io/v1", "leases", "Lease")
