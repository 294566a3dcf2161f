"""A page in the browser: fields to fill in, pictures that come about stage by stage.

Gradio makes the fields and carries what happens in them here; what they mean is in `runner.form`,
how it is drawn in `runner.easel`. Nothing is loaded from elsewhere: fonts are the system's, and
browsers are told to ask this address alone.
"""

from __future__ import annotations

import atexit
import ipaddress
import logging
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import fastapi
import gradio as gr
import uvicorn
from gradio.components.image_editor import EditorData
from gradio.themes import Default

from cascade.config import read_json
from cascade.errors import UserError
from cascade.runner import form as forms
from cascade.runner.cascade import Cascade
from cascade.runner.easel import MOST_WAITING, STOPPED, Drawing, Drawn, State, end_all
from cascade.runner.form import Form

MOST_BYTES = 2**24
"""An upload has at most so many bytes."""
SECONDS_TO_END = 10.0
"""So long the end of the page waits for a drawing to take its step."""
_ONLY_FROM_HERE = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"


class Page:
    """The page of one model. `serve` shows it until a signal ends that."""

    def __init__(self, model: Cascade, folder: str):
        """folder: for all files. Raises UserError for a model that draws from no text."""
        if model.stages[0][0].config.lowres is not None:
            raise UserError(
                f"model {model.name} only enlarges pictures, and the page draws from text; "
                "use cascade sample --lowres"
            )
        self._model, self._folder = model, folder
        self._drawings: dict[str, Drawing] = {}  # by session
        self._folders: dict[str, str] = {}
        self._blocks = self._laid_out()

    def serve(self, listener: socket.socket) -> None:
        """Answer at that address until SIGINT or SIGTERM, which is then raised again."""
        app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        gr.mount_gradio_app(
            app,
            self._blocks,
            path="/",
            footer_links=[],
            run_history=False,
            allowed_paths=[self._folder],
            max_file_size=MOST_BYTES,
            show_error=True,
            ssr_mode=False,
            enable_monitoring=False,
            mcp_server=False,
            theme=_theme(),
            css=_CSS,
        )
        # Its errors at the end are of browsers that still listen.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        server = uvicorn.Server(
            uvicorn.Config(
                _only_from_here(app, _hosts(listener)),
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=1,
                ws="none",
            )
        )
        heard, handle = [], server.handle_exit

        def noted(sig: int, frame: Any) -> None:
            heard.append(sig)
            handle(sig, frame)

        server.handle_exit = noted
        try:
            server.run(sockets=[listener])
        finally:
            interrupted = signal.SIGINT in heard
            if not end_all(SECONDS_TO_END):
                # One compiles for so long. Python ends its thread by what C++ takes for an
                # exception and aborts at, so this process ends before it comes to that.
                atexit.register(os._exit, 130 if interrupted else 143)
        # The server raises the signal again, which asyncio loses if nothing more is to be done.
        if interrupted:
            raise KeyboardInterrupt
        sys.exit(143)

    def _laid_out(self) -> gr.Blocks:
        model, empty = self._model, forms.empty(self._model)
        every = [stage.config for stage, _ in model.stages]
        sides = [stage.resolution for stage in every]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of gradio, which are for programmers
            blocks = gr.Blocks(
                title="cascade", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True
            )
        with blocks, gr.Row(elem_id="page"):
            with gr.Column(elem_id="ask"):
                gr.HTML(
                    f"<h1>cascade</h1><p>{escape(model.name)}: "
                    f"{', then '.join(map(str, sides))} px</p>"
                )
                prompt = gr.Textbox(
                    label="Prompt",
                    placeholder="a small red circle above a big blue square on gray",
                    max_lines=6,
                    autofocus=True,
                    elem_id="prompt",
                )
                with gr.Row(elem_classes="narrow"):
                    draw = gr.Button("Draw", variant="primary", min_width=80, elem_id="draw")
                    stop = gr.Button("Stop", min_width=80, elem_id="stop")
                message = gr.HTML(elem_id="message")
            with gr.Column(elem_id="options"):
                with gr.Row(elem_classes="narrow"):
                    seed = gr.Number(0, label="Seed", min_width=90, elem_id="seed")
                    num = gr.Number(
                        1,
                        label=f"Pictures, 1 to {forms.MOST_PICTURES}",
                        min_width=90,
                        elem_id="num",
                    )
                again = gr.Button("Another seed, at random", size="sm", elem_id="random")
                until = gr.Radio(
                    [(f"{side} px", side) for side in sides],
                    value=sides[-1],
                    label="Stop at",
                    elem_id="until",
                    visible=len(sides) > 1,
                )
                with gr.Accordion("More", open=False, elem_id="more"):
                    negative = gr.Textbox(
                        label="Negative: what to move away from", max_lines=3, elem_id="negative"
                    )
                    lists = {"steps": [], "guidance": [], "aug_level": []}
                    for i, stage in enumerate(every):
                        with gr.Row(elem_classes="narrow"):
                            side = stage.resolution
                            lists["steps"].append(_word(side, "steps", empty.steps[i]))
                            lists["guidance"].append(_word(side, "guidance", empty.guidance[i]))
                            if stage.lowres is not None:
                                level = empty.aug_level[len(lists["aug_level"])]
                                lists["aug_level"].append(_word(side, "aug level", level))
                    reset = gr.Button("The model's own settings", size="sm", elem_id="reset")
                with gr.Accordion("Begin from a picture", open=False, elem_id="begin"):
                    gr.HTML(
                        "<p>Put a picture in, of which the central square is drawn anew. To change "
                        "a part alone, paint over that.</p>"
                    )
                    editor = gr.ImageEditor(
                        show_label=False,
                        sources=("upload", "clipboard"),
                        transforms=(),
                        layers=False,
                        brush=gr.Brush(colors=["#ff00ff"], color_mode="fixed"),
                        format="png",
                        canvas_size=(512, 512),
                        elem_id="editor",
                    )
                    strength = gr.Textbox(
                        label="How much changes, above 0 to 1, or by stage as in 0.6,0.8,0.8",
                        placeholder="the default",
                        elem_id="strength",
                    )
                upload = gr.UploadButton(
                    "Repeat a picture from its JSON",
                    size="sm",
                    file_types=[".json"],
                    elem_id="repeat",
                )
                if model.known_words:
                    with gr.Accordion("Words that this model knows", open=False):
                        gr.HTML(f"<p>{escape(', '.join(sorted(model.known_words)))}</p>")
            with gr.Column(elem_id="result"):
                scrub = gr.Slider(
                    1,
                    2,
                    step=1,
                    label="From noise to picture",
                    visible=False,
                    elem_id="scrub",
                )
                easel = gr.HTML(_WELCOME, elem_id="easel")
            _undecoded(editor)
            repeated = gr.State()

            words = [*lists["steps"], *lists["guidance"], *lists["aug_level"]]
            fields = [prompt, negative, seed, num, until, strength, *words]
            quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
            at_once: dict[str, Any] = {"queue": False, **quiet}
            gr.on(
                [prompt.submit, draw.click],
                self._draw,
                [repeated, editor, *fields],
                [message, easel, scrub],
                concurrency_limit=MOST_WAITING + 2,  # of which all but one wait
                trigger_mode="once",
                **quiet,
            )
            stop.click(self._stop, None, message, **at_once)
            scrub.input(self._scrub, scrub, easel, trigger_mode="always_last", **at_once)
            again.click(None, None, seed, js="() => Math.floor(Math.random() * 2 ** 32)", **at_once)
            reset.click(self._reset, None, [message, repeated, strength, *words], **at_once)
            upload.upload(self._repeat, upload, [message, repeated, *fields], **at_once)
            blocks.unload(self._left)
        blocks.queue(api_open=False)
        return blocks

    # What happens when. Each returns a value for every output that is named above.

    def _draw(
        self, request: gr.Request, repeated: Form | None, editor: Any, *fields: Any
    ) -> Iterator[tuple[Any, ...]]:
        session, hidden = str(request.session_hash), gr.Slider(visible=False)
        folder = tempfile.mkdtemp(dir=self._folder)
        try:
            form = self._form(repeated, editor, fields)
            drawing = Drawing(self._model, form, Path(folder))
        except (ValueError, TypeError) as e:
            shutil.rmtree(folder)
            yield _message(error=str(e)), gr.skip(), gr.skip()
            return
        self._clear(session)
        self._folders[session] = folder
        self._drawings[session] = drawing
        try:
            for state in drawing.states():
                if not state.ended:
                    stopping = ["Stopping at the next step."] if state.stopping else []
                    yield _message([*state.notes, *stopping]), _coming(state), hidden
            error = "" if state.error == STOPPED else state.error
            notes = [*state.notes, *(["Stopped."] if state.error == STOPPED else [])]
            positions = len(state.drawn[0].frames) + 1 if state.drawn else 1
            yield (
                _message(notes, error),
                _hung(state.drawn, positions),
                gr.Slider(maximum=max(2, positions), value=positions, visible=positions > 1),
            )
        finally:
            drawing.stop()

    def _stop(self, request: gr.Request) -> Any:
        drawing = self._drawings.get(str(request.session_hash))
        if drawing is None or drawing.state.ended:
            return _message(["Nothing is being drawn."])
        drawing.stop()
        return gr.skip()  # `_draw` tells of it: two messages might come in either order

    def _scrub(self, position: int, request: gr.Request) -> str:
        drawing = self._drawings.get(str(request.session_hash))
        return _WELCOME if drawing is None else _hung(drawing.state.drawn, int(position))

    def _reset(self) -> tuple[Any, ...]:
        empty = forms.empty(self._model)
        note = _message(["All settings are the model's own again."])
        return note, None, "", *empty.steps, *empty.guidance, *empty.aug_level

    def _repeat(self, file: str | None) -> tuple[Any, ...]:
        empty = forms.empty(self._model)
        kept = [gr.skip()] * (7 + len([*empty.steps, *empty.guidance, *empty.aug_level]))
        if file is None:
            return gr.skip(), *kept
        try:
            try:
                read = read_json(Path(file))
            except UserError as e:
                raise UserError(str(e).replace(file, Path(file).name)) from None
            form, notes = forms.repeating(read, self._model)
        except UserError as e:
            return _message(error=str(e)), *kept
        told = (
            f"{Path(file).name} has filled in the form. The settings that the form does not show "
            "are the picture's too, until “The model's own settings” is pressed."
        )
        if form.init is not None:
            told += " Unless you put another one in, you begin from the picture that it began from."
        values = (form.prompt, form.negative, form.seed, form.num, form.until, form.strength)
        return (
            *(_message([told, *notes]), form, *values),
            *(*form.steps, *form.guidance, *form.aug_level),
        )

    def _left(self, request: gr.Request) -> None:
        """The tab is closed."""
        self._clear(str(request.session_hash))

    def _clear(self, session: str) -> None:
        """Forget what the session has drawn."""
        if (drawing := self._drawings.pop(session, None)) is not None:
            drawing.stop()
        if (folder := self._folders.pop(session, None)) is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def _form(self, repeated: Form | None, editor: Any, fields: Sequence[Any]) -> Form:
        prompt, negative, seed, num, until, strength, *words = fields
        count, base = len(self._model.stages), repeated or forms.empty(self._model)
        largest = max(stage.config.resolution for stage, _ in self._model.stages)
        background, painted = editor or (None, [])
        init, mask = forms.begun_from(background, painted, largest)
        if init is None:
            init, mask = base.init, base.mask if mask is None else mask
        return Form(
            prompt=prompt or "",
            negative=negative or "",
            seed=seed,
            num=num,
            until=until,
            strength=strength or "",
            steps=tuple(words[:count]),
            guidance=tuple(words[count : 2 * count]),
            aug_level=tuple(words[2 * count :]),
            settings=base.settings,
            init=init,
            mask=mask,
        )


