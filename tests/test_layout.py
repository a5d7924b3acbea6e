"""The house: who may import whom, what stands at the root, what --help shows, our kernels/."""

import ast
import graphlib
import importlib
import io
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

import runtime

ROOT = Path(__file__).resolve().parent.parent
STAGES = {"pretrain", "sft", "probe", "eval", "annotate", "reproduce"}
DRAWERS = {"annotations", "hf", "toy", "extras"}
CORE = {"projector", "labels", "data", "model", "runtime", "kernels", "backbones"}
MAY_IMPORT = {  # at the top of a file; each the ones before it, but for those it does not need
    "runtime": set(),
    "projector": set(),
    "kernels/patch_loss": set(),
    "labels": {"runtime"},
    "backbones/loading": {"runtime", "labels"},
    "data": {"runtime", "labels"},
    "model": {"runtime", "labels", "data", "projector", "kernels", "backbones"},
}


def imports(path):
    """Project modules that a file imports: (at its top, inside its functions)."""
    tree, found = ast.parse(path.read_text()), (set(), set())
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        found[id(node) not in top].update(name.split(".")[0] for name in names)
    return tuple(names & (STAGES | DRAWERS | CORE) for names in found)


def sources():
    """{name: path} of every Python file but the tests."""
    folders = ["", "kernels", "backbones", *sorted(DRAWERS), "docs"]
    files = [file for folder in folders for file in sorted((ROOT / folder).glob("*.py"))]
    return {str(file.relative_to(ROOT).with_suffix("")): file for file in files}


def test_the_root_holds_the_method_and_nothing_else():
    assert {file.stem for file in ROOT.glob("*.py")} == STAGES | CORE - {"kernels", "backbones"}


@pytest.mark.parametrize("name", sources())
def test_imports_form_the_agreed_graph(name):
    """Core files import those below them. Stages import the core, and drawers inside functions.
    Drawers import the core and themselves. Nobody imports a stage."""
    path = sources()[name]
    top, inside = imports(path)
    folder = name.split("/")[0]
    assert not (top | inside) & STAGES, "nobody imports a stage but its tests"
    if name in MAY_IMPORT:
        assert top <= MAY_IMPORT[name] and not inside
    elif name in STAGES:
        assert top <= CORE and inside <= CORE | DRAWERS
    elif folder in DRAWERS:
        assert top | inside <= CORE | {folder}
    else:  # scripts of kernels/ and docs/
        assert top | inside <= CORE | (DRAWERS if folder == "docs" else set())


def test_no_files_import_each_other_in_a_circle():
    """Inside the drawers too, and inside functions."""
    files, needs = sources(), {}
    for name, path in files.items():
        needs[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            found = [alias.name for alias in getattr(node, "names", [])]
            if isinstance(node, ast.ImportFrom):
                found = [node.module, *(f"{node.module}.{name}" for name in found)]
            elif not isinstance(node, ast.Import):
                continue
            needs[name] |= {module.replace(".", "/") for module in found} & files.keys() - {name}
    assert needs["toy/vision"] == {"toy/language", "toy/records", "toy/train", "toy/world"}
    graphlib.TopologicalSorter(needs).prepare()


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_help_is_a_page_of_groups(stage):
    """At most eight flags come first, and each flag has one line."""
    module, text = importlib.import_module(stage), io.StringIO()
    with redirect_stdout(text), pytest.raises(SystemExit) as stopped:
        runtime.parse(module.Args, module.__doc__, ["--help"])
    assert stopped.value.code == 0
    groups = text.getvalue().split("\nmain:\n")[1].split("@FILE")[0].split("\n\n")
    assert len(groups[0].splitlines()) <= 8
    for group in filter(str.strip, groups):
        lines = [line for line in group.splitlines() if line and not line.endswith(":")]
        wrapped = [line for line in lines if not line.startswith("  -") and line[2:3] == " "]
        assert not wrapped, "a flag's help goes over its line"
        assert max(map(len, lines)) <= 112


def test_transformers_and_our_kernels_both_import(tmp_path):
    """Behind ours on the path is a package named kernels: ours wins, and CLIP still loads."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise ImportError('the other package')")
    code = (
        f"import sys; sys.path.append({str(tmp_path)!r})\n"
        "import kernels.patch_loss, transformers\n"
        "from transformers import CLIPVisionModel, LlamaForCausalLM\n"
        "print(kernels.__file__)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "kernels" / "__init__.py"
