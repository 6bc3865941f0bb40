"""The workflows as far as they can be tried without GitHub: their form, their rights, and that what they call exists."""
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / ".github/workflows").glob("*"))
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
WRITES = {("pages.yml", "deploy"): {"pages": "write", "id-token": "write"}, ("probe.yml", "addresses"): {"contents": "read", "issues": "write"},
          ("release.yml", "publish"): {"contents": "write"}}
every = pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)


def load(path):
    return yaml.safe_load(path.read_text("utf-8"))


def jobs(path):
    return load(path)["jobs"].items()


def steps(path):
    return [(name, step) for name, job in jobs(path) for step in job["steps"]]


def test_the_workflows():
    assert [p.name for p in FILES] == ["links.yml", "pages.yml", "probe.yml", "release.yml", "test.yml"]


@every
def test_rights(path):
    """Nothing may write but the jobs that must, and nobody's fork gets a token that can."""
    flow = load(path)
    assert flow["permissions"] == {"contents": "read"}
    for name, job in jobs(path):
        assert job.get("permissions", {}) == WRITES.get((path.name, name), {}), f"{path.name}, job {name}"
        assert 0 < job["timeout-minutes"] <= 120 and job["runs-on"]
    assert "pull_request_target" not in flow[True] and "workflow_run" not in flow[True]  # YAML reads `on` as true


@every
def test_actions_are_pinned(path):
    used = [step["uses"] for _, step in steps(path) if "uses" in step]
    assert used
    for action in used:
        assert re.fullmatch(r"actions/[a-z-]+@(v\d+|[0-9a-f]{40})", action), action
    assert all(("uses" in step) != ("run" in step) for _, step in steps(path))


@every
def test_no_credentials_are_left_in_a_checkout(path):
    """Whatever a build runs could read them there. The one job that pushes asks gh for them, which has them by its environment."""
    for name, step in steps(path):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False, f"{path.name}, job {name}"
    for name, job in jobs(path):
        text = "\n".join(step.get("run", "") for step in job["steps"])
        if "git push" in text:
            assert text.index("gh auth setup-git") < text.index("git push") and "GH_TOKEN" in job["env"]


def test_what_servers_said_is_shown_as_code(tmp_path):
    """The summary of the link check holds other people's texts: each line is code, and a shell ran none of it."""
    (step,) = [step for _, step in steps(ROOT / ".github/workflows/links.yml") if "output.txt" in step.get("run", "")]
    folder, summary = tmp_path / "_build/linkcheck", tmp_path / "summary.md"
    folder.mkdir(parents=True)
    said = ["book/a.md:1: [broken] https://x.example: ```</code><img src=//e.example> @someone $(touch pwned) `touch pwned`",
            "book/a.md:2: [timeout] https://x.example: \x1b[31m\u202eevil\x00", "book/a.md:3: [working] https://x.example"]
    (folder / "output.txt").write_text("\n".join(said) + "\n")
    subprocess.run(["bash", "-e", "-c", step["run"]], cwd=tmp_path, env={"GITHUB_STEP_SUMMARY": str(summary), "PATH": "/usr/bin:/bin"}, check=True, timeout=60)
    lines = summary.read_text("utf-8").splitlines()
    assert len(lines) == 2 and all(line.startswith("    book/a.md") and line.isprintable() and line.isascii() for line in lines)
    assert said[0] in lines[0] and not (tmp_path / "pwned").exists()
    summary.unlink()
    (folder / "output.txt").write_text("book/a.md:3: [working] https://x.example\n")
    subprocess.run(["bash", "-e", "-c", step["run"]], cwd=tmp_path, env={"GITHUB_STEP_SUMMARY": str(summary), "PATH": "/usr/bin:/bin"}, check=True, timeout=60)
    assert summary.read_text() == "No link is broken.\n"


@every
def test_what_is_run_exists(path):
    """Make targets, tools and scripts; and a shell can read each line."""
    for name, step in steps(path):
        text = step.get("run", "")
        assert "${{" not in text, "what GitHub puts into a script can be code: hand it over by env"
        assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""
        for target in re.findall(r"\bmake ([a-z-]+)", text):
            assert re.search(rf"^{target}:.*## ", MAKEFILE, re.M), f"{path.name}: there is no make {target}"
        for script in re.findall(r"(?:tools|\.ci|bench)/[\w./]+", text):
            assert (ROOT / script).is_file(), f"{path.name}: there is no {script}"
            if script.startswith("tools/"):
                source = (ROOT / script).read_text("utf-8")
                for option in re.findall(r" (--[a-z-]+)", text[text.index(script):].split("\n")[0]):
                    assert f'"{option}"' in source, f"{path.name}: {script} has no {option}"


@every
def test_needs_and_steps_lead_somewhere(path):
    names = dict(jobs(path))
    for name, job in names.items():
        needs = [job["needs"]] if isinstance(job.get("needs"), str) else job.get("needs", [])
        text = yaml.safe_dump(job)
        assert set(needs) <= set(names)
        assert set(re.findall(r"needs\.(\w+)\.", text)) <= set(needs)
        assert set(re.findall(r"steps\.(\w+)\.", text)) <= {step.get("id") for step in job["steps"]}
        for key in re.findall(r"matrix\.(\w+)", text):
            rows = job["strategy"]["matrix"].get("include", [])
            assert key in job["strategy"]["matrix"] or (rows and all(key in row for row in rows)), key


def lower(requirement, name):
    (bound,) = re.findall(rf"^{name}>=([\d.]+)$", requirement, re.M)
    return bound


def test_the_matrix_begins_where_the_project_does():
    book, torch = (dict(jobs(ROOT / ".github/workflows/test.yml"))[name]["strategy"]["matrix"] for name in ("book", "torch"))
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert set(book["os"]) == {"ubuntu-latest", "macos-latest"} == {row["os"] for row in torch["include"]}
    assert book["python"][0] == oldest and len(book["python"]) == 2
    needed = "\n".join(PROJECT["dependencies"])
    for system in book["os"]:
        rows = [row for row in torch["include"] if row["os"] == system]
        assert [(r["torch"], r["torchvision"]) for r in rows] == [
            (f"torch=={lower(needed, 'torch')}.*", f"torchvision=={lower(needed, 'torchvision')}.*"), ("torch", "torchvision")]
        assert [r["python"] for r in rows] == book["python"]


def test_the_cells_that_ask_for_a_week():
    for name in ("probe.yml", "links.yml"):
        (entry,) = load(ROOT / ".github/workflows" / name)[True]["schedule"]
        assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", entry["cron"])
