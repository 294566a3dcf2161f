"""Figures of merit: how much of a prompt its picture shows, and how good the pictures look."""

from cascade.scenes.judge import Verdict, judge, judge_pictures, summary, verdicts
from cascade.scenes.reading import Reading, Seen, read

__all__ = ["Reading", "Seen", "Verdict", "judge", "judge_pictures", "read", "summary", "verdicts"]
