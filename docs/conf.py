"""Configuration of the documentation: ``sphinx-build -W docs build/docs``; doctests, -b doctest."""

import subprocess
import sys
from pathlib import Path

import rnnfast

project = "rnnfast"
author = "the rnnfast authors"
copyright = "the rnnfast authors"
release = rnnfast.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
]
myst_heading_anchors = 2
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say shapes, which types cannot
napoleon_custom_sections = ["Inputs", "Outputs"]
doctest_test_doctest_blocks = "default"
doctest_global_setup = """
import torch
from torch import nn
import rnnfast
torch.manual_seed(0)
"""
html_theme = "alabaster"
html_theme_options = {"description": "A drop-in torch.nn.RNN with a fused time loop"}
html_sidebars = {"**": ["about.html", "navigation.html", "searchbox.html"]}

# backends.md shows the table of the machine that builds the pages, so that it is never stale.
out = subprocess.run([sys.executable, "-m", "rnnfast"], capture_output=True, text=True, check=True)
generated = Path(__file__).parent / "_generated"
generated.mkdir(exist_ok=True)
(generated / "diagnosis.txt").write_text(out.stdout)
exclude_patterns = ["_generated"]
