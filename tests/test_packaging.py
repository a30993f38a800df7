"""What a program that installs or imports lirpa_megatron may rely on."""

import ast
import importlib.util
import os
import pkgutil
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from forks import launch

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lirpa_megatron"
DIGITS = ROOT / "examples" / "digits"
IMPORT = "from lirpa_megatron import BoundedModule"
NOT_OURS = {".git", ".venv", "build", "dist", "__pycache__", ".hypothesis"}
NOT_OURS |= {".pytest_cache", ".ruff_cache", "lirpa_megatron.egg-info", "shared"}


def python(code, *arguments, path=()):
    """Runs `code` in a fresh interpreter that sees no GPU; stdout and stderr are text."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, path), str(ROOT)])
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def last_line(process):
    return (process.stderr.strip() or process.stdout.strip()).splitlines()[-1]


STATE = """
import logging, random, signal, sys, warnings
import numpy, torch, torch.distributed
import megatron.core

def state():
    return {
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "grad mode": torch.is_grad_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "float32 matmul": torch.get_float32_matmul_precision(),
        "torch random": torch.get_rng_state().sum().item(),
        "numpy random": str(numpy.random.get_state()),
        "python random": hash(random.getstate()),
        "numpy errors": numpy.geterr(),
        "numpy print": str(numpy.get_printoptions()),
        "cuda device": torch.cuda.current_device,
        "warning filters": str(warnings.filters),
        "logging": (logging.root.level, list(logging.root.handlers)),
        "exception hook": sys.excepthook,
        "interrupt": signal.getsignal(signal.SIGINT),
        "process group": torch.distributed.is_initialized(),
        "torch._six": "torch._six" in sys.modules or hasattr(torch, "_six"),
        "arraysetops": "numpy.lib.arraysetops" in sys.modules,
        "Node.__getitem__": hasattr(torch._C.Node, "__getitem__"),
        "profiling executor": torch._C._jit_set_profiling_executor(True),
    }

