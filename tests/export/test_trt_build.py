"""TensorRT engines: identity, refusals, proof of precision, and real builds by TensorRT-RTX."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiue_export.bundle.engine_identity import (
    PORTABLE,
    check_engine,
    compiled_for,
    graph_identity,
    rtx_target,
    tensorrt_target,
    this_platform,
)
from tiue_export.bundle.manifest import Compiled, CompiledGraph, FileRecord
from tiue_export.bundle.read import Bundle, open_bundle
from tiue_export.bundle.write import write_manifest
from tiue_export.errors import (
    BundleError,
    MissingExtraError,
    ParityError,
    ResourceError,
    RuntimeFailure,
    TiueError,
    UsageError,
)
from tiue_export.export.trt.build_process import (
    NOT_PARSED,
    OUT_OF_MEMORY,
    EngineRequest,
    PhaseTree,
    is_memory_error,
    parse,
)
from tiue_export.export.trt.bundle import _failure, compile_trt, easier, refit_from
from tiue_export.export.trt.plan import TrtOptions, TrtPlan, plan_trt
from tiue_export.export.trt.precision import Census, engine_census, network_census
from tiue_export.specs import GRAPH_NAMES, UNET_DECODER
from tiue_export.system.progress import Observer
from tiue_export.system.tensorrt_flavor import (
    BEYOND_CORE,
    FOLDERS,
    Device,
    Flavor,
    flavor_install_line,
    installed_flavors,
    load_flavor,
    this_device,
)

TEXT = "text_encoder"
ADA = TrtOptions(flavor="rtx", compute_capabilities=("8.6", "8.9"))
RTX_3090 = Device("NVIDIA GeForce RTX 3090", "8.6", "580.1", "13.0")
ORIN = Device("Orin", "8.7", "R36, REVISION: 4.7", "12.6", unified_memory=True)
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt_rtx is not installed: pip install 'tiue-export[trt-rtx]'",
)
no_gpu = pytest.mark.skipif(bool(this_device()), reason="this machine has an NVIDIA GPU")


def with_graphs(source: Bundle, place: Path, *names: str, **changes) -> Bundle:
    """A copy of a bundle with some graphs only, so that a build takes seconds."""
    shutil.copytree(source.root, place)
    graphs = {name: source.manifest.graphs[name] for name in names}
    write_manifest(place, replace(source.manifest, graphs=graphs, **changes))
    return open_bundle(place)


@pytest.fixture(scope="module")
def engines(half_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """All four engines of the tiny student, really built for two RTX generations. Shared."""
    place = tmp_path_factory.mktemp("engines") / "tiny-rtx"
    shutil.copytree(half_bundle.root, place)
    return compile_trt(open_bundle(place), ADA)


@pytest.fixture
def small(half_bundle: Bundle, tmp_path: Path) -> Bundle:
    """The text encoder alone, without engines."""
    return with_graphs(half_bundle, tmp_path / "small", TEXT)


def compiled_by_hand(bundle: Bundle, flavor: str, version: str, target, **flags) -> Compiled:
    """What a build would have listed, with the manifest's word for a plan."""
    graphs = {
        name: CompiledGraph(
            f"{FOLDERS[flavor]}/{name}.plan",
            graph_identity(record, flavor, version, target, flags),
            {f"{FOLDERS[flavor]}/{name}.plan": FileRecord(4, "0" * 64)},
        )
        for name, record in bundle.manifest.graphs.items()
    }
    return Compiled(flavor, version, target, flags, graphs)


def refusal(call, kind: type[TiueError]) -> TiueError:
    with pytest.raises(kind) as caught:
        call()
    return caught.value


# --- real builds


@needs_rtx
def test_every_graph_of_the_student_becomes_an_engine_that_the_manifest_answers_for(engines):
    compiled = open_bundle(engines.root).manifest.compiled["trt-rtx"]
    assert list(compiled.graphs) == list(engines.manifest.graphs)
    assert (compiled.backend, dict(compiled.target)) == ("rtx", {"compute_capabilities": "8.6,8.9"})
    for name, graph in compiled.graphs.items():
        assert graph.path == f"trt-rtx/{name}.plan"
        assert (engines.root / graph.path).stat().st_size == graph.files[graph.path].size_bytes
        assert graph.report["build_seconds"] > 0
        assert graph.report["peak_memory_bytes"] > 50e6
        assert graph.report["attempts"] == 1


@needs_rtx
def test_products_run_in_half_and_every_float_layer_has_its_reason(engines):
    for graph in engines.manifest.compiled["trt-rtx"].graphs.values():
        report = graph.report
        assert report["products_half"] > 0
        assert "products_float" not in report
        reasons = dict(part.rsplit(": ", 1) for part in report["float_because"].split(", "))
        assert sum(map(int, reasons.values())) == report["layers_float"]
        assert set(reasons) <= {"norm statistics", "weighted sum into a float output"}
    decoder = engines.manifest.compiled["trt-rtx"].graphs["unet_decoder"].report
    assert "weighted sum into a float output: 4" in decoder["float_because"]


