"""What somebody could write into a record to get more out of it than a table: texts, and records that hold them.

Each text of PAYLOADS holds OWNED where it would act, so that a test can see that it was there and that it did nothing. `ADDRESS` is
where it would send a request; tests that open pages put a server of their own in its place.
"""
import copy
import json

from nbutils.records import config_hash
from sound_records import sound

ADDRESS = "http://evil.example"
SET = "document.title='OWNED'"
PAYLOADS = {
    # HTML
    "script": f"<script>{SET}</script>",
    "svg": f'<svg onload="{SET}">OWNED',
    "img": f'<img src="{ADDRESS}/OWNED.png" onerror="{SET}">',
    "no quotes": "<img src=x onerror=document.title=/OWNED/.source>",
    "iframe": f'<iframe srcdoc="<script>parent.{SET}</script>">OWNED</iframe>',
    "attribute": f'"><script>{SET}</script>',
    "single quotes": f"'><script>{SET}</script>",
    "style": f"<style>@import '{ADDRESS}/OWNED.css';</style>",
    "meta": f'<meta http-equiv="refresh" content="0; url={ADDRESS}/OWNED">',
    "base": f'<base href="{ADDRESS}/OWNED/">',
    "details": f'<details open ontoggle="{SET}">OWNED</details>',
    "comment": f"<!-- /table --><script>{SET}</script><!-- OWNED",
    "entities": f"&lt;script&gt;{SET}&lt;/script&gt; &#60;script&#62;OWNED",
    "cdata": f"<![CDATA[<script>{SET}</script>]]>",
    # Markdown and MyST
    "image": f"![OWNED]({ADDRESS}/OWNED.png)",
    "link": f"[OWNED](javascript:{SET})",
    "autolink": f"<{ADDRESS}/OWNED>",
    "bare address": f"{ADDRESS}/OWNED www.OWNED.example OWNED@evil.example",
    "reference": f"[OWNED]\n\n[OWNED]: {ADDRESS}/OWNED",
    "include": "x\n\n```{include} INCLUDED\n```\n\nOWNED",
    "include with colons": "x\n\n:::{include} INCLUDED\n:::\n\nOWNED",
    "literalinclude": "x\n\n```{literalinclude} INCLUDED\n```\n\nOWNED",
    "raw": f"x\n\n```{{raw}} html\n<script>{SET}</script>\n```\n",
    "eval-rst": f"x\n\n```{{eval-rst}}\n.. raw:: html\n\n   <script>{SET}</script>\n```\n",
    "download": "{download}`OWNED <INCLUDED>`",
    "image directive": f"x\n\n```{{image}} {ADDRESS}/OWNED.png\n```\n",
    "iframe directive": f"x\n\n```{{figure}} {ADDRESS}/OWNED.png\nOWNED\n```\n",
    "substitution": "{{ cycler.__init__.__globals__.os.system('touch OWNED') }}",
    "formula": f"$\\href{{javascript:{SET}}}{{OWNED}}$",
    "displayed formula": f"$$\\href{{javascript:{SET}}}{{OWNED}}$$",
    "environment": f"x\n\n\\begin{{align}}\\href{{javascript:{SET}}}{{OWNED}}\\end{{align}}\n",
    "code": f"`OWNED` `` <script>{SET}</script> ``",
    "end of the cell": f"x | y |\n| a | <script>{SET}</script> |\n\n# OWNED",
    "heading": "x\n\n# OWNED\n\ny",
    "emphasis": "**OWNED** _OWNED_ ~~OWNED~~",
    "target": "(OWNED)=",
    "list": "- OWNED",
    "numbered list": "1. OWNED",
    "rule": "---\nOWNED",
    "remark": "% OWNED",
    "block break": "+++ OWNED",
    "footnote": "OWNED[^1]\n\n[^1]: OWNED",
    "definition": "OWNED\n: OWNED",
    "citation": "{cite}`OWNED`",
    # terminals, and readers
    "title": "\x1b]0;OWNED\x07",
    "clear": "\x1b[2J\x1b[HOWNED",
    "colours in one byte": "\x9b31mOWNED",
    "carriage return": "fine\rOWNED",
    "backspace": "fine\b\b\b\bOWNED",
    "null": "OWNED\x00",
    "right to left": "\u202eOWNED\u202c",
    "isolate": "\u2066OWNED",
    "zero width": "OW\u200bNED",
    "line separator": "x\u2028OWNED",
    "byte order": "\ufeffOWNED",
    "half a pair": "OWNED\ud800",
    "tags": "OWNED\U000e0041",
    "long": "OWNED" + "x" * 2000,
}


def _in(where, to):
    def change(fields):
        *path, last = where
        for key in path:
            fields = fields[key]
        fields[last] = to
    return change


def _named(*where, name, value):
    """A value under a name of the stranger's own."""
    def change(fields):
        for key in where:
            fields = fields[key]
        fields[name] = value
    return change


