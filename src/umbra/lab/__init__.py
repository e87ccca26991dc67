"""Measuring methods: the benchmark and studies of methods × tasks × seeds."""