@needs_rtx
def test_valid_engines_are_kept_and_others_asked_for_anew(engines):
    before = (engines.root / "tiue.json").read_bytes()
    started: list[str] = []
    same = replace(ADA, compute_capabilities=("8.9", "8.6", "8.6"))
    again = compile_trt(engines, same, Observer(on_start=started.append))
    assert (started, again) == ([], engines)
    assert (engines.root / "tiue.json").read_bytes() == before
    everything = tuple(engines.manifest.graphs)
    for change in (
        {"compute_capabilities": ("12.0",)},
        {"optimization_level": 1},
        {"workspace_mb": 512},
        {"rebuild": True},
    ):
        assert plan_trt(engines, replace(ADA, **change)).to_build == everything


@needs_rtx
def test_an_engine_that_is_missing_is_added_beside_the_others(half_bundle, tmp_path):
    two = (TEXT, "vae_decoder")
    whole = with_graphs(half_bundle, tmp_path / "b", *two)
    only_text = replace(whole.manifest, graphs={TEXT: whole.manifest.graphs[TEXT]})
    write_manifest(whole.root, only_text)
    first = compile_trt(open_bundle(whole.root), ADA)
    inode = (first.root / "trt-rtx" / "text_encoder.plan").stat().st_ino
    write_manifest(whole.root, replace(whole.manifest, compiled=first.manifest.compiled))
    started: list[str] = []
    bundle = compile_trt(open_bundle(whole.root), ADA, Observer(on_start=started.append))
    assert started == ["build vae_decoder"]
    assert tuple(open_bundle(bundle.root).manifest.compiled["trt-rtx"].graphs) == two
    assert (bundle.root / "trt-rtx" / "text_encoder.plan").stat().st_ino == inode


@needs_rtx
def test_half_asked_and_float_got_fails_before_anything_is_built(tiny_bundle, tmp_path):
    records = tiny_bundle.manifest.graphs
    text = replace(records[TEXT], precision="fp16")
    bundle = with_graphs(tiny_bundle, tmp_path / "b", TEXT)
    manifest = replace(bundle.manifest, graphs={TEXT: text}, precision="fp16")
    write_manifest(bundle.root, manifest)
    error = refusal(lambda: compile_trt(open_bundle(bundle.root), ADA), ParityError)
    assert error.message == (
        "text_encoder: 16 of 16 convolutions and matrix products came out in float, but the bundle "
        "says fp16: no engine was made"
    )
    line = "tiue-export onnx --ckpt STUDENT --precision fp16 --out BUNDLE"
    assert error.next_step == f"Export again: {line}"
    assert open_bundle(bundle.root).manifest.compiled == {}
    assert not [path for path in bundle.root.iterdir() if "partial" in path.name]


@needs_rtx
@pytest.mark.parametrize(
    ("modules", "left"),
    [((), 16), (("encoder.layers.0.mlp",), 14), (("encoder.layers.0", "encoder.layers.1"), 0)],
)
def test_products_that_an_audit_put_in_float_are_not_held_against_an_engine(
    tiny_bundle, modules, left
):
    flavor = load_flavor("rtx")
    logger = flavor.trt.Logger(flavor.trt.Logger.ERROR)
    _builder, network, _parser = parse(str(tiny_bundle.graph_path(TEXT)), flavor, logger)
    census = network_census(network, modules)
    assert census.products["float"] - census.audited == left
    assert census.mostly_float == (left > 0)
    assert census.reasons == {"a float32 graph": census.layers["float"]}


@needs_rtx
def test_a_kill_half_way_keeps_what_was_finished_and_a_bundle_that_opens(half_bundle, tmp_path):
    bundle = with_graphs(half_bundle, tmp_path / "b", TEXT, "unet_decoder")
    script = (
        "import sys; from tiue_export import open_bundle\n"
        "from tiue_export.export.trt.bundle import compile_trt\n"
        "from tiue_export.system.progress import Observer\n"
        "from tiue_export.export.trt.plan import TrtOptions\n"
        "tell = lambda stage: print(stage, flush=True)\n"
        "options = TrtOptions(flavor='rtx', compute_capabilities=('8.6', '8.9'))\n"
        "compile_trt(open_bundle(sys.argv[1]), options, Observer(on_start=tell))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(bundle.root)], stdout=subprocess.PIPE, text=True
    )
    told = [process.stdout.readline().split() for _ in range(2)]
    assert told == [["build", TEXT], ["build", "unet_decoder"]]
    (builder,) = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    opened = open_bundle(bundle.root)
    assert list(opened.manifest.compiled["trt-rtx"].graphs) == [TEXT]
    assert plan_trt(opened, ADA).to_build == ("unet_decoder",)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{builder}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{builder}").exists(), "the builder outlived the one who asked"


