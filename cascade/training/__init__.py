"""Everything that learns goes through this room."""
