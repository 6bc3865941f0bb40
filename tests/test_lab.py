"""The optimizer lab: its paths are nbutils', in a bare JavaScript engine and in a browser.

The engine (V8, of the package mini-racer) comes with `make install`, so the numbers are always
checked. A browser is used where one is found; NBUTILS_BROWSER names one, or says `required`.

Settings under which Adam never comes to rest are left out: with a short beta2 and a constant rate
its steps near the valley's floor are chaotic, and the last digit decides where they lead.
"""
import functools
import html
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from py_mini_racer import MiniRacer

from nbutils.amsgrad import Adam, AdamW, counterexample
from nbutils.core import COLORS
from nbutils.momentum import SGD
from nbutils.schedule import constant, cosine, one_cycle, values

ROOT = Path(__file__).resolve().parent.parent
LAB = ROOT / "book" / "_static" / "lab"
PAGE = ROOT / "book" / "lab.md"
TOLERANCE = 1e-9
LINES = ("sgd", "sgdw", "adam", "adam2", "adamw", "amsgrad", "amsgradw")
SCHEDULES = ("constant", "1cycle", "cosine", "root")
BROWSERS = ("google-chrome", "google-chrome-stable", "chromium", "chromium-browser", "chrome",
            "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")


# ---------------------------------------------------------------- what is compared

def settings(on, **changes):
    """A full set of the lab's settings, with nothing at zero."""
    usual = {"valley": {"lr": 0.05, "lrSgd": 0.1, "l2": 0.01, "wd": 0.1},
             "line": {"lr": 0.02, "lrSgd": 1e-4, "l2": 5.0, "wd": 0.05},
             "scales": {"lr": 0.002, "lrSgd": 0.01, "l2": 0.003, "wd": 0.3}}[on]
    return {"on": on, "steps": 404, "schedule": "constant", "beta1": 0.9, "beta2": 0.999,
            "second": 0.99, "eps": 1e-8, "tilt": 20} | usual | changes


CASES = [settings(on, schedule=kind) for on in ("valley", "line", "scales") for kind in SCHEDULES]
CASES += [settings("valley", eps=0.1, schedule="1cycle"), settings("valley", l2=0, wd=0),
          settings("valley", beta1=0, beta2=0.99), settings("valley", tilt=0, lr=0.2, lrSgd=0.3),
          settings("valley", tilt=45, beta1=0.98, schedule="cosine"),
          settings("line", l2=0, wd=0, beta2=0.99, second=0.9999, eps=0), settings("line", eps=100.0),
          settings("line", beta1=0, lr=0.5, schedule="root"),
          settings("line", lr=0.5, lrSgd=0.005, wd=0.01, beta2=0.99),   # from wall to wall
          settings("scales", l2=0.3, beta1=0.5), settings("scales", eps=0.1, beta1=0)]
NAMES = [" ".join(f"{key}={case[key]}" for key in ("on", "schedule", "eps", "beta1", "l2"))
         for case in CASES]
RUNS = [{"line": line, "settings": case} for case in CASES for line in LINES]

# Prints as many JSON texts as are asked for; numbers in them are exact.
COMPUTE = """JSON.stringify(%s.map(function (run) {
  var found = WeighingLab.run(run.line, run.settings);
  return {path: Array.from(found.path), weights: Array.from(found.weights)};
}))"""


# ---------------------------------------------------------------- nbutils' side

