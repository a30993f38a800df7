"""What must be installed, and in which versions; one line that says what to run if it is not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from packaging.version import Version

_NEEDED = {"torch": ("2.4", None), "megatron-core": ("0.14", "0.20")}
"""Project -> first version that works, first version that is not known to."""

_UNDECLARED = {
    "psutil": ("0", "megatron-core's checkpoint writer hangs without it"),
    "triton": ("0.18", "megatron-core {} imports it"),
}
"""What megatron-core needs without declaring it -> the release from which on, and why."""


def check() -> None:
    """Checks torch, megatron-core and what it needs, and apex, without importing them.

    auto_LiRPA: see `auto_lirpa`.

    Raises:
        ImportError: missing or unsupported, with both versions and what to run.
    """
    for project, (first, limit) in _NEEDED.items():
        wanted = f"{project}>={first}" + (f",<{limit}" if limit else "")
        how = f"run `make setup`, or `pip install '{wanted}'`"
        if project == "megatron-core":
            _check_megatron()
        if importlib.util.find_spec(project.split("-")[0]) is None:
            raise ImportError(f"{project} is not installed: {how}")
        try:
            version = Version(importlib.metadata.version(project))
        except importlib.metadata.PackageNotFoundError:
            continue  # a source checkout on the path: its version is its owner's business
        if version < Version(first) or (limit and version >= Version(limit)):
            raise ImportError(f"{project} {version} is not supported ({wanted} is): {how}")
        if project == "megatron-core":
            _check_undeclared(version)
    _check_apex()


def undeclared_and_missing() -> list[str]:
    """Packages that the installed megatron-core needs, does not declare, and that are not there."""
    release = Version(importlib.metadata.version("megatron-core"))
    return [
        package
        for package, (first, _) in _UNDECLARED.items()
        if release >= Version(first) and importlib.util.find_spec(package) is None
    ]


def _check_megatron() -> None:
    """PyPI's megatron is an unrelated package that takes the name of megatron-core's folder."""
    spec = importlib.util.find_spec("megatron")
    folders = list(spec.submodule_search_locations or []) if spec else []
    if spec and not any((Path(folder) / "core" / "__init__.py").exists() for folder in folders):
        where = spec.origin or ", ".join(folders)
        raise ImportError(
            f"the package megatron ({where}) is not NVIDIA's (it has no megatron.core), and it "
            "hides megatron-core: run `pip uninstall megatron`, then `pip install --force-reinstall"
            " --no-deps 'megatron-core>=0.14,<0.20'`"
        )


def _check_undeclared(megatron: Version) -> None:
    for package in undeclared_and_missing():
        why = _UNDECLARED[package][1].format(megatron)
        raise ImportError(f"{package} is not installed, and {why}: run `pip install {package}`")


def _check_apex() -> None:
    """PyPI's apex is an unrelated package with which Megatron takes NVIDIA's to be there."""
    spec = importlib.util.find_spec("apex")
    folders = list(spec.submodule_search_locations or []) if spec else []
    if spec and not any((Path(folder) / "normalization").exists() for folder in folders):
        raise ImportError(
            "the package apex is not NVIDIA's (it has no apex.normalization), and megatron-core "
            "fails with it: run `pip uninstall apex`"
        )
