"""The first notebook shows what it says it shows; test_end_to_end.py executes the other."""

from notebooks import executed, pictures


def test_the_first_notebook_draws_trains_and_shows_both(tmp_path):
    notebook = executed("first_picture", "tiny_images, num, until = 32, 1, 64", tmp_path)
    assert pictures(notebook) >= 9
