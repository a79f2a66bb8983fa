"""Commands of `vql` as processes that are killed (-9) and started again, as a scheduler or Kubernetes would."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tests.jobs.processes import kill

# The store was away: whoever started the command starts it again.
STORE_AWAY = 5
TRIES = 20
COMMAND_WAIT_S = 600.0
BEGIN_WAIT_S, TERM_WAIT_S = 180.0, 120.0
LOOK_S = 0.1


@dataclass(kw_only=True)
class Place:
    """Where commands run: a folder for what they print, and their environment. kills: how often each part was."""

    folder: Path
    environment: Mapping[str, str]
    kills: Counter[str] = field(default_factory=Counter)
    _started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, name: str, arguments: Sequence[object]) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "jobs.cli", *map(str, arguments)]
        with self.output(name).open("ab") as out:
            process = subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=out, stderr=out)
        self._started = [each for each in self._started if each.poll() is None] + [process]
        return process

    def kill_all(self) -> None:
        """Whatever still runs."""
        for process in self._started:
            if process.poll() is None:
                kill(process)

    def output(self, name: str) -> Path:
        return self.folder / f"{name}.out"

    def printed(self, name: str) -> int:
        """How many characters it has printed so far."""
        path = self.output(name)
        return len(path.read_text(errors="replace")) if path.exists() else 0

    def said(self, name: str) -> str:
        """The end of what it has printed."""
        return self.output(name).read_text(errors="replace")[-8000:]


@dataclass(kw_only=True)
class Steps:
    """Commands that end. Each may be killed at some moment, and is then given again until it is done."""

    place: Place

    def run(self, *arguments: object) -> str:
        """What the command printed, once it is done; repeated where the store was away."""
        name = _name(arguments)
        for _ in range(TRIES):
            start_s, begun = time.monotonic(), self.place.printed(name)
            process = self.place.start(name, arguments)
            code = process.wait(COMMAND_WAIT_S)
            print(f"{' '.join(map(str, arguments[:3]))}: {code} in {time.monotonic() - start_s:.1f} s")
            if code != STORE_AWAY:
                break
            time.sleep(1.0)
        assert code == 0, f"exit code {code}:\n{self.place.said(name)}"
        return self.place.output(name).read_text(errors="replace")[begun:]

    def kill(self, *arguments: object, when: Callable[[], bool]) -> bool:
        """Start the command, and kill it as soon as `when` is true; False where it has ended by then."""
        name = _name(arguments)
        process = self._until(name, arguments, when)
        if process.poll() is not None:
            return False
        kill(process)
        self.place.kills[name] += 1
        print(f"{name}: killed")
        return True

    @contextmanager
    def beside(self, *arguments: object, when: Callable[[], bool]) -> Iterator[None]:
        """The context is entered while the command runs and `when` is true, and left when the command is done."""
        name = _name(arguments)
        process = self._until(name, arguments, when)
        assert process.poll() is None, f"ended with {process.returncode}:\n{self.place.said(name)}"
        yield
        code = process.wait(COMMAND_WAIT_S)
        assert code in (0, STORE_AWAY), f"exit code {code}:\n{self.place.said(name)}"
        if code == STORE_AWAY:
            self.run(*arguments)

    def _until(self, name: str, arguments: Sequence[object], when: Callable[[], bool]) -> subprocess.Popen[bytes]:
        """The command, when it has ended or `when` is true; begun again where the store was away."""
        for _ in range(TRIES):
            process = self.place.start(name, arguments)
            while process.poll() is None and not when():
                time.sleep(0.005)
            if process.poll() != STORE_AWAY:
                break
        return process

    def run_twice_at_once(self, *arguments: object) -> None:
        """By two operators."""
        name = _name(arguments)
        both = [self.place.start(f"{name}-{n}", arguments) for n in range(2)]
        codes = [each.wait(COMMAND_WAIT_S) for each in both]
        if codes != [0, 0]:
            assert set(codes) <= {0, STORE_AWAY}, f"{codes}: " + "\n".join(
                self.place.said(f"{name}-{n}") for n in range(2)
            )
            self.run(*arguments)


def after(seconds: float) -> Callable[[], bool]:
    """True from so many seconds after now on."""
    until_s = time.monotonic() + seconds
    return lambda: time.monotonic() >= until_s


def _name(arguments: Sequence[object]) -> str:
    return "-".join(str(each) for each in arguments[: 2 if arguments[0] == "release" else 1])


class Killable(Protocol):
    """What a killer may kill. restart: kill -9, and start again. look: start it again if it ended by itself."""

    name: str

    def restart(self, rng: random.Random) -> None: ...

    def look(self) -> None: ...


class Part:
    """A command that runs for ever, until it is ended or killed. ready: what it prints once it can be ended."""

    def __init__(self, name: str, arguments: Sequence[object], place: Place, ready: str) -> None:
        self.name, self._arguments, self._place, self._ready = name, arguments, place, ready
        self._start()

    def restart(self, rng: random.Random) -> None:
        kill(self._process)
        self._start()

    def look(self) -> None:
        code = self._process.poll()
        if code is None:
            return
        # Begun while the store was away, or waited for it in vain: whoever started it starts it again.
        assert code == STORE_AWAY, f"{self.name} ended with {code}:\n{self._place.said(self.name)}"
        self._start()

    def end(self) -> None:
        """In good order, once it has begun; it says so by its exit code."""
        deadline_s = time.monotonic() + BEGIN_WAIT_S
        while self._ready not in self._place.output(self.name).read_text(errors="replace")[self._begun :]:
            assert time.monotonic() < deadline_s, f"{self.name} does not begin:\n{self._place.said(self.name)}"
            self.look()
            time.sleep(LOOK_S)
        self._process.terminate()
        code = self._process.wait(TERM_WAIT_S)
        assert code == 0, f"{self.name} ended with {code}:\n{self._place.said(self.name)}"

    def _start(self) -> None:
        self._begun = self._place.printed(self.name)
        self._process = self._place.start(self.name, self._arguments)


class Killer:
    """Kills a random one of its parts at random moments, from `start` to `end`, and keeps all of them going."""

    def __init__(self, rng: random.Random, pause_s: tuple[float, float], kills: Counter[str]) -> None:
        self.parts: list[Killable] = []
        self._rng, self._pause_s, self._kills = rng, pause_s, kills
        self._turn, self._stop = threading.Lock(), threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="killer")

    def start(self) -> None:
        self._thread.start()

    def add(self, part: Killable) -> None:
        with self._turn:
            self.parts.append(part)

    def leave(self, part: Killable) -> None:
        """From now on it is safe."""
        with self._turn:
            self.parts.remove(part)
        self.check()

    def end(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def check(self) -> None:
        """Raises what a part did that it should not."""
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        due_s = time.monotonic() + self._rng.uniform(*self._pause_s)
        while not self._stop.wait(LOOK_S):
            with self._turn:
                try:
                    for part in self.parts:
                        part.look()
                    if time.monotonic() < due_s or not self.parts:
                        continue
                    victim = self._rng.choice(self.parts)
                    print(f"kill -9 {victim.name}")
                    victim.restart(self._rng)
                    self._kills[victim.name] += 1
                except BaseException as error:
                    self._failure = error
                    return
            due_s = time.monotonic() + self._rng.uniform(*self._pause_s)
