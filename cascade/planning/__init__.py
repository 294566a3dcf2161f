"""What a run needs on machines that are not here; `cascade plan` prints it.

    topology -> figures -> compiled (hlo) -> training, sampling -> search

Each file imports only from those before it.
"""
