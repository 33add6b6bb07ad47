"""How the tensors are updated.

A backend is a module with two functions and no state:

`direction(bucket)` advances step, moves exp_avg and exp_avg_sq, and returns `(sums, held)`: the `Sums` of every
tensor, and whatever it wants to hand to its own `apply`;
`apply(bucket, held, step_sizes)` does w -= step_sizes[i] * u, and nothing where a step size is zero.

Between the two lies the only thing that may need other processes: adding up the sums.
"""

from hf_lamb.backends import cpu, eager, foreach
from hf_lamb.backends.bucket import Bucket, Sums

__all__ = ["Bucket", "Sums", "cpu", "eager", "foreach"]
