"""The name `deep_ep` for `unisono.deep_ep`, so that engines which import it run unchanged."""

from unisono.deep_ep import *  # noqa: F403
from unisono.deep_ep import __all__  # noqa: F401
