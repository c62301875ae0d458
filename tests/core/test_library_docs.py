"""The code in docs/library.md and docs/models.md runs, and the worked example gives SpikingJelly's losses."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PEER = "from spikingjelly.activation_based import"


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(("page", "at_least"), [("library.md", 5), ("models.md", 1)])
def test_the_pages_code_runs(page, at_least):
    code = blocks(page)
    assert len(code) >= at_least
    names: dict = {}
    for block in code:
        exec(compile(block, page, "exec"), names)


def test_the_worked_example_moves_over_by_changing_imports():
    example = blocks("library.md")[0]
    assert example.count("from scalesnn import") == 1
    ours: dict = {}
    theirs: dict = {}
    exec(example, ours)
    exec(example.replace("from scalesnn import", PEER), theirs)
    assert theirs["neuron"].__name__.startswith("spikingjelly")
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)


def test_every_public_name_stands_in_the_page():
    from scalesnn import functional, layer, neuron, surrogate

    text = (DOCS / "library.md").read_text()
    hidden = {"SurrogateFunctionBase", "heaviside"}
    for module in (functional, layer, neuron, surrogate):
        assert [name for name in module.__all__ if name not in hidden and f"`{name}`" not in text] == []
