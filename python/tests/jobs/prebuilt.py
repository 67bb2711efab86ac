"""A rank on each GPU works with the kernels that the package brought, where no compiler is and nothing is kept."""

import os
import tempfile
from pathlib import Path

os.environ["UNISONO_NVRTC"] = "/there/is/none"
os.environ["UNISONO_CACHE_DIR"] = tempfile.mkdtemp()

import torch  # noqa: E402

import unisono  # noqa: E402

packs = sorted(file.name for file in (Path(unisono.__file__).parent / "kernels").glob("*.xz"))
ordinal = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
torch.cuda.set_device(ordinal)
with unisono.init(device=ordinal, timeout=60) as rank:
    n = rank.world_size
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.full((100_000,), 2.0, dtype=dtype, device="cuda")
        rank.all_reduce(x)
        assert (x == 2.0 * n).all()
    parts = torch.full((n,), rank.rank, device="cuda")
    assert rank.all_gather(parts[:1].contiguous(), out=torch.zeros(n, dtype=parts.dtype, device="cuda")).tolist() == list(range(n))
    kept = os.listdir(os.environ["UNISONO_CACHE_DIR"])
    assert kept and packs, (kept, packs)
    print(f"rank {rank.rank} is done, with kernels of {', '.join(packs)}")
