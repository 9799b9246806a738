"""Whether what a command takes fits into the machine, and which option would make it fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from ffnscope.calibrate.forward import input_device
from ffnscope.calibrate.parallel import n_processes, n_processes_here
from ffnscope.ffn.load import LoadedModel, ModelSource, load_model, resolve_device, stored_bytes
from ffnscope.ffn.main_memory import main_memory
from ffnscope.run.bounds import (
    ALONE,
    Bytes,
    Processes,
    Setting,
    Shapes,
    Workload,
    all_stage_bytes,
    setting_of,
    shapes_of,
)
from ffnscope.run.machine import device_memory
from ffnscope.types import FFNSite

GIB = 2**30

COMMAND = {
    "batch": "--batch-size 1",
    "dtype": "--dtype bfloat16",
    "stream": "--stream {}",
    "device_map": "--device-map auto",
}
"""Options of a command."""
FILE = {
    "batch": "--set calibration.batch_size=1 --set dataset.batch_size=1",
    "dtype": "--set model.dtype=bfloat16",
    "stream": "--set model.stream={}",
    "device_map": "--set model.device_map=auto",
}
"""The same for ``ffnscope run``."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Memory in bytes; None where it is not known.

    Attributes:
        ram: main memory that this process may use.
        device: memory of the accelerator that computes; None where the CPU does.
        libraries: main memory that a process takes without a model.
        processes: that share the windows.
    """

    ram: int | None
    device: int | None = None
    libraries: int = 0
    processes: Processes = ALONE

    @property
    def held(self) -> int:
        """Main memory that all processes here take without a model."""
        return self.libraries * self.processes.here


@dataclass(frozen=True, slots=True)
class Need:
    """Largest stages of a way to run a command.

    Attributes:
        switch: options in words; empty = as asked.
        stage: the one that takes most on the device that computes.
        device: bytes there; in main memory where the CPU computes, libraries included.
        host: bytes of main memory beside it.
        disk: bytes on disk for the time being.
    """

    switch: str
    stage: str
    device: int
    host: int = 0
    disk: int = 0

    def fits(self, machine: Machine) -> bool:
        """Whether it does, as far as the memory is known."""
        if machine.device is None:
            return machine.ram is None or self.device <= machine.ram
        return self.device <= machine.device and (machine.ram is None or self.host <= machine.ram)

    def told(self) -> str:
        """The numbers in words."""
        found = f"{self.device / GIB:.2f} GiB"
        if self.host:
            found += f" and {self.host / GIB:.2f} GiB of main memory"
        return found + (f", {self.disk / GIB:.2f} GiB on disk meanwhile" if self.disk else "")


def machine_of(model: Any, libraries: int) -> Machine:
    """The memory of this machine, of the device on which a model computes."""
    device, here = input_device(model), n_processes_here()
    on_device = -(-here // torch.cuda.device_count()) if device.type == "cuda" else here
    processes = Processes(n_processes(), here, on_device)
    return Machine(main_memory(), device_memory(device), libraries, processes)


def need(
    shapes: Shapes, work: Workload, setting: Setting, machine: Machine, switch: str = "", *, spread: bool = False
) -> Need:
    """What the largest stage takes; with ``spread`` weights that the device does not hold are in main memory."""
    stages = all_stage_bytes(shapes, work, setting, machine.processes)
    stage, peak = max(stages.items(), key=lambda item: item[1].device)
    host, disk = (max(getattr(size, name) for size in stages.values()) for name in ("host", "disk"))
    device = peak.device
    if not shapes.accelerator:
        return Need(switch, stage, device + machine.held, 0, disk)
    if spread:
        over = min(shapes.weights * setting.item, max(0, device - (machine.device or device)))
        device, host = device - over, host + over * machine.processes.here
    return Need(switch, stage, device, host + machine.held, disk)


def alternatives(
    shapes: Shapes, work: Workload, setting: Setting, machine: Machine, names: Mapping[str, str]
) -> list[Need]:
    """Other ways to run it, those that change least first: batches, placement, streaming, and the dtype last.

    Only bfloat16 changes results beyond rounding, so it is after the others, also together with them.
    """
    found: list[Need] = []
    small = replace(setting, batch=1)
    texts = (work.forward, work.backward, work.held_out, work.curves)
    batches = any(load.batch > 1 and load.tokens for load in texts)

    def offer(setting: Setting, *switches: str, spread: bool = False) -> None:
        found.append(need(shapes, work, setting, machine, " ".join(switches), spread=spread))

    if machine.processes.here > 1:
        found.append(need(shapes, work, setting, replace(machine, processes=ALONE), "a single process"))
    if batches:
        offer(small, names["batch"])
    needs_weights = work.contextual > 0
    if shapes.accelerator and setting.stream is None and not (setting.elsewhere or needs_weights):
        offer(setting, names["device_map"], spread=True)
    places = [place for place in ("device", "cpu", "disk") if place != "device" or shapes.accelerator]
    for place in places if shapes.block and not needs_weights else []:
        if (setting.stream, place) in ((None, place), ("device", "cpu"), ("device", "disk"), ("cpu", "disk")):
            switch = names["stream"].format(place)
            offer(replace(setting, stream=place), switch)
            if batches and place == "disk":
                offer(replace(small, stream=place), switch, names["batch"])
    if setting.item > 2:
        offer(replace(setting, item=2), names["dtype"])
        if shapes.block and setting.stream != "disk" and not needs_weights:
            offer(Setting(2, "disk", 1), names["stream"].format("disk"), names["batch"], names["dtype"])
    return found


def peak_line(asked: Need, machine: Machine) -> str:
    """The peak of the largest stage, how much memory there is, and whether it fits."""
    limit, place = (machine.ram, "main memory") if machine.device is None else (machine.device, "the device's memory")
    first = f"peak memory about {asked.told()}, in stage {asked.stage}"
    if limit is None:
        return f"{first}; how much memory there is could not be found out"
    first += f"; there are {limit / GIB:.2f} GiB of {place}"
    if asked.host and machine.ram is not None:
        first += f" and {machine.ram / GIB:.2f} GiB of main memory"
    return f"{first}: it {'fits' if asked.fits(machine) else 'does NOT fit'}"


@dataclass(frozen=True, slots=True, eq=False)
class Bounds:
    """Bounds of a command on a model as it is loaded: see `bounds_of`."""

    shapes: Shapes
    work: Workload
    setting: Setting
    machine: Machine

    @property
    def stages(self) -> dict[str, Bytes]:
        """Peak of every kind of stage; on the CPU with the libraries."""
        held = 0 if self.shapes.accelerator else self.machine.held
        found = all_stage_bytes(self.shapes, self.work, self.setting, self.machine.processes)
        return {stage: replace(size, device=size.device + held) for stage, size in found.items()}

    @property
    def need(self) -> Need:
        """What it takes as asked."""
        return need(self.shapes, self.work, self.setting, self.machine)

    @property
    def fits(self) -> bool:
        """Whether it does as asked, as far as the memory is known."""
        return self.need.fits(self.machine)

    def told(self, names: Mapping[str, str]) -> list[str]:
        """Lines: the peak of every stage, whether it fits, and what would make it fit."""
        peaks = ", ".join(f"{stage} {size.device / GIB:.2f} GiB" for stage, size in self.stages.items())
        here = self.machine.processes.here
        of = "" if here == 1 else f" of {here} processes on this machine together"
        return [f"memory by stage{of}: {peaks}", *self.advice(names)]

    def advice(self, names: Mapping[str, str]) -> list[str]:
        """Lines: whether it fits, and if not, what each option would take, those that fit first."""
        asked, machine = self.need, self.machine
        first = peak_line(asked, machine)
        if asked.fits(machine):
            return [first]
        found = alternatives(self.shapes, self.work, self.setting, machine, names)
        fitting = [one for one in found if one.fits(machine)]
        if fitting:
            return [first, *(f"  {one.switch} would take {one.told()}: fits" for one in fitting)]
        least = min(found, key=lambda one: one.device, default=None)
        told = "" if least is None else f" (the least, {least.switch}: {least.told()}, in stage {least.stage})"
        return [f"{first}, and no option would make it fit{told}"]


def bounds_of(loaded: LoadedModel, sites: Sequence[FFNSite], work: Workload, libraries: int) -> Bounds:
    """Bounds of a command on this model; ``libraries``: main memory in bytes before it was loaded."""
    return Bounds(shapes_of(loaded.model, sites), work, setting_of(loaded), machine_of(loaded.model, libraries))


def load_to_estimate(source: ModelSource) -> LoadedModel:
    """Load a model of which only shapes are needed: without its weights, where they would take half of the memory.

    The result's ``source`` is the one that was asked for.

    Raises:
        ModelError, DeviceError, UsageError: as `load_model`.
    """
    if source.stream is None and source.device_map is None:
        size, ram = stored_bytes(source), main_memory()
        device = device_memory(resolve_device(source.device))
        limit = min((one for one in (ram, device) if one is not None), default=None)
        if size is not None and limit is not None and 2 * size > limit:
            return replace(load_model(replace(source, stream="device")), source=source)
    return load_model(source)


def print_advice(bounds: Bounds, names: Mapping[str, str], console: Console) -> None:
    """Print `Bounds.told`."""
    for line in bounds.told(names):
        console.print(Text(line))
