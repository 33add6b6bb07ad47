"""Which pieces of which layers lie on this process, and how sums over a layer add up over processes.

`Sharding` is what the optimizer holds and asks. A runtime that hides where layers lie is a file with a `Runtime`, and
a row of `RUNTIMES` in `sharding.py`.
"""

from hf_lamb.sharding.collectives import ShardingError
from hf_lamb.sharding.sharding import Piece, Sharding, device_of

__all__ = ["Piece", "Sharding", "ShardingError", "device_of"]
