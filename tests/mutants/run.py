"""Whether the tests see small faults: plants each of a list in a copy of the tree and runs tests.

Run it as `make mutants`. A mutant that its tests do not see has survived: a behaviour that no test
looks at. What a mutant replaces has to be in its file exactly once, so that the list stays current.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.nursery import Nursery

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.json"
RECORDS = "benchmarks/results"
FOLDERS = (
    *(".", "integrations/vllm", "integrations/sglang", "integrations/gateway", "integrations/ray"),
    *("patches", "examples/demo"),
    *("tests", "benchmarks"),
)
MODULES = {
    "vllm": ("torch", "vllm.v1.core.block_pool", "vllm.v1.kv_cache_interface"),
    "sglang": (
        "torch",
        "sglang.srt.mem_cache.allocator.paged",
        "sglang.srt.mem_cache.allocator.token",
        "sglang.srt.mem_cache.memory_pool",
    ),
}
# What a process runs that is forked; the folders of its tree come first, whatever its parent has.
PROGRAM = """
import os, sys
tree, *tests = sys.argv[1:]
sys.dont_write_bytecode = True  # a file may change twice in a second
os.chdir(tree)
sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)
import pytest
options = ["-x", "-q", "-m", "not gpu and not slow", "-p", "no:cacheprovider", "--assert=plain"]
code = int(pytest.main([*options, "-p", "mutants.no_shrinking", *tests]))
sys.stdout.flush()
os._exit(code)
"""
CODES_OF_FAILURE = 1, 2
KILLED, SURVIVED, HUNG, EQUIVALENT = "killed", "survived", "killed by a timeout", "equivalent"


class MutantError(ValueError):
    """The list does not fit the tree; the message names the mutant and what to do."""


@dataclass(frozen=True)
class Mutant:
    """One small fault.

    Attributes:
        name: What it is called.
        file: Where it is planted.
        old: The text that it replaces; it is in the file once.
        new: What takes its place.
        tests: What has to see it: tests that start no server.
        breaks: What goes wrong with it.
        equivalent: Why nothing can see it; then it is not run.
    """

    name: str
    file: str
    old: str
    new: str
    breaks: str
    tests: tuple[str, ...] = ()
    equivalent: str = ""

    @property
    def digest(self) -> str:
        """What tells it from another fault of the same name."""
        text = "\0".join((self.file, self.old, self.new, *self.tests, self.equivalent))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def plant(self, tree: Path) -> None:
        """Write the fault into a copy of the tree.

        Raises:
            MutantError: If what it replaces is not there exactly once.
        """
        path = tree / self.file
        text = path.read_text() if path.is_file() else ""
        if self.old == self.new or text.count(self.old) != 1:
            raise MutantError(
                f"{self.name}: its text is {text.count(self.old)} times in {self.file}, allowed is "
                "once; bring it up to date or take it out"
            )
        path.write_text(text.replace(self.old, self.new))


@dataclass(frozen=True)
class Result:
    """What became of a mutant, and in how many seconds."""

    name: str
    outcome: str
    seconds: float


def read_mutants(paths: Iterable[Path]) -> list[Mutant]:
    """Return the mutants of some files.

    Raises:
        MutantError: If two have one name or plant the same, or one says neither what has to see it
            nor why nothing can.
    """
    entries = [entry for path in paths for entry in tomllib.loads(path.read_text())["mutant"]]
    mutants = [Mutant(**{**entry, "tests": tuple(entry.get("tests", ()))}) for entry in entries]
    names = [mutant.name for mutant in mutants]
    planted: dict[tuple[str, str, str], str] = {}
    for mutant in mutants:
        if names.count(mutant.name) > 1:
            raise MutantError(f"{mutant.name}: two mutants have this name")
        first = planted.setdefault((mutant.file, mutant.old, mutant.new), mutant.name)
        if first != mutant.name:
            raise MutantError(f"{mutant.name}: it plants the same as {first}")
        if bool(mutant.tests) == bool(mutant.equivalent):
            raise MutantError(f"{mutant.name}: name the tests that see it, or say why none can")
    return mutants


@contextmanager
def copied_tree() -> Iterator[Path]:
    """Yield a copy of what git knows, or would know, of the tree."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    )
    with tempfile.TemporaryDirectory(prefix="kvcached-mutants-") as folder:
        for name in filter(None, listed.stdout.split("\0")):
            source, target = ROOT / name, Path(folder, name)
            if source.is_file() and not name.startswith(f"{RECORDS}/"):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
        Path(folder, RECORDS).symlink_to(ROOT / RECORDS)  # large, and read alone
        yield Path(folder)


