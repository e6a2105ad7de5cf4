"""What a user gets by `pip install` and `import`: the public names, torch alone, a wheel that works."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

import fastclip

ROOT = Path(__file__).parent.parent

TORCH_ALONE = """
import sys

class Blocked:
    names = {"numpy", "PIL", "tokenizers", "yaml", "tyro", "deepspeed", "triton", "safetensors", "tqdm", "sklearn",
             "matplotlib", "xformers", "apex", "ninja"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
import warnings
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
import torch
from fastclip import ClipLoss, GradCache, attention, contrastive_loss, create_model

model = create_model("debug")
image = torch.randn(4, 3, 64, 64)
text = torch.tensor([[1, 5, 9, 1023], [1, 1023, 0, 0], [1, 7, 1023, 0], [1, 8, 8, 1023]])
cache = GradCache({"clip": lambda image, text: model(image, text, output_dict=True)}, ClipLoss(), chunk_size=2)
loss = cache.step({"clip": (image, text)})
assert torch.isfinite(loss) and model.logit_scale.grad.abs().sum() > 0
torch.testing.assert_close(contrastive_loss(*model(image, text)), loss)
assert attention(torch.randn(2, 5, 3, 2, 8)).shape == (2, 5, 2, 8)
print("works")
"""


def test_every_public_name_is_there() -> None:
    for name in fastclip.__all__:
        assert getattr(fastclip, name) is not None
    assert set(fastclip.__all__) <= set(dir(fastclip))
    with pytest.raises(AttributeError, match="no attribute 'Cliploss'; it has CLIP, ClipLoss"):
        fastclip.Cliploss  # noqa: B018


def test_losses_grad_cache_and_models_need_torch_alone() -> None:
    found = subprocess.run([sys.executable, "-c", TORCH_ALONE], capture_output=True, text=True, timeout=300)
    assert found.stdout.strip() == "works", found.stderr


@pytest.mark.long
def test_a_wheel_holds_what_it_needs(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, timeout=500)
    (wheel,) = tmp_path.glob("fastclip_kernels-*.whl")
    place = tmp_path / "installed"
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", str(place), str(wheel)], check=True, timeout=300)
    inside = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
    assert {"fastclip/py.typed", "fastclip/report/templates/page.html", "fastclip/report/style.css"} <= inside
    libraries = {name.partition(".")[0] for name in inside if name.startswith("fastclip/_C")}
    assert libraries == {"fastclip/_C"} | ({"fastclip/_C_avx512"} if platform.machine() == "x86_64" else set())
    assert "fastclip/_cuda_sm90.so" in inside or not (ROOT / "fastclip" / "_cuda_sm90.so").exists()
    code = f"import fastclip; assert fastclip.__file__.startswith({str(place)!r})\n" + TORCH_ALONE
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={"PYTHONPATH": str(place)},
    )
    assert found.stdout.strip() == "works", found.stderr
