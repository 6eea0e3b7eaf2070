"""opcheck on every op, native and without a build; torch.compile; the loader, its one warning and its forcing."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from kernel_cases import make_problem, random_matrix

from leaml_plugin import LeamlError, ops
from leaml_plugin.ops import _library, _loader

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def samples():
    w, g = random_matrix((6, 40), torch.bfloat16, "contiguous", 0), random_matrix((6, 40), torch.bfloat16, "padded", 1)
    plain = make_problem([(6, 40), (5, 1)], density=0.5)
    packed = make_problem([(6, 300)], torch.bfloat16, torch.float32, density=0.5, compact=True, eight_bit=True)
    lists, _ = plain.arguments()
    tail = (None, None, None, None, 1e-3, 0.9, 0.999, 1e-8, 0.01, False, False, 0)
    one = torch.tensor([1.0])
    packed_lists, options = packed.arguments()
    packed_scales = options["scales"]
    mastered = make_problem([(6, 40)], torch.bfloat16, density=0.5, master=True)
    columns = make_problem([(6, 40)], torch.float16, density=0.5, layout="transposed", master=True)
    rounded = make_problem([(6, 40), (5, 1)], torch.bfloat16, torch.float32, density=0.5)
    by_chance = (*tail[:-2], True, 9)
    joined = make_problem([(6, 40)] * 3, density=0.5)
    for part in (joined.params, joined.grads):
        part[2] = part[2].t().contiguous().t()

    def lists_and_masters(problem):
        lists, options = problem.arguments()
        return (*lists, [], [], options.get("masters", []))

    ffn_weights, dims, slots = ops.ffn_parts([[random_matrix(s, torch.float32, "contiguous", i) for i, s in
                                               enumerate(((6, 8), (6, 8), (8, 6)))]] * 2)  # fmt: skip
    half_tail = (one * 1e-3, one, one, one * 0, 0.0, 0.9, 0.999, 1e-8, 0.01, True, True, 5)
    return {
        "relevance": ("neuron_relevance_", ([w], [g], [torch.zeros(2, 6)], [0, 3], [0], [0], None, None)),
        "relevance_columns": ("neuron_relevance_", ([w], [g], [torch.zeros(1, 40)], [1], [1], [0], one, one * 0)),
        "relevance_ffn": (
            "neuron_relevance_",
            (
                ffn_weights,
                [w * 2 for w in ffn_weights],
                [torch.zeros(1, 6), torch.zeros(1, 6)],
                [0],
                dims,
                slots,
                None,
                None,
            ),
        ),
        "select": ("select_top", ([torch.randn(9), torch.randn(4)], [0, 0], [3])),
        "adamw": ("sparse_adamw_", (*lists, [], [], [], *tail)),
        "adamw_masters": ("sparse_adamw_", (*lists_and_masters(mastered), *tail)),
        "adamw_columns": ("sparse_adamw_", (*lists_and_masters(columns), *tail)),
        "adamw_stochastic": ("sparse_adamw_", (*lists_and_masters(rounded), *by_chance)),
        "adamw_packed": ("sparse_adamw_", (*packed_lists, *packed_scales, [], *half_tail)),
        "fusion": (
            "relevance_sparse_adamw_",
            (*lists, [], [], [], [torch.zeros(1, 6), torch.zeros(1, 5)], [2], [0, 1], *tail),
        ),
        "fusion_masters": (
            "relevance_sparse_adamw_",
            (*lists_and_masters(mastered), [torch.zeros(2, 6)], [0, 3], [0], *tail),
        ),
        "fusion_columns": (
            "relevance_sparse_adamw_",
            (*lists_and_masters(columns), [torch.zeros(1, 6)], [1], [0], *tail),
        ),
        "fusion_stochastic": (
            "relevance_sparse_adamw_",
            (*lists_and_masters(rounded), [torch.zeros(1, 6), torch.zeros(1, 5)], [0], [0, 1], *by_chance),
        ),
        "fusion_ffn": (
            "relevance_sparse_adamw_",
            (*lists_and_masters(joined), [torch.zeros(2, 6)], [0, 1], [0, 0, 0], *tail),
        ),
        "weight_grad": ("selected_weight_grad", (torch.randn(2, 3, 4), torch.randn(2, 3, 5), torch.tensor([0, 3]))),
    }


@pytest.mark.parametrize("name", list(samples()))
def test_opcheck(name, native):
    op, arguments = samples()[name]
    result = torch.library.opcheck(getattr(torch.ops.leaml, op).default, arguments, test_utils=CHECKS)
    assert set(result.values()) == {"SUCCESS"}


def test_every_op_has_a_sample():
    assert {op for op, _ in samples().values()} == set(_library.SCHEMAS)


def test_a_compiled_step_equals_the_eager_one(native):
    eager = make_problem([(12, 64)], density=0.5)
    compiled = eager.copy()

    def step(params, rows, grads, exp_avg, exp_avg_sq, steps, out):
        doubled = [g * 2 for g in grads]
        norm = ops.neuron_relevance_(params, doubled, out)
        ops.sparse_adamw_(params, rows, doubled, exp_avg, exp_avg_sq, steps, lr=1e-2)
        return norm

    results = []
    for problem, function in ((eager, step), (compiled, torch.compile(step, backend="aot_eager", fullgraph=True))):
        out = [torch.zeros(12)]
        lists, _ = problem.arguments()
        results.append([function(*lists, out), *out, *problem.tensors()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_without_a_build_the_twins_run_and_say_so_once():
    code = """
        import warnings, torch
        from pathlib import Path
        from leaml_plugin.ops import _loader
        _loader.LIBRARIES["cpu"] = Path("nowhere/_C.abi3.so")
        from leaml_plugin import ops
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                out = [torch.zeros(2)]
                ops.neuron_relevance_([torch.ones(2, 3)], [torch.ones(2, 3)], out)
        assert out[0].tolist() == [3.0, 3.0]
        told = [str(w.message) for w in caught if "reference kernels" in str(w.message)]
        assert len(told) == 1 and "was not built" in told[0], told
        # the raw op falls back too
        torch.ops.leaml.select_top([torch.ones(3)], [0], [1])
        info = ops.build_info()
        assert not info["cpu"]["loaded"] and "was not built" in info["cpu"]["cause"]
    """
    result = run(code)
    assert result.returncode == 0, result.stderr


RAW_CALLS = """
import os, warnings, torch
from leaml_plugin import ops
from leaml_plugin.ops import _loader, reference
warnings.simplefilter("error")
asked = []
for name in ("neuron_relevance_", "select_top", "sparse_adamw_", "relevance_sparse_adamw_"):
    twin = getattr(reference, name)
    setattr(reference, name, lambda *a, name=name, twin=twin, **kw: asked.append(name) or twin(*a, **kw))