def children(pid: int) -> list[int]:
    """Process ids below `pid`, waited for until there is one."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    if not path.exists():
        pytest.skip("needs Linux's /proc")
    while not (found := path.read_text().split()):
        time.sleep(0.02)
    return [int(each) for each in found]


@needs_rtx
def test_out_of_memory_climbs_down_the_ladder_says_so_and_gives_up_with_advice(small):
    """A real one: the builder, and it alone, gets an address space of 290 MB."""
    script = (
        "import functools, resource, sys; from subprocess import Popen\n"
        "from tiue_export import open_bundle\n"
        "from tiue_export.errors import ResourceError\n"
        "from tiue_export.export.trt import bundle as trt_bundle\n"
        "from tiue_export.export.trt.bundle import compile_trt\n"
        "from tiue_export.system.progress import Observer\n"
        "from tiue_export.export.trt.plan import TrtOptions\n"
        "bundle = open_bundle(sys.argv[1])\n"
        "options = TrtOptions(flavor='rtx', workspace_mb=256)\n"
        "limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (290 << 20, 290 << 20))\n"
        "trt_bundle.subprocess.Popen = functools.partial(Popen, preexec_fn=limit)\n"
        "try: compile_trt(bundle, options, Observer(on_note=print))\n"
        "except ResourceError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(small.root)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert "optimization level 3 -> 2, workspace 256 -> 128 MB" in lines[0]
    assert "optimization level 2 -> 1, workspace 128 -> 64 MB" in lines[1]
    assert lines[2].startswith(
        "memory ran out while building text_encoder, at optimization level 1"
    )
    assert "add swap" in lines[3]
    assert open_bundle(small.root).manifest.compiled == {}


def test_a_full_disk_is_told_as_such_not_as_a_hard_graph():
    text = f"OSError: [Errno 28] {os.strerror(errno.ENOSPC)}: 'vae_decoder.plan'"
    error = _failure("vae_decoder", 1, text, None)
    assert isinstance(error, ResourceError)
    assert error.next_step.startswith("Free some space. Engines that were finished are kept")


@needs_rtx
def test_a_parser_error_names_the_node(tmp_path):
    import onnx
    from onnx import TensorProto, helper

    node = helper.make_node("Det", ["x"], ["y"], name="down_blocks.0/Det")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    model = helper.make_model(
        helper.make_graph([node], "g", [x], [y]), opset_imports=[helper.make_opsetid("", 19)]
    )
    onnx.save(model, tmp_path / "model.onnx")
    request = EngineRequest(str(tmp_path / "model.onnx"), str(tmp_path / "x.plan"), "rtx")
    done = run_child(request)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == NOT_PARSED
    assert 'node "down_blocks.0/Det" (Det)' in events[-1]["text"]
    assert not (tmp_path / "x.plan").exists()


def run_child(request: EngineRequest) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tiue_export.export.trt.build_process", request.to_json()],
        capture_output=True,
        text=True,
        check=False,
    )


def test_building_loads_neither_torch_nor_onnx():
    code = (
        "import sys, tiue_export.export.trt.bundle\n"
        "import tiue_export.apps.export.trt, tiue_export.apps.export.refit\n"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'diffusers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --- options that cannot be honoured


@needs_rtx
@no_gpu
@pytest.mark.parametrize(
    ("options", "kind", "part"),
    [
        ({"compute_capabilities": ("9.0",)}, UsageError, "cannot build for compute capability 9.0"),
        ({"version_compatible": True}, UsageError, "--version-compatible does not exist"),
        ({"hardware_compatible": True}, UsageError, "--hardware-compatible does not exist"),
        ({"refit": True}, RuntimeFailure, "refittable engines only where a GPU"),
        ({"precision": "fp32"}, UsageError, "--precision is fp32, but the graphs of"),
        ({"batch": (2, 2, 2)}, UsageError, "--batch is 2, but the graphs of"),
        ({"batch": (1, 2, 4)}, UsageError, "--batch is 1:2:4, but the graphs of"),
    ],
)
def test_what_a_build_cannot_honour_is_refused_by_name(half_bundle, options, kind, part):
    error = refusal(lambda: plan_trt(half_bundle, TrtOptions(flavor="rtx", **options)), kind)
    assert part in error.message
    assert error.next_step


@needs_rtx
@no_gpu
def test_without_sm_and_without_a_gpu_rtx_builds_for_ampere_and_newer(half_bundle, tmp_path):
    plan = plan_trt(half_bundle, TrtOptions(flavor="rtx"))
    assert dict(plan.target) == {"compute_capabilities": PORTABLE}
    request = plan.request(half_bundle, TEXT, tmp_path / "x.plan")
    assert (request.compute_capabilities, request.timing_cache) == ((), None)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"optimization_level": 6}, "--optimization-level is 6; expected 0 to 5"),
        ({"workspace_mb": -1}, "--workspace-mb is -1"),
        ({"batch": (2, 1, 4)}, "--batch is 2:1:4; expected min <= opt <= max"),
        ({"batch": (0, 1, 1)}, "--batch is 0:1:1"),
        ({"precision": "int4"}, "unknown precision 'int4'"),
    ],
)
def test_options_out_of_range_are_refused_at_once(options, part):
    assert part in refusal(lambda: TrtOptions(**options), UsageError).message


@needs_rtx
def test_an_open_batch_axis_becomes_a_profile_of_every_input(half_bundle, tmp_path):
    def opened(record):
        return replace(
            record,
            inputs=tuple(replace(s, shape=("batch", *s.shape[1:])) for s in record.inputs),
            outputs=tuple(replace(s, shape=("batch", *s.shape[1:])) for s in record.outputs),
        )

    manifest = half_bundle.manifest
    graphs = {name: opened(record) for name, record in manifest.graphs.items()}
    shape = ("batch", *manifest.latent_shape[1:])
    dynamic = Bundle(half_bundle.root, replace(manifest, graphs=graphs, latent_shape=shape))
    plan = plan_trt(dynamic, replace(ADA, batch=(1, 2, 4)))
    assert plan.flags["batch"] == "1:2:4"
    profile = plan.request(dynamic, "vae_decoder", tmp_path / "x").profile
    assert profile == {"latent_sample": [[1, 4, 8, 8], [2, 4, 8, 8], [4, 4, 8, 8]]}
    assert plan_trt(dynamic, ADA).flags["batch"] == "1:1:1"


# --- a model in a loop ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "steps"),
    [(None, "1:3:3"), (4, "1:2:2"), (5, "1:2:2"), (2, "1:1:1"), (100, "1:3:3")],
)
@needs_rtx
def test_a_loops_decoder_takes_one_step_up_to_its_longest_run(faster_bundle, tmp_path, rows, steps):
    plan = plan_trt(faster_bundle, replace(ADA, max_decoder_rows=rows))
    assert plan.flags["decoder_steps"] == steps
    sizes = [[int(size)] for size in steps.split(":")]
    assert plan.request(faster_bundle, UNET_DECODER, tmp_path / "x").profile == {"timesteps": sizes}
    for graph in set(faster_bundle.manifest.graphs) - {UNET_DECODER}:
        assert plan.request(faster_bundle, graph, tmp_path / "x").profile == {}


@needs_rtx
def test_engines_of_a_loop_are_really_built_and_listed(faster_copy):
    bundle = compile_trt(faster_copy, replace(ADA, max_decoder_rows=4, optimization_level=1))
    compiled = open_bundle(bundle.root).manifest.compiled["trt-rtx"]
    assert list(compiled.graphs) == list(GRAPH_NAMES)
    assert compiled.flags["decoder_steps"] == "1:2:2"
    assert compiled.graphs[UNET_DECODER].report["products_float"] > 0  # of an fp32 bundle


@needs_rtx
def test_decoder_rows_that_cannot_be_are_refused(half_bundle, faster_bundle):
    for bundle, rows, part in (
        (half_bundle, 4, "--max-decoder-rows is for a model in a loop"),
        (faster_bundle, 1, "at most 1 decoder rows were allowed; one step takes 2"),
    ):
        options = replace(ADA, max_decoder_rows=rows)
        assert part in refusal(lambda b=bundle, o=options: plan_trt(b, o), UsageError).message


@needs_rtx
def test_text_attention_of_one_head_and_several_rows_is_built(tmp_path):
    """TensorRT-RTX 1.7.1 ends in a MyelinCheckException where a permutation moves an axis of 1."""
    import torch
    from diffusers.models.attention_processor import Attention

    from tiue_export.graphs.hoisting import TIME, TimedTextAttention

    attention = Attention(16, 16, heads=1, dim_head=16)

    class OneHead(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.processor = attention, TimedTextAttention("a", upcast=False)

        def forward(self, time, hidden, key, value):
            text = {TIME: time, "a_key": key, "a_value": value}
            return self.processor(self.attention, hidden, text)

    steps, rows, text = torch.zeros(3, 8), torch.zeros(6, 64, 16), torch.zeros(2, 7, 16)
    example = tuple(tensor.half() for tensor in (steps, rows, text, text))
    path = tmp_path / "attention.onnx"
    torch.onnx.export(OneHead().half().eval(), example, path, dynamo=True, verbose=False)
    request = EngineRequest(str(path), str(tmp_path / "plan"), "rtx", compute_capabilities=("8.6",))
    done = run_child(request)
    assert done.returncode == 0, done.stdout[-500:]


def test_a_timing_cache_is_one_for_each_version_gpu_and_cuda(small, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = {
        "precision": "fp16", "batch": "1:1:1", "optimization_level": 3, "workspace_mb": 0,
        "version_compatible": False, "hardware_compatible": False, "refit": False, "tf32": True,
    }  # fmt: skip
    found = set()
    for version, device in (("10.3.0", ORIN), ("10.16.2", ORIN), ("10.3.0", RTX_3090)):
        flavor = Flavor("tensorrt", None, version)
        plan = TrtPlan(flavor, device, tensorrt_target(device), flags, (1, 1, 1), {}, ())
        found.add(plan.request(small, TEXT, tmp_path / "x").timing_cache)
    names = sorted(Path(each).name for each in found)
    assert names == [
        "10.16.2-Orin-8.7-cuda12.6.timing",
        "10.3.0-NVIDIA_GeForce_RTX_3090-8.6-cuda13.0.timing",
        "10.3.0-Orin-8.7-cuda12.6.timing",
    ]


# --- identity


def test_an_identity_depends_on_everything_that_decides_an_engine(half_bundle):
    record = half_bundle.manifest.graphs[TEXT]
    name = next(iter(record.files))
    given_ = {
        "record": record,
        "flavor": "tensorrt",
        "version": "10.3.0",
        "target": tensorrt_target(ORIN),
        "flags": {"optimization_level": 3},
    }
    weights = {**record.files, name: FileRecord(record.files[name].size_bytes, "f" * 64)}
    inputs = tuple(replace(spec, shape=(2, *spec.shape[1:])) for spec in record.inputs)
    changes = [
        {"record": replace(record, files=weights)},
        {"record": replace(record, inputs=inputs)},
        {"record": replace(record, precision="fp32")},
        {"flavor": "rtx"},
        {"version": "10.16.1"},
        {"flags": {"optimization_level": 2}},
        *({"target": tensorrt_target(replace(ORIN, **each))} for each in (
            {"name": "Orin Nano"}, {"compute_capability": "8.6"}, {"driver": "R39"},
            {"cuda": "13.0"},
        )),
    ]  # fmt: skip
    identities = [graph_identity(**given_), *(graph_identity(**{**given_, **c}) for c in changes)]
    assert len(set(identities)) == len(changes) + 1
    assert graph_identity(**given_) == identities[0]


@pytest.fixture
def rtx(half_bundle) -> tuple[Bundle, Compiled, Flavor]:
    """Plans for two RTX generations, as the manifest would list them, and what built them."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed")
    flavor = load_flavor("rtx")
    target = rtx_target(("8.6", "8.9"))
    return half_bundle, compiled_by_hand(half_bundle, "rtx", flavor.version, target), flavor


