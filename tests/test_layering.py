"""What nbutils' modules may import, and what they promise to a reader."""
import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nbutils

PACKAGE = Path(__file__).resolve().parent.parent / "nbutils"
MODULES = sorted(p.stem for p in PACKAGE.glob("*.py") if not p.stem.startswith("_"))

# Low to high; a module imports from lower rows only. Models import torch alone.
LAYERS = [
    {"core"}, {"files", "records"}, {"optimizer"}, {"momentum"}, {"adam"}, {"amsgrad"},
    {"schedule", "data", "engines", "conformance"}, {"kernel"}, {"learner"}, {"distributed"},
    {"wide_resnet", "awd_lstm", "qrnn", "cache_pointer"},
    {"pictures"}, {"car_files", "fine_tuning"}, {"experiment"}, {"checks"}, {"cifar10", "cars", "wikitext2"}, {"verdicts"},
    {"command"},
]
TASKS = {"cifar10", "cars", "wikitext2", "verdicts", "command"}
MODELS = {"wide_resnet", "awd_lstm", "qrnn", "cache_pointer"}
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
HEAVY = ("torchvision", "matplotlib", "fastprogress", "sklearn", "pandas", "IPython")
SECTIONS = ("Parameters", "Attributes", "Returns", "Yields", "Raises", "Notes", "See Also",
            "References", "Examples", "Warns")


def source(module):
    return (PACKAGE / f"{module}.py").read_text(encoding="utf-8")


def imports(module):
    """Yield (top-level package, module of nbutils or None, imported names) anywhere in a module."""
    for node in ast.walk(ast.parse(source(module))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                yield parts[0], (parts[1] if parts[0] == "nbutils" and parts[1:] else None), []
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".") if node.module else []
            if node.level:
                parts = ["nbutils", *parts]
            names = [alias.name for alias in node.names]
            if parts == ["nbutils"]:  # from . import core / from nbutils import AdamW
                for name in names:
                    yield "nbutils", name, [name]
            else:
                yield parts[0], (parts[1] if parts[0] == "nbutils" else None), names


