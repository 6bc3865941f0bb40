"""What this book needs from Sphinx beyond its configuration.

1. Notebook pages do not show nbdev's directives. `#| default_exp`, `#| export` and `#| hide`
   are taken out of the source as it is read; an exported cell gets the class `tag_exported`, by
   which custom.css flags it; a hidden cell is removed; a cell that held nothing else is dropped.
   Titles get the chapter's number, from the file's name; the line below the title gets a link to
   the API page of the module that the chapter exports. Folded solutions fold their outputs.
   Black in a figure would be lost on a dark page, which gets a copy of it in light grey.
2. In docstrings `x` is code and |x| an absolute value, as in the chapters' Markdown. A constant
   shows what its API page says of it, not the docstring of its type.
3. The API pages are nitpicky about our own names only. A type in a docstring that is torch's or
   Python's links to its documentation where the address is known, and is plain text elsewhere.
4. Where the repository is public, a chapter's title is followed by links that open its copy for
   Colab and Kaggle (tools/launch.py). The address comes from the variable WEIGHING_REPOSITORY,
   which the workflow of the pages sets once the copies of this version are there.
5. MathJax is copied into the site, so that formulas can be read without a network. Its files
   come from the package sphinx-mathjax-offline (whose own extension copies five times as much).
6. Thebe, which would run cells on a server elsewhere, is left out: Jupyter Book puts its script
   into every page twice, and the second copy is an error in the browser's console.
"""
import base64
import importlib.util
import json
import os
import re
import shutil
import tomllib
from pathlib import Path

from docutils import nodes
from sphinx.util.docstrings import prepare_docstring

VERSION = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text("utf-8"))["project"]["version"]
MATHJAX = ("tex-mml-chtml.js", "output/chtml/fonts/woff-v2", "input/tex/extensions")

DIRECTIVE = re.compile(r"^\s*#\|\s*(default_exp|export|exporti|exports|hide)\b.*$")
EXPORTED = {"export", "exporti", "exports"}


def plain_cell(cell):
    """Return a code cell without its directives, or None if nothing else is in it."""
    kept, found = [], set()
    for line in "".join(cell["source"]).split("\n"):
        match = DIRECTIVE.match(line)
        if match:
            found.add(match.group(1))
        else:
            kept.append(line)
    if not found:
        return cell
    source = "\n".join(kept).strip("\n")
    if not source.strip() and not cell.get("outputs"):
        return None
    tags = list(cell["metadata"].get("tags", []))
    if found & EXPORTED:
        tags.append("exported")
    if "hide" in found:
        tags.append("remove-cell")
    return {**cell, "source": source, "metadata": {**cell["metadata"], "tags": tags}}


def fold_solutions(cells):
    """Fold outputs too where a solution's code is folded: they would give the answer away."""
    exercises = False
    for cell in cells:
        if cell["cell_type"] == "markdown":
            headings = re.findall(r"^## (.*?)\s*$", "".join(cell["source"]), re.M)
            exercises = headings[-1] == "Exercises" if headings else exercises
        elif exercises and "hide-input" in cell["metadata"].get("tags", []):
            tags = cell["metadata"]["tags"]
            cell["metadata"]["tags"] = [{"hide-input": "hide-cell"}.get(t, t) for t in tags]


def number_of(docname):
    """The number by which the text calls a chapter: nbs/06-data is 6, nbs/a1-conventions is A1."""
    match = re.match(r"nbs/(?:0*(\d+)|(a\d+))-", docname)
    return match and (match[1] or match[2].upper())


def module_of(cells):
    """The module that a chapter exports, by its `default_exp`; None if it exports none."""
    for cell in cells:
        match = re.search(r"^#\|\s*default_exp\s+(\w+)", "".join(cell["source"]), re.M)
        if match and cell["cell_type"] == "code":
            return match[1]
    return None


def link_to_api(source, module):
    """A chapter's first cell with a link to its module's page after the line below the title."""
    package = module == "__init__"
    page, name = ("index", "nbutils") if package else (module, f"nbutils.{module}")
    line = f"> Exported as [`{name}`](../book/api/{page}.md)."
    return below_the_title(source, line)


def below_the_title(source, line):
    """Add a paragraph to the quotation that follows the title."""
    return re.sub(r"\A(# .*\n+(?:>.*\n)*>.*)$", lambda m: f"{m[1]}\n>\n{line}", source, count=1, flags=re.M)


def launch_links(repository, version, name):
    """Links that open a chapter's copy, on the branch that the release put it on; none without an address."""
    if not repository:
        return ""
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"WEIGHING_REPOSITORY is {repository!r}: it has to be like https://github.com/OWNER/NAME")
    copy = f"{repository}/blob/launch/v{version}/{name}"
    colab = copy.replace("https://github.com/", "https://colab.research.google.com/github/")
    return f"> Run a copy: [Colab]({colab}) or [Kaggle](https://kaggle.com/kernels/welcome?src={copy})."


def read_notebook(app, docname, content):
    """Sphinx's source-read: change a notebook's JSON before MyST-NB parses it."""
    if not str(app.env.doc2path(docname)).endswith(".ipynb"):
        return
    notebook = json.loads(content[0])
    fold_solutions(notebook["cells"])
    whole_intervals(notebook["cells"])
    dark_twins(notebook["cells"])
    module = module_of(notebook["cells"])
    cells = (plain_cell(c) if c["cell_type"] == "code" else c for c in notebook["cells"])
    notebook["cells"] = [c for c in cells if c is not None]
    first, number = notebook["cells"][0], number_of(docname)
    if number:
        first["source"] = re.sub(r"\A# ", f"# {number} · ", "".join(first["source"]))
    if module:
        first["source"] = link_to_api("".join(first["source"]), module)
    links = launch_links(app.config.weighing_repository, VERSION, Path(app.env.doc2path(docname)).name)
    if links:
        first["source"] = below_the_title("".join(first["source"]), links)
    content[0] = json.dumps(notebook)


