"""Many VMs at once: started concurrently, within what the machine has, and never stranded."""

from smolvm_async.fleet.dask.fleet import DaskFleet
from smolvm_async.fleet.fleet import Fleet
from smolvm_async.fleet.member import FleetStatus, MemberStatus

__all__ = ["DaskFleet", "Fleet", "FleetStatus", "MemberStatus"]
