"""The heartbeat of this rank, as the environment asks for it."""

from pathlib import Path

from karat_scale.engine.devices import device_name, write_flight_record
from karat_scale.engine.distributed import World
from karat_scale.engine.heartbeat import Heartbeat
from karat_scale.foundation.errors import UserError


def start_heartbeat(directory: Path, world: World) -> Heartbeat:
    """Start this rank's heartbeat in a run's directory. Raises UserError if KARAT_STALL_SECONDS cannot be read."""
    try:
        heartbeat = Heartbeat(directory, world.rank, device_name(world.device), write_flight_record)
    except ValueError as error:
        raise UserError(f"STALL_SECONDS: {error}") from None
    return heartbeat.start()