assert not _loader.loaded(torch.device("cpu"))  # the import is as quick as before
w, rows, state = torch.ones(2, 3), torch.tensor([1]), lambda: torch.zeros(1, 3)
lists = lambda: ([w.clone()], [rows], [w], [state()], [state()], [torch.zeros(1)], [], [], [])
tail = (None, None, None, None, 1e-3, 0.9, 0.999, 1e-8, 0.0, False, False, 0)
calls = {
    "neuron_relevance_": lambda op: op([w], [w], [torch.zeros(1, 2)], [0], [0], [0], None, None),
    "select_top": lambda op: op([torch.ones(3)], [0], [1]),
    "sparse_adamw_": lambda op: op(*lists(), *tail),
    "relevance_sparse_adamw_": lambda op: op(*lists(), [torch.zeros(1, 2)], [0], [0], *tail),
}
for name, call in calls.items():
    if child := os.fork():  # each is the first call of its process
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, name
        continue
    for _ in range(2):
        call(getattr(torch.ops.leaml, name))
    if os.environ["LEAML_OPS"] == "reference":
        assert asked.count(name) == 2 and not _loader._outcome, asked
    else:
        assert asked == [], asked
        assert _loader._outcome == {"cpu": None}  # the CUDA library waits for a CUDA tensor
    os._exit(0)
"""


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_the_first_raw_call_runs_what_a_wrapper_would(choice, native):
    """Compiled code, though no wrapper has loaded it; a user's warning filter has nothing to say."""
    result = run(RAW_CALLS, LEAML_OPS=choice)
    assert result.returncode == 0, result.stderr


def test_a_raw_call_misses_the_library_that_was_asked_for():
    missing = """
        from pathlib import Path
        from leaml_plugin.ops import _loader
        _loader.LIBRARIES["cpu"] = Path("nowhere/_C.abi3.so")
        import torch
        torch.ops.leaml.select_top([torch.ones(3)], [0], [1])
    """
    assert "LEAML_OPS=native, but _C.abi3.so was not built" in run(missing, LEAML_OPS="native").stderr


def test_a_broken_library_is_reported_with_its_cause(tmp_path):
    broken = tmp_path / "_C.abi3.so"
    broken.write_bytes(b"not a library" * 100)  # shorter than an ELF header it would be "file too short"
    code = f"""
        from pathlib import Path
        from leaml_plugin.ops import _loader
        _loader.LIBRARIES["cpu"] = Path({str(broken)!r})
        from leaml_plugin import ops
        cause = ops.build_info()["cpu"]["cause"]
        assert "did not load" in cause and "invalid ELF header" in cause, cause
    """
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_the_environment_forces_a_backend():
    code = """
        import torch
        from leaml_plugin.ops import _loader
        assert _loader.native(torch.device("cpu")) is False
    """
    assert run(code, LEAML_OPS="reference").returncode == 0
    result = run(
        "import torch; from leaml_plugin.ops import _loader; _loader.native(torch.device('meta'))", LEAML_OPS="native"
    )
    assert "LEAML_OPS=native, but there are no compiled kernels for meta devices" in result.stderr
    assert (
        "unknown LEAML_OPS backend 'nativ'; did you mean 'native'?"
        in run(
            "import torch; from leaml_plugin.ops import _loader; _loader.native(torch.device('cpu'))", LEAML_OPS="nativ"
        ).stderr
    )


def test_forcing_nests_and_ends(native):
    cpu = torch.device("cpu")
    assert _loader.native(cpu)
    with ops.use_backend("reference"):
        assert not _loader.native(cpu)
        with ops.use_backend("native"):
            assert _loader.native(cpu)
        assert not _loader.native(cpu)
    assert _loader.native(cpu)
    with pytest.raises(LeamlError, match="did you mean 'reference'"), ops.use_backend("referenc"):
        pass


def test_build_info_names_what_runs(native):
    info = ops.build_info()
    assert info["cpu"]["loaded"] and info["cpu"]["cause"] is None
    assert info["torch"] == torch.__version__
    if info["cpu_features"] is not None:
        assert info["cpu_features"]["instruction_set"] in ("x86-64-v4", "x86-64-v3", "baseline")
