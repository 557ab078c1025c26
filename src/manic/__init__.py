"""manic learns the scale of the learning rate while a model trains."""

from manic.diagnosis import ScaleWarning
from manic.history import History
from manic.mechanic import Mechanic
from manic.mechanize import is_mechanized, mechanize
from manic.updater import Updater

__version__ = "0.1.0"
__all__ = ["History", "Mechanic", "ScaleWarning", "Updater", "is_mechanized", "mechanize"]
