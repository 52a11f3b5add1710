"""Events: what they are, how they are read, cut, made into images, augmented and simulated."""

from gep.events.io import read_events as read_events
from gep.events.io import write_bin as write_bin
from gep.events.represent import REPRESENTATIONS as REPRESENTATIONS
from gep.events.represent import RepresentConfig as RepresentConfig
from gep.events.slicing import Windows as Windows
from gep.events.slicing import by_bounds as by_bounds
from gep.events.slicing import by_count as by_count
from gep.events.slicing import by_duration as by_duration
from gep.events.slicing import into_windows as into_windows
from gep.events.types import EventBatch as EventBatch
from gep.events.types import EventFormatError as EventFormatError
from gep.events.types import Events as Events
