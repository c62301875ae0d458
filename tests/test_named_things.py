"""Every flag, file, command, module and make target that docs, docstrings and help texts name exists."""

import argparse
import ast
import importlib.util
import re
from pathlib import Path

import pytest

from scalesnn.cli import command_parser
from scalesnn.evaluation import energy, evaluate, predict
from scalesnn.model.train_imagenet_example import SResNetTrainer

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = [*sorted((ROOT / "scalesnn").rglob("*.py")), ROOT / "launch/train.py"]
SCRIPTS = [*sorted((ROOT / "launch").rglob("*.s*")), *sorted((ROOT / "configs").rglob("*.yaml"))]
SCRIPTS += sorted((ROOT / "launch").rglob("*.yaml"))
FLAG = re.compile(r"(?<![\w-])--[A-Za-z][\w-]*")
# of torchrun, DeepSpeed's launcher, Slurm, pip, compilers and other tools that texts speak of
OTHERS = """
--array --bind --container-image --container-mounts --cpus-per-task --distribution --exclusive --full
--gpus-per-node --kill-on-bad-exit --logdir --nnodes --nproc-per-node --ntasks --ntasks-per-node --nv
--oneliner --open-mode --pty --rdzv-backend --rdzv-conf --rdzv-endpoint --rdzv-id --requeue --shm-size
--signal --wait
"""


def own_flags(parser: argparse.ArgumentParser) -> set[str]:
    """The flags of a parser and of the commands below it."""
    found = {option for action in parser._actions for option in action.option_strings}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= set().union(*map(own_flags, action.choices.values()))
    return found


def commands_below(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    """``("data", "check")`` … of a parser."""
    found = set()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                found |= {(*words, name)} | commands_below(below, (*words, name))
    return found


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The training's, the command's, and those of commands that take a training's flags too."""
    return {
        "the training": SResNetTrainer().get_args_parser(),
        "scalesnn": command_parser(),
        "evaluate": evaluate.Evaluate().get_args_parser(),
        "energy": energy.Energy().get_args_parser(),
        "predict": predict.parser_of_command(),
    }


@pytest.fixture(scope="module")
def flags():
    known = set(OTHERS.split()).union(*map(own_flags, parsers().values()))
    for script in [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("configs/*.py")]:
        known |= set(re.findall(r"add(?:_argument)?\(\s*\"(--[\w-]+)\"", script.read_text()))
    return known


def help_texts(parser: argparse.ArgumentParser) -> list[str]:
    texts = [action.help or "" for action in parser._actions if action.help != argparse.SUPPRESS]
    texts += [parser.description or "", parser.epilog or ""]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            texts += [text for below in action.choices.values() for text in help_texts(below)]
    return texts


def docstrings(path: Path) -> str:
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    tree = ast.parse(path.read_text())
    return "\n".join(ast.get_docstring(n) or "" for n in ast.walk(tree) if isinstance(n, nodes))


def texts() -> dict[str, str]:
    """Everything that a user reads, by where it stands."""
    found = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
    found |= {str(path.relative_to(ROOT)): docstrings(path) for path in MODULES}
    found |= {str(path.relative_to(ROOT)): path.read_text() for path in SCRIPTS if path.is_file()}
    found |= {f"help of {name}": "\n".join(help_texts(parser)) for name, parser in parsers().items()}
    return {place: text for place, text in found.items() if text.strip()}


TEXTS = texts()


def unknown_flags(text: str, known: set[str]) -> set[str]:
    """Flags that nobody has; of one whose end is cut off (``--wandb-…``) the beginning counts."""
    named = set(FLAG.findall(text))
    return {f for f in named - known if not (f.endswith("-") and any(k.startswith(f) for k in known))}


def code_of(text: str) -> list[str]:
    """What stands in backticks or is indented as code, line by line."""
    spans = re.findall(r"`+([^`\n]+)`+", text)
    return spans + [line.strip() for line in text.splitlines() if line.startswith("    ")]


def unknown_commands(text: str, known: set[tuple[str, ...]]) -> set[str]:
    found = set()
    for code in code_of(text):
        if match := re.match(r"(?:\S*/)?scalesnn ([a-z]\w*)(?: ([a-z]\w*))?", code):
            words = tuple(filter(None, match.groups()))
            if words[:1] not in known or (words[0] == "data" and len(words) > 1 and words not in known):
                found.add(" ".join(words))
    return found


def unknown_modules(text: str) -> set[str]:
    names = set(re.findall(r"python -m (scalesnn[\w.]*)", text))
    return {name for name in names if importlib.util.find_spec(name.rstrip(".")) is None}


def unknown_files(text: str) -> set[str]:
    pattern = r"(?<![\w./-])((?:configs|launch|docs|benchmarks|tests|tools|requirements|scalesnn)/[\w./-]*\w)"
    return {p for p in re.findall(pattern, text) if not (ROOT / p).exists() and not list(ROOT.glob(p + "*"))}


def unknown_targets(text: str) -> set[str]:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    return {name for code in code_of(text) for name in re.findall(r"^make ([a-z-]+)", code)} - targets


@pytest.mark.parametrize("place", TEXTS)
def test_what_is_named_exists(place, flags):
    text = TEXTS[place]
    assert unknown_flags(text, flags) == set()
    assert unknown_commands(text, commands_below(command_parser())) == set()
    assert unknown_modules(text) == set()
    assert unknown_files(text) == set()
    assert unknown_targets(text) == set()


def test_the_check_sees_what_does_not_exist(flags):
    assert unknown_flags("see `--memory`, `--wandb-…` and --T", flags) == {"--memory"}
    assert unknown_commands("`scalesnn paln --T 4`, `scalesnn data chek DIR`", {("plan",), ("data",)}) == {
        "paln",
        "data chek",
    }
    assert unknown_modules("python -m scalesnn.clli doctor, python -m scalesnn.cli") == {"scalesnn.clli"}
    assert unknown_files("see docs/memory.md and docs/memroy.md") == {"docs/memroy.md"}
    assert unknown_targets("`make trian`, `make train`") == {"trian"}
