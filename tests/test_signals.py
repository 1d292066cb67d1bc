"""Ctrl-C and SIGTERM: heard in every phase, with the status of a shell; what is computed is kept, no save is torn."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from metarec_jax import signals
from metarec_jax.signals import StopSignal
from metarec_jax.training.checkpoints.checkpoint import saved_metrics

BOTH = [signal.SIGINT, signal.SIGTERM]
# A shell's background job ignores SIGINT, and so would its children.
HEARS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
COMMAND = """
import sys, threading
import jax
from metarec_jax import cli, signals
endless = jax.jit(lambda x: jax.lax.while_loop(lambda x: x > 0, lambda x: jax.numpy.sin(x) + 2, x)).lower(1.0).compile()

def command(args):
{body}

cli._command = command
cli.run()
"""
METAREC = "from metarec_jax.cli import run; run()"


def as_command(body: str) -> str:
    """A program that runs these lines as the command line runs a command; ``endless(1.0)`` never ends."""
    return COMMAND.format(body=textwrap.indent(textwrap.dedent(body), "    "))


class Child:
    """A program in a process of its own; stdout and stderr are one stream of lines."""

    def __init__(self, program: str, *arguments: str, **variables: str) -> None:
        command = [sys.executable, "-c", HEARS + textwrap.dedent(program), *map(str, arguments)]
        flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
        env = os.environ | {"XLA_FLAGS": flags, "PYTHONUNBUFFERED": "1", "METAREC_COMPILE_CACHE_DIR": "off"} | variables
        self.process = subprocess.Popen(
            command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.lines: list[str] = []

    def wait_for(self, *words: str) -> str:
        """Read up to the first line with one of the words in it."""
        for line in self.process.stdout:
            self.lines.append(line)
            if any(word in line for word in words):
                return line
        raise AssertionError(f"no line with {words} in:\n{''.join(self.lines)}")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def ended(self) -> tuple[int, str]:
        """The status, and all that was printed."""
        rest = self.process.communicate(timeout=120)[0]
        return self.process.returncode, "".join(self.lines) + rest


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_during_a_computation_that_never_ends(number):
    """The main thread waits in XLA, where Python runs no handler."""
    program = """
        signals.keep("the first half is kept")
        print("begun")
        jax.block_until_ready(endless(1.0))
    """
    child = Child(as_command(program))
    child.wait_for("begun")
    child.signal(number)
    status, text = child.ended()
    assert status == 128 + number
    assert text.splitlines()[-1] == f"{number.name}: ended; the first half is kept"
    assert "Traceback" not in text


def test_a_save_is_waited_for(tmp_path):
    """Another thread saves while the main one computes for ever: the program ends when the save has, and says so."""
    program = """
        def save():
            with signals.saving("the state"):
                print("begun")
                sys.stdin.readline()
                open(sys.argv[1], "w").write("whole")

        threading.Thread(target=save).start()
        jax.block_until_ready(endless(1.0))
    """
    child = Child(as_command(program), tmp_path / "state")
    child.wait_for("begun")
    for _ in range(2):  # asking twice does not tear it
        child.signal(signal.SIGTERM)
    child.wait_for("SIGTERM: the state is being written; the program ends when that is done")
    assert child.process.poll() is None
    child.process.stdin.write("\n")
    child.process.stdin.flush()
    assert child.ended()[0] == 143
    assert (tmp_path / "state").read_text() == "whole"


def test_what_the_main_thread_saves_is_saved_before_it_is_interrupted():
    done = []
    before = [signal.getsignal(number) for number in BOTH]

    def save():
        with signals.saving("a file"):
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("a file")

    with pytest.raises(signals.Interrupted) as caught, signals.heard():
        save()
    assert done == ["a file"]
    assert caught.value.status == 143
    assert [signal.getsignal(number) for number in BOTH] == before


def test_a_signal_that_is_ignored_stays_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with signals.heard(), StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert not stop
    finally:
        signal.signal(signal.SIGTERM, before)


def test_training_that_has_nothing_to_save_ends_at_once():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop
        with pytest.raises(signals.Interrupted), signals.nothing_to_save():
            raise AssertionError("the signal was there before")
    with StopSignal(), pytest.raises(signals.Interrupted), signals.nothing_to_save():
        os.kill(os.getpid(), signal.SIGTERM)


SMALL = ["--tasks", "8", "--support", "2", "8", "--query", "4", "--size", "2", "--scenarios", "user_cold"]
FIT = ["fit", "synthetic", "--learner", "ridge", *SMALL, "--validate-every", "100000"]


def interrupted(number: int, phase: str, *arguments: object) -> str:
    """Start ``metarec``, signal it at a line that begins a phase, and return what it printed; the status is checked."""
    child = Child(METAREC, *arguments)
    child.wait_for(phase)
    child.signal(number)
    status, text = child.ended()
    assert status == 128 + number, text
    assert "Traceback" not in text
    return text


@pytest.mark.slow
def test_training_is_saved_at_the_step(tmp_path):
    """Ctrl-C does not let ``fit && next`` go on: 130, not 0. The step it stops at is none that is saved anyway."""
    arguments = [*FIT, "--steps", "1000000", "--save-every", "999999", "--no-evaluate", "--out", tmp_path]
    text = interrupted(signal.SIGINT, "compiled in", *arguments)
    [line] = [line for line in text.splitlines() if line.startswith("SIGINT: saved at step ")]
    assert saved_metrics(tmp_path, which="latest")[0] == int(line.split()[4])


@pytest.mark.slow
def test_each_phase_of_fit_ends_and_what_was_computed_is_kept(tmp_path):
    """The same command again and again, each time ended in a later phase, and at last not."""
    command = [*FIT, "--steps", "20", "--out", tmp_path]
    kept = f"the training is kept in {tmp_path}"
    assert "SIGTERM: ended; nothing was trained yet" in interrupted(signal.SIGTERM, "reading", *command)
    assert "SIGINT: ended; nothing was trained yet" in interrupted(signal.SIGINT, "compiling", *command)
    assert kept in interrupted(signal.SIGTERM, "tuning the baselines", *command)
    text = interrupted(signal.SIGINT, "evaluating", *command)
    assert "finished already" in text
    assert kept in text
    text = interrupted(signal.SIGTERM, "writing the report", *command)
    assert "from an earlier run" in text  # what tuning found
    assert kept in text
    child = Child(METAREC, *command)
    status, text = child.ended()
    assert status == 0, text
    assert (tmp_path / "report.html").is_file()


@pytest.mark.slow
def test_compare_keeps_its_cells_and_the_training_under_way(tmp_path):
    """Ended in a baseline, then in training: the cells are kept, and the state of the training is saved."""
    options = ["--steps", "200000", "--save-every", "999999", "--validate-every", "100000"]
    options += ["--learners", "ridge", "--baselines", "bias"]
    command = ["compare", "synthetic", *SMALL, *options, "--out", tmp_path]
    assert "cells are kept in" in interrupted(signal.SIGINT, ": bias", *command)
    text = interrupted(signal.SIGTERM, "  step ", *command)
    assert "cells are already measured" in text
    [line] = [line for line in text.splitlines() if "SIGTERM: saved at step " in line]
    [training] = (tmp_path / "cells").glob("*.training")
    assert saved_metrics(training, which="latest")[0] == int(line.split()[4].rstrip(";"))


@pytest.fixture
def sigint_is_heard():
    """Also where pytest itself is a shell's background job."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("sigint_is_heard")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_sets_the_flag_and_the_handler_comes_back(number):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.name == number.name
    assert signal.getsignal(number) is before


@pytest.mark.usefixtures("sigint_is_heard")
def test_a_second_interrupt_interrupts():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_off_the_main_thread_it_does_nothing():
    seen = []

    def work():
        with StopSignal() as stop:
            seen.append(bool(stop))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
    assert signal.getsignal(signal.SIGINT) is before
