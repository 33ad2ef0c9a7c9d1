"""Pause, resume and end work in whatever state the vCPU is, and the guest loses nothing by it."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rig import ASK, SECONDS, Access, Rig

from kvmpy.core.board import Reason, Stop
from kvmpy.vcpu import KICK, VcpuThread

DONE = Stop(Reason.EXIT)
UNINITIALIZED, HALTED = 1, 3  # KVM_MP_STATE_*
A_MOMENT = 0.05  # seconds, for what must not happen, or will if it is given enough of them
TRIES = 200


def spinning(vm: Rig) -> VcpuThread:
    """In user mode, where nothing makes it leave the guest by itself."""
    vm.answer([1])
    vm.start("user")
    count = 0
    while not count:
        assert not threading.Event().wait(A_MOMENT)
        with vm.thread.paused() as vcpu:
            count = vcpu.regs().rbx
    return vm.thread


def halted_with_interrupts_on(vm: Rig) -> VcpuThread:
    vm.start("irq")
    vm.wait_mp_state(HALTED)
    return vm.thread


def halted_for_good(vm: Rig) -> VcpuThread:
    vm.start("halt")
    vm.wait_mp_state(HALTED)
    return vm.thread


def waiting_for_sipi(vm: Rig) -> VcpuThread:
    vm.start("halt", cpus=2)
    vm.wait_mp_state(UNINITIALIZED, cpu=1)
    return vm.threads[1]


def exiting_at_full_speed(vm: Rig) -> VcpuThread:
    vm.start("count")
    vm.board.wait_until(lambda: len(vm.board.log) > 10)
    return vm.thread


def paused_already(vm: Rig) -> VcpuThread:
    thread = exiting_at_full_speed(vm)
    thread.pause()
    assert thread.wait_paused(SECONDS)
    return thread


def not_started(vm: Rig) -> VcpuThread:
    vm.load("count")
    return vm.thread


def ended(vm: Rig) -> VcpuThread:
    thread = exiting_at_full_speed(vm)
    vm.finish()
    return thread


def ended_by_itself(vm: Rig) -> VcpuThread:
    assert vm.run("triple").reason is Reason.TRIPLE_FAULT
    return vm.thread


State = Callable[[Rig], VcpuThread]
STATES = [
    spinning,
    halted_with_interrupts_on,
    halted_for_good,
    waiting_for_sipi,
    exiting_at_full_speed,
    paused_already,
    not_started,
    ended,
    ended_by_itself,
]
any_state = pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)


@contextmanager
def other_threads(*targets: Callable[[], None]) -> Iterator[None]:
    """`targets` run on threads of their own beside the block, all of which come to their end."""
    threads = [threading.Thread(target=target, daemon=True) for target in targets]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()


@any_state
def test_pause_makes_it_stand_still(vm: Rig, state: State) -> None:
    thread = state(vm)

    thread.pause()

    assert thread.wait_paused(SECONDS)
    before = (thread.vcpu.regs(), len(vm.board.log))
    assert not threading.Event().wait(A_MOMENT)
    assert (thread.vcpu.regs(), len(vm.board.log)) == before


@any_state
def test_end_ends_it(vm: Rig, state: State) -> None:
    thread = state(vm)

    thread.end()

    assert thread.join(SECONDS)
    thread.vcpu.regs()


@any_state
def test_end_while_paused(vm: Rig, state: State) -> None:
    thread = state(vm)
    thread.pause()

    thread.end()

    assert thread.join(SECONDS)
    assert thread.wait_paused(SECONDS)
    thread.resume()


def test_resume_lets_it_go_on(vm: Rig) -> None:
    thread = exiting_at_full_speed(vm)
    with thread.paused():
        before = len(vm.board.log)

    vm.board.wait_until(lambda: len(vm.board.log) > before + 10)


def test_resume_lets_a_spinning_guest_go_on(vm: Rig) -> None:
    thread = spinning(vm)
    with thread.paused() as vcpu:
        before = vcpu.regs().rbx

    for _ in range(TRIES):
        assert not threading.Event().wait(A_MOMENT)
        with thread.paused() as vcpu:
            after = vcpu.regs().rbx
        if after > before:
            break

    assert after > before


def test_pauses_in_a_row_do_not_starve_the_guest(vm: Rig) -> None:
    vm.start("count")

    for _ in range(10000):
        with vm.thread.paused():
            seen = len(vm.board.log)
        if seen > 100:
            break

    assert seen > 100


def test_halted_guest_takes_interrupts_after_a_pause(vm: Rig) -> None:
    thread = halted_with_interrupts_on(vm)
    with thread.paused():
        vm.vm.irq_line(5, 1)

    vm.board.wait_until(lambda: vm.reports == [1, 0x35])


def test_other_cpu_starts_after_a_pause(vm: Rig) -> None:
    ask = threading.Event()

    def answer(address: int, size: int) -> int:
        assert ask.wait(SECONDS)
        return 2

    vm.board.answer = answer
    vm.start("smp", cpus=2)
    for _ in range(100):
        with vm.threads[1].paused() as vcpu:
            assert vcpu.mp_state() == UNINITIALIZED
    ask.set()

    assert vm.wait() == DONE
    assert sorted(vm.reports) == [0, 1]


def test_pause_before_the_start_holds_at_the_first_instruction(vm: Rig) -> None:
    vm.load("count")
    vm.thread.pause()
    vm.thread.start()

    assert vm.thread.wait_paused(SECONDS)
    assert not threading.Event().wait(A_MOMENT)
    assert vm.board.log == []
    vm.thread.resume()
    vm.board.wait_until(lambda: len(vm.board.log) > 10)


def test_end_before_the_start_prevents_it(vm: Rig) -> None:
    vm.load("count")
    vm.thread.end()
    vm.thread.start()

    assert vm.thread.join(SECONDS)
    assert vm.board.log == []


def test_nested_pauses(vm: Rig) -> None:
    thread = exiting_at_full_speed(vm)

    with thread.paused(), thread.paused():
        inner = len(vm.board.log)
    thread.pause()
    assert thread.wait_paused(SECONDS)
    thread.pause()
    thread.resume()
    outer = len(vm.board.log)
    assert not threading.Event().wait(A_MOMENT)
    assert len(vm.board.log) == outer >= inner
    thread.resume()

    vm.board.wait_until(lambda: len(vm.board.log) > outer)


def test_resume_without_a_pause_is_refused(vm: Rig) -> None:
    thread = exiting_at_full_speed(vm)

    with pytest.raises(RuntimeError, match="resume"):
        thread.resume()

    thread.pause()
    assert thread.wait_paused(SECONDS)


def test_a_thousand_pauses_lose_no_exit(vm: Rig) -> None:
    enough = threading.Event()
    vm.board.answer = lambda address, size: enough.is_set()
    vm.start("count")

    for cycle in range(1000):
        with vm.thread.paused() as vcpu:
            counted, reported = vcpu.regs().rbx, len(vm.reports)
            assert reported in (counted, counted - 1)  # between its INC and its OUT the guest is one ahead
        if cycle % 2:  # every other pause comes so early that the thread may not have woken from the last one
            vm.board.wait_more()
    enough.set()

    assert vm.wait() == DONE
    total = vm.reports[-1]
    assert vm.reports == [*range(1, total + 1), total]
    assert sum(a.address == ASK for a in vm.board.log) == total


def test_a_thousand_pauses_of_a_spinning_guest(vm: Rig) -> None:
    thread = spinning(vm)
    counts = []

    for cycle in range(1000):
        with thread.paused() as vcpu:
            counts.append(vcpu.regs().rbx)
            assert vcpu.sregs().cs.selector & 3 == 3
        if cycle % 100 == 0:
            assert not threading.Event().wait(A_MOMENT)

    assert counts == sorted(counts)
    assert counts[-1] > counts[0]


def test_pauses_from_several_threads_at_once(vm: Rig) -> None:
    enough = threading.Event()
    vm.board.answer = lambda address, size: enough.is_set()
    vm.start("count")
    moved: list[tuple[int, int]] = []

    def visit() -> None:
        for _ in range(200):
            with vm.thread.paused() as vcpu:
                seen = (vcpu.regs().rbx, len(vm.board.log))
                now = (vcpu.regs().rbx, len(vm.board.log))
                if seen != now:
                    moved.append((seen[0], now[0]))

    with other_threads(visit, visit, visit, visit):
        pass
    enough.set()

    assert vm.wait() == DONE
    assert moved == []
    total = vm.reports[-1]
    assert vm.reports == [*range(1, total + 1), total]


def test_state_can_be_changed_while_paused(vm: Rig) -> None:
    thread = spinning(vm)
    far = 1 << 60
    with thread.paused() as vcpu:
        regs = vcpu.regs()
        regs.rbx = far
        vcpu.set_regs(regs)

    with thread.paused() as vcpu:
        assert vcpu.regs().rbx >= far


@pytest.fixture
def held(vm: Rig) -> Iterator[threading.Event]:
    """The guest's first access is in a device that holds on until the event is set."""
    inside, release = threading.Event(), threading.Event()

    def hold(access: Access) -> None:
        inside.set()
        assert release.wait(SECONDS)

    vm.board.told = hold
    vm.start("count")
    assert inside.wait(SECONDS)
    yield release
    release.set()


