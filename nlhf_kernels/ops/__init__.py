"""One folder, one operation: oracle, kernels, public function, derivations."""

from .mirror_descent.op import mirror_descent
from .row_uniforms.op import row_uniforms

__all__ = ["mirror_descent", "row_uniforms"]