def _undecoded(editor: gr.ImageEditor) -> None:
    """Have the editor give (background or None, painted layers) as bytes: it is not for
    gradio to decode files of anybody's. It is no subclass, beside which gradio writes a file."""

    def preprocess(payload: EditorData | None) -> Any:
        if payload is None:
            return None
        given: Any = payload
        if payload.id is not None:
            given = editor.blob_storage.pop(payload.id, payload)
        while len(editor.blob_storage) > MOST_WAITING:
            editor.blob_storage.pop(next(iter(editor.blob_storage)))
        return _bytes(given.background), [_bytes(layer) for layer in given.layers if layer]

    editor.preprocess = preprocess


def _bytes(file: Any) -> bytes | None:
    return Path(file.path).read_bytes() if hasattr(file, "path") else file


def _word(side: int, name: str, value: str) -> gr.Textbox:
    """A field for an option of the stage that draws that side."""
    own = f"{name.replace(' ', '-')}-{side}"
    return gr.Textbox(value, label=f"{side} px {name}", max_lines=1, min_width=80, elem_id=own)


def _message(notes: Sequence[str] = (), error: str = "") -> str:
    lines = [f"<p>{escape(note)}</p>" for note in notes]
    if error:
        lines.append(f'<p class="error" role="alert">{escape(error)}</p>')
    return f'<div role="status">{"".join(lines)}</div>'