before = state()
from lirpa_megatron import BoundedModule
after = state()
print("changed:", [name for name in before if before[name] != after[name]])
print("group:", torch.distributed.is_initialized())
print("cuda:", torch.cuda.is_initialized())
"""


def test_importing_changes_and_prints_nothing_and_needs_no_optional_package():
    names = ["apex", "transformer_engine", "flash_attn"]  # None in sys.modules: ImportError
    process = python(f"import sys; sys.modules.update(dict.fromkeys({names})); {STATE}")
    # Megatron-core 0.15 itself logs this of a function of its mixtures of experts.
    said = [x for x in process.stderr.splitlines() if "has reached end of life" not in x]
    assert (process.returncode, said) == (0, [])
    assert process.stdout.splitlines() == ["changed: []", "group: False", "cuda: False"]


@pytest.mark.parametrize(
    "missing", [pytest.param("auto_LiRPA", marks=pytest.mark.slow), "megatron.core", "torch"]
)
def test_a_missing_dependency_is_one_line_that_says_what_to_run(missing):
    top = missing.split(".")[0]
    process = python(f"import sys; sys.modules[{top!r}] = None; {IMPORT}")
    line = last_line(process)
    assert process.returncode != 0
    assert line.startswith("ImportError: ")
    assert missing.split(".")[0].lower() in line.lower()
    assert "make setup" in line


def test_an_unsupported_auto_lirpa_is_one_line_with_both_versions(tmp_path):
    fake = tmp_path / "auto_LiRPA"
    fake.mkdir()
    (fake / "__init__.py").write_text("__version__ = '0.5'\n")
    (fake / "bound_ops.py").write_text("")
    line = last_line(python(IMPORT, path=[tmp_path]))
    assert "auto_LiRPA 0.5 is not supported" in line
    assert "0.3" in line and "0.7.1" in line and "make setup" in line


def distribution(folder, name, version):
    """A distribution's notes, as pip leaves them."""
    notes = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    notes.mkdir()
    (notes / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize("missing, version", [("triton", "0.18.2"), ("psutil", "0.16.1")])
def test_what_megatron_needs_and_does_not_declare_is_one_line(tmp_path, missing, version):
    """The releases themselves end in a traceback, or hang when a checkpoint is written."""
    distribution(tmp_path, "megatron-core", version)
    code = f"import sys; sys.modules[{missing!r}] = None\n"
    code += "from lirpa_megatron.compat import requirements\n"
    code += "try: requirements.check()\nexcept ImportError as error: print(error)"
    line = last_line(python(code, path=[tmp_path]))
    assert line.startswith(f"{missing} is not installed, and megatron-core")
    assert f"`pip install {missing}`" in line


@pytest.mark.parametrize("release", ["0.13.1", "0.20.0", "0.19.2-or-so"])
def test_an_environment_of_an_unsupported_release_is_refused_in_one_line(release):
    process = subprocess.run(
        [ROOT / "tools" / "setup_megatron.sh", release], capture_output=True, text=True,
        env={**os.environ, "VENV": sys.prefix}, timeout=60,
    )
    said = f"MEGATRON={release}: supported are releases >=0.14,<0.20\n"
    assert (process.returncode, process.stdout, process.stderr) == (2, "", said)


def test_a_package_that_takes_megatrons_name_is_one_line(tmp_path):
    fake = tmp_path / "megatron"
    fake.mkdir()
    (fake / "__init__.py").write_text("raise SystemExit('it was imported')\n")
    line = last_line(python(IMPORT, path=[tmp_path]))
    assert "is not NVIDIA's (it has no megatron.core)" in line
    assert "pip uninstall megatron" in line and str(fake) in line


def test_the_command_line_reports_a_missing_dependency_without_a_traceback():
    process = python(
        "import runpy, sys\n"
        "sys.modules['auto_LiRPA'] = None\n"
        "sys.argv[0] = 'lirpa-megatron'\n"
        "runpy.run_module('lirpa_megatron', run_name='__main__', alter_sys=False)",
        *("verify", "--onnx", str(DIGITS / "digits.onnx")),
        *("--instances", str(DIGITS / "instances.csv")),
    )
    assert process.returncode == 2
    assert "Traceback" not in process.stderr
    assert "auto_LiRPA is not installed" in last_line(process)


def setup_arguments():
    """The keyword arguments that setup.py passes to setuptools."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    (call,) = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and _name(n.func) == "setup")
    literal = {}
    for keyword in call.keywords:
        try:
            literal[keyword.arg] = ast.literal_eval(keyword.value)
        except ValueError:  # computed, such as packages=find_packages()
            continue
    return literal


def _name(node):
    return getattr(node, "id", getattr(node, "attr", None))


def test_the_console_script_exists():
    (script,) = setup_arguments()["entry_points"]["console_scripts"]
    name, _, target = script.partition("=")
    assert name == "lirpa-megatron"
    assert callable(pkgutil.resolve_name(target))


def test_every_imported_package_is_a_declared_dependency():
    requirement = re.compile(r"[A-Za-z0-9_-]+")
    declared = {requirement.match(r)[0] for r in setup_arguments()["install_requires"]}
    module_of = {"megatron-core": "megatron", "protobuf": "google", "pyyaml": "yaml"}
    known = {module_of.get(name, name) for name in declared} | set(sys.stdlib_module_names)
    known |= {"lirpa_megatron", "auto_LiRPA"}
    # each asked for where it is used
    optional = {"apex", "transformer_engine", "tokenizers", "vnnlib"}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            unknown = {name.split(".")[0] for name in names} - known - optional
            assert not unknown, f"{path.relative_to(ROOT)} imports {unknown}"


def test_the_files_of_the_project_name_no_path_of_a_machine():
    homes = re.compile(r"(?<![\w.~-])/(?:home|root|Users)/\w")
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        if NOT_OURS & set(parts) or parts[0].startswith(".venv") or not path.is_file():
            continue
        text = path.read_bytes().decode("utf-8", "ignore")
        assert f"{ROOT}/" not in text and not homes.search(text), path.relative_to(ROOT)


EXAMPLES = {  # document and number of the script in it -> how many bounds it prints
    "README": ("README.md", 0, 1),
    "library": ("docs/library.md", 0, 6),
    "GPT": ("docs/library.md", 1, 1),
    "pipeline": ("docs/library.md", 2, 4),
}


def scripts(document):
    """The scripts that a document shows: its blocks marked as python."""
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


def test_every_script_in_the_documents_is_run_here():
    shown = {
        (path.relative_to(ROOT).as_posix(), number)
        for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
        if path.name != "extending.md"  # test_extending.py
        for number in range(len(scripts(path)))
    }
    assert shown == {(document, number) for document, number, _ in EXAMPLES.values()}


def as_the_readme_says(size, script):
    """A script under torchrun; under python as below."""
    if size == 1:
        return on_ranks(size, script)
    launcher = f"-m torch.distributed.run --standalone --nproc-per-node {size}".split()
    return subprocess.run(
        [sys.executable, *launcher, str(script)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, timeout=300,
    )


def on_ranks(size, script):
    """A script as the program of processes that have the libraries already."""
    return launch(size, runpy.run_path, str(script), None, "__main__")


@pytest.mark.parametrize("example, run", [
    ("README", as_the_readme_says), ("library", on_ranks), ("pipeline", on_ranks),
    pytest.param("GPT", as_the_readme_says, marks=pytest.mark.slow),
])
def test_the_documents_examples_print_the_same_bounds_on_one_process_and_on_two(
    example, run, tmp_path, monkeypatch
):
    document, number, count = EXAMPLES[example]
    shown = scripts(document)[number]
    assert len(shown.splitlines()) <= 20
    script = tmp_path / "example.py"
    script.write_text(shown)
    monkeypatch.chdir(ROOT)
    bounds = []
    for size in (1, 2):
        process = run(size, script)
        assert process.returncode == 0, process.stderr
        bounds.append([float(number) for number in re.findall(r"-?\d+\.\d+", process.stdout)])
    assert len(bounds[0]) == count
    assert bounds[0] == pytest.approx(bounds[1], abs=1e-4)  # four digits are printed, or more


@pytest.fixture(scope="module")
def train_digits():
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("train_digits", DIGITS / "train_digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_demos_properties_are_those_of_the_training_script(train_digits, tmp_path):
    _, _, x, y = train_digits.images()
    assert train_digits.write_properties(x, y, tmp_path) == 15
    for path in tmp_path.rglob("*"):
        if path.is_file():
            committed = DIGITS / path.relative_to(tmp_path)
            assert committed.read_text() == path.read_text(), committed.name


def test_the_demos_network_classifies_held_out_digits(train_digits):
    import onnx
    import torch

    weights = onnx.load(DIGITS / "digits.onnx").graph.initializer
    tensors = [torch.tensor(onnx.numpy_helper.to_array(w)) for w in weights]
    model = train_digits.network()
    model.load_state_dict(dict(zip(model.state_dict(), tensors, strict=True)))
    _, _, x, y = train_digits.images()
    assert train_digits.accuracy(model, x, y) >= 0.99
