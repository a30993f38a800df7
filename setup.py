"""Packaging of lirpa_megatron; `make setup` installs it together with the right auto_LiRPA."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="lirpa_megatron",
    version="0.1.0",
    description="Exact certified bounds (CROWN, alpha-CROWN) for sharded Megatron models",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="BSD-3-Clause",
    packages=find_packages(include=["lirpa_megatron", "lirpa_megatron.*"]),
    python_requires=">=3.10",
    # auto_LiRPA is not listed: its declared pins (torch<1.13 in 0.3) would undo the rest of this
    # list. tools/setup_env.sh installs it without them.
    install_requires=[
        "torch>=2.4",  # tensors, gradients and torch.distributed
        "megatron-core>=0.14,<0.20",  # the parallel layers, process groups and checkpoints we bound
        "numpy",  # arrays of ONNX weights and VNN-LIB boxes
        "psutil",  # Megatron's checkpoint writer hangs without it and does not declare it
        "onnx",  # reads the networks given to import-onnx and verify
        "protobuf",  # the format of ONNX files: its error tells that one is truncated
        "pyyaml",  # reads verify's --config
        "safetensors",  # reads the weights of Hugging Face folders, after our own checks
        "tqdm",  # verify's progress bar
        "packaging",  # compares the versions of torch, megatron-core and auto_LiRPA
    ],
    extras_require={
        "test": [
            "pytest",  # runs the tests
            "pytest-xdist",  # two test files at a time
            "hypothesis",  # draws the networks and boxes of the property-based tests
            "ruff",  # make lint
            "scipy",  # linear programs that contradictions between constraints are compared with
            "mpmath",  # values of 200 bits that rounding errors are compared with
            "tokenizers",  # the tests of tokenizer.json
            "sentencepiece",  # the tests of tokenizer.model
            'vnnlib==1.0.2; platform_machine == "x86_64"',  # the tests of VNN-LIB 2.0
        ],
        "tokenizers": ["tokenizers"],  # reads the tokenizer.json of verify --data --tokenizer
        "sentencepiece": ["sentencepiece"],  # reads a tokenizer.model
        # Reads properties of VNN-LIB 2.0. Not required: on Linux it has wheels for x86-64 alone
        # (CPython 3.9 to 3.14, glibc 2.27 or newer; no source), and it asks for pybind11, which it
        # does not use. 1.0 is read without it.
        "vnnlib": ["vnnlib==1.0.2"],
        "examples": [
            "scikit-learn",  # bundles the images of handwritten digits
            "matplotlib",  # draws the curves of certified_training.py
        ],
        "benchmarks": ["matplotlib"],  # draws the figures of benchmarks/
        "docs": [
            "mkdocs",  # make docs; its built-in theme needs nothing more
            "mkdocstrings[python]",  # puts docstrings into the reference
        ],
    },
    entry_points={"console_scripts": ["lirpa-megatron=lirpa_megatron.cli.commands:main"]},
)