def test_a_plan_made_for_this_gpu_by_this_version_passes(rtx):
    bundle, compiled, flavor = rtx
    path = check_engine(bundle, compiled, TEXT, flavor, RTX_3090)
    assert path == bundle.root / "trt-rtx" / "text_encoder.plan"


def test_a_plan_for_another_gpu_is_refused_with_the_line_that_rebuilds(rtx):
    bundle, compiled, flavor = rtx
    blackwell = replace(RTX_3090, name="RTX 5090", compute_capability="12.0")
    error = refusal(lambda: check_engine(bundle, compiled, TEXT, flavor, blackwell), RuntimeFailure)
    assert error.message == (
        "the plans were built for compute capability 8.6,8.9, this is RTX 5090 (compute capability "
        "12.0)"
    )
    assert error.next_step == (
        f"Rebuild with: tiue-export trt --bundle {bundle.root} --flavor rtx --sm 120"
    )


@pytest.mark.parametrize(
    ("compute_capability", "runs"),
    [("7.5", False), ("8.0", True), ("8.7", False), ("9.0", False), ("12.1", True), ("13.0", True)],
)
def test_portable_rtx_plans_run_on_ampere_and_on_what_comes_later(rtx, compute_capability, runs):
    bundle, _, flavor = rtx
    compiled = compiled_by_hand(bundle, "rtx", flavor.version, rtx_target(()))
    gpu = replace(RTX_3090, compute_capability=compute_capability)
    if runs:
        check_engine(bundle, compiled, TEXT, flavor, gpu)
    else:
        refusal(lambda: check_engine(bundle, compiled, TEXT, flavor, gpu), RuntimeFailure)


