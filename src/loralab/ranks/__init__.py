"""Rank policies that look at a model: each makes the rank map of an adapter from data, weights or shapes."""
