"""The machine: devices and processes, their meshes, and what chips can do."""
