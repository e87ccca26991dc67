"""The referee: Umbra beside its peers in one process, interleaved. ``python -m bench --help``."""
