"""Meshes, processes and the compilation cache: where programs run."""
