"""Breaks the losses in one place at a time and sees the tests go red.

    python tests/mutations_losses.py [part of a mutation's name]

Each mutation is one replacement in a copy of the package, and the tests that must notice it. Exit 1 if one survives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
OPS, LOSSES = "fastclip/ops/contrastive_loss", "fastclip/losses"
BLOCK, TRITON = "tests/test_contrastive_loss.py", "tests/test_contrastive_loss_triton.py"
OPTIONS, RANKS = "tests/test_losses_options.py", "tests/test_losses_distributed.py"


class Mutation(NamedTuple):
    name: str
    path: str
    before: str
    after: str
    tests: str  # a test file, and after a space what its names must contain


MUTATIONS = (
    Mutation(
        "drop one tile of the statistics",
        f"{OPS}/triton.py",
        "for start_n in range(first_col, last_col, BLOCK_N):",
        "for start_n in range(first_col, last_col - BLOCK_N, BLOCK_N):",
        f"{TRITON} masks",
    ),
    Mutation(
        "drop one tile of dz",
        f"{OPS}/triton.py",
        "offs_m, offs_n, n, m), 0.0, d_z)",
        "offs_m, offs_n, n, m) | (start_m + start_n == BLOCK_M), 0.0, d_z)",
        f"{TRITON} masks",
    ),
    Mutation(
        "drop one chunk of the text gradient",
        f"{OPS}/reference.py",
        "grad_text.addmm_(d_logits.T, block.image_features[rows].to(text.dtype))",
        "grad_text.addmm_(d_logits.T, block.image_features[rows].to(text.dtype)) if rows.start == 0 else None",
        f"{BLOCK} rectangular",
    ),
    Mutation(
        "double one chunk of the text gradient",
        f"{OPS}/reference.py",
        "grad_text.addmm_(d_logits.T, block.image_features[rows].to(text.dtype))",
        "grad_text.addmm_(d_logits.T, block.image_features[rows].to(text.dtype), alpha=2 if rows.start else 1)",
        f"{BLOCK} rectangular",
    ),
    Mutation(
        "double one chunk of the image gradient",
        f"{OPS}/chunks.py",
        "add_product(grad_image[rows], d_logits, right[cols])",
        "add_product(grad_image[rows], d_logits * (2 if j else 1), right[cols])",
        f"{TRITON} masks",
    ),
    Mutation(
        "transpose one gradient",
        f"{OPS}/dense.py",
        "d_logits.T @ image_features.to(d_logits.dtype)",
        "d_logits @ image_features.to(d_logits.dtype)",
        f"{OPTIONS} gradcheck",
    ),
    Mutation(
        "swap the gradients of image and text",
        f"{OPS}/op.py",
        "add_positives(grad_image, grad_text, d_positive,",
        "add_positives(grad_text, grad_image, d_positive,",
        f"{OPTIONS} gradcheck",
    ),
    Mutation(
        "round the log-sum-exp of the gradient",
        f"{OPS}/op.py",
        "torch.where(is_empty, d_lse, d_lse * torch.exp(-lost))",
        "d_lse",
        "tests/test_contrastive_loss_exact.py scale_100",
    ),
    Mutation(
        "skip one rank's part of the columns",
        "fastclip/distributed.py",
        "+ log_sum).exp()",
        "+ log_sum).exp() * (dist.get_rank(group) > 0)",
        f"{RANKS} 2-even",
    ),
    Mutation(
        "skip one rank's part of the ring's image gradient",
        f"{LOSSES}/ring.py",
        "grad_image.add_(more_image)",
        "grad_image",
        f"{RANKS} 2-even",
    ),
    Mutation(
        "skip one rank's part of the text gradient",
        "fastclip/distributed.py",
        "        total = x.clone()\n        dist.all_reduce(total, group=group)\n        return total.split",
        "        total = x.clone() * (dist.get_rank(group) > 0)\n        dist.all_reduce(total, group=group)\n"
        "        return total.split",
        f"{RANKS} 2-even",
    ),
    Mutation(
        "count the ranks' texts as if all brought as many",
        "fastclip/distributed.py",
        "return sum(self.texts[: self.rank])",
        "return self.rank * self.texts[self.rank]",
        f"{RANKS} 4-uneven",
    ),
    Mutation(
        "keep other logits than those of the forward pass",
        f"{OPS}/reference.py",
        "kept[rows, :m] = logits[: kept.shape[0] - rows.start]",
        "kept[rows, :m] = logits[: kept.shape[0] - rows.start] * 1.0001",
        "tests/test_losses_memory_budget.py same",
    ),
    Mutation(
        "forget the second member of a group",
        f"{LOSSES}/contrastive.py",
        "torch.where(in_row > 1,",
        "torch.where(in_row > 2,",
        f"{OPTIONS} combination",
    ),
    Mutation(
        "ignore nothing",
        f"{OPS}/reference.py",
        "logits.masked_fill_(row_groups[:, None] == col_groups, -torch.inf)",
        "logits",
        f"{OPTIONS} combination",
    ),
    Mutation(
        "smooth over the images in both directions",
        f"{LOSSES}/contrastive.py",
        "row_sum / sum(pairing.layout.texts)",
        "row_sum / sum(pairing.layout.images)",
        f"{OPTIONS} combination",
    ),
    Mutation(
        "divide by the number of pairs instead of their weight",
        f"{LOSSES}/contrastive.py",
        "return total / divisor",
        "return total / sum(layout.images)",
        f"{OPTIONS} combination",
    ),
    Mutation(
        "do not project the gradient of what was normalised",
        f"{LOSSES}/terms.py",
        "(d_unit - wide * (wide * d_unit).sum(1, keepdim=True))",
        "d_unit",
        f"{OPTIONS} gradcheck",
    ),
    Mutation(
        "sum 16-bit gradients over ranks in 16 bits",
        f"{LOSSES}/gathered.py",
        "reduce_scatter_rows(grad_text, ",
        "reduce_scatter_rows(grad_text.to(text.dtype).to(grad_text.dtype), ",
        f"{RANKS} 16_bits",
    ),
    Mutation(
        "hide an infinite feature",
        f"{LOSSES}/contrastive.py",
        "threshold=_EXACT_SOFTPLUS) + 0 * positive",
        "threshold=_EXACT_SOFTPLUS)",
        f"{OPTIONS} not_hidden",
    ),
    Mutation(
        "let values that nobody looked at pass",
        f"{LOSSES}/contrastive.py",
        "torch.where(is_so, torch.nan, 1.0)",
        "1.0",
        f"{OPTIONS} nobody_looks",
    ),
)


def is_red(tests: str, mutation: Mutation | None = None) -> bool:
    """Whether the tests fail in a copy of the package, broken or as it is; a run that collects none is an error."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("fastclip", "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        if mutation:
            path = folder / mutation.path
            text = path.read_text()
            assert text.count(mutation.before) == 1, f"{mutation.name}: {mutation.path} has changed"
            path.write_text(text.replace(mutation.before, mutation.after))
        file, name = tests.split(" ", 1)
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", file, "-k", name]
        environment = os.environ | {"PYTHONPATH": str(folder), "CI": "", "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
    if result.returncode not in (0, 1):
        raise RuntimeError(f"{tests}: pytest ended with {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result.returncode == 1


def survivors(wanted: str = "") -> list[str]:
    """The names of the mutations, of those whose name has `wanted`, that no test notices; one on each core."""
    chosen, alive = [mutation for mutation in MUTATIONS if wanted in mutation.name], []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        files = sorted({mutation.tests for mutation in chosen})
        for tests, red in zip(files, pool.map(is_red, files), strict=True):
            if red:
                raise RuntimeError(f"{tests} is red before anything is broken")
        found = pool.map(lambda mutation: is_red(mutation.tests, mutation), chosen)
        for mutation, red in zip(chosen, found, strict=True):
            print(f"{'red' if red else 'ALIVE'}  {mutation.name}", flush=True)
            alive += [] if red else [mutation.name]
    return alive


if __name__ == "__main__":
    sys.exit(bool(survivors(*sys.argv[1:2])))
