"""Cascades of stages, and the folders that models are kept in."""
