"""The rules of the house: who may import whom, what `import scalesnn` loads, what a module says of itself."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = sorted((ROOT / "scalesnn").rglob("*.py"))
MODULES = [*LIBRARY, *sorted((ROOT / "launch").rglob("*.py"))]
# A module may import those of its own level and of lower ones. What is not named here stands with cli.
LEVELS = {
    **dict.fromkeys(["base", "configs", "movers", "threads"], 0),
    **dict.fromkeys(["kernels", "surrogate"], 1),
    **dict.fromkeys(["layer", "neuron", "functional"], 2),
    **dict.fromkeys(["tracking", "parallel", "memory", "data", "model"], 3),
    "training": 4,
}
TOP = 5
STRANGERS = {"tracking", "parallel", "memory", "data"}  # do not import each other
TOP_OF_THE_HOUSE = {"scalesnn.model.train_classify", "scalesnn.model.train_imagenet_example"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Every scalesnn or launch module that the file imports, inside functions too; not for types alone."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        waiting.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = path.relative_to(ROOT).parts[: -node.level]
                base = ".".join([*package, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("scalesnn", "launch")}


def area(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "launch" or len(parts) == 1:
        return parts[0]
    return parts[1]


def level(name: str) -> int:
    if name.startswith("launch"):
        return TOP + 1
    if any(name == top or name.startswith(f"{top}.") for top in TOP_OF_THE_HOUSE):
        return TOP
    return LEVELS.get(area(name), TOP)


def offences(name: str, imported: str) -> str | None:
    """What is wrong with the module ``name`` importing ``imported``, or None."""
    if imported in ("scalesnn", "scalesnn.__version__"):
        return None
    if level(imported) > level(name):
        return f"{name} imports {imported}, which stands above it"
    if area(name) != area(imported) and {area(name), area(imported)} <= STRANGERS:
        return f"{name} imports {imported}: {area(name)} and {area(imported)} do not know each other"
    if area(name) == "model" and level(name) == LEVELS["model"] and area(imported) in STRANGERS:
        return f"{name} imports {imported}: models know nothing of it"
    if area(name) == "kernels" and area(imported) not in ("kernels", "base"):
        return f"{name} imports {imported}: kernels know tensors, not modules"
    return None


@pytest.mark.parametrize(
    ("name", "imported"),
    [
        ("scalesnn.neuron", "scalesnn.training.loop"),
        ("scalesnn.data.dali", "scalesnn.parallel.topology"),
        ("scalesnn.kernels.ops", "scalesnn.surrogate"),
        ("scalesnn.model.resnet", "scalesnn.model.train_classify"),
        ("scalesnn.training.loop", "scalesnn.cli"),
        ("scalesnn.training.loop", "scalesnn.evaluation.trainer"),
        ("scalesnn.tracking.energy", "scalesnn.exchange.nir_graph"),
        ("scalesnn.cli", "launch.train"),
    ],
)
def test_the_rule_sees_offences(name, imported):
    assert offences(name, imported)


@pytest.mark.parametrize(
    ("name", "imported"),
    [
        ("scalesnn.layer", "scalesnn.functional.set_step_mode"),
        ("scalesnn.training.loop", "scalesnn.data.open_data"),
        ("scalesnn.model.train_classify", "scalesnn.training.loop"),
        ("scalesnn.tracking.spikes", "scalesnn.neuron.BaseNode"),
        ("launch.train", "scalesnn.model.train_classify.Trainer"),
    ],
)
def test_the_rule_lets_the_rest_pass(name, imported):
    assert offences(name, imported) is None


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_down_the_house(path):
    found = [offences(module_name(path), imported) for imported in sorted(imports(path))]
    assert [offence for offence in found if offence] == []


@pytest.mark.parametrize("path", [p for p in LIBRARY if not p.stem.startswith("_")], ids=module_name)
def test_public_modules_name_and_describe_what_they_offer(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the module has no docstring"
    targets = [t for n in tree.body if isinstance(n, ast.Assign) for t in n.targets]
    targets += [n.target for n in tree.body if isinstance(n, ast.AnnAssign)]
    assert any(isinstance(t, ast.Name) and t.id == "__all__" for t in targets), "the module has no __all__"
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [n for n in tree.body if isinstance(n, definitions) and not n.name.startswith("_")]
    assert [n.name for n in public if not ast.get_docstring(n)] == []


HEAVY = ["deepspeed", "nvidia.dali", "cupy", "wandb"]


def loaded_by(statement: str, modules: list[str]) -> list[str]:
    """Which of ``modules`` a fresh interpreter has loaded after ``statement``."""
    code = f"import sys\n{statement}\nprint([m for m in {modules!r} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    return ast.literal_eval(result.stdout)


def test_import_scalesnn_is_light():
    assert loaded_by("import scalesnn", [*HEAVY, "torch", "torchvision"]) == []


def test_library_and_models_load_none_of_the_heavy_dependencies():
    statement = (
        "from scalesnn import base, functional, layer, neuron, surrogate\n"
        "from scalesnn.model import ms_resnet, sew_resnet, spiking_resnet"
    )
    assert loaded_by(statement, [*HEAVY, "scalesnn.training", "scalesnn.model.train_classify"]) == []


def test_submodules_are_there_after_import_scalesnn():
    statement = "import scalesnn\nscalesnn.neuron.IFNode, scalesnn.model.spiking_resnet.spiking_resnet18"
    assert loaded_by(statement, ["scalesnn.neuron"]) == ["scalesnn.neuron"]


def text_files_without_encoding(path: Path) -> list[int]:
    """The lines of calls that open a text file in the encoding of whatever locale the process has."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or any(k.arg in ("encoding", None) for k in node.keywords):
            continue
        function = node.func
        name = getattr(function, "attr", None) or getattr(function, "id", "")
        owner = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ""
        modes = [
            a.value for a in (*node.args, *(k.value for k in node.keywords)) if isinstance(a, ast.Constant)
        ]
        is_binary = any(isinstance(mode, str) and re.fullmatch("[rwax+]*b[rwax+]*", mode) for mode in modes)
        if name in ("read_text", "write_text") or (
            name == "open" and owner not in ("os", "Image", "tarfile") and not is_binary
        ):
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_text_files_are_utf8_in_every_locale(path):
    assert not text_files_without_encoding(path)


def test_the_entry_loads_what_a_run_may_never_use_only_when_it_is_used():
    statement = (
        "from scalesnn.model.train_imagenet_example import SResNetTrainer\n"
        "SResNetTrainer().get_args_parser().parse_args([])"
    )
    seldom = ["tensorboard", "matplotlib", "pandas", "scipy", "pyarrow", "scalesnn.cli"]
    assert loaded_by(statement, [*HEAVY, *seldom]) == []