def test_a_plan_of_another_version_is_refused(rtx):
    bundle, compiled, flavor = rtx
    newer = replace(flavor, version="9.9.9")
    error = refusal(lambda: check_engine(bundle, compiled, TEXT, newer, RTX_3090), RuntimeFailure)
    assert error.message == (
        f"the plans were built for TensorRT-RTX {flavor.version}, this is 9.9.9"
    )
    assert error.next_step.startswith("Rebuild with: tiue-export trt --bundle ")


def test_a_plan_of_the_other_flavour_is_refused(rtx):
    bundle, compiled, _ = rtx
    other = Flavor("tensorrt", None, "10.3.0")
    error = refusal(lambda: check_engine(bundle, compiled, TEXT, other, ORIN), RuntimeFailure)
    assert "built by TensorRT-RTX" in error.message
    assert "this is TensorRT 10.3.0" in error.message


def test_a_plan_of_an_earlier_graph_is_stale(rtx):
    bundle, compiled, flavor = rtx
    record = bundle.manifest.graphs[TEXT]
    files = {name: replace(file, sha256="f" * 64) for name, file in record.files.items()}
    graphs = {**bundle.manifest.graphs, TEXT: replace(record, files=files)}
    changed = Bundle(bundle.root, replace(bundle.manifest, graphs=graphs))
    error = refusal(lambda: check_engine(changed, compiled, TEXT, flavor, RTX_3090), BundleError)
    assert "the plan of text_encoder was built from another text_encoder/model.onnx" in (
        error.message
    )


