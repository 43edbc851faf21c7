"""One driver for every backend: the graphs of a bundle in the backend's form, proven, then listed.

A backend is a small value that fills `Backend`: it says what must hold, what decides a graph's form
and how one is made. All that is alike is done here: refusing what is there already, a fresh folder
for what is unfinished, time and memory of each graph, the proof on captured inputs, and the
manifest, which lists a form when it has passed. Loads without torch: a Jetson builds engines.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Protocol

from tiue_export.bundle.manifest import (
    Compiled,
    CompiledGraph,
    GraphRecord,
    Manifest,
    ParityRecord,
)
from tiue_export.bundle.read import Bundle, file_records
from tiue_export.bundle.write import add_compiled, compiled_folder, link_or_copy
from tiue_export.errors import BundleError, TiueError
from tiue_export.proof.gates import accept_loss
from tiue_export.proof.parity import WHOLE, load_reference, measure_runtime, require_passed
from tiue_export.registry.backends import open_runtime
from tiue_export.registry.support import require_support
from tiue_export.specs import RuntimeOptions
from tiue_export.system.machine import memory_bytes
from tiue_export.system.progress import Observer, stage


@dataclass(frozen=True)
class GraphForm:
    """One graph as a backend left it; names are relative to the folder of the form.

    `path` is the file that a runtime opens, `files` all that it needs, `report` the backend's own
    figures beside time and peak memory, `parity` what was proven while it was made. A child process
    that made it tells its peak memory in bytes.
    """

    path: str
    files: Sequence[str]
    report: Mapping[str, str | int | float] = field(default_factory=dict)
    parity: tuple[ParityRecord, ...] = ()
    peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class Workshop:
    """Where a form is made: of `bundle`, into the unfinished `folder`, heard of by `observer`."""

    bundle: Bundle
    folder: Path
    observer: Observer


Convert = Callable[[str], GraphForm]


class Backend(Protocol):
    """How the graphs of a bundle get one backend's form, from its ONNX files or from the student.

    `runtime` is the name of the runtime that proves it, `title` what a bundle then has, `verb` what
    happens to a graph. `reads_onnx`: the bundle must hold its ONNX files. `in_child`: a child
    process makes each graph, and this one needs no psutil. `resumes`: forms of unchanged identity
    are kept, and each is listed as soon as it is made. `keeps_finished`: all are proven together,
    but those that were finished when a later one failed are listed, for a run that makes the rest;
    its runtime refuses what lacks graphs.
    """

    runtime: ClassVar[str]
    title: ClassVar[str]
    verb: ClassVar[str] = "convert"
    reads_onnx: ClassVar[bool] = True
    in_child: ClassVar[bool] = False
    resumes: ClassVar[bool] = False
    keeps_finished: ClassVar[bool] = False

    @property
    @abstractmethod
    def folder(self) -> str:
        """Where the form lies in a bundle, and what the manifest lists it as."""

    def if_lost(self, failed: ParityRecord) -> str:
        """What to type when a gate fails; nothing that was typed already."""
        return accept_loss()

    def check(self, bundle: Bundle) -> None:
        """Refuse, before any work, what cannot be done for this bundle or with these packages."""
        return

    @abstractmethod
    def form(self, bundle: Bundle) -> Compiled:
        """What the form will be, still without graphs: compiler, version, target, flags."""

    @abstractmethod
    def identity(self, bundle: Bundle, graph: str) -> str:
        """SHA-256 over all that decides the form of a graph; see `form_identity`."""

    @abstractmethod
    def converter(self, workshop: Workshop) -> AbstractContextManager[Convert]:
        """What makes the form of a graph, by its name, for as long as the context lasts."""

    def graphs(self, bundle: Bundle) -> tuple[str, ...]:
        """The graphs that get a form, in the order in which they are made."""
        return tuple(bundle.manifest.graphs)

    def trials(self) -> tuple[RuntimeOptions, ...]:
        """How the runtime is opened for the proof, once each; none where making proves."""
        return ()

    def scope(self) -> str:
        """How much of a drawing the proof runs: one of `parity.SCOPES`."""
        return WHOLE

    def conclude(self, bundle: Bundle, records: Sequence[ParityRecord]) -> list[ParityRecord]:
        """What follows from what the proof measured, as further records."""
        return []


def compile_form(
    bundle: Bundle,
    backend: Backend,
    *,
    force: bool = False,
    allow_parity_loss: bool = False,
    observer: Observer | None = None,
) -> Bundle:
    """Make and prove the form of every graph; returns the bundle with it.

    Raises what the backend raises, `BundleError` when there is such a form already (unless `force`,
    or the backend resumes), `ParityError` when a gate fails (unless `allow_parity_loss`; the
    records then say so). A failure leaves the bundle as it was, with what a backend that resumes or
    keeps had finished.
    """
    backend.check(bundle)
    require_support(backend.runtime, bundle)
    existing, form = bundle.manifest.compiled.get(backend.folder), backend.form(bundle)
    names = backend.graphs(bundle)
    # Left by a run that failed half way, with the same settings.
    unfinished = (
        existing is not None
        and not set(names) <= existing.graphs.keys()
        and _same_settings(existing, form)
    )
    if existing is not None and not (force or backend.resumes or unfinished):
        raise BundleError(
            f"{bundle.root} has {backend.title} already", "Pass --force to make them again."
        )
    identities = {name: backend.identity(bundle, name) for name in names}
    to_make = graphs_to_make(existing, identities, force=force)
    if backend.reads_onnx:
        for name in to_make:
            bundle.graph_path(name)
    # A complete set with other settings is worth more than a part of the new one.
    at_once = existing is not None and (force or not _same_settings(existing, form))
    keeps = backend.keeps_finished and not at_once
    run = _Run(backend, form, identities, allow_parity_loss, keeps, observer or Observer())
    rounds = [(name,) for name in to_make] if backend.resumes and not at_once else [to_make]
    for graphs in filter(None, rounds):
        bundle = run.add(bundle, graphs)
    return bundle


def graphs_to_make(
    existing: Compiled | None, identities: Mapping[str, str], *, force: bool = False
) -> tuple[str, ...]:
    """The graphs, of those with an identity, whose existing form is absent, stale or unwanted."""
    valid = {} if existing is None or force else existing.graphs
    return tuple(
        name
        for name, identity in identities.items()
        if name not in valid or valid[name].identity != identity
    )


def form_identity(bundle: Bundle, graph: str, **decides: object) -> str:
    """SHA-256 over a graph's ONNX files and all else that decides its compiled form.

    Where it has no ONNX files: over the weights, the plan and the contract that it is made from.
    """
    manifest = bundle.manifest
    record = manifest.graphs[graph]
    files = {name: file.sha256 for name, file in record.files.items()}
    made_from = {} if files else _made_from(manifest, record)
    content = json.dumps({"files": files, **made_from, **decides}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _made_from(manifest: Manifest, record: GraphRecord) -> dict[str, object]:
    return {
        "weights": [manifest.source.sha256, dict(manifest.source.part_sha256)],
        "plan": asdict(manifest.plan),
        "hoisted": manifest.hoisted,
        "contract": asdict(record),
        "created_by": manifest.created_by,
    }


def _same_settings(one: Compiled, other: Compiled) -> bool:
    """Whether two forms were made by the same compiler for the same target with the same flags."""
    return all(
        getattr(one, name) == getattr(other, name)
        for name in ("backend", "version", "target", "flags")
    )


@dataclass(frozen=True)
class _Run:
    """What stays the same while the graphs of one form are made."""

    backend: Backend
    form: Compiled
    identities: Mapping[str, str]
    allow_parity_loss: bool
    keeps_finished: bool
    observer: Observer

    def add(self, bundle: Bundle, names: Sequence[str]) -> Bundle:
        """Make some graphs, prove them, and list them beside the valid ones that are kept."""
        backend = self.backend
        with compiled_folder(bundle, backend.folder) as folder:
            graphs = self._keep(bundle, folder, names)
            records: list[ParityRecord] = []
            try:
                with backend.converter(Workshop(bundle, folder, self.observer)) as convert:
                    for name in names:
                        graphs[name], parity = self._make(folder, name, convert)
                        records += self._judged(parity)  # at once: the others may take many minutes
            except BaseException:  # an interrupt too
                if self.keeps_finished and graphs:
                    self._list_finished(bundle, folder, graphs)
                raise
            compiled = self._form_of(graphs)
            records += self._judged(
                self._prove(_trial_of(bundle, backend.folder, folder, compiled))
            )
            compiled = replace(compiled, parity=tuple(records))
            return add_compiled(bundle, backend.folder, folder, compiled, self.observer.on_note)

    def _form_of(self, graphs: Mapping[str, CompiledGraph]) -> Compiled:
        ordered = {name: graphs[name] for name in self.identities if name in graphs}
        return replace(self.form, graphs=ordered)

    def _list_finished(
        self, bundle: Bundle, folder: Path, graphs: Mapping[str, CompiledGraph]
    ) -> None:
        """List graphs that were made, unproven; what failed shall be told, not a failure here."""
        own = {Path(file).name for graph in graphs.values() for file in graph.files}
        with contextlib.suppress(OSError, TiueError):
            for path in folder.iterdir():
                if path.name not in own:
                    path.unlink()
            add_compiled(bundle, self.backend.folder, folder, self._form_of(graphs))
            self.observer.on_note(
                f"{', '.join(graphs)} {'is' if len(graphs) == 1 else 'are'} finished and kept: the "
                f"same options with --bundle {bundle.root} make the rest"
            )

    def _make(
        self, folder: Path, name: str, convert: Convert
    ) -> tuple[CompiledGraph, tuple[ParityRecord, ...]]:
        where, label = self.backend.folder, f"{self.backend.verb} {name}"
        with stage(self.observer, label, in_child=self.backend.in_child) as running:
            made = convert(name)
            files = file_records(folder, made.files)
            running.size_bytes = sum(record.size_bytes for record in files.values())
            if made.peak_memory_bytes is not None:
                running.peak_memory_bytes = made.peak_memory_bytes
        report: dict[str, str | int | float] = {
            "convert_s": round(running.seconds, 2),
            "peak_memory_bytes": running.peak_memory_bytes,
            **made.report,
        }
        listed = {f"{where}/{file}": record for file, record in files.items()}
        graph = CompiledGraph(f"{where}/{made.path}", self.identities[name], listed, report)
        return graph, made.parity

    def _keep(self, bundle: Bundle, folder: Path, names: Sequence[str]) -> dict[str, CompiledGraph]:
        """Bring the forms that stay into the new folder: hard links where the disk has them."""
        existing = bundle.manifest.compiled.get(self.backend.folder)
        kept = {}
        for name, graph in (existing.graphs if existing else {}).items():
            if name in names or graph.identity != self.identities.get(name):
                continue
            for file in graph.files:
                place = folder / Path(file).relative_to(self.backend.folder)
                link_or_copy(bundle.root / file, place)
            kept[name] = graph
        return kept

    def _prove(self, trial: Bundle) -> list[ParityRecord]:
        """Run the new form where it lies, on captured inputs."""
        records: list[ParityRecord] = []
        for options in self.backend.trials():
            precision = "" if options.precision == "auto" else f" in {options.precision}"
            label = f"verify{precision}"
            if crowds_memory(trial):
                options = replace(options, low_memory=True)
            with stage(self.observer, label):
                runtime = open_runtime(self.backend.runtime, trial, options)
                try:
                    on_step = self.observer.steps_of(label)
                    reference, scope = load_reference(trial), self.backend.scope()
                    records += measure_runtime(trial, runtime, reference, on_step, scope)
                finally:
                    runtime.close()
        return records + self.backend.conclude(trial, records)

    def _judged(self, records: Sequence[ParityRecord]) -> Sequence[ParityRecord]:
        if not self.allow_parity_loss:
            failed = next((record for record in records if not record.passed), None)
            if failed is not None:
                require_passed(list(records), self.backend.if_lost(failed))
        return records


# Of the weights in float32, what a runtime holds with all graphs open. OpenVINO, whose CPU plugin
# widens half precision, held more than 1.6 times SDXL's 13.6 GB and no longer ended in 24 GB.
_HELD = 2


def crowds_memory(bundle: Bundle) -> bool:
    """Whether all graphs at once would crowd this machine: then each is opened for its run."""
    total = memory_bytes()
    wide = sum(
        record.size_bytes * (1 if record.precision == "fp32" else 2)
        for record in bundle.manifest.graphs.values()
    )
    return total is not None and _HELD * wide > total


def _trial_of(bundle: Bundle, name: str, folder: Path, compiled: Compiled) -> Bundle:
    """The bundle as if `compiled`, whose files still lie in `folder`, were in place at NAME/.

    Runtimes read paths from the manifest: so they can prove what is not yet listed.
    """
    moved = {
        graph: replace(form, path=form.path.replace(name, folder.name, 1))
        for graph, form in compiled.graphs.items()
    }
    forms = {**bundle.manifest.compiled, name: replace(compiled, graphs=moved)}
    return Bundle(bundle.root, replace(bundle.manifest, compiled=forms))
