"""What a memory does: which tokens it keeps, where it looks, and a page that shows both."""

from hola_jax.diagnostics.energy import entries_kept
from hola_jax.diagnostics.insight import Insight, insight
from hola_jax.diagnostics.vitals import vital_signs

__all__ = ["Insight", "entries_kept", "insight", "vital_signs"]
