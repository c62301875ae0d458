"""Data: from files to normalised batches, the same on any number of ranks and after any resume.

``add_data_arguments`` gives a parser the data flags, ``open_data`` makes the loaders of a run from them.
Nothing here imports DALI before a DALI pipeline is made.
"""

from scalesnn.data.arguments import add_data_arguments, default_workers
from scalesnn.data.loader import Loader
from scalesnn.data.opening import Data, open_data, recipe_of

__all__ = ["Data", "Loader", "add_data_arguments", "default_workers", "open_data", "recipe_of"]
