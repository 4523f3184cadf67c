"""The jobs that make shards: read a layout, render, split, pack, verify."""