def exported(module):
    """The names of a module's __all__, read without importing it."""
    for node in ast.parse(source(module)).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def fresh(program):
    """Run a program in an interpreter of its own and return what it prints."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module):
    assert module in LEVEL, f"say in LAYERS where nbutils.{module} stands"
    for _, imported, names in imports(module):
        assert "*" not in names, f"nbutils.{module} has a star import"
        if imported is not None:
            assert LEVEL.get(imported, 99) < LEVEL[module], \
                f"nbutils.{module} imports nbutils.{imported}, which does not stand below it"


@pytest.mark.parametrize("module", sorted(MODELS.intersection(MODULES)))
def test_models_import_torch_alone(module):
    others = {top for top, _, _ in imports(module)} - set(sys.stdlib_module_names) - {"torch"}
    assert not others, f"nbutils.{module} imports {sorted(others)} besides torch"


def test_a_name_that_does_not_exist_gets_the_nearest():
    with pytest.raises(AttributeError, match="has no name 'Adamw'; did you mean .*AdamW"):
        nbutils.Adamw
    with pytest.raises(AttributeError, match=r"has no name 'zzz'; see dir\(nbutils\)"):
        nbutils.zzz


def test_package_loads_only_what_is_asked_for():
    program = "import sys, nbutils; print(*[m for m in {heavy} + ('torch',) if m in sys.modules])"
    assert fresh(program.format(heavy=HEAVY)) == []


def test_an_optimizer_loads_nothing_heavy():
    program = "from nbutils import AdamW; import sys; print(*[m for m in {heavy} if m in sys.modules])"
    assert fresh(program.format(heavy=HEAVY)) == []


@pytest.mark.parametrize("module", sorted(set(MODULES) - TASKS))  # each task has its ROWS, its build
def test_public_names_come_from_the_package(module):
    import nbutils

    home = importlib.import_module(f"nbutils.{module}")
    for name in exported(module):
        if name in MODULES:
            continue  # `nbutils.momentum` is the module; its stepper is nbutils.momentum.momentum
        assert name in nbutils.__all__, f"a0-package's table lacks {name} of nbutils.{module}"
        assert getattr(nbutils, name) is getattr(home, name), \
            f"nbutils.{name} is not nbutils.{module}'s: two modules share the name"


def test_package_table_names_nothing_else():
    import nbutils

    known = {name for module in MODULES for name in exported(module)} | set(MODULES)
    assert set(nbutils.__all__) <= known | {"__version__"}


def test_editors_read_the_same_names():
    """What stands under TYPE_CHECKING is what the table has: an editor completes what the package gives."""
    import nbutils

    found = {}
    for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and "nbutils" in (node.module or ""):
            found |= {alias.name: node.module.removeprefix("nbutils.") for alias in node.names}
    assert found == nbutils._HOME


def own_parameters(function):
    a = function.args
    names = [x.arg for x in a.posonlyargs + a.args + a.kwonlyargs if x.arg not in ("self", "cls")]
    return names + [x.arg for x in (a.vararg, a.kwarg) if x]


def decorators(node):
    for d in node.decorator_list:
        d = d.func if isinstance(d, ast.Call) else d
        yield d.attr if isinstance(d, ast.Attribute) else d.id


def needs_sections(node):
    """Whether its docstring must have numpy sections: one argument can be told in a sentence."""
    if "stepper" in decorators(node):
        return False  # (p, g, state, *, hyper-parameters): one convention for all
    if isinstance(node, ast.ClassDef) and "Error" in node.name:
        return False  # raised here, not by the reader
    if isinstance(node, ast.ClassDef):
        init = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        return bool(init) and len(own_parameters(init[0])) > 1
    return len(own_parameters(node)) > 1


def definitions(module):
    public = exported(module)
    for node in ast.parse(source(module)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in public:
            yield node


@pytest.mark.parametrize("module", MODULES)
def test_public_docstrings(module):
    assert ast.get_docstring(ast.parse(source(module))), f"nbutils.{module} has no docstring"
    wrong = []
    for node in definitions(module):
        text = ast.get_docstring(node) or ""
        sections = re.findall(rf"^({'|'.join(SECTIONS)})\n-{{4,}}$", text, re.M)
        summary = text.split("\n\n")[0].strip()
        if not text:
            wrong.append(f"{node.name} has no docstring")
        elif not summary.endswith((".", "?", "!", ":")):
            wrong.append(f"{node.name}'s docstring does not begin with a sentence")
        elif needs_sections(node) and not sections:
            wrong.append(f"{node.name} takes several arguments; its docstring has no numpy section")
        for method in node.body if isinstance(node, ast.ClassDef) else []:
            if isinstance(method, ast.FunctionDef) and not method.name.startswith("_") \
                    and not ast.get_docstring(method):
                hook = method.name.startswith(("before_", "after_"))  # the Learner says when each is called
                if not hook and not inherited(module, node.name, method.name):
                    wrong.append(f"{node.name}.{method.name} has no docstring")
    if wrong:
        pytest.fail(f"nbutils.{module}: " + "; ".join(wrong), pytrace=False)


def inherited(module, cls, method):
    """Whether a base class has the method, and so says what it is for."""
    bases = getattr(importlib.import_module(f"nbutils.{module}"), cls).__mro__[1:]
    return any(hasattr(base, method) for base in bases)


@pytest.mark.parametrize("module", MODULES)
def test_documented_parameters_exist(module):
    wrong = []
    for node in definitions(module):
        text = ast.get_docstring(node) or ""
        match = re.search(r"^Parameters\n-{4,}\n(.*?)(?=^\S[^\n]*\n-{4,}$|\Z)", text, re.M | re.S)
        if not match:
            continue
        functions = [node] if isinstance(node, ast.FunctionDef) else [
            n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        if not functions:
            continue
        real = own_parameters(functions[0])
        for line in re.findall(r"^(\S.*)$", match.group(1), re.M):
            for name in line.split(" : ")[0].split(","):
                if name.strip().lstrip("*") not in real and name.strip() != "...":
                    wrong.append(f"{node.name} documents {name.strip()!r}")
    if wrong:
        pytest.fail(f"nbutils.{module}: {'; '.join(wrong)}, which it does not take", pytrace=False)
