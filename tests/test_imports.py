"""Who may import whom, and that our folder kernels/ and a package of the same name keep out of each other's way."""
import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "projector": set(), "kernels": set(), "backbones": set(), "data": set(), "runtime": set(),
    "features": {"data", "runtime"},
    "model": {"projector", "kernels", "data", "llava"},                                  # llava for its command line alone
    "llava": {"model", "data", "runtime", "templates"}, "templates": {"data", "runtime"},
    "toy": {"data", "runtime", "backbones"}, "backbones/train": {"toy", "runtime"},      # behind toy.py --train-backbones alone
    "cost": {"data", "runtime", "model", "kernels"},
    "pretrain": {"data", "runtime", "model", "features", "projector", "kernels", "toy", "cost"},
    "sft": {"data", "runtime", "model", "features", "toy", "cost"},
    "probe": {"data", "runtime", "model", "llava", "toy"}, "eval": {"data", "runtime", "model", "toy"},
    "large_json": {"data"}, "formats": {"data", "large_json"}, "detect": {"data"},
    "annotate": {"data", "runtime", "formats", "large_json", "detect", "model", "projector"},
    "results": set(), "reproduce": {"data", "runtime", "results"},
    "kernels/bench": {"data", "runtime", "model", "projector"},                      # scripts, not the library; so are the next two
    "kernels/measure": {"data", "runtime"}, "kernels/gpu": {"data", "runtime"},
}


def project_imports(path):
    """Project modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names & {name.split("/")[0] for name in MAY_IMPORT}


def test_imports_form_the_agreed_graph():
    files = [*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("backbones/*.py")]
    assert {f.stem for f in ROOT.glob("*.py")} == {name for name in MAY_IMPORT if name not in ("kernels", "backbones") and "/" not in name}
    for file in files:
        name = str(file.relative_to(ROOT).with_suffix(""))
        name = name if name in MAY_IMPORT else name.split("/")[0]
        assert project_imports(file) - {name.split("/")[0]} <= MAY_IMPORT[name], file


def test_transformers_and_our_kernels_both_import(tmp_path):
    """A package named kernels is on the path, behind ours: ours wins, and transformers loads CLIP all the same."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise ImportError('the other package')")
    code = (f"import sys; sys.path.append({str(tmp_path)!r})\n"
            "import kernels.patch_loss, transformers\n"
            "from transformers import CLIPVisionModel, LlamaForCausalLM\n"
            "print(kernels.__file__)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "kernels" / "__init__.py"
