"""`cascade plan`: what a run needs on machines that are not here."""