def _coming(state: State) -> str:
    """Pictures that are being drawn, under a bar for each of their stages; before that their place
    in the queue."""
    if state.before:
        others = "1 drawing is" if state.before == 1 else f"{state.before} drawings are"
        return _wall([f'<p class="welcome">{others} before yours in the queue.</p>'])
    now, before = state.progress, len(state.drawn)
    bars, reached = [], False
    for side in state.sides:
        if now is not None and now.resolution == side:
            reached = True
            told = "compiling" if now.step == 0 else f"step {now.step} of {now.steps}"
            bars.append(_bar(side, told, now.step / now.steps))
        else:
            bars.append(_bar(side, "waiting" if reached or now is None else "drawn", not reached))
    if now is None:
        bars = [_bar(side, "waiting", 0) for side in state.sides]
    of = f"<p>{before} of {state.pictures} drawn</p>" if state.pictures > 1 else ""
    figures = [_figure(drawn) for drawn in state.drawn]
    if not figures and not state.previews:
        figures = ['<p class="welcome"></p>']
    figures += [
        f'<figure><img src="{preview}" alt="what the picture is thought to be by now"></figure>'
        for preview in state.previews
    ]
    return f'{of}<ol class="stages">{"".join(bars)}</ol>{_wall(figures)}'


def _bar(side: int, told: str, share: float) -> str:
    percent = round(100 * share)
    return (
        f'<li><b>{side} px</b> <span>{told}</span><div class="bar" role="progressbar" '
        f'aria-label="{side} px" aria-valuemin="0" aria-valuemax="100" aria-valuenow="{percent}">'
        f'<div style="width: {percent}%"></div></div></li>'
    )