class Warm:
    """Starts pytest in processes that are forked from one that has imported the engine.

    Attributes:
        said: The end of what the last one said.
    """

    def __init__(self) -> None:
        self.said = ""
        self._lock = Lock()
        self._parents: dict[str, Nursery] = {}

    def run_tests(self, tree: Path, tests: Iterable[str], timeout_seconds: float) -> str:
        """Return whether one of `tests` failed in `tree`: KILLED, SURVIVED or HUNG.

        Raises:
            MutantError: If the tests could not be run at all.
        """
        for engine in ("vllm", "sglang"):
            is_sglang = engine == "sglang"
            chosen = [test for test in tests if test.startswith("tests/sglang/") == is_sglang]
            if chosen:
                outcome = self._run_in_one(engine, tree, chosen, timeout_seconds)
                if outcome != SURVIVED:
                    return outcome
        return SURVIVED

    def _run_in_one(self, engine: str, tree: Path, tests: list[str], timeout_seconds: float) -> str:
        with tempfile.TemporaryFile() as output, self._lock:
            process = self._parent(engine).start(
                ["-c", PROGRAM, str(tree), *tests], environ(tree), output.fileno(), output.fileno()
            )
            said = os.dup(output.fileno())
        with os.fdopen(said, "rb") as text:
            try:
                code = process.wait(timeout_seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return HUNG
            text.seek(0)
            self.said = ending = text.read().decode(errors="replace")[-1500:]
        # 2: a fault at import stops the collection; below 0: it ended by a signal. Otherwise it is
        # the list's fault.
        if code > max(CODES_OF_FAILURE) or "not found: " in ending:
            raise MutantError(f"{tests} could not be run ({code}): {ending}")
        return KILLED if code else SURVIVED

    def _parent(self, engine: str) -> Nursery:
        python = sys.executable if engine == "vllm" else os.environ.get("SGLANG_PYTHON", "")
        if not python:
            raise MutantError("SGLANG_PYTHON names no interpreter; use make mutants")
        if python not in self._parents:
            alone = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # nobody forks threads
            self._parents[python] = Nursery(python, MODULES[engine], environ(ROOT) | alone)
        return self._parents[python]

    def close(self) -> None:
        """End the processes that it forks from."""
        for parent in self._parents.values():
            parent.close()


def environ(tree: Path) -> dict[str, str]:
    """Return the environment of processes that run what is in `tree`."""
    paths = os.pathsep.join(str(tree / folder) for folder in FOLDERS)
    return {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": paths}


def run(
    warm: Warm, original: Path, mutants: list[Mutant], num_at_a_time: int, timeout_seconds: float
) -> Iterator[Result]:
    """Yield what becomes of each mutant; each of those that run at a time has its own tree."""
    with ThreadPoolExecutor(num_at_a_time) as pool:
        free: SimpleQueue[Path] = SimpleQueue()
        for number in range(num_at_a_time):
            copied = original.parent / f"{original.name}-{number}"
            free.put(Path(shutil.copytree(original, copied, symlinks=True)))

        def one(mutant: Mutant) -> Result:
            if mutant.equivalent:
                return Result(mutant.name, EQUIVALENT, 0.0)
            tree, start = free.get(), time.monotonic()
            try:
                mutant.plant(tree)
                outcome = warm.run_tests(tree, mutant.tests, timeout_seconds)
            finally:
                shutil.copyfile(original / mutant.file, tree / mutant.file)
                free.put(tree)
            return Result(mutant.name, outcome, round(time.monotonic() - start, 1))

        try:
            yield from pool.map(one, mutants)
        finally:
            while not free.empty():
                shutil.rmtree(free.get())


def now() -> dict[str, str]:
    """Return the date and the commit of the tree, marked if it differs from that."""
    words = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    said = subprocess.run(words, cwd=ROOT, capture_output=True, check=True, text=True)
    return {"date": datetime.now(UTC).date().isoformat(), "commit": said.stdout.strip()}


def known_results(mutants: list[Mutant]) -> dict[str, dict[str, object]]:
    """Return what is known of mutants, by their names: of none that has changed since."""
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    found = {(entry["name"], entry["digest"]): entry for entry in before}
    known = {mutant.name: found.get((mutant.name, mutant.digest)) for mutant in mutants}
    return {name: entry for name, entry in known.items() if entry is not None}


def write_results(results: list[Result], mutants: list[Mutant], when: dict[str, str]) -> None:
    """Write what became of `results`, and when; what is known of others of the list stays."""
    known = known_results(mutants)
    known |= {result.name: {**asdict(result), **when} for result in results}
    report = [
        {
            **known[mutant.name],
            "digest": mutant.digest,
            "file": mutant.file,
            "breaks": mutant.breaks,
        }
        for mutant in mutants
        if mutant.name in known
    ]
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")


def main() -> int:
    """Run the mutants; return 1 if one survived."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="only mutants whose name holds one of these")
    parser.add_argument("--at-a-time", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one mutant")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args()
    mutants = read_mutants(sorted(HERE.glob("*.toml")))
    chosen = [
        mutant
        for mutant in mutants
        if not options.names or any(name in mutant.name for name in options.names)
    ]
    when = now()
    with closing(Warm()) as warm, copied_tree() as original:
        for mutant in chosen:  # all of the list is looked at before the first one is run
            mutant.plant(original)
            shutil.copyfile(ROOT / mutant.file, original / mutant.file)
        every = sorted({test for mutant in chosen for test in mutant.tests})
        if warm.run_tests(original, every, 10 * options.timeout) != SURVIVED:
            raise MutantError(f"the tests fail without a fault, so they show none: {warm.said}")
        results = []
        for result in run(warm, original, chosen, options.at_a_time, options.timeout):
            results.append(result)
            print(f"{result.outcome:20} {result.seconds:6.1f} s  {result.name}", flush=True)
    if options.write:
        write_results(results, mutants, when)
    if unknown := len(mutants) - len(known_results(mutants)):
        print(f"of {unknown} mutants of the list {RESULTS.name} says nothing as they are now")
    survived = [result.name for result in results if result.outcome == SURVIVED]
    print(f"{len(results)} mutants, {len(survived)} survived: {', '.join(survived) or 'none'}")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
