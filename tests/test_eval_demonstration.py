"""benchmarks/evaluation.py: which files of results it renews."""

import gzip
import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("evaluation", ROOT / "benchmarks" / "evaluation.py")
assert spec is not None
assert spec.loader is not None
evaluation = importlib.util.module_from_spec(spec)
spec.loader.exec_module(evaluation)


def test_every_run_has_its_numbers_and_its_rows(tmp_path):
    for name in ("results", "images", "answers", "times", "report"):
        (tmp_path / name).mkdir()
    for name in evaluation.PICTURES.values():
        (tmp_path / "report" / f"{name}.png").write_bytes(b"")
    row = dict(
        model="embedded", policy="full", budget=0, task="own/needle", length=8, drafter="none",
        protocol="seen", id="0", score=1.0, binary=True, first_of_batch="0", cache_bytes=4,
        predicted_answer="x", answer=["x"], question="?", prompt_tokens=8, new_tokens=1,
        peak_bytes=None, peak_is_bound=True, draft_lengths=[],
    )  # fmt: skip
    for step, seconds in (("answers", 2.0), ("times", 1.0)):
        (tmp_path / step / "rows.jsonl").write_text(json.dumps(row | {"ttft_s": seconds}) + "\n")
    evaluation.keep(tmp_path, tmp_path / "results", tmp_path / "images")
    for cells, rows, seconds in (("", "_rows", 2.0), ("_times", "_times", 1.0)):
        start = tmp_path / "results" / "evaluation_embedded"
        (cell,) = json.loads(Path(f"{start}{cells}.json").read_text())["cells"]
        assert cell["ttft_s"][0] == seconds
        content = gzip.decompress(Path(f"{start}{rows}.jsonl.gz").read_bytes())
        assert json.loads(content)["ttft_s"] == seconds
    assert {path.stem for path in (tmp_path / "images").iterdir()} == set(evaluation.PICTURES)
