"""Many VMs at once, on this host (`Fleet`) or on the workers of a Dask cluster (`DaskFleet`)."""

from smolvm_async.fleet.dask.fleet import DaskFleet
from smolvm_async.fleet.fleet import Fleet
from smolvm_async.fleet.member import FleetStatus, MemberStatus

__all__ = ["DaskFleet", "Fleet", "FleetStatus", "MemberStatus"]
