import pytest
from conftest import ROOT

from modiff_trt.core.errors import InputError
from modiff_trt.tools.report.results_tables import render

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_TABLES = [path for path in DOCUMENTS if "<!-- table: " in path.read_text()]


@pytest.mark.parametrize("document", WITH_TABLES, ids=lambda path: path.name)
def test_tables_are_those_of_the_results(document):
    text = document.read_text()
    assert render(text, ROOT / "results") == text


def test_make_renders_every_document_with_tables():
    listed = (ROOT / "Makefile").read_text()
    assert len(WITH_TABLES) > 5 and all(f" {path.relative_to(ROOT)}" in listed for path in WITH_TABLES)


def test_unknown_table_is_refused(tmp_path):
    with pytest.raises(InputError, match="unknown table"):
        render("<!-- table: nothing -->\n<!-- end -->", tmp_path)
