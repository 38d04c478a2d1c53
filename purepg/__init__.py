"""purepg: policy gradients in JAX."""

from purepg.runtime import make_cpu_safe

make_cpu_safe()
