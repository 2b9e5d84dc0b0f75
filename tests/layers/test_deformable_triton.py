"""The Triton kernels: in the interpreter, compiled for a GPU that need not be there, and on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from d2dense import benchmark
from d2dense.layers import deformable_op, deformable_sampling
from d2dense.layers.deformable_sampling import sample_by_grid
from tests.layers.deformable_cases import ODD, SIZES, case, with_gradients

ROOT = Path(__file__).resolve().parents[2]
CASES = [*SIZES, "float16", "bfloat16", "spread 10000", "spread 1e+30", "strides"]


@pytest.fixture(scope="module")
def interpreted():
    pytest.importorskip("triton", reason="Triton is not installed")
    script = [sys.executable, "-m", "tests.layers.interpreted_kernels"]
    run = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", CASES)
def test_kernels_in_the_interpreter(interpreted, name):
    found = interpreted["cases"][name]
    dtype = found["dtype"]
    assert found["types"] == [dtype, dtype, "float32", "float32"]
    for error, kind in zip(found["errors"], found["types"], strict=True):
        # sums are in float32; what is left is the rounding of the result
        assert error < (1e-5 if kind == "float32" else torch.finfo(getattr(torch, kind)).eps)


def test_every_interpreted_case_is_looked_at(interpreted):
    assert set(interpreted["cases"]) == set(CASES)


def test_points_that_are_no_places(interpreted):
    assert interpreted["not places read nothing"]


@pytest.mark.parametrize("way", ["_read", "_spread"])
def test_kernels_compile_for_a_gpu(way, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from d2dense.layers import deformable_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(deformable_triton, way)
    constants = {"HEADS": 8, "CHANNELS": 32, "LEVELS": 2, "POINTS": 4, "ROWS": 32, "PADDED": 32}
    types = {"value": "*bf16", "grad": "*bf16", "result": "*bf16", "size0": "i64", "size1": "i64"}
    pointers = dict.fromkeys(
        ("locations", "weights", "to_value", "to_locations", "to_weights"), "*fp32"
    )
    signature = {name: {**types, **pointers}.get(name, "i32") for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32))
    assert compiled.asm["cubin"]


def test_a_machine_without_triton_uses_the_plain_way(monkeypatch):
    deformable_op._triton_works.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)  # its import fails
    try:
        assert not deformable_op._triton_works(torch.device("cuda", 0))
    finally:
        deformable_op._triton_works.cache_clear()


def test_the_library_imports_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; from d2dense.layers import deformable_sampling"
    )
    environment = {**os.environ, "PYTHONWARNINGS": "error::UserWarning"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


# ------------------------------------------------ on a GPU

LARGE = (((64, 64), (32, 32), (16, 16), (8, 8)), 2, 5440, 8, 32, 4)


def to_gpu(given, dtype):
    value, shapes, locations, weights = given
    return value.to("cuda", dtype), shapes, locations.cuda(), weights.cuda()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnGpu:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("name", SIZES)
    def test_kernels_equal_the_pure_way(self, name, dtype):
        value, shapes, *rest = to_gpu(case(*SIZES[name], dtype=torch.float32), dtype)
        assert deformable_op.is_supported(value, shapes)
        exact = (value.double(), shapes, *(x.double() for x in rest))
        n, q, m = rest[1].shape[:3]
        grad = torch.randn(n, q, m * value.shape[3], device="cuda").to(dtype)
        found = with_gradients(deformable_sampling, grad, value, shapes, *rest)
        expected = with_gradients(sample_by_grid, grad.double(), *exact)
        for a, b in zip(found, expected, strict=True):
            limit = 1e-5 if a.dtype == torch.float32 else torch.finfo(a.dtype).eps
            assert (a.double() - b).abs().max() < limit * b.abs().max().clamp(min=1e-6)

    def test_no_host_syncs(self):
        given = to_gpu(case(ODD, dtype=torch.float32), torch.float32)
        grad = torch.randn(2, 6, 6, device="cuda")
        with_gradients(deformable_sampling, grad, *given)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            with_gradients(deformable_sampling, grad, *given)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_twice_as_fast_as_the_pure_way(self, dtype):
        given = to_gpu(case(*LARGE, dtype=torch.float32), dtype)
        grad = torch.randn(2, 5440, 256, device="cuda", dtype=dtype)
        float32 = (given[0].float(), *given[1:])
        for call in (
            lambda f, *given: f(*given).shape,
            lambda f, *given: with_gradients(f, grad.to(given[0].dtype), *given),
        ):
            times = benchmark.interleaved(
                {
                    "triton": lambda c=call: c(deformable_sampling, *given),
                    "pure": lambda c=call: c(sample_by_grid, *float32),
                },
                rounds=20,
                warmup=5,
            )
            assert benchmark.ratios(times, "triton")["pure"] >= 2
