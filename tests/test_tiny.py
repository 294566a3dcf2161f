"""configs/tiny learns while one watches."""

import os
import subprocess
import sys
from pathlib import Path

from cascade import Cascade
from cascade.data.scenes.captions import caption_at
from cascade.evaluation.judge import judge

ROOT = Path(__file__).parent.parent


def cascade(*argv):
    # With none of the flags that make the other tests' programs fast to compile and slow to run.
    environment = os.environ | {"XLA_FLAGS": ""}
    command = [sys.executable, "-m", "cascade", *map(str, argv)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_shortened_tiny_run_shows_what_the_prompt_says_far_above_chance(tmp_path):
    """Chance is what the same pictures show of other prompts, each judged by the next one's."""
    words = ["--images", 8_000, "--optimizer.cooldown-images", 4_000, "--preview-every-images", 0]
    cascade("train", "configs/tiny/base64.py", "--workdir", tmp_path / "run", *words)
    cascade("export", tmp_path / "run", tmp_path / "model")
    said = [caption_at(0, i, "seen", max_objects=1)[1] for i in range(64)]
    drawn = Cascade.load(tmp_path / "model")([caption.text for caption in said])

    def share(shift):
        verdicts = [
            verdict.right
            for i, picture in enumerate(drawn)
            for verdict in judge(picture.images[64], said[(i + shift) % len(said)].facts)
        ]
        return sum(verdicts) / len(verdicts)

    assert share(0) > 0.16 and share(0) > 1.5 * share(1)
