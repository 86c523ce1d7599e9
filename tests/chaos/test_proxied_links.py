"""Links that are late, slow, silent or broken off, by a proxy between two parts of the mesh."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import pytest
import pytest_asyncio
from support.chaos import DEMO_MODEL, MANY, NUM_LASTING, WAITING, loaded, watched
from support.proxy import TcpProxy
from support.template import fork_worker
from support.thorough import more

from benchmarks.recovery.load import Truth
from benchmarks.recovery.part import free_address
from benchmarks.recovery.parts_mesh import MeshShape, PartsMesh

pytestmark = pytest.mark.timeout(180)

FEW = MANY[:12]


@dataclass
class Wires:
    """Two stages; `between` carries what the first sends to the second, `control` what the second
    worker and the scheduler tell each other, `front` what the gateway and the scheduler do."""

    mesh: PartsMesh
    between: TcpProxy
    control: TcpProxy
    front: TcpProxy


@pytest.fixture(scope="module")
def wiring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wires]:
    scheduler, second = free_address(), free_address()
    shape = MeshShape(
        model=DEMO_MODEL, stages=2, scheduler_options=("--listen", scheduler, *WAITING)
    )
    mesh = PartsMesh(shape, tmp_path_factory.mktemp("wires"), fork_worker)
    with contextlib.ExitStack() as stack:
        stack.callback(mesh.end)
        between, control, front = (
            stack.enter_context(TcpProxy(target)) for target in (second, scheduler, scheduler)
        )
        mesh.add_worker("worker-0", scheduler, "--layers", "0:3")
        mesh.add_worker(
            *("worker-1", control.address, "--layers", "3:6"),
            *("--listen", second, "--advertise", between.address),
        ).listening = lambda facts: ()
        mesh.add_gateway("gateway-0", front.address)
        yield Wires(mesh, between, control, front)


@pytest_asyncio.fixture
async def wires(wiring: Wires) -> AsyncIterator[Wires]:
    async with watched(wiring.mesh):
        yield wiring


async def test_faults_of_the_link_between_two_stages(wires: Wires, truth: Truth) -> None:
    """One after another on the same mesh: late, slow, reset twice, half closed."""
    mesh, link = wires.mesh, wires.between
    async with loaded(mesh, truth, FEW):
        link.delay_s = 0.05
    link.delay_s = 0.0
    async with loaded(mesh, truth, FEW):
        link.bytes_per_s = 200_000.0
    link.bytes_per_s = float("inf")
    before = (await mesh.status()).pipelines[0].epoch.n

    async def noticed(num_faults: int) -> None:
        """Tokens may come of steps that were past the link: only an epoch says that it is new."""
        await mesh.until(
            lambda s: s.pipelines[0].serving and s.pipelines[0].epoch.n >= before + num_faults,
            f"{num_faults} faults to be mended",
        )

    async with loaded(mesh, truth, FEW) as load:
        link.reset()
        await noticed(1)
        await load.until_more_tokens(NUM_LASTING)
        link.reset()
    await noticed(2)
    async with loaded(mesh, truth, FEW):
        link.half_close()
    await noticed(3)


async def test_a_silent_link_between_two_stages_is_found(wires: Wires, truth: Truth) -> None:
    """Nothing is lost on the way, nothing comes either, and no one is told."""
    mesh, link = wires.mesh, wires.between
    before = (await mesh.status()).pipelines[0].epoch.n
    async with loaded(mesh, truth, FEW):
        link.is_stalled = True
        await mesh.until(
            lambda s: not s.pipelines[0].serving or s.pipelines[0].epoch.n > before,
            "the silence to be noticed",
            timeout_s=6.0,
        )
        link.is_stalled = False


@pytest.mark.parametrize("fault", ["reset", "stall", *more("half_close")])
async def test_faults_of_the_control_stream(wires: Wires, truth: Truth, fault: str) -> None:
    async with loaded(wires.mesh, truth, FEW) as load:
        await break_for_a_while(wires, wires.control, fault)
        await load.until_more_tokens(1)


@pytest.mark.parametrize("fault", [*more("reset", "stall"), "half_close"])
async def test_faults_of_the_gateways_link(wires: Wires, truth: Truth, fault: str) -> None:
    async with loaded(wires.mesh, truth, FEW) as load:
        await break_for_a_while(wires, wires.front, fault)
        await load.until_more_tokens(1)


async def break_for_a_while(wires: Wires, link: TcpProxy, fault: str) -> None:
    if fault == "reset":
        link.reset()
    elif fault == "half_close":
        link.half_close()
    else:
        workers, gateways = len(wires.mesh.workers), len(wires.mesh.gateways)
        link.is_stalled = True
        await wires.mesh.until(
            lambda s: len(s.workers) < workers or s.num_gateways < gateways,
            "the scheduler to miss somebody",
            timeout_s=6.0,
        )
        link.is_stalled = False