def _cell(name):
    """The row's name in all places where it stands, with the hash that belongs to it."""
    def change(fields):
        fields["row"] = fields["config"]["row"] = name
    return change


SCRIPT = PAYLOADS["script"]
# name: (what is done to the fields of a sound record, which field the answer has to name)
FITS = {"numbered list"}  # is a line as a device may be: only the pages see to it
RUNS = {f"device: {name}": (_in(["device"], text), "device") for name, text in PAYLOADS.items() if name not in FITS}
RUNS |= {
    "torch's version": (_in(["versions", "torch"], SCRIPT), "versions.torch"),
    "the platform": (_in(["versions", "platform"], PAYLOADS["title"]), "versions.platform"),
    "a version's name": (_named("versions", name=SCRIPT, value="1"), "versions."),
    "a version's name with an escape": (_named("versions", name=PAYLOADS["clear"], value="1"), "versions."),
    "a figure's name": (_named("metrics", name=SCRIPT, value=0.5), "metrics."),
    "a figure's name that includes": (_named("metrics", name=PAYLOADS["include"], value=0.5), "metrics."),
    "a column's name": (_named("history", 0, name=SCRIPT, value=0.5), "history[0]."),
    "a curve's name": (_named("curve", name=SCRIPT, value=[0.5]), "curve."),
    "a setting's name": (_named("config", name=SCRIPT, value=1), "config."),
    "a setting": (_in(["config", "net"], SCRIPT), "config.net"),
    "a setting of a list": (_in(["config", "momentum"], [0.9, PAYLOADS["formula"]]), "config.momentum[1]"),
    "a field's name": (_named(name=SCRIPT, value=1), "the field"),
    "a field's name with an escape": (_named(name=PAYLOADS["title"], value=1), "the field"),
    "the row": (_cell(SCRIPT), "row"),
    "the row: a target": (_cell("x)=\n# OWNED\n(y"), "row"),
    "the row: a folder above": (_cell(".."), "row"),
    "the row: an absolute path": (_cell("/etc"), "row"),
    "the row: a hundred letters": (_cell("a" * 100), "row"),
    "the task": (_in(["task"], SCRIPT), "task"),
    "the size": (_in(["size"], SCRIPT), "size"),
    "the precision": (_in(["precision"], SCRIPT), "precision"),
    "the commit": (_in(["commit"], f"`{SCRIPT}"), "commit"),
    "the hash of the code": (_in(["code_hash"], SCRIPT), "code_hash"),
    "the hash of the settings": (_in(["config_hash"], f"`{SCRIPT}"), "config_hash"),
    "the start": (_in(["started"], f"2026-11-26T10:00:00+00:00{SCRIPT}"), "started"),
    "the start: digits of another script": (_in(["started"], "2026-11-26T10:00:0\u0660+00:00"), "started"),
    "the seed": (_in(["seed"], SCRIPT), "seed"),
    "a seed of many digits": (_in(["seed"], 10**100), "seed"),
    "the recipe": (_in(["recipe"], SCRIPT), "recipe"),
    "the seconds": (_in(["seconds"], SCRIPT), "seconds"),
    "a figure": (_in(["metrics", "error"], SCRIPT), "metrics.error"),
    "a figure out of range": (_in(["metrics", "error"], -0.5), "metrics.error"),
    "a loss of the history": (_in(["history", 3, "loss"], SCRIPT), "history[3].loss"),
    "a step of the curve": (_in(["curve", "step", 3], SCRIPT), "curve.step[3]"),
    "a device that is a list": (_in(["device"], ["x", SCRIPT]), "device"),
    "a device that is empty": (_in(["device"], ""), "device"),
    "versions in a list": (_in(["versions"], [SCRIPT]), "versions"),
    "a history of text": (_in(["history"], SCRIPT), "history"),
    "a history of 20,000 epochs": (lambda f: f.update(history=f["history"][:1] * 20_000), "bytes"),
    "a curve of 2,000 steps": (lambda f: f["curve"].update({k: v[:1] * 2000 for k, v in f["curve"].items()}), "curve."),
    "300 figures": (lambda f: f["metrics"].update({f"m{i}": 0.5 for i in range(300)}), "metrics"),
    "300 versions": (lambda f: f["versions"].update({f"m{i}": "1" for i in range(300)}), "versions"),
    "settings twenty deep": (_in(["config", "net"], json.loads("[" * 20 + "1" + "]" * 20)), "config.net"),
    "20 MB of text": (_in(["device"], "x" * 20_000_000), "bytes"),
    "20 MB of a name": (_named("metrics", name="x" * 20_000_000, value=0.5), "bytes"),
}


def hostile_run(name):
    """The fields of a record that was sound before the change of this name; the hash of its settings fits."""
    fields = copy.deepcopy(sound(seed=7))
    change, _ = RUNS[name]
    change(fields)
    if not name.startswith("the hash"):
        fields["config_hash"] = config_hash(fields["config"])
    return fields