def whole_intervals(cells):
    """A mean and its interval stay on one line of a table's cell."""
    for cell in cells:
        for output in cell.get("outputs", []):
            html = output.get("data", {}).get("text/html")
            if html:
                output["data"]["text/html"] = re.sub(r"(?<=\d) ± (?=\d)", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}",
                                                     "".join(html))


FIGURE = re.compile(r'<img class="figure" (alt="[^"]*") src="data:image/svg\+xml;base64,([^"]+)">')


def dark_twins(cells):
    """A figure with black in it gets a twin with light grey instead, which dark pages show."""
    def both(match):
        drawn = base64.b64decode(match[2])
        if b"#000000" not in drawn:
            return match[0]
        twin = base64.b64encode(drawn.replace(b"#000000", b"#e0e0e0")).decode()
        return "".join(f'<img class="figure only-{page}" {match[1]} src="data:image/svg+xml;base64,{data}">'
                       for page, data in (("light", match[2]), ("dark", twin)))

    for cell in cells:
        for output in cell.get("outputs", []):
            html = output.get("data", {}).get("text/html")
            if html:
                output["data"]["text/html"] = FIGURE.sub(both, "".join(html))


CODE = re.compile(r"(:[\w:]+:`[^`]*`|``.+?``|`[^`]+`_{0,2})")


def without_type(app, what, name, obj, options, lines):
    """Autodoc's docstring hook: a constant without a docstring of its own does not show its type's."""
    if what == "data" and lines and lines == prepare_docstring(type(obj).__doc__ or ""):
        lines.clear()


def plain_markup(app, what, name, obj, options, lines):
    """Autodoc's docstring hook: `x` is code as in Markdown, |x| and (a, *, b) mean themselves."""
    for number, line in enumerate(lines):
        parts = CODE.split(line)
        parts[::2] = [re.sub(r"(?<!\\)(\||\*(?=,))", r"\\\1", part) for part in parts[::2]]
        parts[1::2] = [f"`{part}`" if re.fullmatch(r"`[^`]+`", part) else part for part in parts[1::2]]
        lines[number] = "".join(parts)


def address(target):
    """The documentation's address of a torch name, if we know how it is built; else None."""
    parts = target.split(".")
    if parts[0] != "torch" or len(parts) < 2:
        return None
    base = "https://docs.pytorch.org/docs/stable/"
    if target in ("torch.Tensor", "torch.device", "torch.dtype"):
        page = "tensors.html" if target == "torch.Tensor" else "tensor_attributes.html"
        return f"{base}{page}#{target}"
    if parts[1] in ("nn", "optim") and len(parts) >= 3 and parts[-1][0].isupper():
        return f"{base}generated/{target}.html"
    if target == "torch.Generator":
        return f"{base}generated/torch.Generator.html"
    return None


def ours(env, target):
    """Find a name of nbutils that was written without its module; None unless there is one."""
    objects = env.get_domain("py").objects
    found = [name for name in objects if name.startswith("nbutils.") and name.endswith("." + target)]
    shortest = [name for name in found if name.count(".") == 2] or found
    return (shortest[0], objects[shortest[0]]) if len(shortest) == 1 else None


def resolve(app, env, node, contnode):
    """Sphinx's missing-reference: settle what the Python domain did not find."""
    if node.get("refdomain") != "py":
        return None
    target = node.get("reftarget", "").lstrip("~.")
    match = ours(env, re.sub(r"^nbutils\.(?=\w+$)", "", target))  # the package has every name too
    if match:
        name, entry = match
        place = app.builder.get_relative_uri(node["refdoc"], entry.docname)
        return nodes.reference("", "", contnode, internal=True, reftitle=name,
                               refuri=f"{place}#{entry.node_id}")
    if target.split(".")[0] == "nbutils":
        return None  # ours, and not there: a warning, which is an error
    known = address(target)
    if known:
        return nodes.reference("", "", contnode, internal=False, refuri=known)
    return contnode


def without_thebe(app, pagename, templatename, context, doctree):
    """Sphinx's html-page-context: no script of Thebe's in any page."""
    context["script_files"] = [file for file in context["script_files"] if not any(
        "thebe" in str(text).lower() for text in (file, getattr(file, "attributes", {}).get("body", "")))]


def copy_mathjax(app, exception):
    """Sphinx's build-finished: put MathJax and its fonts into the site."""
    if exception is not None or app.builder.format != "html":
        return
    package = importlib.util.find_spec("sphinx-mathjax-offline")
    source = Path(package.submodule_search_locations[0], "static", "mathjax")
    target = Path(app.outdir, "_static", "mathjax")
    for name in MATHJAX:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, dirs_exist_ok=True)
        else:
            shutil.copy(source / name, target / name)


def setup(app):
    app.config.mathjax_path = f"mathjax/{MATHJAX[0]}"
    app.add_config_value("weighing_repository", os.environ.get("WEIGHING_REPOSITORY", ""), "env", [str])
    app.connect("build-finished", copy_mathjax)
    app.connect("source-read", read_notebook)
    app.connect("autodoc-process-docstring", without_type, priority=100)  # before napoleon
    app.connect("autodoc-process-docstring", plain_markup)
    app.connect("missing-reference", resolve)
    app.connect("html-page-context", without_thebe, priority=900)  # after those that add scripts
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
