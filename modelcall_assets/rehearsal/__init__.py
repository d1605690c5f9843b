"""A free, honest stand-in for a model endpoint: to rehearse a task, to demo, to test faults."""

from modelcall_assets.rehearsal.faults import NO_FAULTS, Faults
from modelcall_assets.rehearsal.server import RehearsalServer, new_event_loop, serve_in_thread

__all__ = ["NO_FAULTS", "Faults", "RehearsalServer", "new_event_loop", "serve_in_thread"]