def test_missing_plans_and_a_missing_gpu_are_said_to_be_missing(rtx, half_bundle):
    bundle, compiled, flavor = rtx
    without = replace(compiled, graphs={})
    error = refusal(lambda: check_engine(bundle, without, TEXT, flavor, RTX_3090), BundleError)
    assert "has no TensorRT-RTX" in error.message
    assert "plan for text_encoder" in error.message
    error = refusal(lambda: check_engine(bundle, compiled, TEXT, flavor, None), RuntimeFailure)
    assert error.message.startswith("no NVIDIA GPU or no driver was found")
    error = refusal(lambda: compiled_for(half_bundle, "tensorrt"), BundleError)
    assert error.message == f"{half_bundle.root} has no TensorRT plans"
    manifest = replace(bundle.manifest, compiled={"trt-rtx": compiled})
    error = refusal(lambda: compiled_for(Bundle(bundle.root, manifest), "tensorrt"), BundleError)
    assert error.message.endswith("has no TensorRT plans; it has plans of TensorRT-RTX")


def tensorrt_plan(bundle: Bundle, version: str, **flags) -> Compiled:
    return compiled_by_hand(bundle, "tensorrt", version, tensorrt_target(ORIN), **flags)


@pytest.mark.parametrize(
    ("built", "here", "compatible", "runs"),
    [
        ("10.3.0", "10.3.0", False, True),
        ("10.3.0", "10.16.1", False, False),
        ("10.3.0", "10.16.1", True, True),
        ("10.16.1", "10.3.0", True, False),
        ("10.3.0", "11.4.1", True, True),
        ("10.3.0", "12.0.0", True, False),
    ],
)
def test_version_compatible_plans_run_on_newer_tensorrt_as_its_matrix_says(
    half_bundle, built, here, compatible, runs
):
    compiled = tensorrt_plan(half_bundle, built, version_compatible=compatible)
    flavor = Flavor("tensorrt", None, here)
    if runs:
        check_engine(half_bundle, compiled, TEXT, flavor, ORIN)
    else:
        error = refusal(
            lambda: check_engine(half_bundle, compiled, TEXT, flavor, ORIN), RuntimeFailure
        )
        assert f"built for TensorRT {built}, this is {here}" in error.message


def test_a_plan_belongs_to_its_gpu_and_platform_unless_it_is_hardware_compatible(half_bundle):
    flavor = Flavor("tensorrt", None, "10.3.0")
    fixed = tensorrt_plan(half_bundle, "10.3.0")
    error = refusal(
        lambda: check_engine(half_bundle, fixed, TEXT, flavor, RTX_3090), RuntimeFailure
    )
    assert error.message == (
        "the plans were built for Orin (compute capability 8.7), this is NVIDIA GeForce RTX 3090 "
        "(compute capability 8.6)"
    )
    updated = replace(ORIN, driver="R39, REVISION: 2.0")
    error = refusal(lambda: check_engine(half_bundle, fixed, TEXT, flavor, updated), RuntimeFailure)
    assert error.message == (
        "the plans were built with driver R36, REVISION: 4.7, this is R39, REVISION: 2.0"
    )
    portable = tensorrt_plan(half_bundle, "10.3.0", hardware_compatible=True)
    check_engine(half_bundle, portable, TEXT, flavor, RTX_3090)
    turing = replace(RTX_3090, compute_capability="7.5")
    error = refusal(
        lambda: check_engine(half_bundle, portable, TEXT, flavor, turing), RuntimeFailure
    )
    assert "for Ampere and newer" in error.message
    target = {**tensorrt_target(ORIN), "platform": "plan9-mips"}
    foreign = compiled_by_hand(half_bundle, "tensorrt", "10.3.0", target)
    error = refusal(lambda: check_engine(half_bundle, foreign, TEXT, flavor, ORIN), RuntimeFailure)
    assert error.message == f"the plans were built on plan9-mips, this is {this_platform()}"


# --- flavours


def test_an_unknown_flavour_is_refused_with_the_names_there_are():
    error = refusal(lambda: load_flavor("trtx"), UsageError)
    assert error.message == ("unknown TensorRT flavour 'trtx'; there are: auto, rtx, tensorrt")


@pytest.mark.skipif("tensorrt" in installed_flavors(), reason="TensorRT is installed")
def test_a_flavour_that_is_not_installed_names_the_line_to_type():
    error = refusal(lambda: load_flavor("tensorrt"), MissingExtraError)
    assert (error.message, error.next_step) == (
        "TensorRT is not installed",
        flavor_install_line("tensorrt"),
    )


@needs_rtx
def test_rtx_names_the_gpus_it_builds_for():
    flavor = load_flavor("rtx")
    assert {"8.6", "8.9", "12.0"} <= set(flavor.compute_capabilities)
    assert flavor.title == f"TensorRT-RTX {flavor.version}"


