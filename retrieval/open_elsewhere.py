"""The calls that open a table of vectors in other programs."""

import json
import shlex
from pathlib import Path

from onceover.base.formats import VECTORS_FORMAT
from onceover.extract.dataset.parquet import open_parquet
from onceover.retrieval.vector_table import TableError


def ways_to_open(path: Path) -> dict[str, str]:
    """Command lines that open a table in other programs and show a first result, by the program's name.

    Raises:
        TableError: it is no table that ``retrieval.vector_table`` wrote. DatasetError: it is no Parquet file.
    """
    with open_parquet(path) as file:
        schema = file.schema_arrow
    about = json.loads((schema.metadata or {}).get(b"onceover", b"{}"))
    if about.get("format") != VECTORS_FORMAT:
        raise TableError(f"{path} is no table of vectors; export and embed write them")
    file_name = _literal(path.as_posix())
    return {
        "Hugging Face datasets": _python(
            "import datasets", f"rows = datasets.Dataset.from_parquet({file_name})", "print(rows, rows[0])"
        ),
        "DuckDB": _python(
            "import duckdb",
            f"rows = duckdb.read_parquet({file_name})",
            f"print(duckdb.sql({_literal(_nearest_to_the_first(schema.field('embedding').type.list_size))}))",
        ),
        "LanceDB": _python(
            "import lancedb, pyarrow.dataset",
            f"rows = pyarrow.dataset.dataset({file_name})",
            f"place = lancedb.connect({_literal(path.with_suffix('.lance').as_posix())})",
            f"table = place.create_table({_literal(about['kind'])}, rows.scanner().to_reader())",
            'print(table.search(rows.head(1)["embedding"][0].as_py()).select(["id"]).limit(5).to_list())',
        ),
        "embedding-atlas": shlex.join(_atlas(path, schema.names)),
    }


def _nearest_to_the_first(dim: int) -> str:
    """A query for the five rows that are nearest to the first one, of vectors of so many numbers."""
    score = f"array_cosine_similarity(a.embedding::FLOAT[{dim}], b.embedding::FLOAT[{dim}])"
    return f"SELECT b.id, {score} AS score FROM (FROM rows LIMIT 1) a, rows b ORDER BY score DESC LIMIT 5"


def _atlas(path: Path, columns: list[str]) -> list[str]:
    """The call of embedding-atlas that shows the map, with the columns that are there."""
    text = next(name for name in ("caption", "path", "id") if name in columns)
    call = ["embedding-atlas", path.as_posix(), "--text", text, "--x", "x", "--y", "y"]
    if "neighbours" in columns:
        call += ["--neighbors", "neighbours"]
    return call


def _python(*statements: str) -> str:
    return shlex.join(["python", "-c", "; ".join(statements)])


def _literal(text: str) -> str:
    """A text as Python writes it in double quotes, which a shell leaves alone."""
    return json.dumps(text, ensure_ascii=False)
