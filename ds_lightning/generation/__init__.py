"""Sampling from a model: latent cache, continuous batching, random numbers of a sample's own."""

from ds_lightning.generation.agreement import RolloutGap, rollout_gap, training_logprobs
from ds_lightning.generation.cache import LatentCache, cache_bytes
from ds_lightning.generation.generator import Generator, Sample

__all__ = ["Generator", "LatentCache", "RolloutGap", "Sample", "cache_bytes", "rollout_gap", "training_logprobs"]
