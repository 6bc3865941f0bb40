#!/usr/bin/env python
"""Write copies of the chapters that run by themselves on Colab, Kaggle, or any Jupyter.

    python tools/launch.py --release URL --site URL [--out dist]

Into OUT go `launch/*.ipynb` and `weighing-adam-files-VERSION.zip`. A copy begins with a cell that
installs the wheel of this release from URL and unpacks the files that chapters read (records and
benchmarks); it changes no package that is there already. Its text is plain Markdown: citations name
author and year and lead to the source, links lead to SITE. URL may be a folder (file:///...), so
that a release can be tried before it is one. The wheel is made by `make dist`.
"""
import argparse
import json
import re
import sys
import tomllib
import zipfile
from pathlib import Path

import nbformat
from pybtex.database import parse_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "book/_ext")]
import nb  # noqa: E402
from weighing import number_of, plain_cell  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
VERSION = PROJECT["version"]
FILES = f"weighing-adam-files-{VERSION}.zip"
READ = ("book/records/**/*.json", "bench/*.py")  # what chapters read besides nbutils
WANTED = ("torch", "torchvision")
GPU_ROWS = {  # task, row at the size colab, row at the size smoke
    "11-cifar10": ("cifar10", "adamw-30", "adamw-30"), "12-cars": ("cars", "adamw", "crops-adamw"),
    "16-wikitext-2": ("wikitext2", "lstm-adam", "lstm-adam")}
ROLE = re.compile(r"\{cite(?::[pt])?\}`([^`]+)`")
FENCE = re.compile(r"^```\{admonition\}[ ]*(.*)\n((?::.*\n)*)((?:.*\n)*?)```$", re.M)
LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)\s]+)(?=\))")
LEFT = re.compile(r"^\s*(?:```\{|:::|\(\w+\)=).*|\{[a-z][\w:-]*\}`.*", re.M)

INSTALL = '''\
# Installs nbutils {version} and the files that the page reads. What is installed here already,
# torch before all, stays as it is. The page's examples are small: they run on the processor.
import importlib.metadata as installed
import io, os, pathlib, re, subprocess, sys, urllib.request, zipfile

RELEASE = "{release}"
names = {{d.name for d in installed.distributions() if d.name}}
for name, least in {least}:
    found = installed.version(name) if name in names else None
    if found and [int(n) for n in re.findall(r"\\d+", found)[:2]] < least:
        raise RuntimeError(f"nbutils {version} needs {{name}} {{'.'.join(map(str, least))}} or newer; this runtime "
                           f"has {{found}}. Choose its newest version: on Colab under Runtime, "
                           "Change runtime type; on Kaggle under Settings, Environment.")
pins = [f"{{name}}=={{installed.version(name)}}" for name in sorted(names)]
pathlib.Path("stays.txt").write_text(
    "\\n".join(p for p in pins if re.fullmatch(
        r"[\\w.-]+==\\d[\\d.]*((a|b|rc|post|dev)\\d+\\.?)*(\\+[\\w.]+)?", p)))
wheel = f"nbutils[data] @ {{RELEASE}}/nbutils-{version}-py3-none-any.whl"
done = subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--constraint",
                       "stays.txt", wheel], capture_output=True, text=True)
if done.returncode:
    raise RuntimeError(f"nbutils {version} could not be installed beside what is here:\\n{{done.stderr}}")
with urllib.request.urlopen(f"{{RELEASE}}/{files}") as answer:
    zipfile.ZipFile(io.BytesIO(answer.read())).extractall("weighing-adam")
os.chdir("weighing-adam/nbs")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
print("nbutils", installed.version("nbutils"), "beside torch", installed.version("torch"))'''

TOP = ("\n\n*A copy for Colab, Kaggle or any Jupyter, release {version}: run its cells in order. The page "
       "itself, with its results, is [here]({page}).*")
GPU_TEXT = ("## A row on this machine's GPU\n\nThe command trains one seed of one row at the size `colab`. It was made for "
            "a quarter of an hour on a T4, which has *not been run* yet. The data set is fetched first. When a run is cut "
            "off, the same command goes on with it. What you found is welcome: [how to send a record]({site}/book/launch.html#send).")
GPU_CELL = ("# without a GPU, in seconds: !nbutils run {task} {small} --size smoke\n"
            "!CUDA_VISIBLE_DEVICES=0 nbutils run {task} {row} --size colab --seeds 0")


def least():
    """The oldest release of torch and of torchvision that nbutils takes, as in pyproject.toml."""
    found = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", d).groups() for d in PROJECT["dependencies"])
    return [(name, [int(n) for n in found[name].split(".")]) for name in WANTED]


