"""Image sets, exact mixtures, stored trajectories and the cache of tensors."""
