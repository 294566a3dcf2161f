"""The page of a blind study: one HTML file that holds the pictures, and asks no address for more.

It keeps the answers in the browser (localStorage) and gives them as a file. Nothing in it says
which run drew which picture. The two questions are those of Saharia et al. 2022 ("Imagen", sec. 3:
which pictures are of higher quality, which represent the caption better), as are the three answers.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

Question = Literal["quality", "text"]
QUESTIONS: tuple[Question, ...] = get_args(Question)
"""What is asked of each pair."""
Choice = Literal["left", "right", "same"]
CHOICES: tuple[Choice, ...] = get_args(Choice)
"""What may be answered."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """One pair as raters see it."""

    prompt: str
    """What both pictures were to show."""
    left: bytes
    """The picture on the left, a PNG."""
    right: bytes
    """The picture on the right, a PNG."""


def write(path: Path, study: str, pairs: Sequence[Shown]) -> None:
    """Write the page of these pairs, in this order; they are numbered from 1.

    study: its identity, under which the browser keeps the answers. A file of answers is {"study",
    "rater", "answers": [{"pair", "quality": CHOICE, "text": CHOICE}]}.
    """
    with path.open("w", encoding="utf-8") as file:
        file.write(_head())
        file.write('<script type="application/json" id="study">{"study": ')
        file.write(_json(study) + ', "pairs": [')
        for number, pair in enumerate(pairs, 1):
            one = {
                "pair": number,
                "prompt": pair.prompt,
                "left": _data_uri(pair.left),
                "right": _data_uri(pair.right),
            }
            file.write((",\n" if number > 1 else "\n") + _json(one))
        file.write(f"\n]}}</script>\n<script>{_SCRIPT}</script>\n</body></html>\n")


def _json(value: object) -> str:
    """As JSON in which no "<" can end the script that it stands in."""
    return json.dumps(value).replace("<", "\\u003c")


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _head() -> str:
    rules = (
        "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"style-src {_allowed(_STYLE)}; script-src {_allowed(_SCRIPT)}"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{rules}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,"><title>Which picture is better?</title>\n'
        f"<style>{_STYLE}</style></head>\n{_BODY}"
    )


def _allowed(text: str) -> str:
    """The words of a Content-Security-Policy that let this script or style in."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1b1b1f; --quiet: #5a5a66; --line: #c4c4cc;
  --accent: #1d5fbf; --on-accent: #fff; --chosen: #e2edfd; --error: #b00020 }