def _hung(drawn: Sequence[Drawn], position: int) -> str:
    """The pictures, at a place of their way from noise: 1 is the first frame, one more than there
    are frames the picture itself."""
    if not drawn:
        return _WELCOME
    figures = []
    for one in drawn:
        if position > len(one.frames):
            figures.append(_figure(one))
            continue
        side, file = one.frames[max(position, 1) - 1]
        own = [number for number, _ in one.frames].index(side)
        count = sum(number == side for number, _ in one.frames)
        nth = f"{side} px, seed {one.seed}: guess {max(position, 1) - own} of {count}"
        figures.append(_framed(_link(file), nth, f"<span>{nth}</span>", side))
    return _wall(figures)


def _figure(one: Drawn) -> str:
    """A picture, with its files to download under it."""
    name = f"cascade-{one.seed}"
    links = [
        f'<a href="{_link(file)}" download="{name}-{side}.png">{side} px</a>'
        for side, file in one.files.items()
    ]
    links.append(f'<a href="{_link(one.json)}" download="{name}.json">JSON</a>')
    caption = f"<span>seed {one.seed}</span> {' '.join(links)}"
    largest = max(one.files)
    alt = f"the picture of seed {one.seed}, {largest} px"
    return _framed(_link(one.files[largest]), alt, caption, largest)