def uniform(seed):
    """mulberry32, in Python's whole numbers."""
    while True:
        seed = (seed + 0x6D2B79F5) & 0xFFFFFFFF
        t = (seed ^ seed >> 15) * (1 | seed) & 0xFFFFFFFF
        t = (t + ((t ^ t >> 7) * (61 | t) & 0xFFFFFFFF) & 0xFFFFFFFF) ^ t
        yield (t ^ t >> 14) / 2**32


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def on_valley(case):
    """Start, and a function of p and t that leaves the gradient in p: here of d'Hd / 2."""
    angle = math.radians(case["tilt"])
    turn = double([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    hessian, best = turn.T @ torch.diag(double([0.02, 1.0])) @ turn, double([1.5, 0.5])

    def fill(p, t):
        p.grad = hessian @ (p.detach() - best)
    return double([-2.0, 1.5]), fill


def on_line(case):
    large, small = double([1010.0]), double([-10.0])

    def fill(p, t):
        p.grad = large if t % 101 == 1 else small
    return double([0.0]), fill


@functools.cache
def noise(steps):
    """What every line's gradients are, in all cases: [steps, 200]."""
    draws = uniform(0)
    drawn = double([[(2 * next(draws) - 1) * math.sqrt(3) for _ in range(100)]
                    for _ in range(steps)])
    return torch.cat([drawn, 0.01 * drawn], dim=1)


def on_scales(case):
    gradients = noise(case["steps"])

    def fill(p, t):
        p.grad = gradients[t - 1]
    return double([1.0] * 200), fill


ON = {"valley": on_valley, "line": on_line, "scales": on_scales}


def maker(line, case):
    """The optimizer of nbutils that a line stands for."""
    adam = {"eps": case["eps"], "amsgrad": line.startswith("amsgrad")}
    beta2 = case["second" if line == "adam2" else "beta2"]
    lr, betas, l2, wd = case["lr"], (case["beta1"], beta2), case["l2"], case["wd"]
    if line.startswith("sgd"):
        decay = {"l2": l2} if line == "sgd" else {"weight_decay": wd}
        return lambda params: SGD(params, case["lrSgd"], momentum=case["beta1"], **decay)
    if line in ("adamw", "amsgradw"):
        return lambda params: AdamW(params, lr, betas, weight_decay=wd, **adam)
    return lambda params: Adam(params, lr, betas, l2=l2, **adam)


def plan(case, lr):
    """The rate and beta1 of every step, from nbutils.schedule."""
    steps, momenta = case["steps"], constant(case["beta1"])
    if case["schedule"] == "root":
        return [lr / math.sqrt(t) for t in range(1, steps + 1)], values(momenta, steps)
    if case["schedule"] == "1cycle":
        both = one_cycle(lr)
        return values(both["lr"], steps), values(both["momentum"], steps)
    rates = {"constant": constant, "cosine": cosine}[case["schedule"]](lr)
    return values(rates, steps), values(momenta, steps)


def expected(line, case):
    """The path of the lab's coordinates and the last weights, by nbutils' optimizers."""
    start, fill = ON[case["on"]](case)
    p = torch.nn.Parameter(start)
    opt = maker(line, case)([p])
    group, path = opt.param_groups[0], [p.detach().clone()]
    for t, (lr, beta1) in enumerate(zip(*plan(case, group["lr"])), 1):
        group["lr"] = lr
        group.update({"momentum": beta1} if "momentum" in group
                     else {"betas": (beta1, group["betas"][1])})
        fill(p, t)
        opt.step()
        if case["on"] == "line":
            p.data.clamp_(-1, 1)
        path.append(p.detach().clone())
    path = torch.stack(path)
    if case["on"] == "scales":
        path = path.reshape(-1, 2, 100).mean(2)
    return path, p.detach()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def by_nbutils():
    return [expected(run["line"], run["settings"]) for run in RUNS]


def check(found, by_nbutils, case):
    """Hold all lines of a case against nbutils'; name the line that is farthest off."""
    apart = {}
    for run, ours, (path, weights) in zip(RUNS, found, by_nbutils, strict=True):
        if run["settings"] is case:
            far = [(double(ours["path"]) - path.flatten()).abs().max().item(),
                   (double(ours["weights"]) - weights).abs().max().item()]
            apart[run["line"]] = max(far) if all(map(math.isfinite, far)) else math.inf
            assert path.diff(dim=0).abs().max() > 1e-4, "a path that stands still shows nothing"
    worst = max(apart, key=apart.get)
    assert apart[worst] <= TOLERANCE, f"{worst} is {apart[worst]:.3g} from nbutils': {apart}"


# ---------------------------------------------------------------- the engine that is always there

@pytest.fixture(scope="module")
def engine():
    engine = MiniRacer()
    engine.eval((LAB / "lab.js").read_text("utf-8"))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def by_engine(engine):
    return json.loads(engine.eval(COMPUTE % json.dumps(RUNS)))


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_paths_in_a_javascript_engine(by_engine, by_nbutils, case):
    check(by_engine, by_nbutils, case)


@pytest.mark.parametrize("schedule", ("root", "constant"))
@pytest.mark.parametrize("line, variant", (("adam", "adam"), ("amsgrad", "torch")))
def test_the_line_is_the_counterexample(engine, line, variant, schedule):
    case = settings("line", l2=0, beta2=0.99, eps=0, steps=20_200, schedule=schedule)
    found = json.loads(engine.eval(COMPUTE % json.dumps([{"line": line, "settings": case}])))
    ours = counterexample(variant, 20_200, lr=case["lr"], falling=schedule == "root",
                          betas=(0.9, 0.99), at=range(1, 20_201))["x"]
    assert (double(found[0]["path"][1:]) - double(ours)).abs().max() <= TOLERANCE


def test_colours_are_the_books(engine):
    wanted = {"sgd": "sgd", "sgdw": "sgd", "adam": "adam", "adam2": "sky", "adamw": "adamw",
              "amsgrad": "amsgrad", "amsgradw": "amsgrad"}
    lines = json.loads(engine.eval("JSON.stringify(WeighingLab.LINES)"))
    assert {name: line["color"] for name, line in lines.items()} == \
        {name: COLORS[color] for name, color in wanted.items()}
    assert tuple(lines) == LINES


ROUND = """JSON.stringify(WeighingLab.PRESETS.map(function (p) {
  var made = WeighingLab.defaults(p[1], p[2]), hash = WeighingLab.toHash(made);
  return [JSON.stringify(made), JSON.stringify(WeighingLab.fromHash('#' + hash)), hash];
}))"""


def test_settings_survive_the_address(engine):
    for made, read, address in json.loads(engine.eval(ROUND)):
        assert json.loads(made) == json.loads(read), address


@pytest.mark.parametrize("address", ("on=valley&lr=nan", "on=valley&lr=1e9", "on=valley&beta1=1",
                                     "on=valley&steps=1e12", "on=valley&schedule=toString", "on=valley&wd=",
                                     "on=valley&lines2=adam", "on=valley&on2=line&__proto__=1"))
def test_nonsense_in_an_address_is_left_out(engine, address):
    usual = engine.eval("JSON.stringify(WeighingLab.defaults('valley'))")
    assert engine.eval(f"JSON.stringify(WeighingLab.fromHash({address!r}))") == usual


def test_an_address_of_something_else_is_none_of_ours(engine):
    for address in ("", "#the-updates", "#on=moon", "#on=toString", "#on=%", "#%"):
        assert engine.eval(f"WeighingLab.fromHash({address!r})") is None


ENDS = """JSON.stringify(WeighingLab.PRESETS.map(function (p) {
  var made = WeighingLab.defaults(p[1], p[2]), ends = {};
  made.lines.forEach(function (line) { ends[line] = WeighingLab.end(WeighingLab.run(line, made)); });
  return ends;
}))"""


def test_lessons_show_what_they_say(engine):
    ends = json.loads(engine.eval(ENDS))
    one, valley, scale, strong, spent, wrong, mended = ends
    assert one["sgd"] == pytest.approx(one["sgdw"], abs=1e-12)
    assert math.dist(valley["adam"], [1.5, 0.5]) < 0.01
    assert scale["adamw"] == pytest.approx([0.05, 0.05], abs=0.01)
    assert scale["adam"] == pytest.approx([0.97, 0.05], abs=0.01)
    assert strong["adam"] == pytest.approx([scale["adamw"][0], 0], abs=0.01)
    assert spent["adamw"] == pytest.approx([0.21, 0.21], abs=0.005)
    assert wrong["adam"] == [1.0] and wrong["amsgrad"][0] < -0.85
    assert mended["adam"] == [1.0] and mended["adam2"][0] < -0.85
    drifts = [json.loads(engine.eval(COMPUTE % json.dumps([{"line": "adam2", "settings": settings(
        "line", l2=0, second=second, steps=60_600)}])))[0]["path"] for second in (0.999, 0.9995, 0.9998)]
    moves = [path[-1] - path[10_100] for path in drifts]
    assert moves[0] > 0.5 and abs(moves[1]) < 0.1 and moves[2] < -0.3, moves


# ---------------------------------------------------------------- a browser, where there is one

def find_browser():
    named = os.environ.get("NBUTILS_BROWSER", "")
    for name in BROWSERS if named in ("", "required") else (named,):
        found = shutil.which(name)
        if found and not found.startswith("/snap/"):  # a snap may not read our files in /tmp
            return found
    if named:
        pytest.fail(f"NBUTILS_BROWSER={named}, and there is no such browser; looked for {BROWSERS}")
    pytest.skip("NO BROWSER: the lab's numbers were checked in a bare engine only, its page not at "
                "all; install Chromium or Chrome, or name one in NBUTILS_BROWSER")


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """A function of a page's text and a hash: the text of <pre id="result"> once the page is done."""
    browser, folder = find_browser(), tmp_path_factory.mktemp("browser")

    def dump(page, address=""):
        file = folder / "page.html"
        file.write_text(page, "utf-8")
        done = subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update", "--disable-quic",
             f"--user-data-dir={folder / 'profile'}", "--window-size=1000,1200",
             "--virtual-time-budget=20000", "--dump-dom", file.as_uri() + address],
            capture_output=True, text=True, encoding="utf-8", timeout=300)
        found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.S)
        assert found, f"{browser} gave no result:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return html.unescape(found[1])
    return dump