@media (prefers-color-scheme: dark) { :root { --ground: #17181c; --ink: #ececf1; --quiet: #a6a6b3;
  --line: #4a4b55; --accent: #8ab8ff; --on-accent: #10203a; --chosen: #24344d; --error: #ff8a80 } }
* { box-sizing: border-box }
body { font: 16px/1.45 system-ui, sans-serif; margin: 0; padding: .8rem;
  background: var(--ground); color: var(--ink) }
[hidden] { display: none !important }
h1 { font-size: 1.3rem; margin: 0 }
h1:focus, #prompt:focus { outline: none }
p, header, footer, .questions { max-width: 72rem; margin: .4rem auto }
header { display: flex; flex-wrap: wrap; gap: .2rem 1rem; align-items: center }
progress { flex: 1; min-width: 6rem; accent-color: var(--accent) }
#prompt { text-align: center; font-size: 1.15rem; overflow-wrap: anywhere; max-height: 8em;
  overflow-y: auto }
.pictures { display: flex; justify-content: center; gap: 1rem }
figure { margin: 0; flex: 0 1 auto; min-width: 0; text-align: center }
img { display: block; max-width: 100%; height: auto; outline: 1px solid var(--line) }
img.crisp { image-rendering: pixelated }
figcaption { color: var(--quiet) }
.questions { display: grid; grid-template-columns: 1fr 1fr; gap: .8rem }
fieldset { border: 2px solid var(--line); border-radius: .5rem; padding: .3rem .6rem .6rem;
  margin: 0; min-width: 0 }
fieldset.asked { border-color: var(--accent) }
legend { font-weight: 600; padding: 0 .3rem }
#rater { margin-right: .4rem }
.choices { display: grid; grid-template-columns: repeat(3, 1fr); gap: .4rem }
.choices label { border: 1px solid var(--line); border-radius: .4rem; padding: .5rem .3rem;
  text-align: center; cursor: pointer }
.choices label:has(:checked) { background: var(--chosen); border-color: var(--accent) }
kbd { font: .8em ui-monospace, monospace; color: var(--quiet) }
button, input[type=text] { font: inherit; padding: .5rem 1rem; border-radius: .4rem;
  border: 1px solid var(--line); background: transparent; color: inherit; max-width: 100% }
button { cursor: pointer; margin: .15rem 0 }
button.main { background: var(--accent); border-color: var(--accent); color: var(--on-accent) }
:is(button, input):focus-visible, label:has(:focus-visible) { outline: 3px solid var(--accent);
  outline-offset: 2px }
nav, footer { display: flex; flex-wrap: wrap; gap: .6rem; align-items: center }
nav { justify-content: center }
footer { border-top: 1px solid var(--line); padding-top: .7rem;
  color: var(--quiet) }
#message { min-height: 1.5em; text-align: center }
#message.error { color: var(--error); font-weight: 600 }
@media (max-width: 45rem) { body { padding: .5rem } .pictures { gap: .4rem }
  .questions { grid-template-columns: 1fr } }
"""


def _fieldset(question: str, legend: str) -> str:
    answers = (("left", "left"), ("same", "same"), ("right", "right"))
    labels = "".join(
        f'<label><input type="radio" name="{question}" value="{choice}"> {words} '
        f"<kbd>{key}</kbd></label>"
        for key, (choice, words) in enumerate(answers, 1)
    )
    return (
        f'<fieldset id="{question}"><legend>{legend}</legend>'
        f'<div class="choices">{labels}</div></fieldset>\n'
    )


_BODY = f"""<body>
<header><h1 tabindex="-1">Which picture is better?</h1>
<span id="count"></span><progress id="progress" value="0" max="1" aria-label="pairs answered"
></progress></header>
<noscript><p>This page needs JavaScript, which is switched off here.</p></noscript>
<main>
<section id="start" hidden>
<p>You will see two pictures at a time, and the text that both were to show. Answer two questions
about each pair: which picture is of higher quality (looks better made, more real, without flaws),
and which one shows the text better (all that it says, and nothing else).</p>
<p>With keys: <kbd>1</kbd> left, <kbd>2</kbd> same, <kbd>3</kbd> right, for
the first question and then for the second; <kbd>Enter</kbd> goes on, <kbd>Backspace</kbd> goes
back, <kbd>&larr;</kbd> and <kbd>&rarr;</kbd> go to the pair before and after.</p>
<p>Your answers stay in this browser, so that you can go on later. They are sent nowhere: download
them, and give the file to whoever asked you.</p>
<p><label for="rater">Your name or initials</label></p>
<p><input type="text" id="rater" autocomplete="off" maxlength="60">
<button type="button" class="main" id="begin">Begin</button></p>
</section>
<section id="pair" hidden>
<p id="prompt" tabindex="-1"></p>
<div class="pictures">
<figure><img id="left" alt="the picture on the left"><figcaption>left</figcaption></figure>
<figure><img id="right" alt="the picture on the right"><figcaption>right</figcaption></figure>
</div>
<div class="questions">
{_fieldset("quality", "Which picture is of higher quality?")}
{_fieldset("text", "Which one shows the text better?")}
</div>
<nav><button type="button" id="back">Back</button>
<button type="button" class="main" id="next">Next</button></nav>
</section>
<section id="end" hidden>
<p>All pairs are answered. Thank you! Download your answers, and give the file to whoever asked
you.</p>
<nav><button type="button" id="again">Back to the pairs</button></nav>
</section>
</main>
<p id="message" role="status"></p>
<footer id="tools" hidden><button type="button" id="download">Download answers</button>
<span>Rater: <b id="who"></b></span>
<button type="button" id="another">Another rater</button></footer>
"""

_SCRIPT = r"""
"use strict";
const {study, pairs} = JSON.parse(document.getElementById("study").textContent);
const QUESTIONS = ["quality", "text"], KEYS = {1: "left", 2: "same", 3: "right"};
const WORDS = {left: "left", same: "same", right: "right"};
const byId = id => document.getElementById(id);
// Each answer has a name of its own, so that a page which does not see the others overwrites none.
const name = (...of) => ["cascade-study", study, ...of.map(encodeURIComponent)].join("/");
let rater = "", answers = {}, at = 0, asked = 0;

function kept(key) {
  try { return localStorage.getItem(key) } catch { return null }
}
function keep(key, value) {
  try { localStorage.setItem(key, value); return true } catch { return false }
}
function tell(text, error = false) {
  byId("message").textContent = text;
  byId("message").className = error ? "error" : "";
}
function only(section) {
  for (const id of ["start", "pair", "end"]) byId(id).hidden = id !== section;
  byId("tools").hidden = section === "start";
  byId("download").classList.toggle("main", section === "end");
}
const whole = pair => QUESTIONS.every(question => (answers[pair.pair] || {})[question]);
const done = () => pairs.filter(whole).length;

function read() {
  answers = {};
  for (const {pair} of pairs) for (const question of QUESTIONS) {
    const choice = kept(name(rater, pair, question));
    if (Object.hasOwn(WORDS, choice)) (answers[pair] ||= {})[question] = choice;
  }
}
function start() {
  only("start");
  byId("count").textContent = pairs.length === 1 ? "1 pair" : pairs.length + " pairs";
  byId("progress").value = 0;
  byId("rater").value = rater;
  byId("rater").focus();
}
function begin() {
  const said = byId("rater").value.trim().replace(/\s+/g, " ");
  if (!said) {
    tell("Write your name or initials first.", true);
    byId("rater").focus();
    return;
  }
  rater = said;
  keep(name(), rater);
  read();
  const open = pairs.findIndex(pair => !whole(pair));
  tell(done() ? "You go on where you were." : "");
  if (open < 0) end(); else show(open);
}
function show(index) {
  at = index;
  const pair = pairs[at], own = answers[pair.pair] || {};
  only("pair");
  byId("who").textContent = rater;
  byId("count").textContent = (at + 1) + " of " + pairs.length;
  byId("progress").max = pairs.length;
  byId("progress").value = done();
  byId("prompt").textContent = "\u201c" + pair.prompt + "\u201d";
  for (const side of ["left", "right"]) if (byId(side).src !== pair[side]) {
    byId(side).removeAttribute("src");  // or the picture before is seen beside the new text
    byId(side).src = pair[side];
  }
  for (const question of QUESTIONS)
    for (const radio of document.getElementsByName(question))
      radio.checked = radio.value === own[question];
  byId("back").disabled = at === 0;
  byId("next").textContent = at + 1 < pairs.length ? "Next" : "End";
  ask(Math.max(0, QUESTIONS.findIndex(question => !own[question])));
  byId("prompt").focus({preventScroll: true});
}
function ask(index) {
  asked = index;
  QUESTIONS.forEach((question, i) => {
    byId(question).classList.toggle("asked", i === asked);
    byId(question).setAttribute("aria-current", String(i === asked));
  });
}
function end() {
  only("end");
  byId("who").textContent = rater;
  byId("count").textContent = pairs.length + " of " + pairs.length;
  byId("progress").max = byId("progress").value = pairs.length;
  byId("download").focus();
}
function answer(question, choice) {
  const pair = pairs[at].pair;
  (answers[pair] ||= {})[question] = choice;
  const stays = keep(name(rater, pair, question), choice);
  for (const radio of document.getElementsByName(question)) radio.checked = radio.value === choice;
  byId("progress").value = done();
  if (stays) tell((question === "quality" ? "Quality: " : "Text: ") + WORDS[choice]);
  else tell("This browser keeps nothing: download your answers before you close the page.", true);
  ask(question === "quality" ? 1 : asked);
}
function next() {
  const own = answers[pairs[at].pair] || {}, open = QUESTIONS.findIndex(one => !own[one]);
  if (open >= 0) {
    ask(open);
    tell("Answer both questions first: 1, 2 or 3.", true);
    return;
  }
  tell("");
  if (at + 1 < pairs.length) { show(at + 1); return }
  const left = pairs.findIndex(pair => !whole(pair));
  if (left < 0) { end(); return }
  show(left);
  tell("This pair has not been answered yet.");
}
function back() {
  tell("");
  if (!byId("end").hidden) { show(pairs.length - 1); return }
  if (asked > 0) { ask(asked - 1); return }
  if (at > 0) { show(at - 1); ask(QUESTIONS.length - 1) }
}
function step(by) {
  tell("");
  if (!byId("end").hidden) { if (by < 0) show(pairs.length - 1); return }
  if (at + by >= 0 && at + by < pairs.length) show(at + by);
}
function download() {
  const given = pairs.filter(whole).map(pair => ({pair: pair.pair, ...answers[pair.pair]}));
  const text = JSON.stringify({study, rater, answers: given}, null, 2) + "\n";
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
  link.download = "answers-" + rater.replace(/[^\p{L}\p{N}_-]+/gu, "-") + ".json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  tell(given.length + " of " + pairs.length + " pairs are in " + link.download + ".");
}

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.isComposing) return;
  const own = event.target.tagName, key = event.key;
  if (!byId("start").hidden) {
    if (key === "Enter" && own !== "BUTTON") { event.preventDefault(); begin() }
    return;
  }
  const pairShown = !byId("pair").hidden;
  if (key in KEYS && pairShown) answer(QUESTIONS[asked], KEYS[key]);
  else if (key === "Enter" && own !== "BUTTON" && pairShown) next();
  else if (key === "Backspace") back();
  else if (key === "ArrowLeft" && own !== "INPUT") step(-1);
  else if (key === "ArrowRight" && own !== "INPUT") step(1);
  else return;
  event.preventDefault();
});
QUESTIONS.forEach((question, i) => {
  byId(question).addEventListener("change", event => answer(question, event.target.value));
  byId(question).addEventListener("focusin", () => ask(i));
});
for (const side of ["left", "right"]) byId(side).addEventListener("load", event => {
  const image = event.target, own = image.naturalWidth;
  const most = 62 * own / image.naturalHeight;  // so that the questions are on the screen too
  const width = own * (own < 256 ? Math.ceil(256 / own) : 1);  // in whole steps: it stays crisp
  image.style.width = "min(" + width + "px, " + most + "vh)";
  image.classList.toggle("crisp", own < 256);
});
byId("begin").addEventListener("click", begin);
byId("next").addEventListener("click", next);
byId("back").addEventListener("click", () => step(-1));
byId("again").addEventListener("click", () => step(-1));
byId("download").addEventListener("click", download);
byId("another").addEventListener("click", () => { tell(""); rater = ""; start() });
addEventListener("storage", () => { if (!byId("pair").hidden) { read(); show(at) } });

rater = kept(name()) || "";
if (rater) { byId("rater").value = rater; begin() } else start();
"""
