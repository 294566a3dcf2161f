"""Figures of merit: how much of a prompt its picture shows, and how good the pictures look."""