WRITE = """<pre id="result"></pre><script>
window.addEventListener("load", function () {
  try { document.getElementById("result").textContent = (function () { %s })(); }
  catch (error) { document.getElementById("result").textContent = "failed: " + error.stack; }
});</script>"""


@pytest.fixture(scope="module")
def by_browser(browse):
    page = f"<!doctype html><script src='{(LAB / 'lab.js').as_uri()}'></script>"
    return json.loads(browse(page + WRITE % ("return " + COMPUTE % json.dumps(RUNS))))


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_paths_in_a_browser(by_browser, by_nbutils, case):
    check(by_browser, by_nbutils, case)


def lab_page():
    """The raw HTML of book/lab.md, as a page beside nothing else."""
    text = PAGE.read_text("utf-8").split("```{raw} html\n")[1].split("\n```")[0]
    return "<!doctype html><html><body>" + text.replace("../_static/lab", LAB.as_uri())


# What a reader does: opens a link, moves a slider, chooses a lesson, resets.
VISIT = """
var said = [], $ = function (id) { return document.getElementById(id); };
function look(what) {
  var svg = document.querySelector("#lab .lab-figure svg");
  said.push({what: what, hash: location.hash, desc: svg.querySelector("desc").textContent,
    role: svg.getAttribute("role"), live: $("lab-live").textContent,
    lines: Array.from(svg.querySelectorAll("path[data-line]")).map(function (p) { return p.dataset.line; }),
    lr: $("lab-lr").getAttribute("aria-valuetext"), beta1: $("lab-beta1").disabled,
    lesson: document.querySelector("#lab .lab-lesson").textContent,
    pressed: Array.from(document.querySelectorAll("#lab [aria-pressed=true]")).map(function (b) { return b.textContent; }),
    unnamed: Array.from(document.querySelectorAll("#lab input")).filter(function (i) { return !i.labels.length; }).length});
}
var doing = [
  function () { look("link"); var i = $("lab-lr"); i.value = i.max; i.dispatchEvent(new Event("input")); },
  function () { look("slider"); document.querySelector("input[value='1cycle']").click(); },
  function () { look("schedule"); document.querySelectorAll("#lab .lab-presets button")[5].click(); },
  function () { look("lesson"); $("lab-line-adam").click(); },
  function () { look("line"); location.hash = "#on=scales&l2=0.1"; },
  function () { look("hash"); Array.from(document.querySelectorAll("#lab button")).pop().click(); },
  function () { look("reset"); $("result").textContent = JSON.stringify(said); }];
function next() { doing.shift()(); if (doing.length) setTimeout(next, 900); }
setTimeout(next, 900);
return "";
"""