def test_pause_waits_for_a_device_that_holds_the_vcpu(vm: Rig, held: threading.Event) -> None:
    vm.thread.pause()

    assert not vm.thread.wait_paused(A_MOMENT)
    held.set()
    assert vm.thread.wait_paused(SECONDS)
    assert len(vm.board.log) == 1


def test_end_while_a_device_holds_the_vcpu(vm: Rig, held: threading.Event) -> None:
    vm.thread.end()

    assert not vm.thread.join(A_MOMENT)
    held.set()
    assert vm.thread.join(SECONDS)
    assert len(vm.board.log) == 1  # no further instruction


def test_device_can_pause_its_own_vcpu(vm: Rig) -> None:
    seen: list[bool] = []

    def pause_once(access: Access) -> None:
        if len(vm.board.log) == 5:
            vm.thread.pause()
            seen.append(vm.thread.wait_paused(0))

    vm.board.told = pause_once
    vm.start("count")
    vm.board.wait_until(lambda: len(vm.board.log) == 5)
    with vm.thread.paused():
        assert len(vm.board.log) == 5
    vm.thread.resume()

    vm.board.wait_until(lambda: len(vm.board.log) > 5)
    assert seen == [True]


def test_device_can_end_its_own_vcpu(vm: Rig) -> None:
    vm.board.told = lambda access: vm.thread.end()

    vm.start("count")

    assert vm.thread.join(SECONDS)
    assert len(vm.board.log) == 1