def sources(site, path=ROOT / "book/references.bib"):
    """For each key of the bibliography, a link that names authors and year; to the book's list if it has no address."""
    found = {}
    for key, entry in parse_file(str(path)).entries.items():
        names = [" ".join(p.prelast_names + p.last_names) or str(p) for p in entry.persons["author"]]
        names = [re.sub(r"[{}]", "", n) for n in names]
        who = names[0] if len(names) == 1 else f"{names[0]} and {names[1]}" if len(names) == 2 else f"{names[0]} and others"
        fields = entry.fields
        place = fields.get("url") or (f"https://doi.org/{fields['doi']}" if "doi" in fields else f"{site}/book/bibliography.html")
        found[key] = f"[{who}, {fields['year']}]({place})"
    return found


def plain(text, cited, site):
    """A cell's Markdown without MyST: citations as links, boxes as quotations, links to the site."""
    text = ROLE.sub(lambda m: "(" + "; ".join(cited[key.strip()] for key in m[1].split(",")) + ")", text)
    text = FENCE.sub(lambda m: "\n".join(f"> {line}".rstrip() for line in (f"**{m[1]}.**", "", *m[3].strip().split("\n"))), text)
    text = LINK.sub(lambda m: f"{site}/{placed(m[1])}", text)
    left = LEFT.search(re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.M | re.S))
    if left:
        raise ValueError(f"this is not plain Markdown: {left[0].strip()!r}; teach tools/launch.py what becomes of it")
    return text


def placed(target):
    """A chapter's relative link as an address below the site."""
    path, mark, part = target.partition("#")
    whole = (ROOT / "nbs" / path).resolve().relative_to(ROOT).as_posix()
    return re.sub(r"\.(ipynb|md)$", ".html", whole) + mark + part


def hidden(source):
    return nbformat.v4.new_code_cell(source, metadata={"cellView": "form", "_kg_hide-input": True, "jupyter": {"source_hidden": True}})


def copied(cell, cited, site):
    if cell.cell_type == "markdown":
        return nbformat.v4.new_markdown_cell(plain(cell.source, cited, site), id=cell.id)
    cell = plain_cell({**cell, "outputs": []})
    if cell is None:
        return None
    tags = cell["metadata"].get("tags", [])
    new = nbformat.v4.new_code_cell(cell["source"])
    if {"hide-input", "remove-cell"} & set(tags):
        new = hidden(f"#@title Shown folded on the page\n{cell['source']}")
    new.id = cell["id"]
    return new


def launch_copy(path, release, site, cited=None):
    """The notebook that a reader opens elsewhere in the place of nbs/NAME."""
    cited, docname = cited or sources(site), f"nbs/{path.stem}"
    cells = [new for cell in nbformat.read(path, 4).cells if (new := copied(cell, cited, site)) is not None]
    top = cells[0]
    top.source = re.sub(r"\A# (.*)", lambda m: f"# {number_of(docname)} · {m[1]}" + TOP.format(
        version=VERSION, page=f"{site}/{docname}.html"), top.source)
    cells.insert(1, nbformat.v4.new_code_cell(INSTALL.format(version=VERSION, release=release, least=least(), files=FILES), id="install"))
    if path.stem in GPU_ROWS:
        task, row, small = GPU_ROWS[path.stem]
        cells.append(nbformat.v4.new_markdown_cell(GPU_TEXT.format(site=site), id="gpu-text"))
        cells.append(nbformat.v4.new_code_cell(GPU_CELL.format(task=task, row=row, small=small), id="gpu"))
    metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                "language_info": {"name": "python"}, "colab": {"provenance": []}}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def write(release, site, out):
    """Write all copies and the archive; returns their paths."""
    (out / "launch").mkdir(parents=True, exist_ok=True)
    for old in (out / "launch").glob("*.ipynb"):
        old.unlink()
    cited, written = sources(site), []
    for path in nb.notebooks():
        target = out / "launch" / path.name
        target.write_text(json.dumps(launch_copy(path, release, site, cited), ensure_ascii=False, indent=1) + "\n", "utf-8")
        written.append(target)
    with zipfile.ZipFile(out / FILES, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("nbs/", "")
        for path in sorted(p for pattern in READ for p in ROOT.glob(pattern)):
            archive.write(path, path.relative_to(ROOT))
    return [*written, out / FILES]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--release", required=True, help="where the wheel and the archive will lie: an address or a file:// folder")
    parser.add_argument("--site", required=True, help="the book's address")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    chosen = parser.parse_args()
    for name in ("release", "site"):
        if not re.match(r"(https|http|file)://", getattr(chosen, name)):
            parser.error(f"--{name} is {getattr(chosen, name)!r}, which is no address: it begins with https:// or file://")
    written = write(chosen.release.rstrip("/"), chosen.site.rstrip("/"), chosen.out)
    print(f"{len(written) - 1} notebooks in {chosen.out / 'launch'}, and {written[-1]}")


if __name__ == "__main__":
    main()
