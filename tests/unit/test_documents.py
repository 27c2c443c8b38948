"""What the documents say can be run, runs."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("document", ["README.md", "docs/api.md", "docs/guide/sample.md"])
def test_the_python_of_a_document_runs_as_it_stands(document):
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    result = subprocess.run([sys.executable, "-c", snippet], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    for document in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / link).exists(), (document, link)
