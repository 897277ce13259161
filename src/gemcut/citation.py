"""How to cite gemcut and the models it runs, as BibTeX. CITATION.cff says the same of gemcut."""

from __future__ import annotations

import gemcut

TITLE = "gemcut: Google's Gemma 2 made usable"
AUTHOR = "The gemcut authors"
YEAR = 2026


def bibtex() -> str:
    """Two entries: gemcut, and Gemma as Google's card gives it."""
    return f"""@software{{gemcut,
    title={{{TITLE}}},
    author={{{{{AUTHOR}}}}},
    version={{{gemcut.__version__}}},
    year={{{YEAR}}}
}}

@article{{gemma_2024,
    title={{Gemma}},
    url={{https://www.kaggle.com/m/3301}},
    DOI={{10.34740/KAGGLE/M/3301}},
    publisher={{Kaggle}},
    author={{Gemma Team}},
    year={{2024}}
}}
"""
