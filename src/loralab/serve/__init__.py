"""Rows of many adapters over one base: which adapters are loaded, and what each row is answered."""

from loralab.serve.folders import Known, known
from loralab.serve.pool import Pool
from loralab.serve.predictor import Answer, Predictor, Row

__all__ = ["Answer", "Known", "Pool", "Predictor", "Row", "known"]
