"""Answers of many adapters over one base: which adapters are loaded, and what each row is answered."""

from loralab.serve.generation import BASE, Generator
from loralab.serve.pipeline import Pipeline
from loralab.serve.pool import AdapterFolder, Pool, adapter_folders
from loralab.serve.predictor import Answer, Predictor, Request

__all__ = [
    "BASE",
    "AdapterFolder",
    "Answer",
    "Generator",
    "Pipeline",
    "Pool",
    "Predictor",
    "Request",
    "adapter_folders",
]
