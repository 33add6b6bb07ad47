"""Finds the local pieces of each layer and adds up sums of a layer over processes.

The optimizer holds one `Sharding`. Each runtime whose tensors carry no layout metadata is a file with a `Runtime`, and
a row of `RUNTIMES` in `sharding.py`.
"""

from hf_lamb.sharding.collectives import ShardingError
from hf_lamb.sharding.layout import Layout, Sizes
from hf_lamb.sharding.plain import local_tensor, own_class
from hf_lamb.sharding.sharding import Block, Piece, Sharding, device_of

__all__ = ["Block", "Layout", "Piece", "Sharding", "ShardingError", "Sizes", "device_of", "local_tensor", "own_class"]
