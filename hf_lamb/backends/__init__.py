"""How the tensors are updated. A backend is a module with two functions and no state:

`direction(bucket)` advances step, moves exp_avg and exp_avg_sq, and returns `(w_sq, u_sq, held)`: the sums of squares
of every weight w and every update u (shape [n] each), and whatever it wants to hand to its own `apply`;
`apply(bucket, held, step_sizes)` does w -= step_sizes[i] * u.

Between the two lies the only thing that may need other processes: summing the squares.
"""

from hf_lamb.backends import cpu, eager, foreach
from hf_lamb.backends.bucket import Bucket

__all__ = ["Bucket", "cpu", "eager", "foreach"]
