"""Reading and writing files safely: folders that are replaced as one, locks, manifests, hub ids."""
