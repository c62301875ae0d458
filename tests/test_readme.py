"""README and docs are true: every flag is in the table, every path, target and recipe exists."""

import re
from pathlib import Path

import pytest
import yaml

from scalesnn.model.train_imagenet_example import SResNetTrainer

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def parser():
    return SResNetTrainer().get_args_parser()


def test_the_table_of_flags_is_the_parser_s(parser):
    rows = dict(re.findall(r"^\| ([\w ]+) \| ((?:`--[\w-]+` ?)+) \|$", README, flags=re.M))
    groups = {
        group.title: {action.option_strings[-1] for action in group._group_actions if action.option_strings}
        for group in parser._action_groups
    }
    for title, flags in groups.items():
        flags -= {"--help", "--print_config", "--config"}
        if flags:
            assert set(re.findall(r"--[\w-]+", rows[title])) == flags, title


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_paths_and_links_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for path in re.findall(
        r"(?<![\w./-])((?:configs|launch|docs|benchmarks|tests|scalesnn)/[\w./-]*\w)", text
    ):
        found = (ROOT / path).exists() or list(ROOT.glob(path + "*"))
        assert found, f"{page.name} names {path}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make ([a-z-]+)", page.read_text())):
        assert re.search(rf"^{target}:", makefile, flags=re.M), f"{page.name} names `make {target}`"


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs/recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_recipes_are_accepted_and_set_what_they_say(parser, recipe):
    args = parser.parse_args(["--config", str(recipe)])
    for key, value in yaml.safe_load(recipe.read_text()).items():
        assert getattr(args, key) == value
