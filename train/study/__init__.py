"""Studies: several models that differ in named settings alone, trained alike with several seeds and measured alike."""

from train.study.config import Measure, Study

__all__ = ["Measure", "Study"]
