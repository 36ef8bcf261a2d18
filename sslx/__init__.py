"""sslx: self-supervised pretraining in JAX, from a laptop to a pod, with every FLOP counted."""
