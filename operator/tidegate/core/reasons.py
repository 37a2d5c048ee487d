"""Every CamelCase reason, once: for conditions, events, decisions and metrics labels.

A reason is stable, and what machines match on. Its message carries the figures.
"""

from typing import Final

# Scaling: why a lane has the replicas it has.
MEETS_DEMAND: Final = "MeetsDemand"
AT_MINIMUM: Final = "AtMinimum"
AT_MAXIMUM: Final = "AtMaximum"
PINNED: Final = "Pinned"
SHARES_LANES: Final = "SharesLanes"
"""Replicas of lower classes of the same model carry the rest of the demand at once."""
SCALE_DOWN_DELAYED: Final = "ScaleDownDelayed"
DEMAND_RAISED: Final = "DemandRaised"
DEMAND_FELL: Final = "DemandFell"
BORROWS_IDLE: Final = "BorrowsIdleGPUs"

# Reclaiming lent GPUs.
RECLAIMS: Final = "ReclaimsLentGPUs"
BEING_RECLAIMED: Final = "BeingReclaimed"
RECLAIMED: Final = "Reclaimed"
WAITS_FOR_GPUS: Final = "WaitsForGPUs"
"""It has its place as soon as those who stand there have gone."""
HANDS_OVER: Final = "HandsOver"
"""A lane gives GPUs that nobody reserved to a higher class: it is lowered, nobody is evicted."""

# Held as it is: nothing is taken away.
PAUSED: Final = "Paused"
EXTERNAL: Final = "External"
OBSERVED: Final = "Observed"
DEMAND_STALE: Final = "DemandStale"
BUDGET_UNKNOWN: Final = "BudgetUnknown"
POOL_NOT_FOUND: Final = "PoolNotFound"
CLASS_NOT_FOUND: Final = "ClassNotFound"

# Wanted, and there is no place for it.
NO_FREE_BLOCK: Final = "NoFreeBlock"
RESERVED_FOR_OTHERS: Final = "ReservedForOthers"
BORROW_LIMIT: Final = "BorrowLimit"
MODEL_MAXIMUM: Final = "ModelMaximum"
NO_CLAIM: Final = "NoClaim"
"""It found no place, and no reservation of its own gives it the right to push anybody out."""
NOTHING_RECLAIMABLE: Final = "NothingReclaimable"

# Weights.
WEIGHTS_CHANGED: Final = "WeightsChanged"

# Facts about pools.
RESERVATIONS_EXCEED_POOL: Final = "ReservationsExceedPool"
NODES_SHARED: Final = "NodesShared"
RESERVATIONS_FIT: Final = "ReservationsFit"

# Conditions of objects.
READY: Final = "Ready"
PROGRESSING: Final = "Progressing"
DELETING: Final = "Deleting"
IN_USE: Final = "InUse"
INVALID_SPEC: Final = "InvalidSpec"
INVALID_POD_OVERRIDES: Final = "InvalidPodOverrides"
NAMESPACE_NOT_ALLOWED: Final = "NamespaceNotAllowed"
NO_CLASS: Final = "NoClass"
NO_NODES: Final = "NoNodes"
REPLICA_TOO_LARGE: Final = "ReplicaTooLarge"
FIELD_CONFLICT: Final = "FieldConflict"
NAME_TAKEN: Final = "NameTaken"
APPLY_FAILED: Final = "ApplyFailed"
ENGINE_NOT_STARTING: Final = "EngineNotStarting"
NO_ENDPOINTS: Final = "NoEndpoints"
CRD_NOT_INSTALLED: Final = "CRDNotInstalled"
NOT_EXPOSABLE: Final = "NotExposable"
NOT_ENFORCED: Final = "NotEnforced"
SEVERAL_DEFAULTS: Final = "SeveralDefaults"
DRIFT_REPAIRED: Final = "DriftRepaired"