@needs_rtx
def test_names_beyond_the_common_core_are_asked_for_and_others_are_not():
    flavor = load_flavor("rtx")
    assert all(flavor.has(name) for name in BEYOND_CORE)
    with pytest.raises(KeyError, match="not in BEYOND_CORE"):
        flavor.has("Builder")


# --- the ladder, progress, the inspector's words


@given(level=st.integers(0, 5), workspace_mb=st.integers(0, 200_000))
def test_the_ladder_of_settings_only_goes_down_and_ends(level, workspace_mb):
    request = EngineRequest("a", "b", "rtx", optimization_level=level, workspace_mb=workspace_mb)
    steps = 0
    while (lower := easier(request, request.workspace_mb)) is not None:
        assert (lower.optimization_level, lower.workspace_mb) < (
            request.optimization_level,
            request.workspace_mb,
        )
        request, steps = lower, steps + 1
    assert steps <= 20
    assert request.optimization_level == min(level, 1)


@pytest.mark.parametrize(
    ("text", "memory"),
    [
        ("Unexpected exception std::bad_alloc", True),
        ("Error Code 2: OutOfMemory (Requested size was 4229 MB)", True),
        ("Tactic Device request: 4229MB Available: 2658MB. Device memory is insufficient", True),
        ("NvMapMemAllocInternalTagged: error 12", True),
        ("Myelin (Unexpected exception Resource temporarily unavailable)", True),
        ("CUDA initialization failure with error: 35", False),
        ("Could not find any implementation for node", False),
    ],
)
def test_running_out_of_memory_is_recognised_in_the_words_of_each_library(text, memory):
    assert is_memory_error(text) is memory


@given(st.lists(st.tuples(st.sampled_from("sdf"), st.sampled_from("abcd"), st.integers(0, 9))))
def test_progress_lies_between_0_and_1_and_never_falls(events):
    tree, seen = PhaseTree(), [0.0]
    for kind, phase, number in events:
        if kind == "s":
            tree.start(phase, "abcd"[number % 4], number)
        elif kind == "d":
            tree.step(phase, number)
        else:
            tree.finish(phase)
        seen.append(tree.fraction)
    assert seen == sorted(seen)
    assert seen[-1] <= 1.0


def test_progress_counts_inner_phases_as_parts_of_the_step_they_belong_to():
    tree = PhaseTree()
    tree.start("build", None, 4)
    tree.step("build", 0)
    tree.start("optimize", "build", 2)
    assert tree.fraction == 0.25
    tree.step("optimize", 0)
    assert tree.fraction == 0.375


def test_the_inspector_is_read_in_the_layouts_of_tensorrt_10_and_11():
    old = {
        "Layers": [
            {
                "Name": "conv",
                "LayerType": "CaskConvolution",
                "Outputs": [{"Format/Datatype": "Channel major FP16 format where C % 8 == 0"}],
            },
            {
                "Name": "norm",
                "LayerType": "kgen",
                "Outputs": [{"Format/Datatype": "Row major linear FP32"}],
            },
            {
                "Name": "copy",
                "LayerType": "Reformat",
                "Outputs": [{"Format/Datatype": "Row major linear FP16 format"}],
            },
        ],
        "Bindings": ["x"],
    }
    new = {
        "Layers": [
            {"LayerType": "conv", "Outputs": [{"DataType": "Half", "Format": "Row major"}]},
            {"LayerType": "norm", "Outputs": [{"DataType": "Float", "Format": "Row major"}]},
            {"LayerType": "Reformat", "Outputs": [{"DataType": "Half", "Format": "Row major"}]},
        ],
        "I/O Tensors": [{"Name": "x", "DataType": "Float"}],
    }
    expected = Census({"half": 1, "float": 1}, {}, casts=1)
    assert engine_census(json.dumps(old)) == engine_census(json.dumps(new)) == expected
    assert engine_census('{"Layers": ["conv", "norm"]}') is None
    assert engine_census("not json") is None


# --- refitting


def test_refitting_is_refused_where_it_cannot_be_done(half_bundle, tiny_bundle, rtx):
    bundle, compiled, flavor = rtx

    def holding(**flags) -> Bundle:
        form = compiled_by_hand(half_bundle, "rtx", flavor.version, compiled.target, **flags)
        return Bundle(bundle.root, replace(bundle.manifest, compiled={"trt-rtx": form}))

    for old, new, kind, part in (
        (half_bundle, tiny_bundle, BundleError, "has no TensorRT engines to refit"),
        (holding(refit=False), tiny_bundle, BundleError, "were built without --refit"),
    ):
        error = refusal(lambda old=old, new=new: refit_from(old, new), kind)
        assert part in error.message
        assert error.next_step
    if this_device() is None:
        error = refusal(lambda: refit_from(holding(refit=True), tiny_bundle), RuntimeFailure)
        assert error.message.startswith("refitting opens the engines, which needs their GPU")


# --- the command line


