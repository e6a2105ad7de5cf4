"""One harness for every op: a correctness gate, then speed and memory of all implementations in one interleaved run.

    python -m benchmarks --case contrastive_loss --out rows.csv

Reading order: `case` (what is measured), `cases/` (one file an op), `gate`, `timing`, `memory`, `runner` (one
implementation on one problem), `harness` (all of them), `rows` (the CSV). `plot` and `table` draw from the CSV,
`predict` fills it for a GPU nobody has, `base` brings in another commit, `lab` is for a machine that may be gone in
minutes, `record` keeps a whole run, `agree` says whether two of them found the same.

To add an op: one file in `cases/` with a `CASE`, and its name in `cases/__init__.py`.
"""
