"""The rank policies, a file each: they make rank maps from trained adapters, weights or shapes of a model."""