@needs_rtx
def test_the_command_builds_and_prints_sizes_times_and_precision(run, small):
    code, out, err = run("trt", "--bundle", small.root, "--flavor", "rtx", "--sm", "86")
    assert code == 0, err
    assert "norm statistics: 5" in out
    assert "1 built in" in out
    assert "build text_encoder" in err
    code, out, err = run("trt", "--bundle", small.root, "--flavor", "rtx", "--sm", "86", "--json")
    data = json.loads(out)
    assert (code, err, data["built"]) == (0, "", [])
    assert data["compiled"]["trt-rtx"]["graphs"][TEXT]["report"]["layers_half"] == 49
    code, out, _ = run("inspect", small.root)
    assert "compute_capabilities 8.6" in out


@needs_rtx
def test_a_dry_run_prints_the_plan_and_builds_nothing(run, small):
    code, out, _ = run(
        "trt", "--bundle", small.root, "--flavor", "rtx", "--sm", "12.0", "--dry-run"
    )
    assert code == 0
    for part in ("nothing was built", "to build", "compute_capabilities 12.0", "fp16", "batch 1"):
        assert part in out
    assert open_bundle(small.root).manifest.compiled == {}
    code, out, _ = run(
        "trt", "--bundle", small.root, "--flavor", "rtx", "--sm", "86", "--dry-run", "--json"
    )
    assert json.loads(out)["to_build"] == [TEXT]


@needs_rtx
@no_gpu
def test_the_command_explains_what_it_cannot_do(run, small, tiny_pipeline):
    refit = ["trt", "--bundle", small.root, "--refit-from", "x"]
    bundle = ["trt", "--bundle", small.root, "--flavor", "rtx"]
    for arguments, code, part in (
        (["trt"], 2, "give a checkpoint or a bundle, one of them"),
        ([*bundle, "--ckpt", tiny_pipeline], 2, "give a checkpoint or a bundle, one of them"),
        ([*bundle, "--sm", "90"], 2, "cannot build for compute capability 9.0; it can for 7.5"),
        ([*bundle, "--sm", "ada"], 2, "--sm 'ada' is no compute capability"),
        ([*bundle, "--batch", "1:2"], 2, "--batch is '1:2'; expected one number, or min:opt:max"),
        ([*bundle, "--method", "faster"], 2, "--method is for the export of a checkpoint"),
        ([*bundle, "--max-decoder-rows", "4"], 2, "--max-decoder-rows is for a model in a loop"),
        ([*refit, "--steps", "2"], 2, "--steps is decided by"),
        ([*refit, "--max-decoder-rows", "4"], 2, "--max-decoder-rows is decided by"),
        ([*bundle, "--precision", "fp32"], 2, "--precision is fp32, but the graphs of"),
        (refit, 6, "has no TensorRT engines to refit"),
        (["trt", "--ckpt", tiny_pipeline, "--refit-from", "x"], 2, "takes engines that are there"),
        (["trt", "--ckpt", tiny_pipeline, "--flavor", "rtx", "--sm", "90"], 2, "cannot build for"),
    ):
        got, _, err = run(*arguments)
        assert (got, part in err) == (code, True), err
        assert "Traceback" not in err
    if "tensorrt" not in installed_flavors():
        code, _, err = run("trt", "--bundle", small.root, "--flavor", "tensorrt")
        assert (code, "TensorRT is not installed" in err) == (8, True)
        assert f"next: {flavor_install_line('tensorrt')}" in err


@pytest.mark.slow
@needs_rtx
def test_from_a_checkpoint_it_exports_in_half_and_builds(run, micro_folder):
    arguments = ["trt", "--ckpt", micro_folder, "--out", "fox", "--flavor", "rtx"]
    code, out, err = run(*arguments, "--sm", "86")
    assert code == 0, err
    manifest = open_bundle("fox").manifest
    assert manifest.precision == "fp16"
    assert list(manifest.compiled["trt-rtx"].graphs) == ["unet_encoder", "unet_decoder"]
    assert "2 built in" in out
    decoder = manifest.compiled["trt-rtx"].graphs["unet_decoder"].report
    assert "weighted sum into a float output" in decoder["float_because"]
    code, _, err = run(*arguments)
    assert code == 6
    assert "tiue-export trt --bundle fox" in err


def test_doctor_says_which_tensorrt_is_here_and_what_to_type(run):
    code, out, _ = run("doctor", "--json")
    rows = {row["name"]: row for row in json.loads(out)["backends"]}
    assert code == 0
    for flavor, name in (("tensorrt", "TensorRT"), ("rtx", "TensorRT-RTX")):
        row = rows[f"build and run: {name}"]
        if flavor not in installed_flavors():
            assert (row["usable"], row["remedy"]) == (False, flavor_install_line(flavor))
        assert row["detail"].startswith(name)


def test_exit_codes_of_the_child_are_its_own():
    assert len({0, 1, NOT_PARSED, OUT_OF_MEMORY}) == 4
    assert ResourceError.exit_code == 10
