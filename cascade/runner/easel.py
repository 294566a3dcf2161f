"""One drawing of a page: pictures that come about in a thread, and can be looked at meanwhile."""

from __future__ import annotations

import base64
import io
import queue
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cascade.errors import UserError
from cascade.runner import form as forms
from cascade.runner import output
from cascade.runner.cascade import Cascade
from cascade.runner.form import Form
from cascade.runner.picture import Picture
from cascade.runner.progress import Progress

FRAMES = 8
"""So many guesses of each stage are kept, from noise to the end."""
PREVIEW_SIDE = 384
"""A preview has at most so many pixels on a side."""
STOPPED = "stopped"
"""The error of a drawing that a person has stopped."""
SECONDS_APART = 0.25
"""Between one preview and the next: to make one takes time from the drawing."""

MOST_WAITING = 32
"""So many drawings wait for their turn at most."""

_TURN = threading.Condition()
_WAITING: list[Drawing] = []
"""The drawing that is made, and those that wait, in the order in which they came."""


class Stopped(Exception):
    """A person has stopped the drawing."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The files of one picture."""

    seed: int
    """The seed that it was drawn with."""
    files: dict[int, Path]
    """Side in pixels -> its PNG."""
    json: Path
    """All of its metadata."""
    frames: list[tuple[int, Path]]
    """(side in pixels, a JPEG) of what it was thought to be, from noise to the end."""


@dataclass(kw_only=True)
class State:
    """What a drawing has come to."""

    sides: list[int]
    """The sides of the stages that draw, in pixels."""
    pictures: int
    """How many are asked for."""
    before: int = 0
    """How many drawings are made before this one begins."""
    drawn: list[Drawn] = field(default_factory=list)
    """The pictures that are done, with all their sides."""
    progress: Progress | None = None
    """The last step of those that are being drawn; None before the first."""
    previews: list[str] = field(default_factory=list)
    """What those are thought to be by now, as JPEGs in data URLs."""
    notes: list[str] = field(default_factory=list)
    """What a person should know, such as words that the model does not."""
    error: str = ""
    """Why it ended, if it was not because all was drawn."""
    stopping: bool = False
    """Whether a person has stopped it."""
    ended: bool = False
    """Whether it is over."""


class Drawing:
    """Pictures drawn in a thread, one drawing at a time in this process."""

    def __init__(self, model: Cascade, form: Form, folder: Path):
        """It begins when those that came before it are over. folder: for the files of its pictures,
        empty or not there yet. Raises UserError for what cannot be drawn.
        """
        self._form, self._folder = form, folder
        self._stop, self._said = threading.Event(), queue.SimpleQueue[None]()
        self._previewed = -SECONDS_APART
        # Warnings are caught for the whole process, so drawings are begun one at a time as well.
        with _TURN, warnings.catch_warnings(record=True) as told:
            if len(_WAITING) > MOST_WAITING:
                raise UserError(f"{MOST_WAITING} drawings are waiting already; try again later")
            warnings.simplefilter("always")
            pictures = model.draw(
                **forms.options(form, model), frames=FRAMES, progress=self._advance
            )
            _WAITING.append(self)
        sides = [s.config.resolution for s, _ in model.select(until=form.until)]
        self.state = State(sides=sides, pictures=form.num)
        self.state.notes = [str(warning.message) for warning in told]
        self._thread = threading.Thread(target=self._draw, args=(pictures,), daemon=True)
        self._thread.start()

    def states(self, seconds: float = 0.5) -> Iterator[State]:
        """What it has come to, as often as that changes, and at least every so many seconds; the
        last time when it is over."""
        while not self.state.ended:
            with _TURN:
                self.state.before = _WAITING.index(self) if self in _WAITING else 0
            yield self.state
            try:
                self._said.get(timeout=seconds)
                while True:
                    self._said.get_nowait()
            except queue.Empty:
                pass
        yield self.state

    def stop(self) -> None:
        """End it at the next step of a stage, or at once if it has not begun."""
        self.state.stopping = True
        self._stop.set()
        self._said.put(None)
        with _TURN:
            _TURN.notify_all()

    def ends(self, seconds: float) -> bool:
        """Whether it ends within so many seconds."""
        self._thread.join(seconds)
        return self.state.ended

    def _draw(self, pictures: Iterator[Picture]) -> None:
        state = self.state
        try:
            with _TURN:
                _TURN.wait_for(lambda: _WAITING[0] is self or self._stop.is_set())
            self._check()
            for picture in pictures:
                state.drawn.append(self._keep(picture))
                state.previews = []
                if len(state.drawn) < state.pictures:
                    state.progress = None
                self._said.put(None)
                self._check()
        except Stopped:
            state.error = STOPPED
        except UserError as e:
            state.error = str(e)
        except Exception as e:  # of JAX, such as too little memory: the page goes on
            state.error = " ".join(f"{type(e).__name__}: {e}".split())[:400]
        finally:
            with _TURN:
                _WAITING.remove(self)
                _TURN.notify_all()
        state.ended = True
        self._said.put(None)

    def _check(self) -> None:
        if self._stop.is_set() and len(self.state.drawn) < self.state.pictures:
            raise Stopped

    def _advance(self, progress: Progress) -> None:
        self._check()
        state, now = self.state, time.monotonic()
        if now - self._previewed > SECONDS_APART or progress.step == progress.steps:
            thought = progress.images
            if thought is not None:
                state.previews = [_preview(picture) for picture in thought]
                self._previewed = time.monotonic()
        state.progress = progress
        self._said.put(None)

    def _keep(self, picture: Picture) -> Drawn:
        """The picture as files, those of `cascade sample` and JPEGs of its frames."""
        number = len(self.state.drawn)
        output.write(picture, self._folder, number, forms.begun(self._form))
        name, frames = f"{number:04d}", []
        for side, path in picture.frames.items():
            for i, frame in enumerate(path):
                file = self._folder / f"{name}_{side}_{i}.jpg"
                file.write_bytes(_jpeg(frame))
                frames.append((side, file))
        return Drawn(
            seed=picture.seed,
            files={side: self._folder / f"{name}_{side}.png" for side in picture.images},
            json=self._folder / f"{name}.json",
            frames=frames,
        )


def end_all(seconds: float) -> bool:
    """Stop every drawing. Whether each ends within so many seconds."""
    with _TURN:
        drawings = list(_WAITING)
    for drawing in drawings:
        drawing.stop()
    return all([drawing.ends(seconds) for drawing in drawings])


def _preview(picture: UInt8[np.ndarray, "s s 3"]) -> str:
    """A JPEG in a data URL."""
    small = picture[:: -(-len(picture) // PREVIEW_SIDE), :: -(-len(picture) // PREVIEW_SIDE)]
    return "data:image/jpeg;base64," + base64.b64encode(_jpeg(small)).decode()


def _jpeg(picture: UInt8[np.ndarray, "s s 3"]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="JPEG", quality=92, subsampling=0)
    return file.getvalue()
