"""What README.md and docs/ say about files, options and names is there."""

import argparse
import importlib
import re
import unicodedata
from pathlib import Path

import pytest
import yaml

from lirpa_megatron import __version__

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "docker" / "README.md", *PAGES]
OTHERS = {"--nproc-per-node", "--no-deps"}  # options of torchrun and of pip
FOLDERS = "lirpa_megatron|examples|benchmarks|tests|docker|tools|findings"


def name(path):
    return path.relative_to(ROOT).as_posix()


def prose(path):
    """A document without its scripts and commands."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.sub(r"^    .*$", "", text, flags=re.MULTILINE)


def anchors(path):
    """What a link to a heading of the page may say: letters of ASCII, hyphens, as mkdocs does."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE):
        plain = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
        found.add(re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower()))
    return found


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 7000


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_lead_to_a_file_and_to_a_heading_in_it(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if "://" in target:
            continue
        file, _, heading = target.partition("#")
        aim = (path.parent / file).resolve() if file else path
        assert aim.is_file(), target
        # A page of the site cannot link to what is not on it.
        assert path not in PAGES or DOCS in aim.parents, target
        if heading:
            assert heading in anchors(aim), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_files_that_are_named_exist(path):
    text = path.read_text(encoding="utf-8")
    for named in re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", text):
        assert (ROOT / named).exists(), named


def test_every_page_is_in_the_navigation():
    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        children = entry.values() if isinstance(entry, dict) else entry
        return [page for child in children for page in pages(child)]

    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(pages(navigation)) == [path.relative_to(DOCS).as_posix() for path in PAGES]


def options():
    """Every option of every command."""
    from lirpa_megatron.cli.options import make_parser

    parsers = [make_parser(__version__)]
    for parser in parsers:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    return {option for parser in parsers for option in parser._option_string_actions}


@pytest.mark.parametrize("page", ["command-line", "checkpoints", "library", "limits"])
def test_options_of_the_command_line_that_are_named_exist(page):
    named = re.findall(r"(?<![\w-])--[a-z][a-z-]+", (DOCS / f"{page}.md").read_text("utf-8"))
    assert set(named) <= options() | OTHERS


def test_options_of_bounds_that_are_named_exist():
    from lirpa_megatron.crown.options import OwnOptions

    table = (DOCS / "library.md").read_text("utf-8").partition("## Memory and communication")[2]
    named = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert len(named) >= 8 and set(named) <= set(OwnOptions.__dataclass_fields__)


def test_names_in_the_reference_exist():
    named = re.findall(r"^::: (\S+)$", "\n".join(p.read_text("utf-8") for p in PAGES), re.MULTILINE)
    assert named
    for path in named:
        parts, found = path.split("."), None
        for end in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:end]))
            except ModuleNotFoundError:
                continue
            for part in parts[end:]:
                found = getattr(found, part)
            break
        assert found is not None, path


def test_fields_of_results_that_are_named_are_written():
    sources = "".join(p.read_text("utf-8") for p in (ROOT / "lirpa_megatron").rglob("*.py"))
    page = (DOCS / "command-line.md").read_text("utf-8").partition("Every line has these")[2]
    table = page.partition("A summary is printed")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    named = re.findall(r"`(\w+)`", " ".join(rows))
    assert len(named) > 15
    for field in named:
        assert f'"{field}"' in sources, field


def test_the_drawing_of_the_package_is_true():
    """All packages are in it, and none imports what is drawn above it or to its left."""
    drawing = (DOCS / "figures" / "package.svg").read_text("utf-8")
    boxes = re.findall(r'<text x="(\d+)" y="(\d+)"[^>]*"monospace">(\w+)</text>', drawing)
    place = {name: (int(y), int(x)) for x, y, name in boxes}
    package = ROOT / "lirpa_megatron"
    rooms = {path.stem for path in package.iterdir() if (path / "__init__.py").is_file()}
    assert set(place) == rooms | {"bounded_module"}
    for room in place:
        for path in (*(package / room).rglob("*.py"), *package.glob(f"{room}.py")):
            text = path.read_text("utf-8").partition("if TYPE_CHECKING")[0]
            for other in re.findall(r"^from lirpa_megatron\.(\w+)", text, re.MULTILINE):
                assert other not in place or place[other] >= place[room], f"{path} imports {other}"
