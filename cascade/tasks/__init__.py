"""The applications, each in a file or a folder that can be deleted without a trace."""