def _framed(link: str, alt: str, caption: str, side: int) -> str:
    crisp = ' class="crisp"' if side < 256 else ""
    return (
        f'<figure><img{crisp} src="{link}" alt="{escape(alt)}"><figcaption>{caption}</figcaption>'
        "</figure>"
    )


def _wall(figures: Sequence[str]) -> str:
    kind = "one" if len(figures) == 1 else "many"
    return f'<div class="wall {kind}">{"".join(figures)}</div>'


def _link(file: Path) -> str:
    return f"/gradio_api/file={quote(str(file))}"


def _theme() -> Default:
    system = ("system-ui", "sans-serif")
    return Default(primary_hue="blue", font=system, font_mono=("ui-monospace", "monospace"))


def _hosts(listener: socket.socket) -> set[str] | None:
    """By which names browsers of this machine may call the page; None is any, if it is open to
    other machines. A page elsewhere whose name is made to lead here has another one."""
    address = ipaddress.ip_address(listener.getsockname()[0])
    return {"127.0.0.1", "localhost", "[::1]", str(address)} if address.is_loopback else None


def _only_from_here(app: Any, hosts: set[str] | None) -> Any:
    """The app, whose answers tell browsers to load nothing from elsewhere; it fetches nothing for
    them either, and answers to these names alone."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = (b"content-security-policy", _ONLY_FROM_HERE.encode())
                message = {**message, "headers": [*message.get("headers", []), own]}
            await send(message)

        said = dict(scope.get("headers", ())).get(b"host", b"").decode("latin-1")
        stranger = hosts is not None and re.sub(r":\d+$", "", said) not in hosts
        if scope["type"] == "http" and (stranger or "/file=http" in scope["path"]):
            status = 403 if stranger else 404
            await fastapi.Response(status_code=status)(scope, receive, send)
            return
        await app(scope, receive, sending)

    return answer


_WELCOME = '<div class="wall one"><p class="welcome">Say what to draw, and press Enter.</p></div>'
_CSS = """
#page { display: grid; align-items: start; gap: 1rem 2rem;
  grid-template: "ask result" auto "options result" 1fr / minmax(0, 22rem) minmax(0, 1fr) }
#ask { grid-area: ask } #result { grid-area: result } #options { grid-area: options }
@media (max-width: 45rem) {
  #page { grid-template: "ask" "result" "options" / minmax(0, 1fr) } }
#ask h1 { font-size: 1.4rem; margin: 0 }
#ask p { margin: 0 }
#message p { margin: 0 0 .5rem }
#message .error { color: #b00020; font-weight: 600 }
.dark #message .error { color: #ff8a80 }
.narrow { flex-wrap: nowrap !important; gap: .5rem }
.stages { list-style: none; display: flex; gap: 1rem; margin: 0 0 1rem; padding: 0 }
.stages li { flex: 1; min-width: 0 }
.stages .bar { height: .4rem; border-radius: .2rem; background: var(--border-color-primary) }
.stages .bar div { height: 100%; border-radius: .2rem; background: var(--primary-500) }
.wall { display: grid; gap: 1rem }
.wall.one { grid-template-columns: minmax(0, min(100%, 78vh)) }
.wall.many { grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)) }
.wall figure { margin: 0 }
.wall img { display: block; width: 100%; aspect-ratio: 1; border-radius: .4rem;
  background: var(--block-background-fill) }
.wall img.crisp { image-rendering: pixelated }
.wall figcaption { display: flex; flex-wrap: wrap; gap: .9rem; padding: .4rem 0 }
.wall figcaption a { text-decoration: underline }
.welcome { aspect-ratio: 1; max-height: 60vh; width: 100%; display: grid; place-items: center;
  border: 1px dashed var(--border-color-primary); border-radius: .4rem;
  color: var(--body-text-color) }
"""