def test_the_page_in_a_browser(browse):
    page = browse(lab_page() + WRITE % VISIT, "#on=valley&lr=0.03&lines=sgd,adamw&wd=0.5")
    seen = {look["what"]: look for look in json.loads(page)}
    for look in seen.values():
        assert look["role"] == "img" and look["unnamed"] == 0
        assert look["live"] == look["desc"] and "distance" in look["live"]
    link = seen["link"]
    assert link["lines"] == ["sgd", "adamw"] and link["lr"] == "0.03"
    case = settings("valley", lr=0.03, wd=0.5, l2=0, steps=300)
    x, y = expected("adamw", case)[1].tolist()
    assert f"AdamW ends at ({x:.3f}, {y:.3f})".replace("-", "−") in link["live"]
    assert "lr=1&" in seen["slider"]["hash"] + "&" and seen["slider"]["lr"] == "1"
    assert seen["schedule"]["beta1"] and "schedule=1cycle" in seen["schedule"]["hash"]
    assert seen["lesson"]["pressed"] == ["Adam goes the wrong way, amsgrad does not"]
    assert seen["lesson"]["lines"] == ["adam", "amsgrad"] and "worst x" in seen["lesson"]["lesson"]
    assert seen["line"]["lines"] == ["amsgrad"]
    assert seen["hash"]["hash"] == "#on=scales&l2=0.1" and seen["hash"]["lines"] == ["adam", "adamw"]
    assert seen["reset"]["hash"] == "#on=scales"
