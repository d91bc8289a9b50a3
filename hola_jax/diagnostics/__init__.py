"""What a memory does: which tokens it keeps, where it looks, and a page that shows both; what passes from layer to layer."""

from hola_jax.diagnostics.depth import DepthReport, depth_report, depth_signs
from hola_jax.diagnostics.energy import entries_kept, tiles_kept
from hola_jax.diagnostics.insight import Insight, Look, insight, memory_insight
from hola_jax.diagnostics.vitals import vital_signs

__all__ = [
    "DepthReport",
    "Insight",
    "Look",
    "depth_report",
    "depth_signs",
    "entries_kept",
    "insight",
    "memory_insight",
    "tiles_kept",
    "vital_signs",
]
