"""Read and write files safely: atomic folders, locks, manifests, hub ids."""
