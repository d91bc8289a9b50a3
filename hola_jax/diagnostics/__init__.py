"""What a memory does: which tokens it keeps, how it is read."""

from hola_jax.diagnostics.vitals import vital_signs

__all__ = ["vital_signs"]