def test_vcpus_pause_independently(vm: Rig) -> None:
    vm.load("count", cpus=2)
    first, second = vm.threads
    second.vcpu.set_mp_state(0)  # runnable, from the same entry
    second.vcpu.set_sregs(first.vcpu.sregs())
    second.vcpu.set_regs(first.vcpu.regs())
    vm.start()

    with first.paused() as vcpu:
        before, still = len(vm.board.log), vcpu.regs()
        vm.board.wait_until(lambda: len(vm.board.log) > before + 100)
        assert vcpu.regs() == still


def test_pauses_while_the_vcpu_comes_to_its_end() -> None:
    """Whoever kicks must not signal a thread that is gone."""
    for _ in range(50):
        rig = Rig()
        rig.load("triple")
        rig.start()
        with rig.thread.paused():
            pass
        rig.thread.pause()
        rig.thread.end()
        rig.close()


def test_everything_after_the_close() -> None:
    rig = Rig()
    rig.run("modes")
    rig.close()

    rig.thread.pause()
    assert rig.thread.wait_paused(SECONDS)
    rig.thread.resume()
    rig.thread.end()
    assert rig.thread.join(SECONDS)
    assert rig.thread.cpu_seconds() == 0


def test_thread_started_with_all_signals_blocked_can_be_paused(vm: Rig) -> None:
    vm.answer([1])
    vm.load("user")
    old = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        vm.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
    vm.board.wait_until(lambda: len(vm.board.log) == 2)
    assert not threading.Event().wait(A_MOMENT)  # until it is inside KVM_RUN, where only the signal reaches it

    vm.thread.pause()

    assert vm.thread.wait_paused(SECONDS)


def test_kicks_do_not_reach_python_signal_handlers(vm: Rig) -> None:
    thread = spinning(vm)

    for _ in range(100):
        with thread.paused():
            pass

    assert signal.getsignal(KICK) is signal.SIG_DFL  # Python's own table knows nothing of the C handler


def test_cpu_time_of_a_spinning_guest_grows(vm: Rig) -> None:
    thread = spinning(vm)
    before = thread.cpu_seconds()

    for _ in range(TRIES):
        assert not threading.Event().wait(A_MOMENT)
        if thread.cpu_seconds() > before:
            break

    assert thread.cpu_seconds() > before


def test_segmentation_fault_in_a_device_is_reported() -> None:
    """Faults are not blocked on vCPU threads: faulthandler says where it was."""
    program = """if True:
        import ctypes, faulthandler
        from rig import Rig
        faulthandler.enable()
        vm = Rig()
        vm.board.told = lambda access: ctypes.string_at(0)
        vm.run("halt")
    """
    here = Path(__file__).parent

    result = subprocess.run([sys.executable, "-c", program], cwd=here, capture_output=True, text=True, timeout=60)

    assert result.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in result.stderr
    assert "kvmpy/vcpu.py" in result.stderr
